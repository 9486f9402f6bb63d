"""safetensors files, read, changed and written tensor by tensor, never whole in memory.

The format is a header's length (8 bytes, little-endian), the header (JSON, may end in spaces) and
the tensors' bytes without gaps: https://huggingface.co/docs/safetensors
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Self

import ml_dtypes  # noqa: F401  # gives NumPy bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io.untrusted import is_regular, parse_json
from coremerge_jax.lora import Shape

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

# Above what files of models have, and what NumPy can hold.
_LONGEST_NAME = 1000
_MOST_DIMS = 32
_LARGEST = 2**48
_COPIED = 16 * 2**20

# The longest entry of a tensor in a header, its name aside, at up to this many dimensions.
_MAX_DIMS = 8

_ENTRY = len('"": {"dtype": "BF16", "shape": [], "data_offsets": []}, ') + 22 * (_MAX_DIMS + 2)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read whenever an array is made of it, as by ``np.asarray``.

    Attributes:
        shape: of the array.
        dtype: of the array.
        read: gives elements of the flat array, from the first of two indices to the second.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray] = dataclasses.field(repr=False, compare=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot become an array without a copy")
        return np.asarray(self.read(0, math.prod(self.shape)), dtype).reshape(self.shape)


class TensorReader:
    """A safetensors file. Only its header is read until a tensor is asked for.

    Args:
        file: the file. It is opened anew by each `opened`, so threads can share the reader.
        strict: whether tensors of dtypes that NumPy does not know are an error.

    Attributes:
        file: the file.
        tensors: shape and dtype of each tensor.
        foreign: the dtype, by its name in the format, of each tensor that NumPy cannot hold.

    Raises:
        FormatError: the file is broken, or has a tensor of a dtype that NumPy does not know.
    """

    def __init__(self, file: Path, *, strict: bool = True) -> None:
        self.file = file
        self._identity = _identity(file.stat())
        self._start, header = _read_header(file)
        self._metadata = header.pop("__metadata__", None)
        self._entries: dict[str, dict[str, Any]] = dict(sorted(header.items()))
        codes = {key: entry["dtype"] for key, entry in self._entries.items()}
        self.foreign = {key: code for key, code in codes.items() if code not in _CODES}
        for key, code in self.foreign.items() if strict else ():
            raise FormatError(
                f"{file}: tensor {key!r} has dtype {code}; expected one of {', '.join(_CODES)}; "
                "others are quantized or packed: save it again in float32 or bfloat16"
            )
        self.tensors = {
            key: Shape(self.shape(key), np.dtype(_CODES[code]))
            for key, code in codes.items()
            if code in _CODES
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The fields of the header beside the tensors."""
        return dict(self._metadata or {})

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns the shape of a tensor of any dtype."""
        return tuple(self._entries[key]["shape"])

    def position(self, key: str, element: int = 0) -> int:
        """Returns the position in the file of an element, by its index in the flat tensor."""
        first: int = self._start + self._entries[key]["data_offsets"][0]
        return first + (element * self.tensors[key].dtype.itemsize if element else 0)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Yields a function that reads a tensor, while the context lasts.

        The last few tensors are kept, for modules that share them.

        Raises:
            FormatError: the file is not what it was when the reader was made.
        """
        with self._stream() as stream:
            yield functools.lru_cache(maxsize=4)(functools.partial(self._read, stream))

    def read_part(self, key: str, start: int, stop: int) -> np.ndarray:
        """Returns elements ``start`` to ``stop`` of the flat tensor.

        Raises:
            FormatError: the file is not what it was when the reader was made.
        """
        with self._stream() as stream:
            return self.read_from(stream, key, start, stop)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        with self.file.open("rb") as stream:
            if _identity(os.fstat(stream.fileno())) != self._identity:
                raise FormatError(f"{self.file}: has changed since it was opened; open it again")
            yield stream

    def _read(self, stream: BinaryIO, key: str) -> np.ndarray:
        shape = self.tensors[key].shape
        return self.read_from(stream, key, 0, math.prod(shape)).reshape(shape)

    def read_from(self, stream: BinaryIO, key: str, start: int, stop: int) -> np.ndarray:
        """Returns elements ``start`` to ``stop`` of the flat tensor, from the opened file.

        Raises:
            FormatError: the file ends before.
            MemoryError: they do not fit into memory.
        """
        # Not mapped into memory: all that is read of a mapped file counts as the program's memory.
        dtype = self.tensors[key].dtype
        try:
            value = np.empty(stop - start, dtype)
        except MemoryError as error:
            size = (stop - start) * dtype.itemsize / 2**30
            raise MemoryError(
                f"{self.file}: {size:.1f} GiB of tensor {key!r} do not fit into memory"
            ) from error
        rest = value.view(np.uint8).data
        try:
            stream.seek(self.position(key, start))
            while size := stream.readinto(rest):  # type: ignore[attr-defined]  # not in BinaryIO
                rest = rest[size:]
        except OSError as error:
            error.filename = str(self.file)  # a failed read does not say where
            raise
        if rest:
            raise FormatError(f"{self.file}: ends in the middle of tensor {key!r}")
        return value

    def check(self) -> None:
        """Checks that the file is still the one that was opened.

        Raises:
            FormatError: it has changed.
        """
        with self._stream():
            pass

    def copy_with(self, file: Path, more: Mapping[str, np.ndarray]) -> None:
        """Copies the file, with more tensors at its end; the others keep order and offsets.

        Raises:
            UnsupportedError: a tensor would not be aligned there, which the format cannot mend.
        """
        header = dict(sorted(self._entries.items(), key=lambda item: item[1]["data_offsets"]))
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for name, value in more.items():
            if end % value.itemsize:
                raise UnsupportedError(
                    f"{self.file}: ends at byte {end} of its tensors, where {value.dtype} tensor "
                    f"{name!r} would not be aligned; save the base again with this tensor in it"
                )
            header[name] = _entry(value, end)
            end += value.nbytes
        if self._metadata is not None:
            header = {"__metadata__": self._metadata, **header}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(math.ceil(len(text) / 8) * 8)
        with self._stream() as source, file.open("wb", buffering=0) as target:
            source.seek(self._start)
            _write(target, len(text).to_bytes(8, "little") + text)
            try:
                shutil.copyfileobj(source, target, _COPIED)
            except OSError as error:
                error.filename = target.name
                raise
            for value in more.values():
                _write(target, _bytes(value))


