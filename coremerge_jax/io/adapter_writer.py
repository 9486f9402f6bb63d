"""`Adapter`, or a stream of its modules, to a folder with a safetensors file, in any layout."""

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from coremerge_jax.errors import CoreMergeWarning, FormatError, MismatchError
from coremerge_jax.io.atomic import atomic_folder, shared_folder
from coremerge_jax.io.card import model_card
from coremerge_jax.io.file_layout import FileLayout
from coremerge_jax.io.outputs import ADAPTER, check_output, write_record
from coremerge_jax.io.tensors import TensorReader, TensorWriter
from coremerge_jax.lora import DTYPES, Adapter, Array, LoRA, ModuleStream, widest
from coremerge_jax.merging.mesh import is_spread
from coremerge_jax.merging.processes import exchange

if TYPE_CHECKING:
    from coremerge_jax.merging.metric import InputMetric
    from coremerge_jax.merging.truncation import Cut

# Ranks with more digits than any rank has; each is another, so none can be left out as a default.
_LONGEST_RANK = 10**9

_SHOWN = 3

Parts = Iterable[Mapping[str, LoRA]]


@dataclasses.dataclass(frozen=True)
class Written:
    """Result of writing an adapter.

    Attributes:
        ranks: rank of each module in the file, by path.
        least_rank: the lowest rank of a group of modules, before zeros filled it up.
        kept: share of energy that each module kept, by path; empty if nothing was to be cut.
    """

    ranks: Mapping[str, int]
    least_rank: int
    kept: Mapping[str, float]


def write_adapter(
    adapter: Adapter | ModuleStream,
    out: str | Path,
    layout: FileLayout,
    *,
    kind: str,
    dtype: str = "float32",
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    parameters: int | None = None,
    metric: "InputMetric | None" = None,
    uniform_rank: bool = False,
    force: bool = False,
    card: Mapping[str, Any] | None = None,
    library: str | None = None,
    finish: Callable[[Path, Mapping[str, int]], None] | None = None,
) -> Written:
    """Writes the folder of an adapter: a safetensors file, the layout's files, and their origin.

    The folder appears whole or not at all; one that is replaced is deleted last. Modules are
    written as they come. Memory holds one part of the stream, and the modules that wait for others
    of their group. A limit of the whole model iterates over the stream twice: its first pass finds
    the energies of all modules.

    If several processes share a merge, each writes its modules into a folder that all of them see,
    and process 0 joins the files.

    Args:
        adapter: an adapter, in memory or in a file, or a stream of its modules.
        out: the folder to write.
        layout: places of the modules in the files.
        kind: name of the format, for messages and coremerge.json.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        rank: cut every module to this rank first.
        energy: cut every module to the lowest rank that keeps this share of energy.
        budget: cut the whole model to this mean rank, see `truncate`.
        parameters: cut the whole model to so many entries of factors. Zeros that fill up ranks,
            as of modules of one group, are not counted.
        metric: of the modules' inputs, to cut by; by default, the Frobenius norm counts.
        uniform_rank: give all modules the largest rank among them, filled up with zeros.
        force: replace a folder that is already there, if it is of this kind and coremerge wrote
            all that is in it.
        card: origin of the adapter, for README.md and coremerge.json; ``"sources"`` is a list of
            mappings with ``"name"``, ``"path"`` and ``"sha256"``.
        library: the library that loads the folder, for README.md on the Hugging Face hub.
        finish: called with the finished safetensors file, still in a temporary folder, and the rank
            of each module; may turn the file into one of another form.

    Raises:
        FormatError: the output may not be replaced, or a value does not fit into `dtype`.
        MismatchError: the modules of a stream are not those of its outline.
        ProcessError: another process has failed.
    """
    card = dict(card or {})
    inputs = [source["path"] for source in card.get("sources", ()) if source.get("path")]
    inputs += adapter.folders
    check_output(out, kind=kind, inputs=inputs, force=force)
    if dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    outline = adapter.outline
    weights = layout.weights or f"{_name(out)}.safetensors"
    limits = {"rank": rank, "energy": energy, "budget": budget, "parameters": parameters}
    cut = _cut(limits, metric)
    job = _Job(layout, outline, weights, jnp.dtype(dtype), cut, uniform_rank)
    stream = _Parts(adapter, layout.groups.values()) if isinstance(adapter, Adapter) else adapter
    together = bool(stream.processes or stream.spread)
    write = _write_share if stream.processes else _write_spread if stream.spread else _write_all
    open_folder = shared_folder if together else atomic_folder
    with open_folder(out, kind=kind, inputs=inputs, force=force) as folder:
        own, least, kept = write(stream, job, folder)
        ranks = _filled(own, least)
        by_module = {p: ranks[group] for group, paths in layout.groups.items() for p in paths}
        if not together or jax.process_index() == 0:
            if finish is not None:
                finish(folder / weights, by_module)
            content = {"modules": len(by_module), "rank": max(ranks.values()), "dtype": dtype}
            readme, provenance = model_card(
                outline.metadata.base_model, {**content, **card}, library
            )
            for name, text in {**layout.files(ranks), "README.md": readme}.items():
                (folder / name).write_text(text, encoding="utf-8")
            if kind == ADAPTER:
                for file in outline.metadata.beside:
                    shutil.copyfile(file, folder / file.name)
            else:
                tell_beside(outline, kind)
            _tell_dropped(outline, layout.metadata(ranks))
            write_record(folder, kind, provenance)
    in_order = {path: kept[path] for path in outline} if kept else {}
    ordered = {path: by_module[path] for path in outline}
    return Written(ordered, min(own.values()), in_order)


