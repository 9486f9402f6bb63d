"""Merges and sweeps as jobs: from files to files, with progress handed in."""

import dataclasses
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import platformdirs
import psutil

from coremerge_jax.errors import CoreMergeWarning, FormatError, MismatchError, RecipeError
from coremerge_jax.io.adapter_writer import Written
from coremerge_jax.io.formats import Layouts, find_merge_target, merge_targets, open_adapter
from coremerge_jax.io.outputs import ADAPTER, check_file, check_output, find_foreign, refuse_inputs
from coremerge_jax.io.peft.writer import write_peft
from coremerge_jax.io.untrusted import refuse_url
from coremerge_jax.lora import Adapter, AdapterSource, LoRA, ModuleStream
from coremerge_jax.merging.cost import Machine, expected_seconds
from coremerge_jax.merging.groups import label
from coremerge_jax.merging.mesh import make_mesh
from coremerge_jax.merging.metric import in_words
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.processes import agreed
from coremerge_jax.merging.projected import project
from coremerge_jax.merging.stream import MergeStream
from coremerge_jax.recipe import Recipe, Resolved, build
from coremerge_jax.record import (
    describe_sources,
    describe_statistics,
    provenance,
    warn_of_copies,
)

if TYPE_CHECKING:
    from coremerge_jax.search.sweeping import Metrics, Record, Sweep

# Memory for compiling: a first start against a second one in benchmarks/end_to_end.py, rounded up.
_COMPILATION = 384 * 2**20  # bytes

# Files and folders in the output of a sweep.
LOG, TABLE, PLOT, BEST = "sweep.jsonl", "sweep.csv", "sweep.svg", "best"


class Progress(Protocol):
    """A display of the stages of a job."""

    def __call__(
        self, stage: str, total: int | None = None
    ) -> AbstractContextManager[Callable[[], None]]:
        """Shows a stage until the context ends.

        Args:
            stage: its name.
            total: number of steps, if known.

        Returns:
            A context that yields a function, to be called after each step.
        """
        ...


