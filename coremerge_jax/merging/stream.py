"""Merges part by part: batches of modules are read, merged and given out, a few at a time."""

import contextlib
import dataclasses
import functools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.linalg.threads import processors
from coremerge_jax.lora import Adapter, Array, LoRA, Metadata
from coremerge_jax.merging.checks import refuse_values
from coremerge_jax.merging.cost import Cost, batch_size, cost, fitting_workers
from coremerge_jax.merging.groups import Group, Scratch, label
from coremerge_jax.merging.mesh import Devices, is_host, rows_like
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.processes import failing_together, gather, owners, total
from coremerge_jax.merging.program import BITS, Facts, Inputs, Settings, count_stack, merge_stack
from coremerge_jax.rules import Chain, ties, ties_above
from coremerge_jax.spaces import Space


class MergeStream:
    """A merge that happens while it is iterated over: see `merge_stream`.

    Attributes:
        processes: those that share the merge, and how many devices each has; empty if it is not
            shared, or if this is the share of one.
        effects: what was found out by the last iteration, of all shares; nothing of what is
            traced.
    """

    def __init__(
        self,
        job: "Job",
        groups: list[Group],
        max_memory: int | None,
        metadata: Metadata,
        extras: Mapping[str, Array],
        processes: Mapping[int, int],
        shared: bool = False,
    ) -> None:
        self._job, self._groups, self._max_memory = job, groups, max_memory
        self._metadata, self._extras, self._shared = metadata, extras, shared
        self._workers, self._batches = _batches(job, groups, max_memory)
        self.processes = processes
        self.effects = Effects([0] * len(job.adapters))

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The adapters that are merged: those of a weight other than 0."""
        return self._job.adapters

    def __len__(self) -> int:
        """Returns the number of parts."""
        return len(self._batches)

    @property
    def workers(self) -> int:
        """The number of parts that are worked on at once."""
        return self._workers

    @property
    def memory(self) -> int:
        """Bytes that the parts on their way take together, at most."""
        return (self._workers + 1) * max(
            (
                one.held * batch.length + self._job.rows * one.work
                for one, batch in zip(self.costs(), self._batches, strict=True)
            ),
            default=0,
        )

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that the adapters are still to be read from."""
        return tuple(folder for adapter in self._job.adapters for folder in adapter.folders)

    @property
    def spread(self) -> bool:
        """True if the merged factors are on devices of several processes."""
        return self._job.grid is not None and len(self._job.grid.processes) > 1

    def costs(self) -> list[Cost]:
        """Returns the cost of each part, in the order of the parts."""
        return [cost(batch, self._job.rule, self._job.space) for batch in self._batches]

    def __iter__(self) -> Iterator[dict[str, LoRA]]:
        """Yields the merged modules, some at a time; each exactly once."""
        job = self._job
        if any(isinstance(part, ties) and part.scope == "model" for part in job.rule.rules):
            over_all = total if self._shared else lambda *counts: counts
            rule = _with_thresholds(job, self._batches, self._workers, over_all)
            job = dataclasses.replace(job, rule=rule)
        self.effects.reset()
        for batch, (a, b, facts) in _each(job.merge, self._batches, self._workers):
            if facts is not None:
                self.effects.add(batch, facts)
            yield job.modules(batch, *job.apart(batch, a, b))
        if self._shared:
            self.effects.add_up()

    def collect(self) -> Adapter:
        """Collects the whole merge in memory."""
        if not self.processes:
            return self._adapter({path: lora for part in self for path, lora in part.items()})
        share, owner = self.share()
        with failing_together():
            own = {path: lora for part in share for path, lora in part.items()}
        return self._adapter(gather(own, self.outline, owner))

    @property
    def own(self) -> "MergeStream":
        """The share of this process, if no modules have to stay together."""
        return self.share()[0] if self.processes else self

    def share(
        self, together: Iterable[Sequence[str]] | None = None
    ) -> "tuple[MergeStream, dict[str, int]]":
        """Returns the share of this process in a merge, and the process of every module.

        Args:
            together: the paths of all modules, in lists of those that one process has to do; by
                default, each by itself.

        Returns:
            A stream of some modules; and by path, the process that has it.
        """
        costs: dict[str, float] = {}
        for group in self._groups:
            one = cost(group, self._job.rule, self._job.space)
            each = one.products + one.core + one.read + one.written
            costs |= dict.fromkeys(group.paths, each / one.modules)
        # In the order of batches, so that a process has few kinds of modules to compile for.
        order = {path: i for i, path in enumerate(costs)}
        units = [[path] for path in order]
        if together is not None:
            units = sorted(map(list, together), key=lambda unit: order[unit[0]])
        processes = sorted(self.processes)
        rows = [self.processes[process] for process in processes]
        found = owners([sum(costs[path] for path in unit) for unit in units], rows)
        owner = {path: processes[i] for unit, i in zip(units, found, strict=True) for path in unit}
        own = [
            group.only(lambda path: owner[path] == jax.process_index()) for group in self._groups
        ]
        groups = [group for group in own if group.paths]
        share = MergeStream(
            self._job, groups, self._max_memory, self._metadata, self._extras, {}, shared=True
        )
        share.effects = self.effects
        return share, owner

    @functools.cached_property
    def outline(self) -> Adapter:
        """The merged adapter, with shapes and dtypes in place of its factors."""
        modules: dict[str, LoRA] = {}
        for batch in self._batches:
            a, b = (
                [jax.ShapeDtypeStruct(x.shape[1:], x.dtype)] * batch.length
                for x in self._job.shapes(batch)
            )
            modules |= self._job.modules(batch, a, b)
        return self._adapter(modules)

    def _adapter(self, modules: Mapping[str, LoRA]) -> Adapter:
        order = dict.fromkeys(path for adapter in self._job.outlines for path in adapter)
        return Adapter(
            {path: modules[path] for path in order if path in modules},
            metadata=self._metadata,
            extras=self._extras,
        )


