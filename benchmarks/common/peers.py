"""The contenders: each prepares a merge of adapters by a rule, and returns the call to time.

Factors are NumPy float32 arrays in memory, before and after.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import coremerge_jax as cm
from common import paper
from coremerge_jax.rules import Rule

RULES: dict[str, Rule] = {
    "ta": cm.task_arithmetic(),
    "ties": cm.ties(density=paper.DENSITY),
    "tsv": cm.tsv(),
    "cart": cm.cart(rank=paper.SHARE),
    "iso-c": cm.chain(cm.task_arithmetic(), cm.isotropize()),
    "tsv+iso-c": cm.chain(cm.tsv(), cm.isotropize()),
}
PEFT_RULES = {"ta": "svd", "ties": "ties_svd"}

Merged = Mapping[str, Any]  # by module path: a LoRA, or dense where the method is
Call = Callable[[], Merged]


class Contender(NamedTuple):
    """A way to merge.

    Attributes:
        title: for the table.
        prepare: makes the call to time, from the rule's name and the adapters.
        compiles: whether the first call compiles, and is to be timed apart.
        needs: the module that must be installed.
        same: rules for which the merged updates are, by definition, those of `cm.merge`.
    """

    title: str
    prepare: Callable[[str, Sequence[cm.Adapter]], Call]
    compiles: bool = False
    needs: str = "jax"
    same: frozenset[str] = frozenset(RULES)

    @property
    def installed(self) -> bool:
        """Returns whether it can run here."""
        return importlib.util.find_spec(self.needs) is not None


def ours(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares this library."""
    return lambda: cm.merge(adapters, RULES[rule], scale=1.0)


def torch_core(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares the paper's algorithm, one module after another."""
    return _in_torch("core", rule, adapters, "float64")


def torch_full(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares full space: the rule on dense updates."""
    return _in_torch("full", rule, adapters, "float32")


def torch_knots(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares KnOTS space, from dense updates."""
    return _in_torch("knots", rule, adapters, "float32")


def _in_torch(space: str, rule: str, adapters: Sequence[cm.Adapter], dtype: str) -> Call:
    import torch

    def result(x: Any) -> np.ndarray:
        return x.to(torch.float32).numpy()

    def merge_module(path: str) -> Any:
        loras = [adapter[path] for adapter in adapters]
        a = torch.concatenate([torch.from_numpy(lora.a) for lora in loras])
        b = torch.concatenate([torch.from_numpy(lora.b) for lora in loras], dim=1)
        a, b = (x.to(getattr(torch, dtype)) for x in (a, b))
        merged = paper.SPACES[space](torch, rule, a, b, len(loras))
        if space == "core":
            return cm.LoRA(a=result(merged[0]), b=result(merged[1]))
        return result(merged)

    return lambda: {path: merge_module(path) for path in adapters[0]}


def naive_jax(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares the paper's algorithm with `jax.numpy.linalg.svd`, a batch for each shape."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path, lora in adapters[0].items():
        groups.setdefault(lora.shape, []).append(path)

    @jax.jit
    @jax.vmap
    def merge_module(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = a.astype(jnp.float64), b.astype(jnp.float64)
        a, b = paper.core(jnp, rule, a, b, len(adapters))
        return a.astype(jnp.float32), b.astype(jnp.float32)

    def call() -> Merged:
        merged: dict[str, cm.LoRA] = {}
        with jax.enable_x64(True):
            for paths in groups.values():
                a = np.stack([np.concatenate([x[path].a for x in adapters]) for path in paths])
                b = np.stack([np.concatenate([x[path].b for x in adapters], 1) for path in paths])
                a, b = map(np.asarray, merge_module(a, b))
                merged |= {path: cm.LoRA(a[i], b[i]) for i, path in enumerate(paths)}
        return merged

    return call


def peft_merge(rule: str, adapters: Sequence[cm.Adapter]) -> Call:
    """Prepares ``add_weighted_adapter`` of peft on a model of only these modules."""
    model, layers = _peft_model(adapters)
    names = [f"task{t}" for t in range(len(adapters))]

    def call() -> Merged:
        with _quiet():
            if "merged" in model.peft_config:
                model.delete_adapter("merged")
            model.add_weighted_adapter(
                names,
                [1.0] * len(names),
                "merged",
                combination_type=PEFT_RULES[rule],
                svd_rank=sum(next(iter(adapter.values())).rank for adapter in adapters),
                svd_full_matrices=False,
                density=paper.DENSITY,
            )
        return {
            path: cm.LoRA(
                a=layer.lora_A["merged"].weight.detach().numpy(),
                b=layer.lora_B["merged"].weight.detach().numpy() * layer.scaling["merged"],
            )
            for path, layer in layers.items()
        }

    return call


def _peft_model(adapters: Sequence[cm.Adapter]) -> tuple[Any, dict[str, Any]]:
    """Returns a model of linear layers with these adapters, and its layers by module path."""
    import torch

    with _quiet():
        import peft

        shapes = {path: lora.shape for path, lora in adapters[0].items()}
        base = torch.nn.ModuleList(torch.nn.Linear(n, m, bias=False) for m, n in shapes.values())
        targets = [str(i) for i in range(len(shapes))]
        model = None
        for t, adapter in enumerate(adapters):
            rank = next(iter(adapter.values())).rank
            config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
            if model is None:
                model = peft.PeftModel(base, config, adapter_name="task0")
            else:
                model.add_adapter(f"task{t}", config)
    assert model is not None
    linear: Any = model.base_model.model
    layers = dict(zip(shapes, linear, strict=True))
    with torch.no_grad():
        for path, layer in layers.items():
            for t, adapter in enumerate(adapters):
                layer.lora_A[f"task{t}"].weight.copy_(torch.from_numpy(adapter[path].a))
                layer.lora_B[f"task{t}"].weight.copy_(torch.from_numpy(adapter[path].b))
    return model.base_model, layers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CONTENDERS: dict[str, Contender] = {
    "ours": Contender("coremerge_jax", ours, compiles=True),
    "torch": Contender("paper, PyTorch float64", torch_core, needs="torch"),
    "jax": Contender("paper, naive JAX float64", naive_jax, compiles=True),
    "peft": Contender(
        "peft add_weighted_adapter", peft_merge, needs="peft", same=frozenset({"ta"})
    ),
    "full": Contender(
        "full space, PyTorch float32", torch_full, needs="torch", same=frozenset({"ta", "tsv"})
    ),
    "knots": Contender(
        "KnOTS space, PyTorch float32", torch_knots, needs="torch", same=frozenset({"ta"})
    ),
}


def relative_error(x: cm.LoRA | np.ndarray, expected: cm.LoRA) -> float:
    """Returns the Frobenius norm of the difference of two updates, relative to the second."""
    if isinstance(x, np.ndarray):
        dense = np.asarray(expected.dense(), np.float64)
        return float(np.linalg.norm(x - dense) / np.linalg.norm(dense))
    a = np.concatenate([x.a, expected.a]).astype(np.float64)
    b = np.concatenate([x.b, -np.asarray(expected.b)], axis=1).astype(np.float64)
    # ‖b a‖ = ‖R_b R_aᵀ‖ with the triangular factors of b and aᵀ.
    left, right = np.linalg.qr(b).R, np.linalg.qr(a.T).R
    own = x.a.shape[0]
    difference, size = left @ right.T, left[:, own:] @ right[:, own:].T
    return float(np.linalg.norm(difference) / np.linalg.norm(size))