@contextmanager
def silent(stage: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Shows no progress."""
    del stage, total
    yield lambda: None


class _Timed:
    """A `Progress` that measures the seconds of each stage."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        start = time.perf_counter()
        with self._progress(stage, total) as advance:
            yield advance
        self.seconds[stage] = round(time.perf_counter() - start, 3)


# --- Merges ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Signature:
    """Modules of equal shape, of which the adapters have equal ranks.

    Attributes:
        shape: m and n.
        ranks_in: ranks of the adapters that have these modules.
        ranks_out: rank of each merged module, by path.
    """

    shape: tuple[int, int]
    ranks_in: tuple[int, ...]
    ranks_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Report:
    bytes: int
    signatures: list[Signature]
    seconds: Mapping[str, float]
    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-like data."""
        return {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merged(_Report):
    """Result of a merge that was written.

    Attributes:
        output: the folder.
        bytes: size of its files.
        signatures: the merged modules.
        energy_kept: share of energy that each module kept, by path; empty if nothing was to be cut.
        cut_by: words for the norm whose square is that energy; None if nothing was to be cut.
        auto_scale: automatic scales, by words for the kind of modules; empty if there are none.
        seconds: time of each stage, and of compiling.
        recipe: the recipe.
    """

    output: str
    energy_kept: Mapping[str, float]
    cut_by: str | None
    auto_scale: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergePlan(_Report):
    """Result of a dry run: a merge that was checked, and not made.

    Attributes:
        bytes: largest size of the weights in the output.
        signatures: the merged modules; of their ranks, the largest that a cut may leave.
        decisions: automatic decisions: ``"precision"`` of the computation, number of ``"batches"``,
            and of batches that are worked on ``"at_once"``; ``"cut_by"``, as in `Merged`; and for
            each group of modules with the same compiled programs, ``"groups"``, the paths and the
            engine's `Decisions`.
        cost: expected ``"operations"``, ``"bytes"`` read and written, bytes of ``"memory"``,
            number of compiled ``"programs"``, and ``"seconds"`` by stage. Of a merge that several
            processes share, the cost of the share of process 0.
        seconds: time that each stage of the dry run took.
        recipe: the recipe.
    """

    decisions: Mapping[str, Any]
    cost: Mapping[str, Any]


def run_merge(
    resolved: Resolved,
    output: str | Path | None = None,
    *,
    mesh: str | None = None,
    max_memory: int | None = None,
    base_config: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Merged | MergePlan | None:
    """Merges the adapters of a recipe into a folder. All that can fail early is done first.

    Several processes of a job (`jax.distributed`) share the merge if all of them call this.

    Args:
        resolved: the recipe.
        output: the folder to write. Without one, the run is dry.
        mesh: arrangement of the devices, ``ROWS`` or ``ROWSxCOLUMNS``; by default, one a row.
        max_memory: bytes that the whole process may take.
        base_config: config.json of the base model, its folder, or its GGUF file, for formats that
            need it.
        force: replace a folder that coremerge wrote.
        dry_run: check everything, write nothing.
        progress: display of the stages.

    Returns:
        The result, or for a dry run the plan; in processes other than the first, None.

    Raises:
        CoreMergeError: as `open_adapter`, `merge` and the writer of the format.
        MemoryError: a single module needs more than ``max_memory``.
    """
    recipe, stage = resolved.recipe, _Timed(progress)
    inputs = [*_inputs(recipe), *([base_config] if base_config else [])]
    with stage("open"), agreed():
        kind = find_merge_target(recipe.to).name if recipe.to else None
        if output is not None:
            check_output(output, kind=kind, inputs=inputs, force=force)
        adapters = [open_adapter(source) for source in recipe.adapters]
        to = recipe.to or _own_format(adapters)
        more = _more_options(to, base_config)
        if output is not None:
            kind = find_merge_target(to).name
            check_output(output, kind=kind, inputs=inputs, force=force)
        devices = make_mesh(mesh)
        taken = psutil.Process().memory_info().rss + _COMPILATION
        room = None if max_memory is None else _room_for_batches(max_memory, taken)
        stream = resolved.stream(adapters, mesh=devices, max_memory=room)
        target = find_merge_target(to)
        if isinstance(target, Layouts):  # refuses what the format cannot hold
            target.layout(stream.outline, **more)
        metric = resolved.metric(adapters)
        if metric is not None:
            metric.check(stream.outline)
    cut_by = None if recipe.limit.nothing else in_words(metric, stream.outline)
    is_first = jax.process_index() == 0  # the hosts of others may not see the output yet
    if output is None or dry_run:
        return _plan(resolved, stream, taken, stage, cut_by) if is_first else None
    more |= {"to": to, "force": force, "metric": metric}
    written = _write(resolved, adapters, stream, output, stage, **more)
    if not is_first:
        return None
    for note in _idle_adapters(stream):
        warnings.warn(note, CoreMergeWarning, stacklevel=2)
    return Merged(
        bytes=sum(file.stat().st_size for file in Path(output).iterdir()),
        signatures=_signatures(stream.adapters, stream.outline, written.ranks),
        seconds=stage.seconds,
        recipe=recipe,
        auto_scale=stream.scales_in_words,
        output=str(output),
        energy_kept=written.kept,
        cut_by=cut_by,
    )


def _inputs(recipe: Recipe) -> list[str]:
    """Returns the folders and files that a merge by a recipe reads."""
    return [*recipe.adapters, *(recipe.statistics or ())]


def _own_format(adapters: Sequence[Adapter]) -> str:
    """Returns the format that all adapters have, if a merge can be written in it; else PEFT's."""
    first, *others = {adapter.metadata.format for adapter in adapters}
    return first if first in merge_targets() and not others else "peft"


def _more_options(to: str, base_config: str | Path | None) -> dict[str, Any]:
    """Returns the options of one format only, if they are for this one."""
    if base_config is None:
        return {}
    if "base_config" not in find_merge_target(to).targets[to]:
        takers = [x for x in merge_targets() if "base_config" in find_merge_target(x).targets[x]]
        raise RecipeError(f"--base-config is for --to {' or '.join(takers)}, not for {to}")
    return {"base_config": base_config}


def _room_for_batches(limit: int, taken: int) -> int:
    """Returns the bytes that are left for data; ``taken`` is for the program and compilation."""
    if limit <= taken:
        raise RecipeError(
            f"max_memory {limit / 2**20:.0f} MiB: the program itself and compilation take "
            f"{taken / 2**20:.0f} MiB; give more"
        )
    return limit - taken


def _plan(
    resolved: Resolved,
    stream: MergeStream,
    taken: int,
    stage: _Timed,
    cut_by: str | None,
) -> MergePlan:
    recipe = resolved.recipe
    with stage("trace"):
        merged = stream.outline
    with stage("check"):
        ranks, size = _largest(recipe, merged)
        signatures = _signatures(stream.adapters, merged, ranks)
    with stage("measure the machine"):
        machine = Machine.measure(stream.workers)
    own, programs = stream.own, stream.programs
    costs = own.costs()
    seconds = expected_seconds(costs, resolved.rule, machine, stream.workers, programs)
    # The outline traced one program of each signature. A merge traces all of its programs, and
    # then lowers them, which takes as long.
    trace = 2 * stage.seconds["trace"] * programs / max(len(signatures), 1)
    seconds = {"trace": trace, **seconds}
    with computing(recipe.precision) as dtype:
        precision = dtype.name
    return MergePlan(
        bytes=size * jnp.dtype(recipe.dtype).itemsize,
        signatures=signatures,
        seconds=stage.seconds,
        recipe=recipe,
        decisions={
            "precision": precision,
            "batches": len(own),
            "at_once": own.workers,
            "cut_by": cut_by,
            "groups": [
                {"modules": paths, **decisions.to_dict()}
                for paths, decisions in stream.decisions().items()
            ],
        },
        cost={
            "operations": {
                name: sum(getattr(one, name) for one in costs) for name in ("products", "core")
            },
            "bytes": {
                name: sum(getattr(one, name) for one in costs) for name in ("read", "written")
            },
            "memory": taken + own.memory,
            "programs": programs,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        },
    )


def _largest(recipe: Recipe, merged: Adapter) -> tuple[dict[str, int], int]:
    """Returns the largest ranks and number of parameters that the cuts of a recipe may leave."""
    shapes = {path: lora.shape for path, lora in merged.items()}
    given = {path: lora.rank for path, lora in merged.items()}
    ranks, limit = recipe.limit.most(given), recipe.limit
    if limit.whole_model and not recipe.value("uniform_rank"):
        return ranks, limit.largest(shapes, given)
    if recipe.value("uniform_rank"):
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    return ranks, sum(rank * sum(shapes[path]) for path, rank in ranks.items())


def _write(
    resolved: Resolved,
    adapters: Sequence[Adapter],
    stream: MergeStream,
    output: str | Path,
    stage: _Timed,
    *,
    to: str,
    **options: Any,
) -> Written:
    """Merges and writes.

    Args:
        resolved: the recipe.
        adapters: its adapters.
        stream: the merge.
        output: the folder to write.
        stage: display of the stages.
        to: format of the output.
        **options: of its `save`, beside those in the recipe.
    """
    keep_compiled_programs()
    save: Any = find_merge_target(to).save  # of a stream
    passes = 2 if resolved.recipe.limit.whole_model else 1
    total = passes * len(stream.own)
    with _compile_seconds() as compiled, stage("merge", total=total) as advance:
        sources, scales = describe_sources(resolved.recipe, adapters), stream.scales_in_words
        if jax.process_index() == 0:
            warn_of_copies(sources)
        written: Written = save(
            _Watched(stream, advance),
            output,
            to=to,
            card=provenance(resolved, sources, scales),
            **resolved.arguments_of("save_peft"),
            **options,
        )
    stage.seconds["compile"] = round(compiled["compile"], 3)
    return written


@dataclasses.dataclass
class _Watched(ModuleStream):
    """A merge that reports each part, and ends in an error if nothing has an effect."""

    stream: MergeStream
    advance: Callable[[], None]

    @property
    def outline(self) -> Adapter:
        return self.stream.outline

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.stream.folders

    @property
    def processes(self) -> Mapping[int, int]:
        return self.stream.processes

    @property
    def spread(self) -> bool:
        return self.stream.spread

    def share(
        self, together: Iterable[Sequence[str]] | None = None
    ) -> tuple[ModuleStream, dict[str, int]]:
        share, owner = self.stream.share(together)
        return _Watched(share, self.advance), owner

    def __iter__(self) -> Iterator[Mapping[str, LoRA]]:
        for part in self.stream:
            yield part
            self.advance()
        if self.stream.effects.nothing:
            causes = "; ".join(dict.fromkeys(_idle_adapters(self.stream)))
            raise MismatchError(
                "all merged updates are zero, so nothing is written: "
                f"{causes or 'weights or scale are too small, or the adapters cancel'}"
            )


def _idle_adapters(stream: MergeStream) -> Iterator[str]:
    """Yields a sentence for each adapter that had no effect, with the cause."""
    for t in stream.effects.idle:
        cause = "all its updates are zero, as of one that was never trained"
        if stream.adapters[t].metadata.alpha == 0:
            cause = "its alpha is 0; set the one that it was trained with (lora_alpha)"
        yield f"{label(stream.adapters, t)} has no effect: {cause}"


def _signatures(
    adapters: Sequence[AdapterSource], merged: Adapter, ranks: Mapping[str, int]
) -> list[Signature]:
    groups = defaultdict(list)
    outlines = [adapter.outline for adapter in adapters]
    for path, lora in merged.items():
        ranks_in = tuple(adapter[path].rank for adapter in outlines if path in adapter)
        groups[lora.shape, ranks_in].append(path)
    return [
        Signature(shape, ranks_in, {path: ranks[path] for path in paths})
        for (shape, ranks_in), paths in groups.items()
    ]


# --- Sweeps ---------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Swept:
    """Result of a sweep that was written.

    Attributes:
        output: the folder.
        sweep: all candidates.
        table: the file with all records.
        best: the folder with the best candidate; None if each candidate is in a folder of its own.
    """

    output: str
    sweep: "Sweep"
    table: Path
    best: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-like data."""
        return {"output": self.output, "candidates": self.sweep.rows()}


def run_sweep(
    resolved: Resolved,
    output: str | Path,
    values: Mapping[str, Sequence[Any]],
    *,
    evaluate: "Callable[[Adapter], Metrics] | None" = None,
    evaluated_by: Any = None,
    method: str = "grid",
    objective: str | None = None,
    maximize: bool = True,
    progress: bool = False,
) -> Swept:
    """Merges the adapters of a recipe with many values of parameters, into a folder.

    The folder gets a log, from which an interrupted sweep continues, a table, and a plot if
    matplotlib is installed.

    Args:
        resolved: the recipe.
        output: the folder to write.
        values: values to try, by the name of a parameter (`search.parameters`) or ``"scale"``.
        evaluate: gets a merged adapter, and returns a number, or numbers by name. The best
            adapter is written. Without it, every candidate is written.
        evaluated_by: JSON-like data that identifies ``evaluate`` and what it reads. A sweep that
            finds another in the log of the folder is refused.
        method: way to search, as ``NAME[:key=value,...]``.
        objective: name of the number that is compared; by default the first.
        maximize: True if larger numbers are better.
        progress: show progress on stderr, if that is a terminal.

    Raises:
        CoreMergeError: as `open_adapter`, `search.sweep` and `write_peft`; or the folder is that of
            another sweep.
        RecipeError: there is nothing to try; or candidates are to be compared without
            ``evaluate``.
    """
    # Merges do without optax.
    from coremerge_jax.search.methods import METHODS, Line
    from coremerge_jax.search.sweeping import Search, measured

    output, way = Path(output), build("method", method, METHODS)
    if not values:
        raise RecipeError("nothing to try: give --values, such as --values scale=0.5:2:0.5")
    if evaluate is None and (isinstance(way, Line) or objective or not maximize):
        raise RecipeError("line, objective and minimize compare candidates: give --evaluate")
    recipe = resolved.recipe
    if recipe.to not in (None, "peft"):
        raise RecipeError(
            f"--to {recipe.to}: a sweep writes PEFT adapters; then run coremerge convert "
            f"--to {recipe.to}"
        )
    _check_sweep_output(output, _inputs(recipe))
    keep_compiled_programs()
    adapters = [open_adapter(source) for source in recipe.adapters]
    sources, key = describe_sources(recipe, adapters), jax.random.key(recipe.seed)
    warn_of_copies(sources)
    metric = resolved.metric(adapters)
    projected = project(
        adapters,
        space=resolved.space,
        statistics=resolved.statistics,
        **resolved.arguments_of("project"),
    )
    tried = {"scale": [recipe.scale], **values}
    search = Search(projected, resolved.rule, tried, way, objective, maximize, key)
    output.mkdir(parents=True, exist_ok=True)

    def write(candidate: Resolved, merged: Adapter | MergeStream, name: str) -> None:
        scales = merged.scales_in_words if isinstance(merged, MergeStream) else {}
        if metric is not None:
            metric.check(merged.outline)
        write_peft(
            merged,
            output / name,
            force=True,  # written by this sweep, before it was interrupted
            metric=metric,
            card=provenance(candidate, sources, scales),
            **candidate.arguments_of("save_peft"),
        )

    def folder(record: "Record") -> str:
        return ",".join(f"{name}={record.parameters[name]}" for name in values)

    def write_candidate(record: "Record", merged: Adapter) -> Mapping[str, float]:
        write(resolved.with_rule(record.rule, record.scale), merged, folder(record))
        return {}

    def is_written(record: "Record") -> bool:
        place = output / folder(record)
        return evaluate is not None or (place.is_dir() and not find_foreign(place, ADAPTER))

    judge = measured(evaluate) if evaluate else write_candidate
    subject = _sweep_subject(resolved, evaluated_by, writes=evaluate is None)
    records = search.run(judge, output / LOG, subject, is_written)
    result = search.collect(records, progress=progress)
    if evaluate:
        best = resolved.with_rule(result.best.rule, result.best.scale)
        write(best, best.stream(adapters), BEST)
    result.to_csv(output / TABLE)
    if evaluate and find_spec("matplotlib"):
        result.plot(output / PLOT)
    return Swept(str(output), result, output / TABLE, output / BEST if evaluate else None)


def _sweep_subject(resolved: Resolved, evaluated_by: Any, *, writes: bool) -> dict[str, Any]:
    """Returns what the records of a sweep depend on, beside rules, space, key and adapters.

    Args:
        resolved: the recipe.
        evaluated_by: what identifies the function that evaluates.
        writes: True if candidates are written, so that cuts and number format count too.
    """
    recipe = resolved.recipe
    names = ["extras", *(resolved.arguments_of("save_peft") if writes else ())]
    hashes = [x["sha256"] for x in describe_statistics(recipe)]
    options = {name: recipe.value(name) for name in names}
    weights = {"weights": list(recipe.weights or ())}
    return {"evaluation": evaluated_by, **weights, "statistics": hashes, **options}


def _check_sweep_output(output: Path, inputs: Sequence[str]) -> None:
    """Refuses to mix results with files that are not of a sweep, or to touch an input."""
    from coremerge_jax.search.sweeping import TABLE_MARK

    refuse_url(output)
    refuse_inputs(output, inputs)
    if not output.is_dir():
        check_output(output, kind=ADAPTER)
        return
    for name in (LOG, TABLE, PLOT, BEST):
        if (output / name).is_symlink():
            raise FormatError(f"{output / name}: is a symbolic link; choose another output")
    if not (output / LOG).is_file() and any(output.iterdir()):
        raise FormatError(f"{output}: has files but no {LOG}; choose another output")
    if (output / TABLE).exists():
        check_file(output / TABLE, mark=TABLE_MARK, force=True)
    if (output / BEST).exists():
        check_output(output / BEST, kind=ADAPTER, inputs=inputs, force=True)


# --- Compiled programs ----------------------------------------------------------------------
def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs in the user's cache folder, if it keeps them nowhere yet."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # made at run time
        with suppress(RuntimeError):  # no home folder
            folder = platformdirs.user_cache_path("coremerge") / "jax"
            jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def _compile_seconds() -> Iterator[Mapping[str, float]]:
    """Yields a mapping whose ``"compile"`` counts the seconds that JAX compiles meanwhile."""
    seconds = {"compile": 0.0}

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds["compile"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
