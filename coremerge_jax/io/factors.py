"""Low-rank updates in safetensors files: places of the factors, and adapters that are read late."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError
from coremerge_jax.io.tensors import LazyTensor, TensorFiles, TensorReader
from coremerge_jax.lora import AdapterFile, Kind, LoRA, Metadata, Shape

Read = Callable[[str], np.ndarray]
Factors = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FactorSource:
    """Place and form of one module in the tensors of a file.

    Attributes:
        file: the file, for messages.
        path: the module's path in the file.
        outline: the module, with shapes in place of its factors.
        keys: names of the tensors.
        factors: function from the tensors to A and B.
        scale: factor of B.
    """

    file: Path
    path: str
    outline: LoRA
    keys: tuple[str, ...]
    factors: Callable[..., Factors]
    scale: float

    def read(self, tensor: Read) -> LoRA:
        """Returns the module in memory.

        Raises:
            FormatError: it has values that are not finite.
        """
        a, b = self.factors(*map(tensor, self.keys))
        a, b = to_float32(a), to_float32(b, self.scale)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            for key in self.keys:
                check_finite(self.file, key, tensor(key))
            raise FormatError(
                f"{self.file}: module {self.path!r}: B times the scaling {self.scale:g} (or a "
                "value of a wider dtype) overflows float32"
            )
        return dataclasses.replace(self.outline, a=a, b=b)


class FactorFile(AdapterFile):
    """An adapter whose factors are still in a safetensors file. Threads can share it.

    Args:
        reader: the file.
        sources: source of each module, by its path.
        metadata: origin of the adapter.
        extras: tensors that are not low-rank updates, by name.
    """

    def __init__(
        self,
        reader: TensorReader | TensorFiles,
        sources: Mapping[str, FactorSource],
        metadata: Metadata,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        outlines = {path: source.outline for path, source in sources.items()}
        super().__init__(outlines, metadata=metadata, extras=extras)
        self._reader, self._sources = reader, sources

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the file."""
        return (self._reader.file.parent,)

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths, by one opening of the file.

        Modules that share tensors (experts of one parameter) read them once if asked for in a row.

        Raises:
            FormatError: a module has values that are not finite, or the file has changed.
        """
        with self._reader.opened() as tensor:
            return {path: self._sources[path].read(tensor) for path in paths}


def outline_of(rank: int, m: int, n: int, kind: Kind) -> LoRA:
    """Returns a module of these sizes, with shapes in place of its factors."""
    a: Any = Shape((rank, n), np.dtype(np.float32))
    b: Any = Shape((m, rank), np.dtype(np.float32))
    return LoRA(a, b, kind)


def open_extra(reader: TensorReader | TensorFiles, key: str, scale: float = 1.0) -> LazyTensor:
    """Returns a tensor that is not a factor, times a scale; floats become float32."""
    tensor = reader.tensors[key]
    dtype = np.dtype(np.float32) if is_float(tensor.dtype) else tensor.dtype
    return LazyTensor(tensor.shape, dtype, partial(_read_extra, reader, key, scale))


def _read_extra(
    reader: TensorReader | TensorFiles, key: str, scale: float, start: int, stop: int
) -> np.ndarray:
    value = reader.read_part(key, start, stop)
    if not is_float(value.dtype):
        return value
    check_finite(reader.file, key, value)
    result = to_float32(value, scale)
    if not np.isfinite(result).all():
        raise FormatError(f"{reader.file}: tensor {key!r} overflows float32")
    return result


def check_finite(file: Path, key: str, value: np.ndarray) -> None:
    """Raises `FormatError` if a tensor has values that are not finite."""
    if not np.isfinite(value).all():
        raise FormatError(f"{file}: tensor {key!r} has NaN or infinite values")


def is_float(dtype: np.dtype) -> bool:
    """Returns True for a dtype of weights, False for whole numbers and truth values."""
    return not np.issubdtype(dtype, np.integer) and dtype != np.bool_


def to_float32(value: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Returns the value times the scale in float32, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        if scale == 1.0:
            return value.astype(np.float32, copy=False)
        if value.dtype == np.float64 or float(np.float32(scale)) != scale:
            return (value.astype(np.float64) * scale).astype(np.float32)
        scaled = value.astype(np.float32)
        scaled *= np.float32(scale)
        return scaled
