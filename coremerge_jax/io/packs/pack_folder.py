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

from coremerge_jax.errors import FormatError, UnsupportedError, unknown
from coremerge_jax.io import untrusted
from coremerge_jax.io.outputs import PACK, RECORD, fingerprint
from coremerge_jax.io.tensors import LazyTensor, TensorReader
from coremerge_jax.lora import FLOATS, LINEAR, AdapterFile, Kind, LoRA, Metadata, Shape
from coremerge_jax.merging.packed import Coordinates, PackedAdapter

COORDINATES = "coordinates.safetensors"
VERSION = 1
_FOLDER = "a pack that coremerge wrote"

_REQUIRED = {"name": untrusted.TEXT, "file": untrusted.TEXT, "modules": untrusted.TEXTS}
_ADAPTER = {
    **_REQUIRED,
    "extras": untrusted.TEXTS,
    "beside": untrusted.TEXTS,
    "dtype": (lambda value: value in FLOATS, " or ".join(FLOATS)),
    "kinds": untrusted.OBJECT,
    "metadata": untrusted.OBJECT,
}
_is_size = untrusted.is_list_of(lambda x: untrusted.is_whole(x) and x > 0)
_KIND = {
    "name": untrusted.TEXT,
    "kernel": (_is_size, "a list of sizes"),
    "transposed": untrusted.SWITCH,
}
_METADATA = {
    **dict.fromkeys(("base_model", "task_type", "dtype", "format", "prefix"), untrusted.TEXT),
    "rank": untrusted.WHOLE,
    "alpha": untrusted.NUMBER,
    "config": untrusted.OBJECT,
    "header": (
        lambda value: isinstance(value, dict) and all(map(untrusted.is_text, value.values())),
        "texts by name",
    ),
    "lengths": (lambda value: isinstance(value, list) and all(map(_is_lengths, value)), "lengths"),
}


def _is_lengths(value: Any) -> bool:
    """Returns True for the name of a module and two lists of sizes."""
    fits = isinstance(value, list) and len(value) == 3 and untrusted.is_text(value[0])
    return fits and all(map(_is_size, value[1:]))


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

    @property
    def place(self) -> Path:
        """The file."""
        return self._reader.file

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


def is_pack(source: str | Path) -> bool:
    """Returns True for a folder with a pack's record. Does not raise."""
    file = Path(source) / RECORD
    try:
        return file.is_file() and untrusted.read_json(file, _FOLDER).get("kind") == PACK
    except (FormatError, OSError, ValueError):
        return False


def find_member(source: str | Path) -> tuple[Path, str] | None:
    """Returns the pack and the name of a source ``PACK/NAME``; None if it is no such source."""
    path = Path(source)
    if path.exists() or not path.name or not is_pack(path.parent):
        return None
    return path.parent, path.name


def expand(sources: Iterable[str]) -> tuple[str, ...]:
    """Returns sources, with the adapters ``PACK/NAME`` in the place of each pack.

    Raises:
        FormatError: a pack is broken.
    """
    found: list[str] = []
    for source in sources:
        names = member_names(source) if is_pack(source) else None
        found += [source] if names is None else [os.path.join(source, name) for name in names]  # noqa: PTH118
    return tuple(found)


def member_names(folder: str | Path) -> list[str]:
    """Returns the names of a pack's adapters.

    Raises:
        FormatError: the record is broken.
    """
    return [entry["name"] for entry in _read_record(Path(folder))["adapters"]]


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
    record = _read_record(folder)
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


def _read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a pack, of which all fields that are needed are valid."""
    file = folder / RECORD
    record = untrusted.read_json(file, _FOLDER, limit=64 * 2**20)
    if record.get("kind") != PACK:
        kind = untrusted.short(record.get("kind"))
        raise FormatError(f"{file}: kind is {kind}, not {PACK!r}; expected {_FOLDER}")
    if record.get("version") != VERSION:
        raise UnsupportedError(
            f"{file}: version {untrusted.short(record.get('version'))} of the format, and this "
            f"coremerge reads {VERSION}; update coremerge, or pack the adapters again"
        )
    untrusted.check_kinds(file, record, {"files": untrusted.OBJECT})
    adapters = record.get("adapters")
    if not isinstance(adapters, list) or not adapters:
        raise FormatError(f"{file}: adapters is {untrusted.short(adapters)}; expected a list")
    for i, entry in enumerate(adapters):
        _check_entry(f"{file}: adapters[{i}]", entry)
    names = [entry["name"] for entry in adapters]
    for name in names:
        if names.count(name) > 1:
            raise FormatError(f"{file}: adapter {name!r} is there twice")
    return record


def _check_entry(where: str, entry: Any) -> None:
    """Refuses an adapter of a record unless all that is read of it is valid."""
    if not isinstance(entry, dict):
        raise FormatError(f"{where} is {untrusted.short(entry)}; expected an object")
    untrusted.check_kinds(where, entry, _ADAPTER)
    for name, (_, expected) in _REQUIRED.items():
        if not entry.get(name):
            raise FormatError(f"{where}: no {name}; expected {expected}")
    if not is_file_name(entry["name"]) or entry["file"] != file_of(entry["name"]):
        raise FormatError(f"{where}: name {untrusted.short(entry['name'])} and file do not fit")
    for other in entry.get("beside") or ():
        if not is_file_name(other):
            raise FormatError(f"{where}: {untrusted.short(other)} is no name of a file beside it")
    if len(set(entry["modules"])) < len(entry["modules"]):
        raise FormatError(f"{where}: a module is there twice")
    for path, kind in (entry.get("kinds") or {}).items():
        if not isinstance(kind, dict) or kind.keys() - _KIND.keys():
            raise FormatError(f"{where}: kind of {path!r} is {untrusted.short(kind)}")
        untrusted.check_kinds(f"{where}: kind of {path!r}", kind, _KIND)
    metadata = entry.get("metadata") or {}
    if others := metadata.keys() - _METADATA.keys():
        raise FormatError(f"{where}: unknown metadata {min(others)!r}")
    untrusted.check_kinds(f"{where}: metadata", metadata, _METADATA)


def is_file_name(name: str) -> bool:
    """Returns True if an adapter of this name can have a file in a pack."""
    return Path(name).name == name and name.isprintable() and len(name.encode()) < 200


def file_of(name: str) -> str:
    """Returns the name of an adapter's file."""
    return f"{name}.adapter.safetensors"


def files_of(name: str) -> str:
    """Returns the name of the folder with the files beside an adapter."""
    return f"{name}.files"


def describe_metadata(metadata: Metadata) -> dict[str, Any]:
    """Returns the fields of metadata that a record has, without those that have no value."""
    return {name: value for name in _METADATA if (value := getattr(metadata, name))}


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
