"""Outputs: places where one may be written, and older ones that may be replaced.

Every folder that coremerge writes has a record, ``coremerge.json``, with the kind of output and the
fingerprints of all files. Only a folder of the same kind with just these files is ever replaced.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coremerge_jax.errors import FormatError
from coremerge_jax.io import untrusted
from coremerge_jax.io.untrusted import refuse_url

RECORD = "coremerge.json"
RECORD_SIZE = 64 * 2**20  # bytes; that of a pack grows with modules times adapters
_WHOLE = 64 * 2**20  # bytes; larger files are not read whole for their fingerprint
_BLOCK = 4096
_BLOCKS = 64

_SHOWN = 3

_ELSEWHERE = "choose another output, or move it away"

# Kinds of outputs.
ADAPTER = "PEFT adapter"
CHECKPOINT = "orbax adapter"
GGUF = "GGUF adapter"
MODEL = "model"
PACK = "pack"
STATISTICS = "statistics"

# Options of `adapter_writer.write_adapter` that the `save` of a format hands on.
WRITER_OPTIONS = (
    "dtype",
    "rank",
    "energy",
    "budget",
    "parameters",
    "metric",
    "uniform_rank",
    "card",
)


def check_output(
    out: str | Path, *, kind: str | None, inputs: Iterable[str | Path] = (), force: bool = False
) -> Path:
    """Returns the real path of an output folder, if it may be written.

    Args:
        out: the folder to write.
        kind: what will be written: the name of a format, or `MODEL`; None if not yet known.
        inputs: folders and files that are read for it. The output may not be one of them, contain
            one, or lie inside one; links are followed. Hugging Face ids are passed over.
        force: replace a folder that is already there, if it is of this kind and coremerge wrote all
            that is in it.

    Raises:
        FormatError: the output may not be written, and why.
    """
    path = _resolve(out)
    refuse_inputs(out, inputs)
    if not os.path.lexists(path):
        return path
    if path.is_symlink():
        raise FormatError(f"{out}: is a symbolic link that leads nowhere; {_ELSEWHERE}")
    if not path.is_dir():
        raise FormatError(f"{out}: exists and is not a folder; choose another output")
    if not force:
        raise FormatError(f"{out}: already exists; choose another output, or --force it")
    if reason := find_foreign(path, kind):
        raise FormatError(f"{out}: {reason}, so it is not replaced; {_ELSEWHERE}")
    return path


def check_file(
    out: str | Path,
    *,
    mark: bytes | re.Pattern[bytes],
    inputs: Iterable[str | Path] = (),
    force: bool = False,
) -> Path:
    """Returns the real path of an output file, if it may be written.

    Args:
        out: the file to write.
        mark: bytes near the beginning of every such file that coremerge writes, or a pattern that
            matches there.
        inputs: as for `check_output`.
        force: replace a file that is already there, if coremerge wrote it.

    Raises:
        FormatError: the output may not be written, and why.
    """
    path = _resolve(out)
    if path.is_dir():
        raise FormatError(f"{out}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FormatError(f"{Path(out).parent}: there is no such folder")
    refuse_inputs(out, inputs)
    if not os.path.lexists(path):
        return path
    if not path.is_file():
        raise FormatError(f"{out}: exists and is not a file; choose another output")
    if not force:
        raise FormatError(f"{out}: already exists; choose another output, or --force it")
    pattern = mark if isinstance(mark, re.Pattern) else re.escape(mark)
    with path.open("rb") as stream:
        if not re.search(pattern, stream.read(_BLOCK)):
            raise FormatError(
                f"{out}: coremerge did not write this file, so it is not replaced; {_ELSEWHERE}"
            )
    return path


def _resolve(out: str | Path) -> Path:
    """Returns the real path of an output that has a name."""
    refuse_url(out)
    if not str(out):
        raise FormatError("the output has no name; give the name of a folder or file to write")
    return Path(os.path.realpath(out))


def refuse_inputs(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuses an output that is one of the inputs, or contains one, or lies inside one.

    Files are compared by device and inode, so neither links nor other spellings hide them.

    Raises:
        FormatError: naming output and input.
    """
    path = Path(os.path.realpath(out))
    itself, above = _identity(path), _identities(path)
    for source in inputs:
        if found := _relation(itself, above, Path(source)):
            raise FormatError(
                f"{out}: {found} the input {source}, which is never changed; choose another output"
            )


