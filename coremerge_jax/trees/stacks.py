"""Trees that hold several adapters in one array, as SkyRL-tx trains and serves them."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.lora import Adapter, Array, widest
from coremerge_jax.trees.adapters import from_tree
from coremerge_jax.trees.paths import Tree, flatten

_PART = re.compile(r"(?P<module>.+)/(?P<part>lora_A|lora_B|lora_scaling|lora_ranks)")
_LAYERS = "_stacked"  # the part of a path below which layers are stacked, too


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The adapters of one module, along `axis`: 1 if layers are stacked along axis 0."""

    module: str
    parts: dict[str, Array]
    axis: int

    @property
    def count(self) -> int:
        return self.parts["lora_A"].shape[self.axis]

    @property
    def ranks(self) -> np.ndarray:
        """The rank of each adapter; that of the array where the tree does not tell."""
        full = np.full(self.count, self.parts["lora_A"].shape[-1])
        told = self.parts.get("lora_ranks")
        if told is None or isinstance(told, jax.core.Tracer):
            return full
        return np.minimum(full, np.asarray(told).reshape(-1, self.count).max(axis=0))

    def factors(self, index: int, rank: int) -> dict[str, Array]:
        """Returns the factors of one adapter, with its scale in b, by key of the layout of nnx."""
        a, b, scale = (
            self.parts[name].take(index, axis=self.axis)
            for name in ("lora_A", "lora_B", "lora_scaling")
        )
        wide = widest(np.dtype(np.float32), b.dtype)  # scaling is not to round
        scale = scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim)).astype(wide)
        return {
            f"{self.module}/lora_a": a[..., :rank],
            f"{self.module}/lora_b": b[..., :rank, :].astype(wide) * scale,
        }


def from_stacks(tree: Tree, *, name: str | None = None) -> list[Adapter]:
    """Returns the adapters that a tree holds in one array per factor, as SkyRL-tx stores them.

    A module has ``lora_A`` ``(adapters, inputs, r)``, ``lora_B`` ``(adapters, r, outputs)``,
    ``lora_scaling`` and ``lora_ranks`` ``(adapters,)``; below ``_stacked``, an axis of layers
    comes first. Other leaves, such as the base model's, are left out, and so is a slot whose rank
    is 0 in all modules. Other stacks of one adapter are read by `from_tree`.

    Args:
        tree: any pytree, such as an `nnx.State`.
        name: a name for messages and tables; a slot's number is put behind it.

    Raises:
        FormatError: there are no such factors, or a module is not whole.
    """
    stacks = _find_stacks(tree)
    counts = {stack.count for stack in stacks}
    if len(counts) != 1:
        raise FormatError(f"modules have {sorted(counts)} adapters; expected as many in each")
    found = []
    for index in range(counts.pop()):
        ranks = {stack.module: int(stack.ranks[index]) for stack in stacks}
        factors = [
            stack.factors(index, ranks[stack.module]) for stack in stacks if ranks[stack.module]
        ]
        if factors:
            leaves = {key: value for part in factors for key, value in part.items()}
            label = f"{name or 'adapter'}-{index}"
            found.append(from_tree(leaves, name=label, layout="nnx"))
    if not found:
        raise FormatError(f"all {len(stacks)} modules have ranks of 0; no slot holds an adapter")
    return found


def _find_stacks(tree: Tree) -> list[_Stack]:
    modules: dict[str, dict[str, Any]] = {}
    for key, leaf in flatten(tree).items():
        if match := _PART.fullmatch(key):
            modules.setdefault(match["module"], {})[match["part"]] = leaf
    if not modules:
        raise FormatError("no stacks of adapters in the tree; expected keys like 'x/lora_A'")
    return [_stack(module, parts) for module, parts in modules.items()]


def _stack(module: str, parts: dict[str, Any]) -> _Stack:
    missing = {"lora_A", "lora_B", "lora_scaling"} - parts.keys()
    if missing:
        raise FormatError(f"{module!r} has no {min(missing)}; expected the factors and their scale")
    pieces = module.split("/")
    axis = int(_LAYERS in pieces)
    shapes = {part: tuple(leaf.shape) for part, leaf in parts.items()}
    lengths = {shape[axis] for shape in shapes.values() if len(shape) > axis}
    fits = len(shapes["lora_A"]) == len(shapes["lora_B"]) >= axis + 3
    if len(lengths) != 1 or not fits or len(shapes["lora_scaling"]) != axis + 1:
        layers = "layers, " * axis
        raise FormatError(
            f"{module!r} has {', '.join(f'{part} {shape}' for part, shape in shapes.items())}; "
            f"expected lora_A ({layers}adapters, inputs, r), lora_B ({layers}adapters, r, outputs) "
            f"and lora_scaling ({layers}adapters)"
        )
    return _Stack("/".join(x for x in pieces if x != _LAYERS), parts, axis)