def _cut(limits: Mapping[str, Any], metric: "InputMetric | None") -> "Cut | None":
    """Returns the cut by some limits; None if there are none."""
    if all(value is None for value in limits.values()):
        return None
    from coremerge_jax.merging.truncation import Cut, checked_limit

    return Cut(checked_limit(**limits), metric)


def _tell_dropped(outline: Adapter, written: Mapping[str, str]) -> None:
    """Warns of fields in the header of the sources that the result does not have."""
    left = sorted(outline.metadata.header.keys() - written.keys())  # files have them in any order
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        warnings.warn(
            f"fields of the files' headers stay behind, as they are of a training, or not of all "
            f"adapters, or have no place in this format: {', '.join(left[:_SHOWN])}{more}",
            CoreMergeWarning,
            stacklevel=3,
        )


def tell_beside(outline: Adapter, kind: str) -> None:
    """Warns if there are files with other trained weights, for which a format has no place."""
    if files := outline.metadata.beside:
        names = ", ".join(sorted(file.name for file in files))
        warnings.warn(
            f"other trained weights beside the adapter ({names}) stay behind: {kind}s have no "
            "place for them; --to peft copies them",
            CoreMergeWarning,
            stacklevel=3,
        )


def _name(out: str | Path) -> str:
    """Returns the name of a folder, also of one like ``..``."""
    return Path(os.path.realpath(out)).name


@dataclasses.dataclass(frozen=True)
class _Job:
    """Form in which modules are written, and the name of the file."""

    layout: FileLayout
    outline: Adapter
    file: str
    dtype: np.dtype
    cut: "Cut | None"
    uniform: bool

    @property
    def passes(self) -> int:
        """The number of times that modules are read."""
        return 2 if self.cut is not None and self.cut.limit.whole_model else 1

    def planned(self, parts: Parts, shared: bool = False) -> "_Job":
        """Returns the job with the rank of each module, if that depends on all of them.

        Args:
            parts: the modules, which are then read again.
            shared: True if other processes write others.
        """
        if self.cut is None or self.passes == 1:
            return self
        found = self.cut.energies(map(Adapter, filter(None, parts)))
        if shared:
            lists = exchange({path: x.tolist() for path, x in found.items()})
            found = {path: np.asarray(x) for each in lists for path, x in each.items()}
        return dataclasses.replace(self, cut=self.cut.with_energies(found, self.outline))

    def shorten(self, parts: Parts, kept: dict[str, float]) -> Parts:
        """Yields the parts, cut if they are to be; puts kept shares into `kept`."""
        if self.cut is None:
            return iter(parts)
        cut = self.cut

        def shorter(part: Mapping[str, LoRA]) -> Mapping[str, LoRA]:
            modules, shares = cut(Adapter(part))
            kept.update(shares)
            return modules

        return map(shorter, filter(None, parts))

    @property
    def largest_rank(self) -> int | None:
        """The largest rank of all modules; None if that is known only when all are cut."""
        if self.cut is None:
            return max(lora.rank for lora in self.outline.values())
        if self.cut.ranks is not None:
            return max(self.cut.ranks.values())
        if self.cut.limit.energy is not None or self.cut.limit.rank is None:
            return None
        most = self.cut.limit.rank
        return max(min(most, lora.rank, *lora.shape) for lora in self.outline.values())

    def weights(self, folder: Path) -> contextlib.AbstractContextManager[TensorWriter]:
        """Returns a writer for the file with all factors and extras."""
        return _weights(folder / self.file, self.layout, self.dtype)


