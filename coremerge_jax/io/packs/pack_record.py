"""The record of a pack, and names of its adapters. NumPy and JAX are not imported, for help."""

import collections
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.outputs import PACK, RECORD, RECORD_SIZE

VERSION = 1
COORDINATES = "coordinates.safetensors"
_ADAPTER_FILE = ".adapter.safetensors"
_FOLDER = "a pack that coremerge wrote"

_REQUIRED = {"name": untrusted.TEXT, "file": untrusted.TEXT, "modules": untrusted.TEXTS}
_ADAPTER = {
    **_REQUIRED,
    "extras": untrusted.TEXTS,
    "beside": untrusted.TEXTS,
    "dtype": untrusted.TEXT,
    "kinds": untrusted.OBJECT,
    "metadata": untrusted.OBJECT,
}
_is_size = untrusted.is_list_of(lambda x: untrusted.is_whole(x) and x > 0)
_KIND = {
    "name": untrusted.TEXT,
    "kernel": (_is_size, "a list of sizes"),
    "transposed": untrusted.SWITCH,
}
METADATA = {
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


def is_pack(source: str | Path) -> bool:
    """Returns True for a folder with a pack's record. Does not raise."""
    file = Path(source) / RECORD
    try:
        if not file.is_file():
            return False
        return untrusted.read_json(file, _FOLDER, limit=RECORD_SIZE).get("kind") == PACK
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
    return [entry["name"] for entry in read_record(Path(folder))["adapters"]]


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of a pack, of which all fields that are needed are valid."""
    file = folder / RECORD
    record = untrusted.read_json(file, _FOLDER, limit=RECORD_SIZE)
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
    (name, count), *_ = collections.Counter(entry["name"] for entry in adapters).most_common(1)
    if count > 1:
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
    if others := metadata.keys() - METADATA.keys():
        raise FormatError(f"{where}: unknown metadata {min(others)!r}")
    untrusted.check_kinds(f"{where}: metadata", metadata, METADATA)


def is_file_name(name: str) -> bool:
    """Returns True if an adapter of this name can have a file in a pack, unlike any other file."""
    other = name in ("..", RECORD, COORDINATES) or name.endswith(_ADAPTER_FILE)
    return Path(name).name == name and name.isprintable() and len(name.encode()) < 200 and not other


def file_of(name: str) -> str:
    """Returns the name of an adapter's file."""
    return f"{name}{_ADAPTER_FILE}"


def files_of(name: str) -> str:
    """Returns the name of the folder with the files beside an adapter."""
    return f"{name}.files"
