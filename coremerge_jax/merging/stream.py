"""Merges part by part: batches of modules are read, merged and given out, a few at a time."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Adapter, AdapterSource, LoRA
from coremerge_jax.merging.auto_scale import given_scale, scale_to_norm
from coremerge_jax.merging.batches import map_batches, split_groups
from coremerge_jax.merging.cost import Cost, cost
from coremerge_jax.merging.groups import Group
from coremerge_jax.merging.job import Job, scaled, without_inputs
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.present import Present
from coremerge_jax.merging.processes import failing_together, gather, owners, total
from coremerge_jax.merging.program import Decisions, Facts
from coremerge_jax.merging.stacks import stacked_shapes
from coremerge_jax.merging.trimming import Counts, find_thresholds
from coremerge_jax.rules import Chain, ties, ties_above
from coremerge_jax.rules.rule import AUTO


class MergeStream:
    """A merge that is computed while it is iterated over, made by `merge_stream`.

    Attributes:
        processes: the number of devices of each process that has a share; empty if the merge is
            not shared, or if this is one of the shares.
        effects: counts of the last iteration, over all shares; zero for traced factors.
    """

    def __init__(
        self,
        job: Job,
        max_memory: int | None = None,
        processes: Mapping[int, int] | None = None,
        shared: bool = False,
    ) -> None:
        assert job.rule is not None
        self._job, self._rule, self._max_memory = job, job.rule, max_memory
        self._shared = shared
        groups = job.present.groups
        if job.traced:
            self._workers = 1
            self._batches = [
                part for group in groups for part in group.split(len(group.paths), job.rows)
            ]
        else:
            self._workers, self._batches = split_groups(
                groups, job.rule, job.space, job.devices, max_memory
            )
        self.processes = processes or {}
        self.effects = Effects([0] * len(job.present.adapters))

    @property
    def adapters(self) -> Sequence[AdapterSource]:
        """The adapters that are merged: those of a weight other than 0."""
        return self._job.present.adapters

    def __len__(self) -> int:
        """Returns the number of parts."""
        return len(self._batches)

    @property
    def workers(self) -> int:
        """The number of parts that are computed at once."""
        return self._workers

    @property
    def memory(self) -> int:
        """The most bytes that the parts on their way take together."""
        pairs = zip(self.costs(), self._batches, strict=True)
        needs = (one.memory(self._workers, x.length, self._job.rows) for one, x in pairs)
        return max(needs, default=0)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that adapters are read from during the merge."""
        return tuple(folder for adapter in self.adapters for folder in adapter.folders)

    @property
    def spread(self) -> bool:
        """True if the merged factors are on devices of several processes."""
        devices = self._job.devices
        return devices is not None and len(devices.processes) > 1

    def costs(self) -> list[Cost]:
        """Returns the cost of each part, in the order of the parts."""
        found = []
        for batch in self._batches:
            one = cost(batch, self._rule, self._job.space)
            found.append(one.twice() if self._is_measured(batch) else one)
        return found

    @property
    def programs(self) -> int:
        """The number of compiled programs: one of each group, and one more of a first pass."""
        groups = self._job.present.groups
        return len(groups) + sum(map(self._is_measured, groups))

    def _is_measured(self, batch: Group) -> bool:
        """Returns True if the automatic scale of a batch takes a first pass."""
        auto = any(scale is AUTO for scale in (self._job.scales or {}).values())
        rule = self._job.rule_of(batch) or self._rule
        return auto and given_scale(rule, len(batch.ranks)) is None

    def decisions(self) -> dict[tuple[str, ...], Decisions]:
        """Returns the engine's decisions for each signature, by the paths of its modules."""
        found = {}
        for group in self._job.present.groups:
            (whole,) = group.split(len(group.paths), self._job.rows)
            found[group.paths] = self._job.decisions(whole)
        return found

    def __iter__(self) -> Iterator[dict[str, LoRA]]:
        """Yields the merged modules, some at a time; each exactly once."""
        job = dataclasses.replace(self._with_thresholds, scales=self.scales)
        self.effects.reset()
        for batch, (a, b, facts) in map_batches(job.merge, self._batches, self._workers):
            if facts is not None:
                self.effects.add(batch, facts)
            yield job.modules(batch, a, b)
        if self._shared:
            self.effects.add_up()

    @functools.cached_property
    def scales(self) -> Mapping[str, Any]:
        """The scale of each module, by path. Automatic ones may take a first pass over all modules.

        On several processes, all of them have to ask for it.
        """
        scales = self._job.scales or {}
        if not any(scale is AUTO for scale in scales.values()):
            return scales
        if self.processes:
            with failing_together():
                own = self._share()[0].auto_scales
        else:
            own = self.auto_scales
        return self._by_path(own)

    def _by_path(self, own: Mapping[tuple[int, bool], Any]) -> dict[str, Any]:
        """Returns the scale of each module, given the automatic ones by kind."""
        scales = self._job.scales or {}
        return {
            path: own[_kind(group, self._rule)] if scales[path] is AUTO else scales[path]
            for group in self._job.present.groups
            for path in group.paths
        }

    @property
    def scales_in_words(self) -> dict[str, float]:
        """The automatic scales of modules that several adapters have, by words for their kind."""
        scales = self._job.scales or {}
        found: dict[str, float] = {}
        for group in self._job.present.groups:
            tasks, missing = _kind(group, self._rule)
            words = f"{tasks} adapter{'s' * (tasks > 1)}{', no statistics' * missing}"
            auto = (path for path in group.paths if scales[path] is AUTO and tasks > 1)
            path = next(auto, None)
            if path is not None:
                found[words] = float(self.scales[path])
        return found

    @functools.cached_property
    def auto_scales(self) -> dict[tuple[int, bool], Any]:
        """The automatic scales of all kinds of modules, see `_kind`."""
        unknown = [batch for batch in self._batches if self._is_measured(batch)]
        measured = map_batches(self._with_thresholds.measure, unknown, self._workers)
        return self._scales_to_norms((_kind(batch, self._rule), x) for batch, x in measured)

    def _scales_to_norms(
        self, squares: Iterable[tuple[tuple[int, bool], Any]]
    ) -> dict[tuple[int, bool], Any]:
        """Returns the automatic scales by kind.

        Args:
            squares: kinds of modules, and sums as `Job.measure` returns them.
        """
        job, most = self._job, len(self._job.present.adapters)
        rules = {False: self._rule, True: without_inputs(self._rule)}
        kinds = list(itertools.product(range(1, most + 1), rules))
        found = {kind: given_scale(rules[kind[1]], kind[0]) for kind in kinds}
        nothing = 0.0, 0.0
        sums: dict[tuple[int, bool], Any] = dict.fromkeys(kinds, nothing)
        for kind, (merged, updates) in squares:
            sums[kind] = sums[kind][0] + merged, sums[kind][1] + updates
        if self._shared:
            rows = total(np.asarray([*sums.values()]))[0]
            sums = dict(zip(kinds, rows.tolist(), strict=True))
        with computing(job.precision, *job.traced):
            for kind, scale in found.items():
                if scale is None and sums[kind] is nothing:  # of no module
                    found[kind] = 1.0
                elif scale is None:
                    found[kind] = scale_to_norm(rules[kind[1]], kind[0], *sums[kind])
        return found

    @functools.cached_property
    def _with_thresholds(self) -> Job:
        """The job; with a `ties` over all modules, this rule has the thresholds that these give."""
        job, rule, reducer = self._job, self._rule, self._rule.reducer
        if not isinstance(reducer, ties) or reducer.scope != "model":
            return job

        def passes(known: jax.Array, shift: np.ndarray) -> Iterator[Counts]:
            count = partial(job.count, known=known, shift=shift)
            counts = map_batches(count, self._batches, self._workers)
            return (found for _, found in counts)

        with computing(job.precision, *job.traced) as dtype:
            pass
        thresholds = find_thresholds(
            reducer,
            int(job.present.places.max()) + 1,
            passes,
            total if self._shared else lambda *counts: counts,
            dtype,
            job.traced,
        )
        above = ties_above(rule=reducer, thresholds=thresholds)
        return dataclasses.replace(job, rule=dataclasses.replace(rule, reducer=above))

    def compile(self) -> dict[str, np.ndarray]:
        """Merges to the matrices between the adapters' stacked factors, see `Merge`.

        Raises:
            UnsupportedError: a transformation of JAX traces factors, or devices share the merge;
                or the space does not merge in bases of the factors.
        """
        if self._job.traced or self._job.devices or self.processes:
            raise UnsupportedError(
                "compiled merges are of adapters that JAX does not trace, on one device; leave the "
                "mesh out, or use merge"
            )
        job = dataclasses.replace(self._with_thresholds, scales=self.scales)
        found: dict[str, np.ndarray] = {}
        for batch, cores in map_batches(job.compile, self._batches, self._workers):
            found |= dict(zip(batch.paths, cores, strict=False))
        return {path: found[path] for path in job.present.paths}

    @property
    def present(self) -> Present:
        """The adapters that are merged, and what is the same for all of their modules."""
        return self._job.present

    def collect(self) -> Adapter:
        """Collects the whole merge in memory."""
        present = self._job.present
        if not self.processes:
            parts = [self._scaled_last()] if self._can_scale_last else self
            return present.adapter({path: lora for part in parts for path, lora in part.items()})
        share, owner = self.share()
        with failing_together():
            own = {path: lora for part in share for path, lora in part.items()}
        return present.adapter(gather(own, self.outline, owner))

    @property
    def _can_scale_last(self) -> bool:
        """True if one pass will do: all updates are merged, and scaled when all norms are known.

        Not in a dtype of few digits, to which scaled updates have to be rounded once.
        """
        job = self._job
        if (
            job.traced
            or self._shared
            or self.spread
            or not any(map(self._is_measured, self._batches))
        ):
            return False
        shapes = (stacked_shapes(batch, job.present.outlines) for batch in self._batches)
        dtypes = {b.dtype.name for _, b in shapes}
        return dtypes <= {"float32", "float64"}

    def _scaled_last(self) -> dict[str, LoRA]:
        """Merges all modules in one pass, and then scales them."""
        job = dataclasses.replace(self._with_thresholds, norms=True)
        modules: dict[str, LoRA] = {}
        peaks: dict[str, float] = {}
        squares = []
        self.effects.reset()
        for batch, (a, b, facts) in map_batches(job.merge, self._batches, self._workers):
            assert facts is not None
            self.effects.add(batch, facts)
            number = len(batch.paths)
            squares.append((_kind(batch, self._rule), facts.squares[:number].sum(axis=0)))
            peaks |= dict(zip(batch.paths, facts.peak.tolist(), strict=False))
            modules |= job.modules(batch, a, b)
        scales = self._by_path(self._scales_to_norms(squares))
        auto = [path for path, scale in (job.scales or {}).items() if scale is AUTO]
        with computing(job.precision):
            for path in auto:
                modules[path] = scaled(path, modules[path], scales[path], peaks[path])
        return modules

    @property
    def own(self) -> "MergeStream":
        """The share of this process, if no modules have to stay together."""
        return self.share()[0] if self.processes else self

    def share(
        self, together: Iterable[Sequence[str]] | None = None
    ) -> "tuple[MergeStream, dict[str, int]]":
        """Returns the share of this process in a merge, and the process of every module.

        Args:
            together: the paths of all modules, in lists of those that one process has to merge;
                by default each is alone.

        Returns:
            A stream of the modules of this process; and the process of each module, by path.
        """
        job = dataclasses.replace(self._job, scales=self.scales)
        return self._share(job, together)

    def _share(
        self, job: Job | None = None, together: Iterable[Sequence[str]] | None = None
    ) -> "tuple[MergeStream, dict[str, int]]":
        """Shares a job, by default its own; see `share`."""
        costs: dict[str, float] = {}
        for group in self._job.present.groups:
            one = cost(group, self._rule, self._job.space)
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
        present = self._job.present.only(lambda path: owner[path] == jax.process_index())
        job = dataclasses.replace(job or self._job, present=present)
        share = MergeStream(job, self._max_memory, shared=True)
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
            modules |= self._job.present.modules(batch, a, b)
        return self._job.present.adapter(modules)


def _kind(group: Group, rule: Chain) -> tuple[int, bool]:
    """Returns the number of adapters that have modules, and True if their inputs are missing."""
    return len(group.ranks), rule.needs_inputs and group.inputs is None


@dataclasses.dataclass
class Effects:
    """Effects of a merge, counted in modules.

    Attributes:
        alive: for each adapter, the number of modules in which its update is not zero.
        merged: the number of merged updates that are not zero.
        modules: the number of modules that were merged.
    """

    alive: list[int]
    merged: int = 0
    modules: int = 0

    def reset(self) -> None:
        """Starts to count anew."""
        self.alive, self.merged, self.modules = [0] * len(self.alive), 0, 0

    def add_up(self) -> None:
        """Adds the counts of the other processes."""
        *alive, self.merged, self.modules = map(
            int, total(np.asarray([*self.alive, self.merged, self.modules]))[0]
        )
        self.alive = alive

    def add(self, batch: Group, facts: Facts) -> None:
        """Counts a batch, without its padding."""
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
