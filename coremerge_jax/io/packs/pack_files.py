"""Packs to folders, and back."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax import __version__
from coremerge_jax.errors import FormatError, RecipeError
from coremerge_jax.io.atomic import atomic_folder
from coremerge_jax.io.folders import not_found
from coremerge_jax.io.outputs import PACK, write_record
from coremerge_jax.io.packs.pack_folder import (
    PackedFile,
    describe_metadata,
    open_members,
)
from coremerge_jax.io.packs.pack_record import (
    COORDINATES,
    VERSION,
    file_of,
    files_of,
    is_file_name,
    is_pack,
)
from coremerge_jax.io.tensors import TensorWriter
from coremerge_jax.io.untrusted import check_path
from coremerge_jax.lora import LINEAR, AdapterSource
from coremerge_jax.merging.packing import Pack
from coremerge_jax.text import short

_BATCH = 16
"""Modules that are read at once."""


def open_pack(path: str | Path) -> Pack:
    """Opens a pack; factors and coordinates stay in the files until they are asked for.

    Args:
        path: a folder that `save_pack` or ``coremerge pack`` has written.

    Raises:
        FormatError: there is no such folder, or it is broken, or a file has changed.
        UnsupportedError: a newer version of coremerge has written it.
    """
    check_path(path)
    if not is_pack(path):
        if not os.path.lexists(path):
            raise not_found(path, "a pack")
        raise FormatError(f"{path}: no pack; expected a folder that coremerge pack wrote")
    return Pack(open_members(path))


def save_pack(pack: Pack, out: str | Path, *, force: bool = False) -> None:
    """Writes a pack to a folder, which appears whole or not at all.

    Adapters stay as they are, bit by bit; factors are in the narrowest dtype that holds them.

    Args:
        pack: what to write.
        out: the folder to make. With ``force``, it may be the one that the pack is read from.
        force: replace a pack that coremerge wrote.

    Raises:
        FormatError: the output may not be written.
        RecipeError: it is something else than a pack, or a name cannot be that of a file.
    """
    if not isinstance(pack, Pack):
        raise RecipeError(f"pack: expected a Pack, got {short(pack)}; make one with pack(adapters)")
    for packed in pack:
        name = str(packed.metadata.name)
        if not is_file_name(name):
            raise RecipeError(f"adapter {name!r}: such a name cannot be that of a file; give names")
    target = Path(os.path.realpath(out))
    read = {folder for packed in pack for folder in packed.folders}
    inputs = [folder for folder in read if folder != target]
    with atomic_folder(out, kind=PACK, inputs=inputs, force=force) as folder:
        entries = [
            _write_adapter(packed.source, str(packed.metadata.name), folder) for packed in pack
        ]
        _write_coordinates(pack, folder / COORDINATES)
        for packed in pack:
            if isinstance(packed.source, PackedFile):
                packed.source.check()  # not replaced by another process since it was opened
        write_record(
            folder,
            PACK,
            {"coremerge_version": __version__, "version": VERSION, "adapters": entries},
        )


def _write_coordinates(pack: Pack, file: Path) -> None:
    coordinates = pack.coordinates
    names = [f"{path}.{side}" for path in coordinates for side in ("left", "right")]
    with TensorWriter(file, names) as writer:
        for path, found in coordinates.items():
            for side in ("left", "right"):
                writer.write(f"{path}.{side}", np.asarray(getattr(found, side), np.float64))


def _write_adapter(source: AdapterSource, name: str, folder: Path) -> dict[str, Any]:
    """Writes the file of an adapter; returns its entry in the record."""
    file, outline = folder / file_of(name), source.outline
    beside = source.metadata.beside
    for other in beside:
        (folder / files_of(name)).mkdir(exist_ok=True)
        shutil.copyfile(other, folder / files_of(name) / other.name)
    kinds = {path: x.kind for path, x in outline.items() if x.kind != LINEAR}
    entry: dict[str, Any] = {
        "name": name,
        "file": file.name,
        "metadata": describe_metadata(source.metadata),
        "modules": list(outline),
        "kinds": {path: _describe(kind) for path, kind in kinds.items()},
        "extras": list(source.extras),
        "beside": [other.name for other in beside],
    }
    if isinstance(source, PackedFile):
        source.copy(file)
        return entry | {"dtype": source.dtype}
    narrow = _narrow(source)
    names = [f"{path}.{factor}" for path in outline for factor in "ab"]
    extras = {f"extras.{key}": x for key, x in source.extras.items()}
    with TensorWriter(file, [*names, *extras]) as writer:
        # Wider dtypes first, as the format has it.
        sizes = {x.dtype.itemsize for lora in outline.values() for x in (lora.a, lora.b)}
        sizes |= {np.dtype(x.dtype).itemsize for x in extras.values()}
        for size in sorted({2, *sizes}, reverse=True):
            for key, value in _factors(source, narrow):
                if value.dtype.itemsize == size:
                    writer.write(key, value)
            for key, extra in extras.items():
                if np.dtype(extra.dtype).itemsize == size:
                    writer.write(key, np.asarray(jax.device_get(extra)))
    return entry | {"dtype": "float32" if narrow else None}


def _factors(source: AdapterSource, narrow: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the factors of an adapter by their names in the file."""
    paths = list(source)
    for start in range(0, len(paths), _BATCH):
        for path, lora in source.read(paths[start : start + _BATCH]).items():
            for factor in "ab":
                value = np.asarray(jax.device_get(getattr(lora, factor)))
                yield f"{path}.{factor}", value.astype(narrow or value.dtype, copy=False)


def _narrow(source: AdapterSource) -> np.dtype | None:
    """Returns the dtype of an adapter's source if float32 factors fit in it exactly, else None."""
    name = source.metadata.dtype
    if name not in ("bfloat16", "float16"):
        return None
    dtype = np.dtype(name)
    for _, value in _factors(source, None):
        if value.dtype != np.float32:
            return None
        with np.errstate(over="ignore"):
            if not np.array_equal(value.astype(dtype).astype(np.float32), value):
                return None
    return dtype


def _describe(kind: Any) -> Mapping[str, Any]:
    return {"name": kind.name, "kernel": list(kind.kernel), "transposed": kind.transposed}
