"""The LoRA factors of flax NNX models in memory: out of a model, and back into it."""

from typing import Any

from flax import nnx

from coremerge_jax.lora import Adapter
from coremerge_jax.trees.adapters import from_tree, to_tree


def from_nnx(model: nnx.Module, *, name: str | None = None, **options: Any) -> Adapter:
    """Returns the LoRA factors of a model: its variables of type `nnx.LoRAParam`.

    Those of a sharded model stay where they are.

    Args:
        model: any NNX module.
        name: a name for messages and tables.
        **options: the fields of `TreeFormat`. A model of qwix needs the ``alpha`` of its LoraRule.

    Raises:
        FormatError: the model has no LoRA factors, or how they are stored is not clear.
    """
    return from_tree(nnx.state(model, nnx.LoRAParam), name=name, **options)


def update_nnx(model: nnx.Module, adapter: Adapter, **options: Any) -> None:
    """Replaces the LoRA factors of a model by those of an adapter.

    Their rank becomes that of the adapter; `truncate` it first where shapes must not change. A
    model of qwix keeps its rank, which its LoraRule fixes: smaller factors are filled up with
    zeros. New factors are put where those that they replace are on devices.

    Args:
        model: has LoRA factors for the modules of the adapter, and for no others.
        adapter: such as the result of `merge`.
        **options: the fields of `TreeFormat`. For a model of qwix, the ``alpha`` of its LoraRule.

    Raises:
        MismatchError: the adapter and the model have not the same modules; or a model of qwix has a
            smaller rank.
    """
    nnx.update(model, to_tree(adapter, nnx.state(model, nnx.LoRAParam), **options))
