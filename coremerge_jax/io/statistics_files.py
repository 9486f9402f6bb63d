"""Statistics of modules' inputs <-> folders with a safetensors file and their description.

``statistics.safetensors`` has, for each module, the tensors ``PATH.matrices``, ``PATH.counts`` and,
unless the matrices are of whole inputs, ``PATH.squares``; ``coremerge.json`` has all the rest.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax import __version__
from coremerge_jax.errors import FormatError, MismatchError, RecipeError, UnsupportedError
from coremerge_jax.io import untrusted
from coremerge_jax.io.atomic import atomic_folder
from coremerge_jax.io.outputs import RECORD, STATISTICS, write_record
from coremerge_jax.io.single_file import hash_files
from coremerge_jax.io.tensors import TensorReader, TensorWriter
from coremerge_jax.merging.statistics import SOURCES, Gram, Statistics
from coremerge_jax.text import short

TENSORS = "statistics.safetensors"
_VERSION = 1
_FOLDER = "a folder that coremerge collect wrote"
_DTYPES = ("float64", "float32")
_PARTS = ("matrices", "counts", "squares")

_is_texts = untrusted.is_list_of(lambda x: x is None or untrusted.is_text(x))
_is_places = untrusted.is_list_of(lambda x: untrusted.is_whole(x) and x >= 0)
_is_ranks = untrusted.is_list_of(lambda x: untrusted.is_whole(x) and x > 0)
_REQUIRED = {
    "adapters": (_is_texts, "a list of names"),
    "source": (lambda value: value in SOURCES, " or ".join(SOURCES)),
    "modules": (lambda value: isinstance(value, list), "a list of groups of modules"),
}
_FIELDS = {"model": untrusted.TEXT, **_REQUIRED}
_GROUP = {
    "tasks": (_is_places, "a list of places of adapters"),
    "ranks": (_is_ranks, "a list of ranks"),
    "paths": untrusted.TEXTS,
}


def save_statistics(
    statistics: Statistics,
    out: str | Path,
    *,
    inputs: Sequence[str] | None = None,
    force: bool = False,
) -> None:
    """Writes statistics to a folder, which appears whole or not at all.

    Args:
        statistics: what to write; float32 and float64 stay, all else becomes float64.
        out: the folder to make.
        inputs: for each adapter, the name of its inputs, such as a file's; for the record only.
        force: replace a folder of statistics that coremerge wrote.

    Raises:
        FormatError: the output may not be written, or a value is not finite.
        MismatchError: there are names of more or fewer inputs than adapters.
        RecipeError: it is something else than statistics.
    """
    if not isinstance(statistics, Statistics):
        raise RecipeError(f"statistics: expected Statistics, got {short(statistics)}")
    if inputs is not None and len(inputs) != len(statistics.adapters):
        raise MismatchError(
            f"{len(inputs)} names of inputs for {len(statistics.adapters)} adapters; expected one "
            "each"
        )
    tensors = {
        name: value
        for path, gram in statistics.items()
        for name, value in _tensors(path, gram).items()
    }
    for name, value in tensors.items():
        _check_values(str(out), name, value)
    with atomic_folder(out, kind=STATISTICS, force=force) as folder:
        with TensorWriter(folder / TENSORS, tensors) as writer:
            for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):
                writer.write(name, tensors[name])
        write_record(folder, STATISTICS, _description(statistics, inputs))


def _tensors(path: str, gram: Gram) -> dict[str, np.ndarray]:
    found = {part: getattr(gram, part) for part in _PARTS}
    arrays = {part: np.asarray(jax.device_get(x)) for part, x in found.items() if x is not None}
    return {
        f"{path}.{part}": x if x.dtype.name in _DTYPES else x.astype(np.float64)
        for part, x in arrays.items()
    }


def _description(statistics: Statistics, inputs: Sequence[str] | None) -> dict[str, Any]:
    """Returns the content of the record; modules in a row with equal ranks share an entry."""
    groups = itertools.groupby(statistics.items(), lambda item: (item[1].tasks, item[1].ranks))
    return {
        "coremerge_version": __version__,
        "version": _VERSION,
        "model": statistics.model,
        "adapters": statistics.adapters,
        "source": statistics.source,
        "inputs": inputs,
        "counts": [float(count) for count in statistics.counts],
        "modules": [
            {"tasks": tasks, "ranks": ranks, "paths": [path for path, _ in items]}
            for (tasks, ranks), items in groups
        ],
    }


def load_statistics(path: str | Path) -> Statistics:
    """Returns the statistics in a folder, as NumPy arrays that are mapped into memory.

    Args:
        path: a folder that `save_statistics` or ``coremerge collect`` has written.

    Raises:
        FormatError: there is no such folder, or it is broken.
        UnsupportedError: a newer version of coremerge has written it.
    """
    untrusted.check_path(path)
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{path}: no such folder; expected {_FOLDER}")
    record = _read_record(folder)
    if not untrusted.is_regular(folder / TENSORS):
        raise FormatError(f"{path}: no {TENSORS}; expected {_FOLDER}")
    reader = TensorReader(folder / TENSORS)
    grams = {
        path: _read_gram(reader, path, group)
        for group in record["modules"]
        for path in group["paths"]
    }
    expected = {f"{path}.{part}" for path in grams for part in _PARTS}
    for name in reader.tensors.keys() - expected:
        raise FormatError(f"{reader.file}: tensor {name!r} is of no module in {RECORD}")
    return Statistics(grams, record["adapters"], source=record["source"], model=record.get("model"))


def sum_statistics(paths: Sequence[str | Path]) -> Statistics:
    """Returns the sum of the statistics in several folders, at least one.

    Raises:
        FormatError: see `load_statistics`.
        MismatchError: they are of different adapters or models; it names the folder.
    """
    total = load_statistics(paths[0])
    for path in paths[1:]:
        try:
            total = total + load_statistics(path)
        except MismatchError as error:
            raise MismatchError(f"{paths[0]} and {path}: {error}") from error
    return total


def hash_statistics(path: str | Path) -> dict[str, str]:
    """Returns the SHA-256 of the file of tensors in a folder of statistics, by its name.

    Raises:
        FormatError: the file cannot be read.
    """
    return hash_files(Path(path) / TENSORS)


def _read_record(folder: Path) -> dict[str, Any]:
    """Returns the description of statistics, of which all fields that are needed are valid."""
    file = folder / RECORD
    record = untrusted.read_json(file, _FOLDER)
    if record.get("kind") != STATISTICS:
        kind = untrusted.short(record.get("kind"))
        raise FormatError(f"{file}: kind is {kind}, not {STATISTICS!r}; expected {_FOLDER}")
    version = record.get("version")
    if version != _VERSION:
        raise UnsupportedError(
            f"{file}: version {untrusted.short(version)} of the format, and this coremerge reads "
            f"{_VERSION}; update coremerge, or collect the statistics again"
        )
    _check_fields(str(file), record, _FIELDS, _REQUIRED)
    tasks = len(record["adapters"])
    seen: set[str] = set()
    for i, group in enumerate(record["modules"]):
        where = f"{file}: modules[{i}]"
        if not isinstance(group, dict):
            raise FormatError(f"{where} is {untrusted.short(group)}; expected an object")
        _check_fields(where, group, _GROUP, _GROUP)
        places, ranks = group["tasks"], group["ranks"]
        if places != sorted(set(places)) or max(places, default=tasks) >= tasks:
            raise FormatError(f"{where}: tasks are no ascending places of the {tasks} adapters")
        if len(ranks) != len(places):
            raise FormatError(f"{where}: {len(ranks)} ranks of {len(places)} adapters")
        for path in group["paths"]:
            if path in seen:
                raise FormatError(f"{where}: module {path!r} is there twice")
            seen.add(path)
    return record


def _check_fields(
    where: str,
    fields: Mapping[str, Any],
    kinds: Mapping[str, untrusted.Kind],
    required: Mapping[str, untrusted.Kind],
) -> None:
    untrusted.check_kinds(where, fields, kinds)
    for name, (_, expected) in required.items():
        if fields.get(name) is None:
            raise FormatError(f"{where}: no {name}; expected {expected}")


def _read_gram(reader: TensorReader, path: str, group: Mapping[str, Any]) -> Gram:
    """Returns the statistics of a module; raises if its tensors are not there, or not valid."""
    tasks, ranks = tuple(group["tasks"]), tuple(group["ranks"])
    found = {part: _read(reader, f"{path}.{part}") for part in _PARTS[:2]}
    whole = f"{path}.squares" not in reader.tensors
    size = found["matrices"].shape[-1] if whole and found["matrices"].ndim else sum(ranks)
    squares = None if whole else _read(reader, f"{path}.squares")
    shapes = {"matrices": (len(tasks), size, size), "counts": (len(tasks),), "squares": (size,)}
    for part, value in {**found, "squares": squares}.items():
        if value is not None and value.shape != shapes[part]:
            raise FormatError(
                f"{reader.file}: tensor '{path}.{part}' has shape {value.shape}; expected "
                f"{shapes[part]} for adapters of ranks {ranks}"
            )
    return Gram(**found, squares=squares, tasks=tasks, ranks=ranks)


def _read(reader: TensorReader, name: str) -> np.ndarray:
    """Returns a tensor that is mapped into memory, so that statistics of whole inputs fit."""
    if name not in reader.tensors:
        raise FormatError(f"{reader.file}: no tensor {name!r}; the file is not that of {RECORD}")
    outline = reader.tensors[name]
    if outline.dtype.name not in _DTYPES:
        raise FormatError(
            f"{reader.file}: tensor {name!r} has dtype {outline.dtype}; expected one of "
            f"{', '.join(_DTYPES)}"
        )
    if 0 in outline.shape:
        raise FormatError(f"{reader.file}: tensor {name!r} of shape {outline.shape} is empty")
    mapped = np.memmap(
        reader.file, outline.dtype, "r", offset=reader.position(name), shape=outline.shape
    )
    value = mapped.view(np.ndarray)
    _check_values(str(reader.file), name, value)
    return value


def _check_values(where: str, name: str, value: np.ndarray) -> None:
    """Refuses what no sum of squares or products of finite inputs is."""
    if not all(np.isfinite(part).all() for part in _pieces(value)):
        raise FormatError(
            f"{where}: {name!r} has NaN or infinite values; collect the statistics again"
        )
    if not name.endswith(".matrices") and (value < 0).any():
        raise FormatError(f"{where}: {name!r} has negative values; collect the statistics again")


def _pieces(value: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the matrices of a stack one by one, which takes less memory; or an array as it is."""
    return iter(value) if value.ndim == 3 else iter([value])
