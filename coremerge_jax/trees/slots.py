"""The places of an adapter's factors in a tree: what is read there, and what is written."""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, hint
from coremerge_jax.lora import Adapter, Array, Kind, LoRA
from coremerge_jax.trees.arrays import gather_stack, numpy_or_jax, stack
from coremerge_jax.trees.axes import Axes, Shape, lengths


@dataclasses.dataclass(frozen=True)
class Slot:
    """Place of the two factors of a kernel in a tree.

    Attributes:
        paths: module paths of the kernels, in the order of the batch.
        keys: of a and b.
        shapes: of a and b.
        dtypes: of a and b.
        axes: of a and b.
        kind: the kind of module.
        wanted: the rank to write; None for that of the adapter.
    """

    paths: tuple[str, ...]
    keys: tuple[str, str]
    shapes: tuple[Shape, Shape]
    dtypes: tuple[np.dtype, np.dtype]
    axes: Axes
    kind: Kind
    wanted: int | None = None

    @property
    def rank(self) -> int:
        """The length of the rank axes."""
        return self.axes.rank(*self.shapes)[0]

    @property
    def lengths(self) -> tuple[Shape, Shape]:
        """The lengths of the axes of inputs, and of outputs."""
        a, b = self.shapes
        return lengths(self.axes.a, a, "i"), lengths(self.axes.b, b, "o")

    def outline(self) -> dict[str, LoRA]:
        """Returns the modules with shapes and dtypes in place of their factors."""
        pair = map(jax.ShapeDtypeStruct, self.shapes, self.dtypes)
        return jax.eval_shape(partial(self.read, scale=1.0), *pair)

    def read(self, a: Array, b: Array, scale: float | Array) -> dict[str, LoRA]:
        """Returns the modules, given the stored factors."""
        a, b = gather_stack(_single(a), self.axes.a), gather_stack(_single(b), self.axes.b)
        a, b = self.axes.matrices(a, b)
        b = b * _as_dtype(scale, b)
        # Indexing keeps arrays where they are on devices; iterating over them does not.
        shared = len(b) != len(a)  # one b for all
        return {
            path: LoRA(a=a[i], b=b[0 if shared else i], kind=self.kind)
            for i, path in enumerate(self.paths)
        }

    def write(self, modules: Mapping[str, LoRA], scale: float | Array) -> tuple[Array, Array]:
        """Returns the factors to store, given the modules; their ranks are made equal with zeros.

        Raises:
            MismatchError: a module's rank is larger than that of the scale; a factor overflows its
                dtype; or modules that share one b have several.
        """
        loras = [modules[path] for path in self.paths]
        rank = max(lora.rank for lora in loras)
        if self.wanted is not None and rank > self.wanted:
            raise MismatchError(
                f"module {self.paths[0]!r} has rank {rank}, and updates are scaled by alpha / "
                f"{self.wanted}; truncate the adapter, or make the factors anew with this rank "
                f"and say rank={rank}"
            )
        a, b = stack(loras, self.wanted or rank)
        if len(loras) > 1 and not set(self.axes.b) & set("le"):
            self._check_shared(b)
        a, b = self.axes.stored(a, b / _as_dtype(scale, b), *self.shapes)
        first, second = map(_cast, (a, b), self.dtypes, self.keys)
        return first, second

    def _check_shared(self, b: Array) -> None:
        """Refuses different B ``(L, m, r)`` where one is stored for all modules."""
        if isinstance(b, jax.core.Tracer) or not np.array_equal(b, b[:1].repeat(len(b), 0)):
            raise MismatchError(
                f"{self.keys[1]!r} is the b of {len(b)} modules (first: {self.paths[0]!r}), which "
                "have not one b; read the factors as those of one module, with the inputs of all: "
                f"axes {self.axes.a.replace('l', 'i').replace('e', 'i')},{self.axes.b}"
            )


def _cast(x: Array, dtype: np.dtype, key: str) -> Array:
    """Casts a factor to the dtype of its place.

    Raises:
        MismatchError: it overflows.
    """
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    narrower = jnp.finfo(dtype).max < jnp.finfo(x.dtype).max
    if (
        narrower
        and not isinstance(x, jax.core.Tracer)
        and not numpy_or_jax(cast).isfinite(cast).all()
    ):
        raise MismatchError(
            f"{key!r} overflows {dtype}; make the factors anew in bfloat16 or float32"
        )
    return cast


def _single(x: Array) -> Array:
    """Casts to at least float32: scaling is not to round."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _as_dtype(scale: float | Array, x: Array) -> float | Array:
    """Returns a Python number in the dtype of an array, which does not change the array's."""
    return np.asarray(scale, x.dtype) if isinstance(scale, float) else scale


@dataclasses.dataclass(frozen=True)
class Places:
    """Places of a tree's factors, and the number by which its library scales each update.

    Raises:
        FormatError: two of them are of one module.
    """

    slots: Mapping[Slot, float | Array]

    def __post_init__(self) -> None:
        seen: dict[str, Slot] = {}
        for slot in self.slots:
            for path in slot.paths:
                if path in seen:
                    raise FormatError(
                        f"{seen[path].keys[0]!r} and {slot.keys[0]!r} are both of module {path!r}"
                    )
                seen[path] = slot

    def outline(self) -> dict[str, LoRA]:
        """Returns the modules with shapes and dtypes in place of their factors."""
        return {path: lora for slot in self.slots for path, lora in slot.outline().items()}

    def read(self, leaves: Mapping[str, Array]) -> dict[str, LoRA]:
        """Returns the modules, given the arrays of the tree by key."""
        modules: dict[str, LoRA] = {}
        for slot, scale in self.slots.items():
            a, b = (leaves[key] for key in slot.keys)
            modules |= slot.read(a, b, scale)
        return modules

    def write(self, adapter: Adapter) -> dict[str, Array]:
        """Returns the arrays to store by key.

        Raises:
            MismatchError: the adapter has not the modules of the tree, or of other shapes.
        """
        _check_same_modules(adapter.outline, self.outline())
        stored: dict[str, Array] = {}
        for slot, scale in self.slots.items():
            stored |= zip(slot.keys, slot.write(adapter.read(slot.paths), scale), strict=True)
        return stored


def _check_same_modules(adapter: Mapping[str, LoRA], tree: Mapping[str, LoRA]) -> None:
    for missing, there, what in (
        (tree.keys() - adapter.keys(), adapter, "the adapter has no module"),
        (adapter.keys() - tree.keys(), tree, "the tree has no place for module"),
    ):
        if missing:
            first = min(missing)
            raise MismatchError(
                f"{what} {first!r}{hint(first, there)} ({len(missing)} in all); expected the "
                "same modules in both"
            )
    for path, lora in tree.items():
        if adapter[path].shape != lora.shape:
            raise MismatchError(
                f"module {path!r} is {adapter[path].shape} (m, n) in the adapter, and {lora.shape} "
                "in the tree"
            )
