"""Merging adapters: a space and a rule over all modules."""

import contextlib
import dataclasses
import fnmatch
import functools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from coremerge_jax.cost import Cost, batch_size, cost, fitting_workers
from coremerge_jax.errors import MismatchError
from coremerge_jax.extras import merge_extras
from coremerge_jax.grid import Grid, is_host, refuse_explicit, rows_like
from coremerge_jax.linalg import matmul
from coremerge_jax.lora import Adapter, Array, LoRA, Metadata
from coremerge_jax.precision import computing
from coremerge_jax.processes import failing_together, gather, owners, total
from coremerge_jax.processors import processors
from coremerge_jax.rules import Chain, Context, Equivariance, Rule, Ties, TiesAbove, as_rule, chain
from coremerge_jax.rules.base import dense, fold_rows
from coremerge_jax.spaces import Projection, Space, core
from coremerge_jax.stack import Group, Scratch, group_modules, label, over_modules


def merge(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    scale: float | Mapping[str, float] = 1.0,
    key: jax.Array | None = None,
    precision: str | None = None,
    extras: str = "error",
    allow_mismatch: bool = False,
    mesh: Mesh | None = None,
) -> Adapter:
    """Merges adapters of one base model into one adapter.

    Modules of equal signature are merged by one compiled program. A module that only some
    adapters have is merged from those. May be called inside a jitted or differentiated function
    with traced factors.

    Args:
        adapters: at least one.
        rule: how to merge, see `coremerge_jax.rules`; or a function ``(T, p, q) -> (p, q)``.
        space: where to merge, see `coremerge_jax.spaces`; core space by default. Linear rules give
            the same in every lossless space and are computed without any.
        weights: one per adapter, multiplies its updates before anything else. An adapter of
            weight 0 counts as absent.
        scale: multiplies the merged updates. A mapping from patterns (as in `fnmatch`) of module
            paths to scales takes, for each module, the first pattern that matches, else 1.
        key: PRNG key, for rules that draw random numbers.
        precision: ``"float64"`` or ``"float32"`` for the computation. By default float64, except
            on TPU and for traced factors, which keep their precision (at least float32). JAX's
            global x64 switch is neither needed nor changed.
        extras: what to do with tensors that are not low-rank updates: ``"error"``, ``"first"``,
            ``"mean"`` or ``"keep=NAME"``.
        allow_mismatch: merge also adapters that name different base models or share no module.
        mesh: devices to share the work. Modules are spread over its first axis; along a second
            one, for modules or ranks too large for one device, so are the columns of A and the
            rows of B. May have devices of several processes (`jax.distributed`), which then all
            have to call this.

    Returns:
        The merged adapter, its rank at most the sum of the ranks (and at most m and n). Factors
        have the widest dtype of the sources', and are NumPy arrays where all of theirs are. With
        a mesh, others are where those of the first adapter are.

    Raises:
        MismatchError: the adapters do not belong together.
        ProcessError: another process has failed.
        UnsupportedError: adapters have extras and no policy for them was given; or the mesh has
            other axes, or the space cannot spread a module over devices.
        ValueError: a parameter is out of range.
    """
    return merge_stream(
        adapters,
        rule,
        space=space,
        weights=weights,
        scale=scale,
        key=key,
        precision=precision,
        extras=extras,
        allow_mismatch=allow_mismatch,
        mesh=mesh,
    ).collect()


