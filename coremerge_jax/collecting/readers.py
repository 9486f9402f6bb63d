"""Models that read inputs with an adapter: where its factors go, and which weights see inputs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coremerge_jax.collecting.products import Weight
from coremerge_jax.errors import FormatError, MismatchError, hint
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.trees.adapters import TreeFormat
from coremerge_jax.trees.arrays import place_like, stack
from coremerge_jax.trees.fold import fold_tree
from coremerge_jax.trees.kernels import Kernel, find_kernels
from coremerge_jax.trees.layouts import LAYOUTS
from coremerge_jax.trees.paths import Leaf, Tree, flatten, map_leaves
from coremerge_jax.trees.slots import Places

Forward = Callable[[Any, Any], Any]


def as_tree(model: Any, forward: Forward) -> tuple[Tree, Forward]:
    """Returns the parameters of a model, and its forward pass as a function of these."""
    if not isinstance(model, nnx.Module):
        return model, forward
    graph, state = nnx.split(model)
    return state, lambda state, batch: forward(nnx.merge(graph, state), batch)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A model that computes updates by LoRA factors of its own.

    Attributes:
        places: of the factors.
        rank: the largest of any adapter. All are given it, so that one program runs them all.
    """

    places: Places
    rank: int

    def weights(self, paths: Sequence[str], full: Callable[[str], bool]) -> list[Weight]:
        """Returns the weights that see the inputs of modules: the factors A."""
        wanted = set(paths)
        found = []
        for slot in self.places.slots:
            there = tuple(path if path in wanted else None for path in slot.paths)
            if any(there):
                sizes = any(full(path) for path in there if path is not None)
                found.append(Weight(slot.keys[0], slot.axes.a, there, sizes))
        return found

    def insert(self, tree: Tree, adapter: Adapter | None) -> Tree:
        """Returns the parameters with an adapter; None for the base model alone.

        Modules that the adapter does not have are those of the base model.
        """
        stored = self.places.write(self._completed(adapter))

        def put(key: str, leaf: Leaf) -> Leaf:
            return place_like(stored[key], leaf) if key in stored else leaf

        return map_leaves(put, tree)

    def _completed(self, adapter: Adapter | None) -> Adapter:
        modules = {}
        for path, lora in self.places.outline().items():
            m, n = lora.shape
            mine = LoRA(a=np.zeros((0, n), np.float32), b=np.zeros((m, 0), np.float32))
            if adapter is not None and path in adapter:
                mine = adapter[path]
            a, b = stack([mine], self.rank)
            modules[path] = LoRA(a=a[0], b=b[0], kind=lora.kind)
        return Adapter(modules)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A model without LoRA factors, into whose kernels updates are folded.

    Attributes:
        kernels: those of all adapters, by key.
        options: of `fold_tree`.
    """

    kernels: Mapping[str, Kernel]
    options: Mapping[str, Any]

    def weights(self, paths: Sequence[str], full: Callable[[str], bool]) -> list[Weight]:
        """Returns the weights that see the inputs of modules: the kernels."""
        wanted = set(paths)
        found = []
        for kernel in self.kernels.values():
            mine = {place: path for path, place in kernel.modules.items() if path in wanted}
            if mine:
                there = tuple(mine.get(place) for place in range(math.prod(kernel.sizes("l"))))
                sizes = any(map(full, mine.values()))
                found.append(Weight(kernel.key, kernel.axes, there, sizes))
        return found

    def insert(self, tree: Tree, adapter: Adapter | None) -> Tree:
        """Returns the parameters with an adapter; None for the base model alone."""
        return tree if adapter is None else fold_tree(tree, adapter, **self.options)


Reader = Factors | Kernels


def find_reader(
    tree: Tree, every: Adapter, rank: int, options: Mapping[str, Any], *, whole: bool
) -> Reader:
    """Finds the places of adapters in a model.

    Args:
        tree: the parameters of the model.
        every: all modules of all adapters.
        rank: the largest of any adapter.
        options: the fields of `TreeFormat`; of a model without factors, options of `fold_tree`.
        whole: the default of the field of that name.

    Raises:
        MismatchError: a module has no place in the model.
        FormatError: how factors or kernels are stored is not clear.
    """
    leaves = flatten(tree)
    if not any(layout.match(key) for layout in LAYOUTS.values() for key in leaves):
        unknown = set(options) - {"scan_axis", "axes"}
        if unknown:
            raise FormatError(
                f"{min(unknown)} is about LoRA factors, and the model has none; leave it out"
            )
        return Kernels(find_kernels(leaves, every, **options), dict(options))
    form = TreeFormat(**{"whole": whole, **options})
    layout, factors, _ = form.sort(leaves)
    mine = {key: leaves[key] for key in factors}
    places = dataclasses.replace(form, layout=layout.name, ignore=()).places(mine)
    _check_modules(every, places.outline())
    return Factors(places, rank)


def _check_modules(every: Adapter, there: Mapping[str, LoRA]) -> None:
    missing = [path for path in every if path not in there]
    if missing:
        raise MismatchError(
            f"the model has no LoRA factors for module {missing[0]!r}{hint(missing[0], there)} "
            f"({len(missing)} of {len(every)} in all); are the adapters of this model, and their "
            "names its own (trees.translate)?"
        )
    for path, lora in every.items():
        if lora.shape != there[path].shape:
            raise MismatchError(
                f"module {path!r} is {lora.shape} (m, n) in the adapters, and {there[path].shape} "
                "in the model; are the adapters of this model?"
            )


def on_device(tree: Tree) -> Tree:
    """Puts what is on the host on the default device, once for all batches."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)
