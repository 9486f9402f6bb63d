"""Packs as folders, read module by module. JAX is not imported here.

A folder has one safetensors file for each adapter, with the tensors ``PATH.a``, ``PATH.b`` and
``extras.NAME``; a folder with other files that belong to the adapter, if there are any;
``coordinates.safetensors``, with ``PATH.left`` and ``PATH.right``; and ``coremerge.json``, with all
the rest.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, unknown
from coremerge_jax.io.outputs import RECORD, fingerprint
from coremerge_jax.io.packs.pack_record import COORDINATES, METADATA, files_of, read_record
from coremerge_jax.io.tensors import LazyTensor, TensorReader
from coremerge_jax.lora import FLOATS, LINEAR, AdapterFile, Kind, LoRA, Metadata, Shape
from coremerge_jax.merging.packed import Coordinates, PackedAdapter


class PackedFile(AdapterFile):
    """An adapter of a pack, whose factors are still in its file.

    Args:
        reader: the file.
        entry: what the record says of the adapter.

    Attributes:
        dtype: name of the factors' dtype in memory, if it is not that in the file.
    """

    def __init__(self, reader: TensorReader, entry: Mapping[str, Any]) -> None:
        self._reader, self.dtype = reader, entry.get("dtype")
        if self.dtype not in (None, *FLOATS):
            floats = " or ".join(FLOATS)
            raise FormatError(
                f"{reader.file}: dtype is {self.dtype!r} in {RECORD}; expected {floats}"
            )
        kinds = entry.get("kinds") or {}
        modules = {path: self._outline(path, kinds.get(path)) for path in entry["modules"]}
        extras: dict[str, Any] = {name: self._extra(name) for name in entry.get("extras") or ()}
        metadata = _metadata(entry, reader.file.parent)
        super().__init__(modules, metadata=metadata, extras=extras)
        expected = {f"{path}.{factor}" for path in modules for factor in "ab"}
        for name in reader.tensors.keys() - expected - {f"extras.{name}" for name in extras}:
            raise FormatError(f"{reader.file}: tensor {name!r} is of no module in {RECORD}")

    def _outline(self, path: str, kind: Mapping[str, Any] | None) -> LoRA:
        shapes = [self._tensor(f"{path}.{factor}") for factor in "ab"]
        a, b = (Shape(x.shape, np.dtype(self.dtype or x.dtype)) for x in shapes)
        found: Any = LINEAR
        if kind is not None:
            found = Kind(**{**kind, "kernel": tuple(kind.get("kernel") or ())})
        return LoRA(a, b, found)  # type: ignore[arg-type]  # shapes in place of arrays

    def _tensor(self, name: str) -> Shape:
        if name not in self._reader.tensors:
            raise FormatError(f"{self._reader.file}: no tensor {name!r}, which {RECORD} names")
        return self._reader.tensors[name]

    def _extra(self, name: str) -> LazyTensor:
        found, key = self._tensor(f"extras.{name}"), f"extras.{name}"
        return LazyTensor(found.shape, found.dtype, partial(self._reader.read_part, key))

    def copy(self, file: Path) -> None:
        """Copies the adapter's file.

        Raises:
            FormatError: it has changed since it was opened.
        """
        self._reader.copy_with(file, {})

    def check(self) -> None:
        """Checks that the adapter's file is the one that was opened.

        Raises:
            FormatError: it is not.
        """
        self._reader.check()

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the pack."""
        return (self._reader.file.parent,)

    def read(self, paths: Iterable[str]) -> dict[str, LoRA]:
        """Returns the modules with these paths, by one opening of the file.

        Raises:
            FormatError: the file has changed.
        """
        found = {}
        with self._reader.opened() as tensor:
            for path in paths:
                outline = self.outline[path]
                a, b = (tensor(f"{path}.{factor}") for factor in "ab")
                found[path] = LoRA(
                    a.astype(outline.a.dtype, copy=False),
                    b.astype(outline.b.dtype, copy=False),
                    outline.kind,
                )
        return found