def merge_stream(
    adapters: Sequence[Adapter],
    rule: Rule | Callable[[jax.Array], jax.Array],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    scale: float | Mapping[str, float] = 1.0,
    key: jax.Array | None = None,
    precision: str | None = None,
    extras: str = "error",
    allow_mismatch: bool = False,
    mesh: Mesh | None = None,
    max_memory: int | None = None,
) -> "MergeStream":
    """Merges adapters part by part, for those that are larger than memory.

    With adapters from `open_peft` and the stream given to `save_peft`, modules are read, merged
    and written in batches, at the same time, and memory does not grow with their number.

    Args:
        adapters: as in `merge`.
        rule: as in `merge`.
        space: as in `merge`.
        weights: as in `merge`.
        scale: as in `merge`.
        key: as in `merge`.
        precision: as in `merge`.
        extras: as in `merge`.
        allow_mismatch: as in `merge`.
        mesh: as in `merge`. Of adapters in files or on the host, each process reads and merges a
            share of its own, given to `save_peft`.
        max_memory: bytes that the batches on their way may take together; by default, batches
            are as large as is good for speed.

    Raises:
        MemoryError: a single module needs more than ``max_memory``.
    """
    parts = chain(as_rule(rule))
    check_rule(parts, key, len(adapters))
    tasks = present_adapters(adapters, weights, allow_mismatch)
    present = [adapters[t] for t in tasks]
    merged_extras, config = merge_extras(present, extras)
    groups = group_modules(present)
    paths = [path for group in groups for path in group.paths]
    grid, processes = _devices(mesh, present)
    job = _Job(
        adapters=present,
        places=np.asarray(tasks, np.int32),
        rule=parts,
        space=space or core(),
        weights=weights,
        scales=dict(zip(paths, module_scales(paths, scale), strict=True)),
        key=key,
        precision=precision,
        grid=grid,
    )
    metadata = common_metadata(present, config)
    return MergeStream(job, groups, max_memory, metadata, merged_extras, processes)


def _devices(
    mesh: Mesh | None, adapters: Sequence[Adapter]
) -> tuple[Grid | None, Mapping[int, int]]:
    """The devices that this process merges with, and the processes that have shares.

    What is on the host, or in files, each process can read for itself.
    """
    factors = jax.tree.leaves([dict(x) for x in adapters if type(x) is Adapter])
    if mesh is None:
        refuse_explicit(factors)
        return None, {}
    grid, processes = Grid(mesh), {}
    if not all(map(is_host, factors)):
        return grid, {}
    if len(grid.processes) > 1:
        grid, processes = grid.local(), grid.processes
    # On its one device, a process does better with batches side by side.
    return None if grid.is_default else grid, processes


