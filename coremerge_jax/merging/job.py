"""A merge job: the arguments of a merge, and the compiled programs run on its batches."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError, UnsupportedError
from coremerge_jax.lora import Array, LoRA
from coremerge_jax.merging.batches import first_calls
from coremerge_jax.merging.checks import refuse_values
from coremerge_jax.merging.groups import Group, label
from coremerge_jax.merging.mesh import Devices, is_host, rows_like
from coremerge_jax.merging.packed import stack_coordinates
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.present import Present
from coremerge_jax.merging.program import (
    Decisions,
    Facts,
    Inputs,
    Settings,
    compile_stack,
    decide,
    measure_stack,
    merge_stack,
)
from coremerge_jax.merging.stacks import Scratch, stack_factors, stacked_shapes
from coremerge_jax.merging.statistics import Matched, check_stack
from coremerge_jax.merging.trimming import count_stack
from coremerge_jax.rules import Chain, tsv
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.spaces import Space


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of a merge, checked, for any of its modules.

    Attributes:
        present: the adapters that take part.
        space: where to merge.
        rule: how to merge; None if adapters are only projected.
        weights: one per adapter that the user gave, or None.
        scales: by path, numbers or `AUTO`; None if adapters are only projected.
        statistics: of the modules' inputs; None if there are none.
        norms: find the norms of updates while they are merged.
        key: PRNG key; None for rules that draw no random numbers.
        precision: to compute in, see `computing`.
        devices: those that share the work; None for one device.
    """

    present: Present
    space: Space
    rule: Chain | None = None
    weights: Any = None
    scales: Mapping[str, Any] | None = None
    key: jax.Array | None = None
    precision: str | None = None
    devices: Devices | None = None
    statistics: Matched | None = None
    norms: bool = False
    scratch: Scratch = dataclasses.field(default_factory=Scratch)

    @property
    def rows(self) -> int:
        """The number of modules that are worked on side by side."""
        return self.devices.rows if self.devices else 1

    @functools.cached_property
    def traced(self) -> list[jax.core.Tracer]:
        """The adapters' factors, the parameters and the key that a transformation of JAX traces."""
        adapters = [x for x in self.present.adapters if x.in_memory]
        statistics = self.statistics and self.statistics.statistics
        given = adapters, self.rule, self.weights, self.scales, self.key, statistics
        leaves = jax.tree.leaves(given)
        return [x for x in leaves if isinstance(x, jax.core.Tracer)]

    def _stacked(self, batch: Group) -> tuple[Array, Array]:
        """Returns the stacked factors of a batch, in memory that the next batch may overwrite."""
        # A traced function keeps them as constants, which JAX does not copy.
        return stack_factors(batch, self.present.adapters, None if self.traced else self.scratch)

    def coordinates(self, batch: Group) -> LoRA | None:
        """Returns the coordinates of packed adapters that stand for their factors, if they may."""
        if self.devices or not self.space.takes_coordinates:
            return None
        return stack_coordinates(batch, self.present.adapters)

    @contextlib.contextmanager
    def reduced(self, batch: Group) -> Iterator[tuple[Inputs, Settings]]:
        """Does as `prepared`, for programs that take coordinates in place of the factors."""
        found = self.coordinates(batch)
        if found is None:
            with self.prepared(batch, *self._stacked(batch)) as (inputs, settings):
                yield inputs, settings
            return
        with self.prepared(batch, found.a, found.b) as (inputs, settings):
            given = stacked_shapes(batch, self.present.outlines)[0].dtype
            yield inputs, settings._replace(shape=found.shape, given=given)

    @contextlib.contextmanager
    def prepared(
        self, batch: Group, a: Any, b: Any, coordinates: LoRA | None = None
    ) -> Iterator[tuple[Inputs, Settings]]:
        """Enters the precision to compute in, and yields the inputs of a compiled program.

        Args:
            batch: the modules.
            a: their stacked A, or its shape and dtype.
            b: their stacked B, likewise.
            coordinates: of both, if a program takes them.
        """
        tasks = self.present.places[np.asarray(batch.padded(batch.tasks))]
        with computing(self.precision, *self.traced) as dtype:
            # Not jnp for what is concrete: each of its operations is a small program to compile.
            xp: Any = jnp if self.traced else np
            if self.devices:
                a, b = self.devices.place(a, b)
            weights = scales = None
            if self.weights is not None:
                weights = xp.asarray(self.weights, dtype)[tasks]
            if self.scales is not None:
                rows = [self.scales[path] for path in batch.padded(batch.paths)]
                # What automatic scales are not known for is scaled later, or only asked for shapes.
                numbers = [1.0 if scale is AUTO else scale for scale in rows]
                scales = xp.stack([xp.asarray(number, dtype) for number in numbers])
            # Tasks and names are concrete, inside a user's jit too.
            grams = self._grams(batch, a)
            settings = Settings(
                batch.ranks, self.space, dtype, batch.shape, self.devices, self.norms
            )
            if batch.inputs is not None:
                settings = settings._replace(whole=batch.inputs.whole)
            if coordinates is not None:
                settings = settings._replace(given=a.dtype)
            yield (
                Inputs(a, b, weights, tasks, batch.names, scales, grams, coordinates),
                settings,
            )

    def _grams(self, batch: Group, a: Any) -> Any:
        """Returns the Gram matrices of a batch, or their shape; None if it has none."""
        if batch.inputs is None or self.statistics is None:
            return None
        if isinstance(a, jax.ShapeDtypeStruct):
            size = batch.inputs.size
            shape = batch.length, len(batch.ranks), size, size
            return jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
        grams, squares = self.statistics.stack(batch)
        if squares is None:
            if self.devices and self.devices.axis:
                raise UnsupportedError(
                    f"module {batch.paths[0]!r} has Gram matrices of its inputs, which cannot be "
                    "spread over devices as its columns are; use a mesh of one axis, or statistics "
                    "of the coordinates in the adapters' A"
                )
        else:
            check_stack(batch.paths, squares, a)
        return grams

    def rule_of(self, batch: Group) -> Chain | None:
        """Returns the rule; if it needs inputs and the batch has none, the same with `tsv`."""
        if self.rule is None or batch.inputs is not None:
            return self.rule
        return without_inputs(self.rule)

    def merge(self, batch: Group) -> tuple[Array, Array, Facts | None]:
        """Merges a batch of modules to factors ``(L, r, n)`` and ``(L, m, r)``, and facts."""
        given = self._stacked(batch)
        with (
            self.prepared(batch, *given, self.coordinates(batch)) as (inputs, settings),
            first_calls("merge", *self._kind(batch, inputs), settings),
        ):
            a, b, facts = self._run(self.rule_of(batch), inputs, settings)
            if self.traced:
                return a, b, None
            self._check(batch, facts, given[1].dtype)
            # Waits: the program may still read the scratch memory that the next batch overwrites.
            if not all(map(is_host, given)):
                return *jax.block_until_ready((a, b)), facts
            return given[0] if a is inputs.a else np.asarray(a), np.asarray(b), facts

    def _run(
        self, rule: Chain | None, inputs: Inputs, settings: Settings
    ) -> tuple[Array, Array, Facts | None]:
        merge = partial(merge_stack, rule, inputs, self.key, settings=settings)
        if self.traced or (self.devices and len(self.devices.processes) > 1):
            return *merge()[:2], None
        # Two programs, as a branch inside of one would compute both ways for every module.
        a, b, good, facts = merge(keep_a=True)
        if not jax.device_get(good).all():
            a, b, _, facts = merge()
        return inputs.a if a is None else a, b, jax.device_get(facts)

    def _check(self, batch: Group, facts: Facts | None, dtype: np.dtype) -> None:
        """Refuses factors and merged updates that are not finite."""
        if facts is None:
            return
        good = np.isfinite(facts.peak)
        if not (good.all() and facts.finite.all()):
            refuse_values(self.present.adapters, batch.paths, label)
        if not good.all():
            raise overflow(batch.padded(batch.paths)[int(np.argmin(good))], dtype)

    def count(self, batch: Group, **digit: Any) -> tuple[Array, Array]:
        """Counts the next digit of trimming thresholds in a batch, see `count_stack`."""
        assert self.rule is not None
        with (
            self.reduced(batch) as (inputs, settings),
            first_calls("count", *self._kind(batch, inputs), settings),
        ):
            once = np.arange(batch.length) < len(batch.paths)
            counts, sizes = count_stack(self.rule, inputs, self.key, settings, once, **digit)
            return (counts, sizes) if self.traced else (np.asarray(counts), np.asarray(sizes))

    def measure(self, batch: Group) -> Array:
        """Returns the sums ``(2,)`` that the automatic scale is computed from."""
        with (
            self.reduced(batch) as (inputs, settings),
            first_calls("measure", *self._kind(batch, inputs), settings),
        ):
            squares = measure_stack(self.rule_of(batch), inputs, self.key, settings)
            found = jnp.sum(squares[: len(batch.paths)], axis=0)
            # Waits: the program may still read the scratch memory that the next batch overwrites.
            return found if self.traced else jax.device_get(found)

    def compile(self, batch: Group) -> np.ndarray:
        """Merges a batch of modules to ``(L, R, R)``, the matrices between their stacked factors.

        Raises:
            FormatError: a factor has NaN or infinite values.
            MismatchError: a matrix overflows.
            UnsupportedError: the space does not merge in bases of the factors.
        """
        with (
            self.reduced(batch) as (inputs, settings),
            first_calls("compile", *self._kind(batch, inputs), settings),
        ):
            found = compile_stack(self.rule_of(batch), inputs, self.key, settings)
            cores = np.asarray(jax.device_get(found))
        for path, core in zip(batch.paths, cores, strict=False):
            if not np.isfinite(core).all():
                refuse_values(self.present.adapters, [path], label)
                raise overflow(path, cores.dtype)
        return cores

    def _kind(self, batch: Group, inputs: Inputs) -> tuple:
        a, b, small = inputs.a, inputs.b, inputs.coordinates
        rule = jax.tree.structure(self.rule_of(batch))
        return rule, batch.inputs, a.shape, a.dtype, b.shape, b.dtype, small and small.shape

    def shapes(self, batch: Group) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Returns the shapes and dtypes of the results of `merge`."""
        inputs, a, b = self._outline(batch)
        a, (m, n) = inputs.a if a is None else a, batch.shape
        return (
            jax.ShapeDtypeStruct((*a.shape[:-1], n), a.dtype),
            jax.ShapeDtypeStruct((b.shape[0], m, b.shape[2]), b.dtype),
        )

    def decisions(self, batch: Group) -> Decisions:
        """Returns the automatic decisions for a batch, without running a program."""
        rule = self.rule_of(batch)
        assert rule is not None
        given = stacked_shapes(batch, self.present.outlines)
        with self.prepared(batch, *given) as (_, settings):
            found = decide(rule, settings)
        if found.keeps_a is None and self._outline(batch)[1] is not None:
            return dataclasses.replace(found, keeps_a=False)
        return found

    def _outline(self, batch: Group) -> tuple[Inputs, Any, Any]:
        given = stacked_shapes(batch, self.present.outlines)
        with self.prepared(batch, *given) as (inputs, settings):
            merge = partial(merge_stack, settings=settings, keep_a=True)  # traced once for both
            a, b, *_ = jax.eval_shape(merge, self.rule_of(batch), inputs, self.key)
        return inputs, a, b

    def modules(self, batch: Group, a: Any, b: Any) -> dict[str, LoRA]:
        """Returns the modules of merged stacks by path, without padding."""
        return self.present.modules(batch, *self._apart(batch, a, b))

    def _apart(self, batch: Group, a: Any, b: Any) -> tuple[Sequence, Sequence]:
        if self.devices is None:
            return list(a), list(b)
        if self.traced:
            return self.devices.take_apart(a, b, batch.shape)
        if is_host(a):
            m, n = batch.shape
            return [x[:, :n] for x in a], [x[:m] for x in b]
        pairs = zip(batch.paths, batch.tasks, strict=True)
        return rows_like(a, b, [self._on_device(path, tasks) for path, tasks in pairs])

    def _on_device(self, path: str, tasks: np.ndarray) -> LoRA:
        """Returns a module of the first adapter that is on devices."""
        adapters = (self.present.adapters[t] for t in tasks)
        found = (adapter[path] for adapter in adapters if adapter.in_memory)
        return next(lora for lora in found if not any(map(is_host, (lora.a, lora.b))))


def without_inputs(rule: Chain) -> Chain:
    """Returns the rule for modules without statistics: `tsv` in place of one that needs them."""
    return dataclasses.replace(rule, reducer=tsv()) if rule.reducer.needs_inputs else rule


def scaled(path: str, lora: LoRA, scale: float, peak: float) -> LoRA:
    """Returns a merged module times a scale.

    Args:
        path: of the module.
        lora: the module.
        scale: the scale.
        peak: the largest magnitude in its B.

    Raises:
        MismatchError: the result is too large for its dtype.
    """
    dtype = lora.b.dtype
    if peak * abs(scale) > float(jnp.finfo(dtype).max):
        raise overflow(path, dtype)
    return dataclasses.replace(lora, b=lora.b * np.asarray(scale, dtype))


def overflow(path: str, dtype: np.dtype) -> MismatchError:
    """Returns the error for a merged update that is too large for its dtype."""
    return MismatchError(
        f"module {path!r}: the merged update overflows {dtype}, though all factors are finite; "
        "choose smaller weights or scale, or cast the adapters to a wider dtype"
    )