class TensorFiles:
    """Several safetensors files that are read as one, such as the shards of an adapter.

    Args:
        files: the files.

    Attributes:
        file: the first of them, for messages.
        tensors: shape and dtype of each tensor.

    Raises:
        FormatError: a file is broken, or two have a tensor of one name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        readers = [TensorReader(file) for file in files]
        self.file = files[0]
        self._readers: dict[str, TensorReader] = {}
        for reader in readers:
            for key in reader.tensors:
                if (other := self._readers.setdefault(key, reader)) is not reader:
                    raise FormatError(f"{reader.file}: tensor {key!r} is in {other.file.name}, too")
        self.tensors = {key: self._readers[key].tensors[key] for key in sorted(self._readers)}

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[str], np.ndarray]]:
        """Yields a function that reads a tensor, as `TensorReader.opened` does."""
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Callable[[str], np.ndarray]] = {}

            def read(key: str) -> np.ndarray:
                reader = self._readers[key]
                if reader.file not in opened:
                    opened[reader.file] = stack.enter_context(reader.opened())
                return opened[reader.file](key)

            yield read

    def read_part(self, key: str, start: int, stop: int) -> np.ndarray:
        """Returns elements ``start`` to ``stop`` of the flat tensor."""
        return self._readers[key].read_part(key, start, stop)


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Returns the position where the tensors' bytes start, and the header."""
    if not is_regular(file):
        raise FormatError(f"{file}: no such file")
    try:
        with safe_open(file, framework="numpy"):  # checks the header, and the size of the file
            pass
    except SafetensorError as error:
        raise FormatError(f"{file}: not a readable safetensors file ({error})") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = parse_json(stream.read(size).decode(), f"{file}: header")
    for key, entry in header.items():
        _check_entry(file, key, entry)
    return 8 + size, header