@dataclasses.dataclass
class Effects:
    """The effects of a merge, counted in modules.

    Attributes:
        alive: for each adapter, in how many modules its update is not zero.
        merged: how many merged updates are not zero.
        modules: how many modules were merged.
    """

    alive: list[int]
    merged: int = 0
    modules: int = 0

    def reset(self) -> None:
        """Starts to count anew."""
        self.alive, self.merged, self.modules = [0] * len(self.alive), 0, 0

    def add_up(self) -> None:
        """Adds what other processes have counted."""
        *alive, self.merged, self.modules = map(
            int, total(np.asarray([*self.alive, self.merged, self.modules]))[0]
        )
        self.alive = alive

    def add(self, batch: Group, facts: Facts) -> None:
        """Counts a batch; the modules that only fill it up are left out."""
        number = len(batch.paths)
        for tasks, alive in zip(batch.tasks, facts.alive, strict=False):
            for t in tasks[alive]:
                self.alive[t] += 1
        self.merged += int(np.count_nonzero(facts.peak[:number]))
        self.modules += number

    @property
    def idle(self) -> list[int]:
        """The adapters without any effect."""
        return [t for t, count in enumerate(self.alive) if self.modules and not count]

    @property
    def nothing(self) -> bool:
        """True if all merged updates are zero."""
        return self.modules > 0 and not self.merged


def _batches(job: "Job", groups: list[Group], max_memory: int | None) -> tuple[int, list[Group]]:
    """Returns the number of batches to work on at once, and the batches."""
    rule, space, rows = job.rule, job.space, job.rows
    if job.traced:
        return 1, [batch for group in groups for batch in group.split(len(group.paths), rows)]
    workers = _workers(job.grid)
    if max_memory is not None and groups:
        workers = fitting_workers(groups, rule, space, workers, max_memory, rows)
    sizes = [batch_size(group, rule, space, workers, max_memory, rows) for group in groups]
    pairs = zip(groups, sizes, strict=True)
    return workers, [batch for group, size in pairs for batch in group.split(size, rows)]


