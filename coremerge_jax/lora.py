"""LoRA and Adapter: the two pytrees that every part of the library speaks.

A LoRA update of one module is ``ΔW = b @ a`` with ``a`` of shape ``(r, n)`` and ``b`` of shape
``(m, r)``; any scaling (alpha / r and its variants) is already part of ``b``.

JAX is imported in methods only, so that files are opened and described without it; `pytrees`
makes the two known to it.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from coremerge_jax.errors import FormatError

if TYPE_CHECKING:
    import jax
    from jax.sharding import NamedSharding

    Array = jax.Array | np.ndarray
else:
    Array = Any

# A module's path, the lengths of the axes of its inputs, and of those of its outputs.
Lengths = tuple[str, tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Kind of module that an update belongs to, as far as writing it back needs it.

    Attributes:
        name: ``"linear"``, ``"embedding"``, ``"conv2d"`` or ``"expert"`` (one expert of a fused
            mixture-of-experts parameter, whose path ends in ``[index]``).
        kernel: for ``"conv2d"``, the trailing shape ``(in_channels, height, width)`` of the A
            factor, which is kept flat as ``n = in_channels * height * width``.
        transposed: whether the base weight is stored as ``(n, m)`` (``fan_in_fan_out``).
    """

    name: str = "linear"
    kernel: tuple[int, ...] = ()
    transposed: bool = False


LINEAR = Kind()


def widest(*dtypes: np.dtype) -> np.dtype:
    """Returns the dtype that holds all of these, whatever JAX's promotion and x64 settings."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    import jax
    import jax.numpy as jnp

    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def is_traced(value: object) -> bool:
    """Returns True if a transformation of JAX traces a value; without JAX, none is."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """Returns ‖b a‖ from Gram matrices, on the host: to half the digits where terms cancel."""
    return float(np.sqrt(max(np.sum((b.T @ b) * (a @ a.T)), 0.0)))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape and the dtype of a factor, in its place.

    Attributes:
        shape: of the factor.
        dtype: of the factor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A low-rank update ``ΔW = b @ a`` of one module, scaling included.

    Leading axes, equal in both factors, are batch axes.

    Attributes:
        a: ``(..., r, n)``, acts on the module's input.
        b: ``(..., m, r)``, gives the module's output.
        kind: static description of the module.

    Raises:
        FormatError: the shapes are not those of two factors of one product.
    """

    a: Array
    b: Array
    kind: Kind = dataclasses.field(default=LINEAR, metadata={"static": True})

    def __post_init__(self) -> None:
        # Pytree transformations put other things than matrices (scalars, axes, None) in the leaves.
        a: tuple[int, ...] = getattr(self.a, "shape", ())
        b: tuple[int, ...] = getattr(self.b, "shape", ())
        if len(a) < 2 or len(b) < 2:
            return
        if a[:-2] != b[:-2] or a[-2] != b[-1]:
            raise FormatError(
                f"LoRA factors do not fit: a has shape {a}, b has shape {b}; "
                "expected a: (r, n) and b: (m, r) with the same rank r"
            )

    @property
    def rank(self) -> int:
        """The inner dimension r (an upper bound of the rank of the update)."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``: rows (output) and columns (input) of the update."""
        return self.b.shape[-2], self.a.shape[-1]

    @property
    def dtype(self) -> np.dtype:
        """The common dtype of both factors."""
        return widest(self.a.dtype, self.b.dtype)

    def replace(self, **changes: Any) -> "LoRA":
        """Returns a copy with other ``a``, ``b`` or ``kind``."""
        return dataclasses.replace(self, **changes)

    def dense(self) -> Array:
        """Returns the update ``b @ a``, ``(..., m, n)``; a NumPy array for NumPy factors."""
        a, b = self.a.astype(self.dtype), self.b.astype(self.dtype)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return b @ a
        import jax
        import jax.numpy as jnp

        where = _sharding_of_product(b, a)
        return jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST, out_sharding=where)