def _check_entry(file: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Refuses what the format allows, but no tensor of a model has."""
    if len(key) > _LONGEST_NAME:
        raise FormatError(f"{file}: tensor {key[:60]!r}… has a name of {len(key)} characters")
    shape = entry.get("shape", ())  # __metadata__ has none
    if key != "__metadata__" and (len(shape) > _MOST_DIMS or any(x > _LARGEST for x in shape)):
        raise FormatError(f"{file}: tensor {key!r} has shape {str(shape)[:60]}; that is too large")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns


class TensorEditor(TensorReader):
    """A safetensors file whose tensors are changed in place, part by part. A context manager.

    `tensors` are in the order of the file here, and those of foreign dtypes are left alone.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file, strict=False)
        self.tensors = {key: self.tensors[key] for key in sorted(self.tensors, key=self.position)}
        self._file = file.open("r+b", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns elements ``start`` to ``stop`` of the flat tensor."""
        return self.read_from(self._file, name, start, stop)

    def write(self, name: str, start: int, value: np.ndarray) -> None:
        """Overwrites elements of the flat tensor from ``start`` on.

        Raises:
            ValueError: the values are of another dtype, or too many.
        """
        tensor = self.tensors[name]
        if value.dtype != tensor.dtype or not 0 <= start <= math.prod(tensor.shape) - value.size:
            raise ValueError(f"tensor {name!r}: cannot write {value.size} {value.dtype} at {start}")
        self._file.seek(self.position(name, start))
        _write(self._file, _bytes(value))


class TensorWriter:
    """Writes a safetensors file as its tensors come.

    A context manager: the header is written when the context ends without an exception, and the
    file is not valid before.

    Args:
        file: the file to make.
        names: the names of all tensors to come, in any order; the header has room for them.
        metadata: text by name, for the header, which has room for as much.

    Attributes:
        metadata: text by name, for the header; may change until the context ends.
    """

    def __init__(
        self, file: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.metadata = dict(metadata or {})
        self._missing = set(names)
        self._entries: dict[str, Any] = {}
        names_size = sum(len(json.dumps(name)) for name in self._missing)
        size = len(json.dumps(self._header)) + names_size + _ENTRY * len(self._missing)
        self._room = math.ceil(size / 8) * 8  # so that the tensors are aligned in the file
        self._end = 0
        self._stream = file.open("wb", buffering=0)
        self._stream.seek(8 + self._room)

    @property
    def _header(self) -> dict[str, Any]:
        return {**({"__metadata__": self.metadata} if self.metadata else {}), **self._entries}

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
        self._entries[name] = _entry(value, self._end)
        self._end += value.nbytes
        _write(self._stream, _bytes(value))

    def _write_header(self) -> None:
        header = json.dumps(self._header).encode().ljust(self._room)
        if len(header) > self._room:
            raise ValueError(f"metadata of {self._stream.name} is longer than was announced")
        self._stream.seek(0)
        _write(self._stream, len(header).to_bytes(8, "little") + header)


def _entry(value: np.ndarray, start: int) -> dict[str, Any]:
    """Returns the header's entry for a tensor whose bytes begin at ``start``."""
    return {
        "dtype": _NAMES[value.dtype.name],
        "shape": value.shape,
        "data_offsets": [start, start + value.nbytes],
    }


def _bytes(value: np.ndarray) -> memoryview:
    little_endian = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return little_endian.reshape(-1).view(np.uint8).data


def _write(stream: FileIO, data: bytes | memoryview) -> None:
    data = memoryview(data)
    try:
        while data:
            data = data[stream.write(data) :]
    except OSError as error:
        error.filename = stream.name  # a failed write does not say where
        raise