def _workers(grid: Devices | None) -> int:
    """Returns the number of batches to work on at once."""
    if grid and (grid.axis or len(grid.processes) > 1):
        return 1  # devices that wait for each other have to do all work in one order
    if grid or jax.default_backend() != "cpu":
        return 2  # one is read while the other is computed
    return processors()


def _each(fn: Callable, batches: list[Group], workers: int) -> Iterator[tuple[Group, Any]]:
    """Yields batches in order with ``fn`` of each, computed by threads, but not far ahead."""
    if workers == 1 or len(batches) == 1:
        yield from ((batch, fn(batch)) for batch in batches)
        return
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread

    def run(batch: Group) -> Any:
        with jax.default_device(device):
            return fn(batch)

    ahead: deque[tuple[Group, Future]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="coremerge") as pool:
        try:
            for batch in batches:
                ahead.append((batch, pool.submit(run, batch)))
                if len(ahead) > workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class Job:
    """Arguments of a merge, for any of its modules."""

    adapters: Sequence[Adapter]
    places: np.ndarray  # of the adapters in the list that the user gave
    rule: Chain
    space: Space
    weights: Any
    scales: Mapping[str, Any]
    key: jax.Array | None
    precision: str | None
    grid: Devices | None
    scratch: Scratch = dataclasses.field(default_factory=Scratch)

    @property
    def rows(self) -> int:
        """The number of modules that are worked on side by side."""
        return self.grid.rows if self.grid else 1

    @functools.cached_property
    def outlines(self) -> list[Adapter]:
        """The adapters without their factors."""
        return [adapter.outline for adapter in self.adapters]

    @functools.cached_property
    def traced(self) -> list[Any]:
        """The adapters' factors and the parameters that a transformation of JAX traces."""
        adapters = [x for x in self.adapters if type(x) is Adapter]
        leaves = jax.tree.leaves((adapters, self.rule, self.weights, self.scales))
        return [x for x in leaves if isinstance(x, jax.core.Tracer)]

    def merge(self, batch: Group) -> tuple[Array, Array, Facts | None]:
        """Merges a batch of modules to factors ``(L, r, n)`` and ``(L, m, r)``, and facts."""
        given = batch.stack(self.adapters, self.scratch)
        with (
            self.prepared(batch, *given) as (arrays, settings),
            _first_calls("merge", self.rule, *given, settings),
        ):
            a, b, facts = self._run(arrays, settings)
            if self.traced:
                return a, b, None
            self._check(batch, facts, given[1].dtype)
            # Waits, as B may be computed from memory that the next batch overwrites.
            if not all(map(is_host, given)):
                return *jax.block_until_ready((a, b)), facts
            return given[0] if a is arrays.a else np.asarray(a), np.asarray(b), facts

    def _check(self, batch: Group, facts: Facts | None, dtype: np.dtype) -> None:
        """Refuses what is not finite: one of the factors, or what is merged of them."""
        if facts is None or (np.isfinite(facts.peak) & facts.finite).all():
            return
        refuse_values(self.adapters, batch.paths, label)
        path = batch.padded(batch.paths)[int(np.argmin(np.isfinite(facts.peak) & facts.finite))]
        raise MismatchError(
            f"module {path!r}: the merged update overflows {dtype}, though all factors are finite; "
            "choose smaller weights or scale, or cast the adapters to a wider dtype"
        )

    def _run(self, arrays: "Inputs", settings: "Settings") -> tuple[Any, Any, Facts | None]:
        merge = partial(merge_stack, self.rule, arrays, self.key, settings=settings)
        if self.traced or (self.grid and len(self.grid.processes) > 1):
            return *merge()[:2], None
        a, b, good, facts = merge(keep_a=True)
        if not jax.device_get(good).all():
            a, b, _, facts = merge()
        return arrays.a if a is None else a, b, jax.device_get(facts)

    def apart(self, batch: Group, a: Any, b: Any) -> tuple[Sequence, Sequence]:
        """Returns the modules of merged stacks, without what only fills up."""
        if self.grid is None:
            return list(a), list(b)
        if self.traced:
            return self.grid.take_apart(a, b, batch.shape)
        if is_host(a):
            m, n = batch.shape
            return [x[:, :n] for x in a], [x[:m] for x in b]
        pairs = zip(batch.paths, batch.tasks, strict=True)
        return rows_like(a, b, [self._on_device(path, tasks) for path, tasks in pairs])

    def _on_device(self, path: str, tasks: np.ndarray) -> LoRA:
        """Returns a module of the first adapter that is on devices."""
        found = (self.adapters[t][path] for t in tasks if type(self.adapters[t]) is Adapter)
        return next(lora for lora in found if not any(map(is_host, (lora.a, lora.b))))

    def count(self, batch: Group, **what: Any) -> tuple[Any, ...]:
        """Counts a batch for `_with_thresholds`."""
        a, b = batch.stack(self.adapters)
        with (
            self.prepared(batch, a, b) as (arrays, settings),
            _first_calls("count", self.rule, a, b, settings),
        ):
            once = np.arange(batch.length) < len(batch.paths)
            counts = count_stack(self.rule, arrays, self.key, settings, once, **what)
            return counts if self.traced else tuple(map(np.asarray, counts))

    def shapes(self, batch: Group) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the results of `merge`."""
        with self.prepared(batch, *batch.shapes(self.outlines)) as (arrays, settings):
            merge = partial(merge_stack, settings=settings, keep_a=True)  # traced once for both
            a, b, *_ = jax.eval_shape(merge, self.rule, arrays, self.key)
        a, (m, n) = arrays.a if a is None else a, batch.shape
        return (
            jax.ShapeDtypeStruct((*a.shape[:-1], n), a.dtype),
            jax.ShapeDtypeStruct((b.shape[0], m, b.shape[2]), b.dtype),
        )

    @contextlib.contextmanager
    def prepared(self, batch: Group, a: Any, b: Any) -> Iterator[tuple["Inputs", "Settings"]]:
        """Enters the precision to compute in, and yields the inputs of a compiled program."""
        tasks = self.places[np.asarray(batch.padded(batch.tasks))]
        names = [zlib.crc32(path.encode()) for path in batch.padded(batch.paths)]
        scales = [self.scales[path] for path in batch.padded(batch.paths)]
        with computing(self.precision, *self.traced) as dtype:
            # Not jnp for what is concrete: each of its operations is a small program to compile.
            xp: Any = jnp if self.traced else np
            if self.grid:
                a, b = self.grid.place(a, b)
            weights = None if self.weights is None else xp.asarray(self.weights, dtype)[tasks]
            arrays = Inputs(
                a=a,
                b=b,
                weights=weights,
                tasks=tasks,  # concrete, inside a user's jit too
                names=np.asarray(names, np.uint32),
                scale=xp.stack([xp.asarray(scale, dtype) for scale in scales]),
            )
            yield arrays, Settings(batch.ranks, self.space, dtype, batch.shape, self.grid)

    def modules(self, batch: Group, a: Sequence, b: Sequence) -> dict[str, LoRA]:
        """Returns the merged modules of a batch by path."""
        found = {}
        for path, tasks, x, y in zip(batch.paths, batch.tasks, a, b, strict=False):
            found[path] = LoRA(a=x, b=y, kind=self.outlines[tasks[0]][path].kind)
        return found


class _FirstCalls:
    """Lets the first call of each kind finish alone: it compiles what the others then use."""

    def __init__(self) -> None:
        self._locks: dict[Any, threading.Lock] = {}
        self._done: set[Any] = set()

    @contextlib.contextmanager
    def __call__(
        self, program: str, rule: Chain, a: Array, b: Array, settings: "Settings"
    ) -> Iterator[None]:
        kind = (program, jax.tree.structure(rule), a.shape, a.dtype, b.shape, b.dtype, settings)
        if kind in self._done:
            yield
            return
        with self._locks.setdefault(kind, threading.Lock()):
            yield
            self._done.add(kind)


_first_calls = _FirstCalls()


# --- One trimming threshold over all modules -------------------------------------------------
def _with_thresholds(
    job: Job, batches: list[Group], workers: int, over_all: Callable[..., Sequence]
) -> Chain:
    """Finds the trimming thresholds of a model-wide `ties`, over the cores of all modules.

    Nonnegative floats are ordered as their bit patterns are. Each pass counts, for every adapter,
    the next bits of the entries that agree with the threshold in all bits before. ``over_all``
    adds counts up over all processes.

    A threshold would be an entry itself, and the program that merges may compute this entry with
    other rounding errors. So that it is kept there too, thresholds lie halfway to the next smaller
    entry, or to where the last digit is 0. Of float64, 48 bits are enough.
    """
    reducer = job.rule.reducer
    assert isinstance(reducer, ties)
    adapters = int(job.places.max()) + 1
    with computing(job.precision, *job.traced) as dtype:
        width = 8 * dtype.itemsize
        uint = jnp.dtype(f"uint{width}")
        known = margin = jnp.zeros(adapters, uint)
    wanted = None
    for shift in (48, 32, 16) if width == 64 else (16, 0):
        parts: Any = np.zeros((adapters, 2**BITS), np.int32), np.zeros(adapters, np.int32)
        count = partial(job.count, known=known, shift=np.asarray(shift, uint))
        for _, more in _each(count, batches, workers):
            parts = [x + y for x, y in zip(parts, more, strict=True)]
        parts = over_all(*parts)
        with computing(dtype.name, *job.traced):
            counts, sizes = map(jnp.asarray, parts)
            if wanted is None:
                kept = jnp.floor(sizes.astype(dtype) * jnp.asarray(reducer.density, dtype))
                wanted = jnp.sum(counts, axis=1, dtype=jnp.int32) - kept.astype(jnp.int32)
            known, wanted, margin = _next_digit(counts, known, wanted, np.asarray(shift, uint))
    with computing(dtype.name, *job.traced):
        thresholds = jax.lax.bitcast_convert_type(known - margin, dtype)
    return dataclasses.replace(job.rule, reducer=ties_above(rule=reducer, thresholds=thresholds))


@jax.jit
def _next_digit(
    counts: jax.Array, known: jax.Array, wanted: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds the next digit of the ``wanted``-th smallest entries to what is known of them.

    Args:
        counts: int32 ``(T, 2^BITS)``, how often each digit occurs.
        known: unsigned ``(T,)``, the bits above the digit.
        wanted: int32 ``(T,)``, the place of the entry among those that are counted.
        shift: unsigned, the bits below the digit.

    Returns:
        The bits with the digit, the place among the entries of that digit, and half the distance
        to the next smaller digit that occurs, or to 0.
    """
    digits = jnp.arange(2**BITS, dtype=jnp.int32)[None, :]
    up_to = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
    digit = jnp.sum(up_to < wanted[:, None], axis=1, dtype=jnp.int32)[:, None]
    fewer = jnp.max(jnp.where(digits < digit, up_to, 0), axis=1)
    below = jnp.max(jnp.where((digits < digit) & (counts > 0), digits, 0), axis=1)
    margin = (digit[:, 0] - below) // 2
    return (
        known | (digit[:, 0].astype(known.dtype) << shift),
        wanted - fewer,
        margin.astype(known.dtype) << shift,
    )
