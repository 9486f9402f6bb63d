"""The LoRA factors of flax NNX models in memory: out of a model, and back into it."""

from typing import Any

from flax import nnx

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Adapter
from coremerge_jax.trees.adapters import from_tree, to_tree


def from_nnx(model: nnx.Module, *, name: str | None = None, **options: Any) -> Adapter:
    """Returns the LoRA factors of a model: its variables of type `nnx.LoRAParam`.

    Those of a sharded model stay where they are.

    Args:
        model: any NNX module.
        name: a name for messages and tables.
        **options: the fields of `TreeFormat`; all factors are taken as the model's own unless
            ``whole`` is False. A model of qwix needs the ``alpha`` of its LoraRule.

    Raises:
        FormatError: the model has no LoRA factors, or how they are stored is not clear.
        UnsupportedError: a convolution with groups has factors, whose product is no update of its
            kernel.
    """
    return from_tree(_factors(model), name=name, **{"whole": True, **options})


def update_nnx(model: nnx.Module, adapter: Adapter, **options: Any) -> None:
    """Replaces the LoRA factors of a model by those of an adapter.

    Their rank becomes that of the adapter; `truncate` it first where shapes must not change. A
    model of qwix keeps its rank, which its LoraRule fixes: smaller factors are filled up with
    zeros. New factors are put where those that they replace are on devices.

    Args:
        model: has LoRA factors for the modules of the adapter, and for no others.
        adapter: such as the result of `merge`.
        **options: the fields of `TreeFormat`, as for `from_nnx`.

    Raises:
        MismatchError: the adapter and the model have not the same modules; or a model of qwix has a
            smaller rank.
        UnsupportedError: the adapter is more than low-rank updates; or as for `from_nnx`.
    """
    nnx.update(model, to_tree(adapter, _factors(model), **{"whole": True, **options}))


def _factors(model: nnx.Module) -> nnx.State:
    for path, node in nnx.iter_graph(model):
        grouped = isinstance(node, nnx.Module) and getattr(node, "feature_group_count", 1) != 1
        if grouped and any(isinstance(x, nnx.LoRAParam) for x in vars(node).values()):
            raise UnsupportedError(
                f"module {'.'.join(map(str, path))!r} is a convolution with "
                f"{node.feature_group_count} groups: its factors are no low-rank update of its "
                "kernel; train it without LoRA, or leave it out of the model's LoRA rules"
            )
    return nnx.state(model, nnx.LoRAParam)