class CoordinateFile(Mapping[str, Coordinates]):
    """The coordinates of a pack's factors, read from their file when they are asked for.

    Args:
        file: the file.
        adapters: of the pack.
    """

    def __init__(self, file: Path, adapters: Iterable[AdapterFile]) -> None:
        self._reader = TensorReader(file)
        self._ranks: dict[str, dict[int, int]] = {}
        for task, adapter in enumerate(adapters):
            for path, lora in adapter.outline.items():
                self._ranks.setdefault(path, {})[task] = lora.rank
        expected = {f"{path}.{side}" for path in self._ranks for side in ("left", "right")}
        for name in expected ^ self._reader.tensors.keys():
            raise FormatError(f"{file}: tensor {name!r} is missing, or of no module in {RECORD}")
        for name in expected:
            shape, ranks = self._reader.shape(name), self._ranks[name.rpartition(".")[0]]
            if len(shape) != 2 or shape[1] != sum(ranks.values()) or not 0 < shape[0] <= shape[1]:
                raise FormatError(
                    f"{file}: tensor {name!r} has shape {shape}, which is not that of coordinates "
                    f"of ranks {tuple(ranks.values())}; pack the adapters again"
                )

    def __getitem__(self, path: str) -> Coordinates:
        ranks = self._ranks[path]
        with self._reader.opened() as tensor:
            sides = {side: tensor(f"{path}.{side}") for side in ("left", "right")}
        for side, value in sides.items():
            if not np.isfinite(value).all():
                raise FormatError(
                    f"{self._reader.file}: '{path}.{side}' has NaN or infinite values; pack the "
                    "adapters again"
                )
        return Coordinates(tuple(ranks), tuple(ranks.values()), **sides)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, path: object) -> bool:
        return path in self._ranks


def open_members(folder: str | Path) -> list[PackedAdapter]:
    """Opens the adapters of a pack; factors and coordinates stay in the files.

    Adapters that are opened one by one are of the same pack, as long as the folder stays as it is.

    Raises:
        FormatError: the folder is broken, or a file has changed since it was packed.
        UnsupportedError: a newer version of coremerge has written it.
    """
    path = Path(os.path.realpath(folder))
    files = [(file, file.stat()) for file in sorted(path.iterdir())]
    return list(_open(path, tuple((x, y.st_ino, y.st_mtime_ns, y.st_size) for x, y in files)))


@functools.lru_cache(maxsize=8)
def _open(folder: Path, _: tuple) -> tuple[PackedAdapter, ...]:
    """Opens a pack, once for each state of its files."""
    record = read_record(folder)
    for name, written in (record.get("files") or {}).items():
        if not (folder / name).is_file() or fingerprint(folder / name) != written:
            raise FormatError(
                f"{folder / name}: is missing, or has changed since it was packed, so its "
                "coordinates may be others; pack the adapters again"
            )
    files = [PackedFile(TensorReader(folder / x["file"]), x) for x in record["adapters"]]
    coordinates = CoordinateFile(folder / COORDINATES, files)
    return tuple(
        PackedAdapter(file, str(file.metadata.name), task, coordinates)
        for task, file in enumerate(files)
    )


def open_member(folder: str | Path, name: str) -> PackedAdapter:
    """Opens one adapter of a pack.

    Raises:
        FormatError: as `open_members`.
        RecipeError: there is no such adapter.
    """
    members = {str(packed.metadata.name): packed for packed in open_members(folder)}
    if name not in members:
        raise unknown(f"adapter of the pack {folder}:", name, members)
    return members[name]


def describe_metadata(metadata: Metadata) -> dict[str, Any]:
    """Returns the fields of metadata that a record has, without those that have no value."""
    return {name: value for name in METADATA if (value := getattr(metadata, name))}


def _metadata(entry: Mapping[str, Any], folder: Path) -> Metadata:
    """Returns the metadata of an adapter, from its entry in the record."""
    fields = dict(entry.get("metadata") or {})
    lengths = fields.pop("lengths", ())
    files = folder / files_of(entry["name"])
    return Metadata(
        name=entry["name"],
        lengths=tuple((name, tuple(inputs), tuple(outputs)) for name, inputs, outputs in lengths),
        beside=tuple(files / other for other in entry.get("beside") or ()),
        **fields,
    )