class MergeStream:
    """A merge that happens while it is iterated over: see `merge_stream`.

    Attributes:
        processes: those that share the merge, and how many devices each has; empty if it is not
            shared, or if this is the share of one.
    """

    def __init__(
        self,
        job: "_Job",
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

    def __len__(self) -> int:
        """The number of parts."""
        return len(self._batches)

    @property
    def workers(self) -> int:
        """How many parts are worked on at once."""
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
    def spread(self) -> bool:
        """Whether the merged factors are on devices of several processes."""
        return self._job.grid is not None and len(self._job.grid.processes) > 1

    def costs(self) -> list[Cost]:
        """The cost of each part, in the order of the parts."""
        return [cost(batch, self._job.rule, self._job.space) for batch in self._batches]

    def __iter__(self) -> Iterator[dict[str, LoRA]]:
        """The merged modules, some at a time; each exactly once."""
        job = self._job
        if any(isinstance(part, Ties) and part.scope == "model" for part in job.rule.rules):
            over_all = total if self._shared else lambda *counts: counts
            rule = _with_thresholds(job, self._batches, self._workers, over_all)
            job = dataclasses.replace(job, rule=rule)
        for batch, (a, b) in _each(job.merge, self._batches, self._workers):
            yield job.modules(batch, *job.apart(batch, a, b))

    def collect(self) -> Adapter:
        """All of it, in memory."""
        if not self.processes:
            return self._adapter({path: lora for part in self for path, lora in part.items()})
        share, owner = self.share([[path] for path in self.outline])
        with failing_together():
            own = {path: lora for part in share for path, lora in part.items()}
        return self._adapter(gather(own, self.outline, owner))

    @property
    def own(self) -> "MergeStream":
        """What this process does of it, if nothing has to be together."""
        return self.share([[path] for path in self.outline])[0] if self.processes else self

    def share(self, together: Iterable[Sequence[str]]) -> "tuple[MergeStream, dict[str, int]]":
        """What this process does of a merge that several share, and who does what.

        Args:
            together: the paths of all modules, in lists of those that one process has to do.

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
        units = sorted(together, key=lambda unit: order[unit[0]])
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


def _batches(job: "_Job", groups: list[Group], max_memory: int | None) -> tuple[int, list[Group]]:
    """How many batches to work on at once, and the batches."""
    rule, space, rows = job.rule, job.space, job.rows
    if job.traced:
        return 1, [batch for group in groups for batch in group.split(len(group.paths), rows)]
    workers = _workers(job.grid)
    if max_memory is not None and groups:
        workers = fitting_workers(groups, rule, space, workers, max_memory, rows)
    sizes = [batch_size(group, rule, space, workers, max_memory, rows) for group in groups]
    pairs = zip(groups, sizes, strict=True)
    return workers, [batch for group, size in pairs for batch in group.split(size, rows)]


def _workers(grid: Grid | None) -> int:
    """How many batches to work on at once."""
    if grid and (grid.axis or len(grid.processes) > 1):
        return 1  # devices that wait for each other have to do all work in one order
    if grid or jax.default_backend() != "cpu":
        return 2  # one is read while the other is computed
    return processors()


def _each(fn: Callable, batches: list[Group], workers: int) -> Iterator[tuple[Group, Any]]:
    """Each batch in order with ``fn`` of it, computed ahead by threads, but not far ahead."""
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
class _Job:
    """What a merge needs to know beside which modules."""

    adapters: Sequence[Adapter]
    places: np.ndarray  # of the adapters in the list that the user gave
    rule: Chain
    space: Space
    weights: Any
    scales: Mapping[str, Any]
    key: jax.Array | None
    precision: str | None
    grid: Grid | None
    scratch: Scratch = dataclasses.field(default_factory=Scratch)

    @property
    def rows(self) -> int:
        """How many modules are worked on side by side."""
        return self.grid.rows if self.grid else 1

    @functools.cached_property
    def outlines(self) -> list[Adapter]:
        """The adapters without their factors."""
        return [adapter.outline for adapter in self.adapters]

    @functools.cached_property
    def traced(self) -> list[Any]:
        """What is traced by a transformation of JAX, of the adapters and of the parameters."""
        adapters = [x for x in self.adapters if type(x) is Adapter]
        leaves = jax.tree.leaves((adapters, self.rule, self.weights, self.scales))
        return [x for x in leaves if isinstance(x, jax.core.Tracer)]

    def merge(self, batch: Group) -> tuple[Array, ...]:
        """The merged factors ``(L, r, n)`` and ``(L, m, r)`` of a batch of modules."""
        given = batch.stack(self.adapters, self.scratch)
        with (
            self.prepared(batch, *given) as (arrays, settings),
            _first_calls("merge", self.rule, *given, settings),
        ):
            a, b = self._merge_stack(arrays, settings)
            if self.traced:
                return a, b
            # Waits, as B may be computed from memory that the next batch overwrites.
            if not all(map(is_host, given)):
                return jax.block_until_ready((a, b))
            return given[0] if a is arrays.a else np.asarray(a), np.asarray(b)

    def _merge_stack(self, arrays: "_Inputs", settings: "Settings") -> tuple[Any, ...]:
        merge = partial(_merge_stack, self.rule, arrays, self.key, settings=settings)
        if self.traced or (self.grid and len(self.grid.processes) > 1):
            return merge()[:2]
        a, b, good = merge(keep_a=True)
        if not np.asarray(good).all():
            a, b, _ = merge()
        return arrays.a if a is None else a, b

    def apart(self, batch: Group, a: Any, b: Any) -> tuple[Sequence, Sequence]:
        """The modules of merged stacks, without what only fills up."""
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
        """A module of the first adapter that is on devices."""
        found = (self.adapters[t][path] for t in tasks if type(self.adapters[t]) is Adapter)
        return next(lora for lora in found if not any(map(is_host, (lora.a, lora.b))))

    def count(self, batch: Group, **what: Any) -> tuple[Any, ...]:
        """What `_with_thresholds` needs of a batch."""
        a, b = batch.stack(self.adapters)
        with (
            self.prepared(batch, a, b) as (arrays, settings),
            _first_calls("count", self.rule, a, b, settings),
        ):
            once = np.arange(batch.length) < len(batch.paths)
            counts = _count_stack(self.rule, arrays, self.key, settings, once, **what)
            return counts if self.traced else tuple(map(np.asarray, counts))

    def shapes(self, batch: Group) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Those of what `merge` gives."""
        with self.prepared(batch, *batch.shapes(self.outlines)) as (arrays, settings):
            merge = partial(_merge_stack, settings=settings, keep_a=True)  # traced once for both
            a, b, _ = jax.eval_shape(merge, self.rule, arrays, self.key)
        a, (m, n) = arrays.a if a is None else a, batch.shape
        return (
            jax.ShapeDtypeStruct((*a.shape[:-1], n), a.dtype),
            jax.ShapeDtypeStruct((b.shape[0], m, b.shape[2]), b.dtype),
        )

    @contextlib.contextmanager
    def prepared(self, batch: Group, a: Any, b: Any) -> Iterator[tuple["_Inputs", "Settings"]]:
        """The inputs of a compiled program, in a scope of the precision to compute in."""
        tasks = self.places[np.asarray(batch.padded(batch.tasks))]
        names = [zlib.crc32(path.encode()) for path in batch.padded(batch.paths)]
        scales = [self.scales[path] for path in batch.padded(batch.paths)]
        with computing(self.precision, *self.traced) as dtype:
            # Not jnp for what is concrete: each of its operations is a small program to compile.
            xp: Any = jnp if self.traced else np
            if self.grid:
                a, b = self.grid.place(a, b)
            weights = None if self.weights is None else xp.asarray(self.weights, dtype)[tasks]
            arrays = _Inputs(
                a=a,
                b=b,
                weights=weights,
                tasks=tasks,  # concrete, inside a user's jit too
                names=np.asarray(names, np.uint32),
                scale=xp.stack([xp.asarray(scale, dtype) for scale in scales]),
            )
            yield arrays, Settings(batch.ranks, self.space, dtype, batch.shape, self.grid)

    def modules(self, batch: Group, a: Sequence, b: Sequence) -> dict[str, LoRA]:
        """The merged modules of a batch by path."""
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


@flax.struct.dataclass
class _Inputs:
    """What one compiled program maps over: each field has the modules along its first axis."""

    a: jax.Array  # (L, R, n)
    b: jax.Array  # (L, m, R)
    weights: jax.Array | None  # (L, T)
    tasks: Any  # (L, T), places in the list that the user gave; NumPy
    names: Array  # (L,), hashes of the paths
    scale: jax.Array  # (L,)

    def specs(self, grid: Grid) -> "_Inputs":
        """Where each field is on a grid."""
        a, b, each = grid.specs
        weights: Any = None if self.weights is None else each
        return _Inputs(a=a, b=b, weights=weights, tasks=each, names=each, scale=each)  # type: ignore[arg-type]


class Settings(NamedTuple):
    """What one compiled program is compiled for.

    Attributes:
        ranks: of the adapters.
        space: where to merge.
        dtype: to compute in.
        shape: ``(m, n)`` of the modules.
        grid: the devices that share the work.
    """

    ranks: tuple[int, ...]
    space: Space
    dtype: Any
    shape: tuple[int, int]
    grid: Grid | None = None

    @property
    def axis(self) -> str | None:
        """What modules are spread over."""
        return self.grid.axis if self.grid else None


@partial(jax.jit, static_argnames=("settings", "keep_a"))
def _merge_stack(
    rule: Chain,
    arrays: _Inputs,
    key: jax.Array | None,
    settings: Settings,
    *,
    keep_a: bool | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """The merged A and B of each module, and whether these are good.

    With ``keep_a``, the A factors are those of ``arrays`` where that can be: then the first result
    is None, and the last says whether it should be.
    """

    def merge_module(
        rule: Chain, key: jax.Array | None, module: _Inputs
    ) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        good: bool | jax.Array = True
        if _needs_no_space(rule, settings):
            lora, kept = _merge_linear(rule, module, settings)
        else:
            projection = _project(rule, module, settings)
            good = projection.keeps_a
            kept = bool(keep_a) and good is not False
            lora = projection.merge(
                rule,
                key=_module_key(key, module),
                tasks=module.tasks,
                keep_a=True if kept else None,
            )
        b = (jnp.asarray(lora.b) * module.scale).astype(arrays.b.dtype)
        if keep_a and kept:
            return None, b, jnp.asarray(good)
        return jnp.asarray(lora.a).astype(arrays.a.dtype), b, jnp.asarray(True)

    def merge_modules(shared: tuple, modules: _Inputs) -> Any:
        return over_modules(partial(merge_module, *shared), modules)

    if settings.grid is None:
        return merge_modules((rule, key), arrays)
    return settings.grid.map(
        merge_modules, (rule, key), arrays, arrays.specs(settings.grid), settings.grid.specs
    )


def _needs_no_space(rule: Chain, settings: Settings) -> bool:
    """Whether a merge is a weighted sum of factors: not where these, spread, exceed m or n."""
    fits = settings.axis is None or sum(settings.ranks) <= min(settings.shape)
    return rule.equivariance == Equivariance.LINEAR and settings.space.lossless and fits


def _module_key(key: jax.Array | None, module: _Inputs) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, module.names)


def _project(rule: Chain, module: _Inputs, settings: Settings) -> Projection:
    elementwise = rule.equivariance == Equivariance.ELEMENTWISE
    return project_module(module.a, module.b, module.weights, settings, elementwise=elementwise)


def project_module(
    a: jax.Array,
    b: jax.Array,
    weights: jax.Array | None,
    settings: Settings,
    *,
    elementwise: bool,
) -> Projection:
    """A module's updates, multiplied by weights ``(T,)``, in a space: see `Space.project`."""
    ranks, dtype = settings.ranks, settings.dtype
    if weights is not None:
        b = b.astype(dtype) * _by_rank(weights, ranks)[None, :]
    spread: dict[str, Any] = {}
    if settings.axis:
        spread = {"axis": settings.axis, "shape": settings.shape}
    return settings.space.project(a, b, ranks, dtype=dtype, elementwise=elementwise, **spread)


def _merge_linear(rule: Chain, module: _Inputs, settings: Settings) -> tuple[LoRA, bool]:
    """A weighted sum needs no space: its coefficients go to the factors. And whether A is kept."""
    ranks, dtype = settings.ranks, settings.dtype
    units = jnp.eye(len(ranks), dtype=dtype)[:, None, :]
    context = Context(shape=jnp.asarray(units.shape[1:], jnp.int32), tasks=module.tasks)
    coefficients = rule(units, context=context)[0]
    if module.weights is not None:
        coefficients = coefficients * module.weights
    a, b = module.a, module.b.astype(dtype) * _by_rank(coefficients, ranks)[None, :]
    m, n = settings.shape
    if sum(ranks) <= min(m, n):
        return LoRA(a=a, b=b), True
    update = matmul(b, a.astype(dtype))
    if n <= m:
        return LoRA(a=jnp.eye(n, dtype=dtype), b=update), False
    return LoRA(a=update, b=jnp.eye(m, dtype=dtype)), False


def _by_rank(values: jax.Array, ranks: tuple[int, ...]) -> jax.Array:
    """Repeats one value per adapter for each of its ranks: ``(T,)`` to ``(R,)``."""
    return jnp.repeat(values, np.asarray(ranks), total_repeat_length=sum(ranks))


# --- One trimming threshold over all modules -------------------------------------------------

_BITS = 16  # of a magnitude that one pass over the modules settles


def _with_thresholds(
    job: _Job, batches: list[Group], workers: int, over_all: Callable[..., Sequence]
) -> Chain:
    """Finds the trimming thresholds of a model-wide `ties`, over the cores of all modules.

    Nonnegative floats are ordered as their bit patterns are. Each pass counts, for every adapter,
    the next bits of the entries that agree with the threshold in all bits before. ``over_all``
    adds counts up over all processes.
    """
    ties = job.rule.reducer
    assert isinstance(ties, Ties)
    adapters = int(job.places.max()) + 1
    with computing(job.precision, *job.traced) as dtype:
        width = 8 * dtype.itemsize
        uint = jnp.dtype(f"uint{width}")
        known = jnp.zeros(adapters, uint)
    wanted = None
    for shift in range(width - _BITS, -1, -_BITS):
        parts: Any = np.zeros((adapters, 2**_BITS), np.int32), np.zeros(adapters, np.int32)
        count = partial(job.count, known=known, shift=np.asarray(shift, uint))
        for _, more in _each(count, batches, workers):
            parts = [x + y for x, y in zip(parts, more, strict=True)]
        counts, sizes = map(jnp.asarray, over_all(*parts))
        with computing(dtype.name, *job.traced):
            if wanted is None:
                kept = jnp.floor(sizes.astype(dtype) * jnp.asarray(ties.density, dtype))
                wanted = jnp.sum(counts, axis=1, dtype=jnp.int32) - kept.astype(jnp.int32)
            up_to = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
            digit = jnp.sum(up_to < wanted[:, None], axis=1, dtype=jnp.int32)
            before = jnp.pad(up_to, ((0, 0), (1, 0)))
            wanted = wanted - jnp.take_along_axis(before, digit[:, None], axis=1)[:, 0]
            known = known | (digit.astype(uint) << np.asarray(shift, uint))
    with computing(dtype.name, *job.traced):
        thresholds = jax.lax.bitcast_convert_type(known, dtype)
    return dataclasses.replace(job.rule, reducer=TiesAbove(ties=ties, thresholds=thresholds))


@partial(jax.jit, static_argnames="settings")
def _count_stack(
    rule: Chain,
    arrays: _Inputs,
    key: jax.Array | None,
    settings: Settings,
    once: jax.Array,
    known: jax.Array,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How often each next digit occurs in the cores of each adapter, and the cores' sizes.

    Modules count where ``once: (L,)`` is true: not those that only fill up the stack. ``known:
    (T,)`` has the bits of thresholds above the digit, which is ``shift`` bits from the end.
    """

    def count_core(core: jax.Array, known: jax.Array, shift: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.abs(core).ravel(), known.dtype) >> shift
        agrees = bits >> _BITS == known >> shift >> _BITS
        digits = (bits & (2**_BITS - 1)).astype(jnp.int32)
        return jnp.zeros(2**_BITS, jnp.int32).at[digits].add(agrees.astype(jnp.int32))

    def count_module(shared: tuple, row: tuple[_Inputs, jax.Array]) -> tuple:
        rule, key, known, shift = shared
        module, counted = row[0], row[1].astype(jnp.int32)
        projection = _project(rule, module, settings)
        context = Context(shape=projection.shape, tasks=module.tasks)
        cores = rule.prepare(projection.factors, key=_module_key(key, module), context=context)
        rows = cores, known[module.tasks]
        found = jax.lax.map(lambda row: count_core(dense(row[0]), row[1], shift), rows)
        size = jnp.prod(projection.shape, dtype=jnp.int32)
        counts = jnp.zeros((len(known), 2**_BITS), jnp.int32).at[module.tasks].add(counted * found)
        return counts, jnp.zeros(len(known), jnp.int32).at[module.tasks].add(counted * size)

    def count_modules(shared: tuple, rows: tuple[_Inputs, jax.Array]) -> tuple:
        return fold_rows(partial(count_module, shared), rows)

    shared, rows = (rule, key, known, shift), (arrays, once)
    grid = settings.grid
    if grid is None:
        return count_modules(shared, rows)
    modules = grid.mesh.axis_names[0]
    return grid.map(
        lambda *given: jax.lax.psum(count_modules(*given), modules),
        shared,
        rows,
        (arrays.specs(grid), grid.specs[2]),
        PartitionSpec(),
    )


def _is_zero(weights: Any, t: int) -> bool:
    if weights is None or isinstance(weights, jax.core.Tracer):
        return False
    return not isinstance(weights[t], jax.core.Tracer) and float(weights[t]) == 0


def check_rule(rule: Chain, key: jax.Array | None, adapters: int) -> None:
    """Checks that a rule has what it needs: a key, one weight per adapter.

    Raises:
        MismatchError: naming the number of weights and of adapters.
        ValueError: there is no key for a rule that draws random numbers.
    """
    if rule.needs_key and key is None:
        raise ValueError(f"{rule!r} draws random numbers: pass key=jax.random.key(seed)")
    for part in rule.rules:
        _check_weights(getattr(part, "weights", None), adapters)


def present_adapters(adapters: Sequence[Adapter], weights: Any, allow_mismatch: bool) -> list[int]:
    """Which adapters take part in a merge: those whose weight is not 0.

    Raises:
        MismatchError: none, or they do not belong together, or there is not one weight for each.
    """
    if not adapters:
        raise MismatchError("no adapters to merge; expected at least one")
    _check_weights(weights, len(adapters))
    tasks = [t for t in range(len(adapters)) if not _is_zero(weights, t)]
    if not tasks:
        raise MismatchError("all weights are 0: nothing to merge")
    if not allow_mismatch:
        check_compatible([adapters[t] for t in tasks])
    return tasks


def _check_weights(weights: Any, adapters: int) -> None:
    if isinstance(weights, int | float):
        raise MismatchError(f"weights={weights}: expected a list, one for each adapter")
    if weights is not None and len(weights) != adapters:
        raise MismatchError(f"{len(weights)} weights for {adapters} adapters; expected one each")


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Checks that adapters belong to one base model, as far as they tell.

    Raises:
        MismatchError: two name different base models, or one shares no module with the others.
    """
    bases: dict[str, int] = {}
    for t, adapter in enumerate(adapters):
        if adapter.metadata.base_model:
            bases.setdefault(adapter.metadata.base_model.rstrip("/"), t)
    if len(bases) > 1:
        (x, i), (y, j) = list(bases.items())[:2]
        raise MismatchError(
            f"{label(adapters, i)} was trained on base model {x!r}, {label(adapters, j)} on {y!r};"
            " if they are the same model, allow it with allow_mismatch (--allow-mismatch)"
        )
    for t, adapter in enumerate(adapters):
        others = [other for other in adapters if other is not adapter]
        if others and not any(path in other for other in others for path in adapter):
            raise MismatchError(
                f"{label(adapters, t)} has no module in common with the others (its first is "
                f"{next(iter(adapter))!r}, theirs {next(iter(others[0]))!r}); if that is meant, "
                "allow it with allow_mismatch (--allow-mismatch)"
            )


def module_scales(paths: Sequence[str], scale: float | Mapping[str, float]) -> list[Any]:
    """The scale of each module.

    Raises:
        MismatchError: a pattern matches no module.
    """
    if not isinstance(scale, Mapping):
        return [scale] * len(paths)
    for pattern in scale:
        if not fnmatch.filter(paths, pattern):
            raise MismatchError(
                f"scale pattern {pattern!r} matches no module; module paths look like {paths[0]!r}"
            )
    return [next((scale[p] for p in scale if fnmatch.fnmatchcase(path, p)), 1.0) for path in paths]


def common_metadata(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> Metadata:
    """What is said of a merge."""

    def common(field: str) -> Any:
        values = {getattr(adapter.metadata, field) for adapter in adapters} - {None}
        return values.pop() if len(values) == 1 else None

    base = next((a.metadata.base_model for a in adapters if a.metadata.base_model), None)
    return Metadata(base_model=base, task_type=common("task_type"), config=config)