def _relation(
    itself: tuple[int, int] | None, above: set[tuple[int, int]], source: Path
) -> str | None:
    """Returns how an output and an input touch each other; None if they do not."""
    place = Path(os.path.realpath(source))
    if not place.exists() and (place.parent / RECORD).is_file():
        place = place.parent  # an adapter of a pack
    identity = _identity(place)
    if identity is None:
        return None
    if identity == itself:
        return "is"
    if identity in above:
        return "is inside"
    if itself is not None and any(itself in _identities(x) for x in (place, *_links(place))):
        return "contains"
    return None


def _links(folder: Path) -> list[Path]:
    """Returns where the links in a folder lead: weights may be kept elsewhere."""
    try:
        return [Path(os.path.realpath(x.path)) for x in os.scandir(folder) if x.is_symlink()]
    except OSError:
        return []


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _identities(path: Path) -> set[tuple[int, int]]:
    """Returns the identities of a path and of all folders above it, as far as they exist."""
    return {found for place in (path, *path.parents) if (found := _identity(place)) is not None}


def find_left(path: Path) -> list[tuple[str, Path]]:
    """Finds temporary outputs beside an output, of runs that were killed or are alive.

    Returns:
        ``"new"`` for an unfinished output and ``"old"`` for one moved aside, each with its path.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.(new|old)")
    if not path.parent.is_dir():
        return []
    found = ((pattern.fullmatch(place.name), place) for place in sorted(path.parent.iterdir()))
    return [(match[1], place) for match, place in found if match and not place.is_symlink()]


def write_record(folder: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Writes the record of a finished folder: kind, content, and the fingerprints of all files."""
    files = {name: fingerprint(folder / name) for name in _files(folder) if name != RECORD}
    text = json.dumps({"kind": kind, **content, "files": files}, indent=2, default=str)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def find_foreign(folder: Path, kind: str | None = None) -> str:
    """Returns why a folder may not be deleted; nothing if coremerge wrote all that is in it.

    Args:
        folder: the folder.
        kind: the kind of output that it has to be; any by default.
    """
    found = list(_files(folder))
    if not found:
        return ""
    if RECORD not in found:
        return f"has no {RECORD}, so coremerge did not write it (it holds {_listed(found)})"
    try:
        record = untrusted.read_json(
            folder / RECORD, "a folder that coremerge wrote", limit=RECORD_SIZE
        )
    except FormatError:
        return f"has a broken {RECORD}, so nothing shows that coremerge wrote it"
    written = record.get("files")
    if not isinstance(written, dict):
        return f"has a {RECORD} that names no files, so nothing shows that coremerge wrote them"
    others = [name for name in found if name not in written and name != RECORD]
    if others:
        return f"holds what coremerge did not write ({_listed(others)})"
    changed = [
        name for name in found if name != RECORD and fingerprint(folder / name) != written[name]
    ]
    if changed:
        return f"has changed since coremerge wrote it ({_listed(changed)})"
    if kind is not None and record.get("kind") != kind:
        return f"holds another kind of output ({record.get('kind')}, not {kind})"
    return ""


def _files(folder: Path) -> list[str]:
    """Returns the paths of all that is in a folder but folders, relative to it and sorted."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for where, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(where, name).is_symlink()]
        found += [Path(where, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def fingerprint(file: Path) -> str:
    """Returns the SHA-256 of a file; of one above 64 MiB, of its size and 64 blocks spread over it.

    Writing weights anew changes the header or most blocks, so this finds a changed file at a cost
    that does not grow with the size of a model.
    """
    if not stat.S_ISREG(file.lstat().st_mode):
        return "not a regular file"
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for i in range(_BLOCKS):
            stream.seek((size - _BLOCK) * i // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