class _Parts(ModuleStream):
    """An adapter as a stream: the modules of one group after the other."""

    def __init__(self, adapter: Adapter, groups: Iterable[Sequence[str]]) -> None:
        self._adapter, self._groups = adapter, groups

    @property
    def outline(self) -> Adapter:
        return self._adapter.outline

    @property
    def spread(self) -> bool:
        adapter = self._adapter
        return adapter.in_memory and any(map(is_spread, jax.tree.leaves(dict(adapter))))

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]:
        return map(self._adapter.read, self._groups)


# The rank that each group has of its own, the least that all are written with, and the energy that
# each module has kept.
_Found = tuple[dict[str, int], int, dict[str, float]]


def _filled(ranks: Mapping[str, int], least: int) -> dict[str, int]:
    """Returns the ranks that groups are written with."""
    return {group: max(least, rank) for group, rank in ranks.items()}


def _write_spread(stream: ModuleStream, job: _Job, folder: Path) -> _Found:
    """Gathers factors from the devices of all processes; process 0 writes them."""
    near = _Near(stream)
    if jax.process_index() == 0:
        return exchange(_write_all(near, job, folder))[0]
    for _ in range(job.passes):
        for _ in near:
            pass
    return exchange()[0]


@dataclasses.dataclass(frozen=True)
class _Near:
    """The parts of a stream, gathered from the devices of all processes, which all iterate."""

    stream: ModuleStream

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]:
        for part in self.stream:
            yield multihost_utils.process_allgather(dict(part), tiled=True)


def _write_all(parts: Parts, job: _Job, folder: Path) -> _Found:
    kept: dict[str, float] = {}
    groups, job = list(job.layout.groups), job.planned(parts)
    with (
        _ranked(job.shorten(parts, kept), job, groups, folder / "cut") as (cut, least),
        job.weights(folder) as file,
    ):
        ranks = _write_groups(file, job, groups, cut, least)
        file.metadata = job.layout.metadata(_filled(ranks, least))
    return ranks, least, kept


def _write_share(stream: ModuleStream, job: _Job, folder: Path) -> _Found:
    """Writes this process's share to a file of its own, then all these files into one."""
    kept: dict[str, float] = {}
    index, layout = jax.process_index(), job.layout
    share, owner = stream.share(layout.groups.values())
    own = [group for group, paths in layout.groups.items() if owner[paths[0]] == index]
    files = [folder / f"{i}.part" for i in range(jax.process_count())]
    job = job.planned(share, shared=True)
    parts = job.shorten(share, kept)
    with (
        _ranked(parts, job, own, folder / f"{index}.cut", shared=True) as (cut, least),
        TensorWriter(files[index], layout.keys(own)) as file,
    ):
        ranks = _write_groups(file, job, own, cut, least)
    for other_ranks, other_kept in exchange([ranks, kept]):
        ranks, kept = ranks | other_ranks, kept | other_kept
    if index == 0:
        with job.weights(folder) as file:
            for part in files:
                _copy(part, file)
                part.unlink()
            file.metadata = layout.metadata(_filled(ranks, least))
    return ranks, least, kept


def _copy(part: Path, file: TensorWriter) -> None:
    reader = TensorReader(part)
    for key in reader.tensors:
        with reader.opened() as tensor:
            file.write(key, tensor(key))


@contextlib.contextmanager
def _weights(file: Path, layout: FileLayout, dtype: np.dtype) -> Iterator[TensorWriter]:
    """Yields a writer for the factors; wider extras are written before them, others after them."""
    widths = {key: _written_as(value, dtype).itemsize for key, value in layout.extras.items()}
    ordered = sorted(widths, key=lambda key: -widths[key])
    names = [*layout.keys(layout.groups), *ordered]
    longest = {group: _LONGEST_RANK + i for i, group in enumerate(layout.groups)}
    with TensorWriter(file, names, layout.metadata(longest)) as tensors:
        for wide in (True, False):
            for key in ordered:
                if (widths[key] > dtype.itemsize) == wide:
                    _write(tensors, key, np.asarray(layout.extras[key]), dtype)
            if wide:
                yield tensors


# --- One rank for all modules ---------------------------------------------------------------
@contextlib.contextmanager
def _ranked(
    parts: Parts, job: _Job, groups: Sequence[str], file: Path, shared: bool = False
) -> Iterator[tuple[Parts, int]]:
    """Yields the parts, and the least rank to write them in.

    If all get the largest rank that a cut by energy leaves, that is known only after the last of
    them: they wait in a temporary file.

    Args:
        parts: modules of the groups.
        job: form in which they are written.
        groups: the groups.
        file: the temporary file.
        shared: True if other processes write others.
    """
    least = job.largest_rank if job.uniform else 1
    if least is not None:
        yield parts, least
        return
    paths = [path for group in groups for path in job.layout.groups[group]]
    ranks = _store(_complete(parts, paths), paths, job.outline, file)
    top = max(ranks, default=1)
    if shared:
        top = max(exchange(top))
    try:
        yield _stored(paths, job.outline, file), top
    finally:
        file.unlink()


