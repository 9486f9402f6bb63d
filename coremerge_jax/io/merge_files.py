"""Compiled merges in files: the matrices alone, a few megabytes for each merge.

A file is a safetensors file with the matrix of each module, ``PATH.core``, and numbers of its
stacked factors, ``PATH.traits``, by which other adapters are told apart from the ones that were
merged. Its header has the names of these.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, RecipeError, UnsupportedError, hint
from coremerge_jax.io import untrusted
from coremerge_jax.io.atomic import atomic_file
from coremerge_jax.io.tensors import TensorReader, TensorWriter
from coremerge_jax.lora import Adapter, AdapterSource
from coremerge_jax.merging.checks import as_adapters
from coremerge_jax.merging.compiled import Merge
from coremerge_jax.merging.present import find_present

MARK = "coremerge_merge"
_VERSION = 1

# Relative: more than rounding to bfloat16 makes of a norm or an inner product, by far.
_ROUNDING = 0.01
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_FIELDS = {"version": untrusted.WHOLE, "adapters": untrusted.TEXTS}


def save_merge(merge: Merge, out: str | Path, *, force: bool = False) -> None:
    """Writes a compiled merge to a file, which appears whole or not at all.

    The adapters are not in it: keep their pack.

    Args:
        merge: what to write.
        out: the file, such as ``math-and-code.safetensors``.
        force: replace a file of this kind.

    Raises:
        FormatError: the output may not be written.
        RecipeError: two adapters of the merge have one name, or one has none.
        UnsupportedError: the merge has extras, which are in no such file.
    """
    if merge.present.extras or merge.present.metadata.beside:
        raise UnsupportedError(
            f"{out}: the merge has extras (trained weights that are no low-rank updates), which a "
            "file of a compiled merge does not hold; compile it with extras='drop' "
            "(--extras drop)"
        )
    names = [adapter.metadata.name for adapter in merge.adapters]
    if None in names or len(set(names)) < len(names):
        raise RecipeError(
            f"adapters are named {', '.join(map(str, names))}; a file needs a name of its own for "
            "each: pack them with names"
        )
    header = {MARK: json.dumps({"version": _VERSION, "adapters": names})}
    tensors: dict[str, np.ndarray] = {}
    for path, core in merge.cores.items():
        tensors[f"{path}.core"] = np.asarray(core)
        tensors[f"{path}.traits"] = _traits(merge.adapters, path)
    with (
        atomic_file(out, mark=MARK.encode(), force=force) as file,
        TensorWriter(file, tensors, header) as writer,
    ):
        for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
            writer.write(name, tensors[name])


def load_merge(path: str | Path, adapters: Sequence[Adapter]) -> Merge:
    """Reads a compiled merge.

    Args:
        path: a file that `save_merge` has written.
        adapters: a pack, or other adapters; those of the merge are found by their names.

    Raises:
        FormatError: there is no such file, or it is broken.
        MismatchError: the adapters are not those that were merged.
        UnsupportedError: a newer version of coremerge has written it.
    """
    untrusted.check_path(path)
    reader = TensorReader(Path(path))
    names = _read_names(reader)
    given = {adapter.metadata.name: adapter for adapter in as_adapters(adapters)}
    for name in names:
        if name not in given:
            known = [str(x) for x in given]
            raise MismatchError(
                f"{path}: is a merge of {', '.join(names)}, and {name!r} is not among the adapters "
                f"that were given{hint(name, known)}"
            )
    present = find_present([given[name] for name in names], None, "drop", True, True)
    cores = {}
    for module in present.paths:
        found = _read(reader, module, sum(x.outline[module].rank for x in _having(present, module)))
        if not _are_same(found["traits"], _traits(present.adapters, module)):
            raise MismatchError(
                f"{path}: module {module!r} of the adapters is not that of the ones that were "
                "merged, though the names are the same; compile the merge again"
            )
        cores[module] = found["core"]
    for name in reader.tensors:
        if name.rpartition(".")[0] not in cores:
            raise MismatchError(f"{path}: no adapter has the module of {name!r}")
    return Merge(cores, present)


def _having(present: Any, module: str) -> list[AdapterSource]:
    return [adapter for adapter in present.adapters if module in adapter]


def _traits(adapters: Sequence[AdapterSource], path: str) -> np.ndarray:
    """Returns numbers of a module's stacked factors.

    Returns:
        ``(4, R)``: the norms of the rows of A, and their inner products with one random vector; and
        those of the columns of B.
    """
    loras = [adapter[path] for adapter in adapters if path in adapter]
    found = []
    for rows in ([x.a for x in loras], [x.b.T for x in loras]):
        stacked = np.concatenate([np.asarray(x, np.float64) for x in rows])
        probe = np.random.default_rng(0).standard_normal(stacked.shape[1])
        found += [np.linalg.norm(stacked, axis=1), stacked @ probe]
    return np.stack(found).astype(np.float32)


def _are_same(traits: np.ndarray, others: np.ndarray) -> bool:
    """Returns True if traits are those of the same factors, up to rounding to bfloat16."""
    norms = others[[0, 0, 2, 2]]
    return bool((np.abs(traits - others) <= _ROUNDING * norms).all())


def _read_names(reader: TensorReader) -> list[str]:
    """Returns the names of the adapters that were merged, from the header of a file."""
    text = reader.metadata.get(MARK)
    if text is None:
        raise FormatError(f"{reader.file}: no compiled merge; expected a file of save_merge")
    where = f"{reader.file}: {MARK}"
    header: Mapping[str, Any] = untrusted.parse_json(text, where)
    if not isinstance(header, dict):
        raise FormatError(f"{where} is {untrusted.short(header)}; expected an object")
    untrusted.check_kinds(where, header, _FIELDS)
    if header.get("version") != _VERSION:
        raise UnsupportedError(
            f"{where}: version {header.get('version')}, and this coremerge reads {_VERSION}; "
            "update coremerge, or compile the merge again"
        )
    if not header.get("adapters"):
        raise FormatError(f"{where}: no adapters; expected a list of names")
    return list(header["adapters"])


def _read(reader: TensorReader, module: str, size: int) -> dict[str, np.ndarray]:
    """Returns the tensors of a module, whose adapters have a rank in all."""
    found = {}
    for part, shape in (("core", (size, size)), ("traits", (4, size))):
        name = f"{module}.{part}"
        if name not in reader.tensors:
            raise MismatchError(f"{reader.file}: no {name!r}, and the adapters have this module")
        outline = reader.tensors[name]
        if outline.shape != shape or outline.dtype.name not in _DTYPES:
            raise MismatchError(
                f"{reader.file}: {name!r} is {outline.dtype} of shape {outline.shape}; expected "
                f"{shape}, the ranks of the adapters"
            )
        with reader.opened() as tensor:
            found[part] = tensor(name)
        if not np.isfinite(found[part]).all():
            raise FormatError(f"{reader.file}: {name!r} has NaN or infinite values")
    return found
