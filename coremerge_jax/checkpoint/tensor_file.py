"""safetensors files, tensor by tensor: neither reading nor writing holds the file in memory.

The format is a header's length (8 bytes, little-endian), the header (JSON, may end in spaces) and
the tensors' bytes without gaps: https://huggingface.co/docs/safetensors
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from coremerge_jax.errors import FormatError

# Names of dtypes in the format, those of NumPy's own first.
_CODES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES = {name: code for code, name in _CODES.items()}

# The longest entry of a tensor in a header, its name aside, at up to this many dimensions.
_MAX_DIMS = 8
_ENTRY = len('"": {"dtype": "BF16", "shape": [], "data_offsets": []}, ') + 22 * (_MAX_DIMS + 2)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read whenever an array is made of it, as by ``np.asarray``.

    Attributes:
        shape: of the array.
        dtype: of the array.
        read: gives the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot become an array without a copy")
        return np.asarray(self.read(), dtype)


class TensorReader:
    """A safetensors file. Only its header is read until a tensor is asked for.

    Args:
        file: the file. It is opened anew by each `opened`, so threads can share the reader.

    Attributes:
        file: the file.
        tensors: shape and dtype of each tensor.

    Raises:
        FormatError: the file is broken, or has a tensor of a dtype that NumPy does not know.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._identity = _identity(file.stat())
        self._start, header = _read_header(file)
        self._offsets = {key: header[key]["data_offsets"][0] for key in sorted(header)}
        self.tensors = {key: self._outline(key, header[key]) for key in self._offsets}

    def _outline(self, key: str, entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        code = entry["dtype"]
        if code not in _CODES:
            raise FormatError(
                f"{self.file}: tensor {key!r} has dtype {code}; expected one of {', '.join(_CODES)}"
            )
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(_CODES[code]))

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Yields a function that reads a tensor, while the context lasts.

        It remembers the last few tensors, for modules that share them.

        Raises:
            FormatError: the file is not what it was when the reader was made.
        """
        with self.file.open("rb") as stream:
            if _identity(os.fstat(stream.fileno())) != self._identity:
                raise FormatError(f"{self.file}: has changed since it was opened; open it again")
            yield functools.lru_cache(maxsize=4)(functools.partial(self._read, stream))

    def _read(self, stream: BinaryIO, key: str) -> np.ndarray:
        # Not mapped into memory: all that is read of a mapped file counts as the program's memory.
        outline = self.tensors[key]
        value = np.empty(outline.shape, outline.dtype)
        try:
            stream.seek(self._start + self._offsets[key])
            size = stream.readinto(value.reshape(-1).view(np.uint8).data)  # type: ignore[attr-defined]
        except OSError as error:
            error.filename = str(self.file)  # a failed read does not say where
            raise
        if size != value.nbytes:
            raise FormatError(f"{self.file}: ends in the middle of tensor {key!r}")
        return value


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes start, and the entry of each tensor."""
    try:
        with safe_open(file, framework="numpy"):  # checks the header, and the size of the file
            pass
    except SafetensorError as error:
        raise FormatError(f"{file}: not a readable safetensors file ({error})") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class TensorWriter:
    """Writes a safetensors file as its tensors come.

    A context manager: the header is written when the context ends without an exception, and the
    file is not valid before.

    Args:
        file: the file to make.
        names: the names of all tensors that will come, in any order; room is reserved for them in
            the header.
        metadata: text by name, for the header.
    """

    def __init__(
        self, file: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._missing = set(names)
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        names_size = sum(len(json.dumps(name)) for name in self._missing)
        size = len(json.dumps(self._header)) + names_size + _ENTRY * len(self._missing)
        self._room = math.ceil(size / 8) * 8  # so that the tensors are aligned in the file
        self._end = 0
        self._stream = file.open("wb", buffering=0)
        self._stream.seek(8 + self._room)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with self._stream:
            if error is None and self._missing:
                raise ValueError(f"tensor {min(self._missing)!r} was announced, but not written")
            if error is None:
                self._write_header()

    def write(self, name: str, value: np.ndarray) -> None:
        """Appends a tensor. Those of wider dtypes must come first, for alignment.

        Raises:
            ValueError: the name is not one of those announced, or has come before; or the tensor
                cannot be written here.
        """
        if name not in self._missing:
            raise ValueError(f"tensor {name!r} was not announced, or is written twice")
        if value.dtype.name not in _NAMES or value.ndim > _MAX_DIMS:
            raise ValueError(f"tensor {name!r}: cannot write {value.dtype} of shape {value.shape}")
        if self._end % value.dtype.itemsize:
            raise ValueError(f"tensor {name!r}: {value.dtype} must come before narrower dtypes")
        self._missing.remove(name)
        self._header[name] = {
            "dtype": _NAMES[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [self._end, self._end + value.nbytes],
        }
        self._end += value.nbytes
        little_endian = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
        self._write(little_endian.reshape(-1).view(np.uint8).data)

    def _write_header(self) -> None:
        header = json.dumps(self._header).encode().ljust(self._room)
        self._stream.seek(0)
        self._write(memoryview(len(header).to_bytes(8, "little") + header))

    def _write(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            error.filename = self._stream.name  # a failed write does not say where
            raise