def _sharding_of_product(b: Any, a: Any) -> "NamedSharding | None":
    """Returns the sharding of ``b @ a`` if its factors have explicit mesh axes.

    Rows are spread as those of ``b``, and columns as those of ``a``, unless by the same axis.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    rows, columns = (jax.typeof(x).sharding for x in (b, a))
    if not any((*rows.spec, *columns.spec)):
        return None
    taken = {axis for part in rows.spec[:-1] for axis in _axes(part)}
    last = () if taken & set(_axes(columns.spec[-1])) else _axes(columns.spec[-1])
    mesh = (rows if any(rows.spec) else columns).mesh
    return NamedSharding(mesh, PartitionSpec(*rows.spec[:-1], last or None))


def _axes(part: Any) -> tuple:
    """Returns the mesh axes that a dimension is spread over."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Origin of an adapter, and fields that writing one needs.

    Attributes:
        name: a short name for messages and tables (the folder's name).
        base_model: name of the base model, None if unknown.
        task_type: PEFT's task type, None if unknown.
        rank: the source's nominal rank.
        alpha: the source's nominal alpha, before it was folded into ``b``.
        dtype: dtype of the factors in the source's file.
        config: further fields of the source's configuration that its extras need.
        lengths: of modules whose inputs or outputs were several axes in the tree that they are
            from.
        format: name of the format that the source has on disk, one of ``coremerge convert --to``.
        header: fields of the source's file beside its tensors; with their text if they describe the
            model, and an adapter made of this one can have them too, else empty.
        prefix: text before the module paths in the source's keys, if not that of the format.
        beside: files with other trained weights, which belong to the source and are not read.
    """

    name: str | None = None
    base_model: str | None = None
    task_type: str | None = None
    rank: int | None = None
    alpha: float | None = None
    dtype: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    lengths: tuple[Lengths, ...] = ()
    format: str | None = dataclasses.field(default=None, compare=False)
    header: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    prefix: str | None = dataclasses.field(default=None, compare=False)
    beside: tuple[Path, ...] = dataclasses.field(default=(), compare=False)


class Adapter(Mapping[str, LoRA]):
    """An ordered mapping from module path to `LoRA`; a pytree.

    Args:
        modules: the update of each module.
        metadata: origin and what writing the adapter needs.
        extras: tensors of the adapter that are not low-rank updates (full weights of
            ``modules_to_save``, biases, trained token rows), by name.

    Raises:
        FormatError: a module's value is not a `LoRA` of two matrices, or has none of their
            entries; or there is no module.
    """

    def __init__(
        self,
        modules: Mapping[str, LoRA],
        *,
        metadata: Metadata | None = None,
        extras: Mapping[str, Array] | None = None,
    ) -> None:
        self._modules = dict(modules)
        self.metadata = metadata or Metadata()
        self.extras = dict(extras or {})
        if not self._modules:
            raise FormatError(f"{self._label()} has no modules; an adapter needs at least one")
        for path, lora in self._modules.items():
            if not isinstance(lora, LoRA):
                raise FormatError(
                    f"{self._label()}, module {path!r}: expected a LoRA, got {type(lora).__name__}"
                )
            if len(lora.a.shape) != 2 or len(lora.b.shape) != 2:
                raise FormatError(
                    f"{self._label()}, module {path!r}: factors must be matrices, "
                    f"got a: {lora.a.shape}, b: {lora.b.shape}"
                )
            if 0 in (*lora.a.shape, *lora.b.shape):
                raise FormatError(
                    f"{self._label()}, module {path!r}: a: {lora.a.shape}, b: {lora.b.shape} have "
                    "no entries; expected a rank, rows and columns of at least 1; leave it out"
                )

    def _label(self) -> str:
        return f"adapter {self.metadata.name!r}" if self.metadata.name else "adapter"

    def __getitem__(self, path: str) -> LoRA:
        return self._modules[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        name = f"{self.metadata.name!r}, " if self.metadata.name else ""
        ranks = sorted({lora.rank for lora in self.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        return f"Adapter({name}{len(self)} modules, rank {rank})"

    def replace(
        self,
        modules: Mapping[str, LoRA] | None = None,
        metadata: Metadata | None = None,
        extras: Mapping[str, Array] | None = None,
    ) -> "Adapter":
        """Returns a copy with other ``modules``, ``metadata`` or ``extras``."""
        return Adapter(
            self if modules is None else modules,
            metadata=self.metadata if metadata is None else metadata,
            extras=self.extras if extras is None else extras,
        )

    @functools.cached_property
    def outline(self) -> "Adapter":
        """The adapter with shapes and dtypes in place of its factors."""

        def shape(x: Array) -> Any:
            return Shape(x.shape, x.dtype)

        return self.replace(
            modules={
                path: LoRA(a=shape(lora.a), b=shape(lora.b), kind=lora.kind)
                for path, lora in self.items()
            }
        )

    @property
    def in_memory(self) -> bool:
        """True if the factors are arrays in memory, False if they are read when asked for."""
        return True

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that factors are still to be read from: none for an adapter in memory."""
        return ()

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths; an `AdapterFile` reads them all in one go."""
        return {path: self[path] for path in paths}

    def tree_flatten_with_keys(self) -> tuple[tuple, tuple]:
        """Returns the children in the order of the mapping (a plain dict would be sorted)."""
        from jax.tree_util import DictKey as key  # noqa: N813

        modules = tuple((key(path), lora) for path, lora in self._modules.items())
        extras = tuple((key(name), value) for name, value in self.extras.items())
        return modules + extras, (tuple(self._modules), tuple(self.extras), self.metadata)

    @classmethod
    def tree_unflatten(cls, aux: tuple, children: tuple) -> "Adapter":
        """Rebuilds without validation: the leaves may be anything."""
        paths, extras, metadata = aux
        self = object.__new__(cls)
        self._modules = dict(zip(paths, children, strict=False))
        self.extras = dict(zip(extras, children[len(paths) :], strict=True))
        self.metadata = metadata
        return self


class AdapterFile(Adapter):
    """An adapter whose factors are still in a file: made of its outline. Not a pytree.

    Subclasses define `read`.
    """

    @property
    def in_memory(self) -> bool:
        """False: factors are read when they are asked for, and not kept."""
        return False

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths."""
        raise NotImplementedError

    def __getitem__(self, path: str) -> LoRA:
        return self.read([path])[path]

    def __contains__(self, path: object) -> bool:
        return path in self._modules

    def __repr__(self) -> str:
        return repr(self.outline)

    @functools.cached_property
    def outline(self) -> Adapter:
        """The adapter with shapes and dtypes in place of its factors."""
        return Adapter(self._modules, metadata=self.metadata, extras=self.extras)


class AdapterSource(Protocol):
    """An adapter as a merge reads it: an `Adapter`, or an `AdapterFile`.

    Iteration gives the paths of the modules, in order. A merge plans with `outline`, and reads the
    factors of a batch of modules with `read`.

    Attributes:
        metadata: origin, and what writing the adapter needs.
        extras: tensors that are not low-rank updates, by name.
    """

    metadata: Metadata
    extras: dict[str, Array]

    @property
    def outline(self) -> Adapter:
        """The adapter with shapes and dtypes in place of its factors."""

    @property
    def in_memory(self) -> bool:
        """True if the factors are arrays, which may be traced or lie on devices.

        False if they are read from files as NumPy arrays, anew at each access.
        """

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that factors are still to be read from; empty if they are in memory."""

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths."""

    def __getitem__(self, path: str) -> LoRA: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...

    def __contains__(self, path: object, /) -> bool: ...


class ModuleStream(Protocol):
    """An adapter whose modules come in parts: each module once, in any order.

    A `MergeStream` is one. A class that inherits from this one needs `outline` and iteration only;
    the rest then describes a stream of one process.
    """

    @property
    def outline(self) -> Adapter:
        """The adapter with shapes and dtypes in place of its factors."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that are read while the stream is iterated over."""
        return ()

    @property
    def processes(self) -> Mapping[int, int]:
        """The number of devices of each process that shares the stream; empty if none does."""
        return {}

    @property
    def spread(self) -> bool:
        """True if the factors are spread over the devices of several processes."""
        return False

    def share(
        self, together: Iterable[Sequence[str]] | None = None
    ) -> "tuple[ModuleStream, dict[str, int]]":
        """Returns the share of this process, and the process of every module by path.

        Args:
            together: the paths of all modules, in lists of those that one process has to do; by
                default, each by itself.
        """
        import jax

        del together
        return self, dict.fromkeys(self.outline, jax.process_index())

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]: ...


# Dtypes of weights that take an update.
FLOATS = ("float64", "float32", "bfloat16", "float16")

# Dtypes of written factors.
DTYPES = ("float32", "bfloat16", "float16")