def _store(parts: Parts, paths: Sequence[str], outline: Adapter, file: Path) -> list[int]:
    """Writes modules to a file; returns their ranks."""
    dtype = widest(np.dtype(np.float32), *(outline[path].dtype for path in paths))
    ranks = []
    with TensorWriter(file, [f"{x}:{path}" for path in paths for x in "ab"]) as tensors:
        for part in parts:
            for path, lora in part.items():
                ranks.append(lora.rank)
                for name, factor in (("a", lora.a), ("b", lora.b)):
                    tensors.write(f"{name}:{path}", np.asarray(factor).astype(dtype, copy=False))
    return ranks


def _stored(paths: Iterable[str], outline: Adapter, file: Path) -> Parts:
    """Yields the modules of a file that `_store` has written, one by one."""
    with TensorReader(file).opened() as tensor:
        for path in paths:
            a, b = tensor(f"a:{path}"), tensor(f"b:{path}")
            yield {path: LoRA(a=a, b=b, kind=outline[path].kind)}


# --- Groups ---------------------------------------------------------------------------------
def _write_groups(
    file: TensorWriter, job: _Job, groups: Iterable[str], parts: Parts, least: int
) -> dict[str, int]:
    """Writes the modules of some groups as they come; returns the groups' own ranks.

    Args:
        file: the file to write.
        job: form in which the modules are written.
        groups: the groups.
        parts: their modules.
        least: least rank to write a group with.
    """
    sizes = {group: len(job.layout.groups[group]) for group in groups}
    group_of = {path: group for group in sizes for path in job.layout.groups[group]}
    waiting: dict[str, dict[str, LoRA]] = {}
    ranks: dict[str, int] = {}

    def write_complete(part: Mapping[str, LoRA]) -> None:
        for path, lora in part.items():
            group = group_of[path]
            loras = waiting.setdefault(group, {})
            loras[path] = lora
            if len(loras) == sizes[group]:
                ranks[group] = max(lora.rank for lora in loras.values())
                complete, rank = waiting.pop(group), max(least, ranks[group])
                for key, value in job.layout.tensors(group, complete, rank, job.dtype):
                    _write(file, key, value, job.dtype)

    for part in _complete(parts, group_of):
        write_complete(part)
        for loras in waiting.values():
            for path in loras.keys() & part.keys():  # a view would keep the whole part
                lora = loras[path]
                loras[path] = dataclasses.replace(lora, a=np.array(lora.a), b=np.array(lora.b))
        del part  # before the next one is made
    return ranks


def _complete(parts: Parts, paths: Iterable[str]) -> Parts:
    """Yields the parts of a stream whose modules are these, each once.

    Raises:
        MismatchError: they are not.
    """
    missing = set(paths)
    for part in parts:
        for path in part:
            if path not in missing:
                raise MismatchError(
                    f"module {path!r} came twice, or is not in the stream's outline"
                )
            missing.remove(path)
        yield part
        del part  # before the next one is made
    if missing:
        raise MismatchError(
            f"the stream ended without {len(missing)} modules of its outline "
            f"(first: {min(missing)!r})"
        )


# --- Tensors --------------------------------------------------------------------------------
def _write(file: TensorWriter, key: str, value: np.ndarray, dtype: np.dtype) -> None:
    file.write(key, _cast(key, value, _written_as(value, dtype)))


def _written_as(value: Array, dtype: np.dtype) -> np.dtype:
    """Returns the dtype in which a tensor is written."""
    return value.dtype if _is_whole(value.dtype) else dtype


def _cast(key: str, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the tensor in another dtype, if that can hold the largest of its magnitudes."""
    if _is_whole(dtype):
        return value
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.maximum(value.max(initial=0), -value.min(initial=0))
        if np.isfinite(largest.astype(dtype)):
            return value.astype(dtype, copy=False)
    if np.isfinite(largest):
        raise FormatError(f"tensor {key!r} overflows {dtype}; choose bfloat16 or float32")
    raise FormatError(f"tensor {key!r} has NaN or infinite values, so it is not written")


def _is_whole(dtype: np.dtype) -> bool:
    return np.issubdtype(dtype, np.integer) or dtype == np.bool_
