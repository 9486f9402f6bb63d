"""Adapters in a merge space: projected once, to be merged many times."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError
from coremerge_jax.linalg import pytree
from coremerge_jax.lora import Adapter, Array, Kind, LoRA, Metadata
from coremerge_jax.merging.auto_scale import given_scale, scale_to_norm
from coremerge_jax.merging.checks import (
    as_adapters,
    as_space,
    as_weights,
    check_rule,
    module_scales,
    refuse_values,
)
from coremerge_jax.merging.groups import Group, label
from coremerge_jax.merging.job import Job, overflow, without_inputs
from coremerge_jax.merging.mesh import implicit
from coremerge_jax.merging.precision import are_traced, computing, is_available
from coremerge_jax.merging.present import find_present
from coremerge_jax.merging.program import (
    finish_stack,
    merge_projected,
    project_stack,
    projected_traits,
    split_projected,
)
from coremerge_jax.merging.stacks import stack_factors
from coremerge_jax.merging.statistics import Statistics, check_missing, match, refuse_missing
from coremerge_jax.rules import Chain, as_rule, chain, ties
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.spaces import Projection, Space


@dataclasses.dataclass(frozen=True)
class Updates:
    """Merged updates, not yet scaled and rounded, made by `Projected.updates`.

    Attributes:
        factors: the merged A ``(L, r, n)`` and B ``(L, m, r)`` of each stack.
        rule: by which they were merged.
        squares: ``(L, 2)`` of each stack, as `Projection.auto_squares` returns them; None where
            the automatic scale does not need them.
    """

    factors: list[tuple[jax.Array, jax.Array]]
    rule: Chain
    squares: list[jax.Array | None]


@pytree
@dataclasses.dataclass(frozen=True)
class Stack:
    """Modules of one signature in a merge space, along the first axis of the arrays.

    Attributes:
        projection: the updates.
        tasks: int32 ``(L, T)``, which adapters have the modules: places in the list that the user
            gave.
        names: uint32 ``(L,)``, hashes of the paths.
        paths: of the modules.
        kinds: of the modules.
        keeps_a: whether merges keep the stacked A of the adapters.
        dtypes: those of the merged A and B.
    """

    projection: Projection
    tasks: jax.Array
    names: jax.Array
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    kinds: tuple[Kind, ...] = dataclasses.field(metadata={"static": True})
    keeps_a: bool = dataclasses.field(metadata={"static": True})
    dtypes: tuple[np.dtype, np.dtype] = dataclasses.field(metadata={"static": True})


@pytree
@dataclasses.dataclass(frozen=True)
class Projected:
    """Adapters in a merge space, made by `project`. A pytree.

    Attributes:
        stacks: all modules.
        space: the merge space.
        extras: tensors that are not low-rank updates, already merged.
        order: the paths of the modules in the order of the adapters.
        adapters: the number of adapters, those of weight 0 included.
        metadata: of the merged adapter.
        missing_statistics: what to do with modules without statistics, as in `merge`.
    """

    stacks: tuple[Stack, ...]
    extras: dict[str, Array]
    space: Space = dataclasses.field(metadata={"static": True})
    order: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    adapters: int = dataclasses.field(metadata={"static": True})
    metadata: Metadata = dataclasses.field(metadata={"static": True})
    missing_statistics: str = dataclasses.field(default="error", metadata={"static": True})

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which merges are computed."""
        return jax.tree.leaves(self.stacks[0].projection.factors)[0].dtype

    def astype(self, dtype: Any) -> "Projected":
        """Returns the adapters in another precision, in which merges are then computed."""
        with computing(str(np.dtype(dtype)), *jax.tree.leaves(self.stacks)):
            stacks = jax.tree.map(
                lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                self.stacks,
            )
        return dataclasses.replace(self, stacks=stacks)

    def merge(
        self,
        rule: Any,
        *,
        weights: Any = None,
        scale: Any = AUTO,
        key: jax.Array | None = None,
    ) -> Adapter:
        """Merges the adapters. Rules that differ in numbers alone share one compiled program.

        Args:
            rule: how to merge; a `ties` with ``scope="model"`` is refused.
            weights: ``(T,)``, multiply the adapters' cores before the rule; or such weights by
                path, for some modules. Those of `project` multiply the adapters before they are
                projected, which is the same unless the rule is elementwise. An adapter of weight 0
                counts here: `mean` and the automatic scale still divide by the number of all.
            scale: multiplies the merged updates; as in `merge`.
            key: PRNG key, for rules that draw random numbers.

        Weights, a scale, the key and parameters of the rule may be traced. The merge is then
        computed in float32, unless JAX's x64 mode is on: outside of it, nothing in float64 has
        derivatives.

        Raises:
            MismatchError: there is not one weight per adapter, or no module of a name; or the
                merged update overflows.
            RecipeError: the rule cannot be used here, or a parameter is out of range.
        """
        if are_traced((rule, weights, scale, key)) and not is_available(self.dtype):
            return self.astype(np.float32).merge(rule, weights=weights, scale=scale, key=key)
        return self.adapter(self.updates(rule, weights=weights, key=key), scale)

    def updates(self, rule: Any, *, weights: Any = None, key: jax.Array | None = None) -> Updates:
        """Computes merged updates before scaling, so that many scales can share them."""
        parts = chain(as_rule(rule))
        key = check_rule(parts, key, self.adapters)
        if any(isinstance(part, ties) and part.scope == "model" for part in parts.rules):
            raise RecipeError(f"{parts!r} trims over all modules at once; use merge instead")
        self._check_weights(weights)
        self._check_inputs(parts)
        with self._computing():
            merged = [
                merge_projected(
                    rule_of(parts, stack),
                    key,
                    stack.projection,
                    stack.tasks,
                    stack.names,
                    self._weights(stack, weights),
                    keep_a=stack.keeps_a,
                    norms=given_scale(rule_of(parts, stack), stack.tasks.shape[1]) is None,
                )
                for stack in self.stacks
            ]
        return Updates([(a, b) for a, b, _ in merged], parts, [x for _, _, x in merged])

    def pieces(self, rule: Any, *, key: jax.Array | None = None) -> "Projected":
        """Splits merges by a rule into the shares of the adapters, which then are what is merged.

        Merged by `task_arithmetic` with coefficients, they are the merge with its shares multiplied
        by these: linear in the coefficients, without any decomposition.

        Args:
            rule: `mean`, `task_arithmetic`, `tsv` or `regmean`, and steps before it.
            key: PRNG key, for rules that draw random numbers.

        Raises:
            RecipeError: the rule cannot be used here, or a parameter is out of range.
            UnsupportedError: the rule is no sum of shares, or needs inputs that are not there.
        """
        parts = chain(as_rule(rule))
        key = check_rule(parts, key, self.adapters)
        self._check_inputs(parts)
        with self._computing():
            stacks = [
                dataclasses.replace(
                    stack,
                    projection=split_projected(
                        rule_of(parts, stack), key, stack.projection, stack.tasks, stack.names
                    ),
                )
                for stack in self.stacks
            ]
        return dataclasses.replace(self, stacks=tuple(stacks))

    def adapter(self, updates: Updates, scale: Any = AUTO) -> Adapter:
        """Scales merged updates. The adapter has NumPy factors unless they are traced."""
        scales = module_scales(self.order, scale)
        if any(number is AUTO for number in scales.values()):
            auto = self.auto_scales(updates)
            scales = {
                path: auto[kind_of(updates.rule, stack)] if scales[path] is AUTO else scales[path]
                for stack in self.stacks
                for path in stack.paths
            }
        modules: dict[str, LoRA] = {}
        for stack, update in zip(self.stacks, updates.factors, strict=True):
            with self._computing():
                factors = jnp.stack([jnp.asarray(scales[x], self.dtype) for x in stack.paths])
                a, b, peaks = finish_stack(*update, factors, stack.dtypes)
                if not isinstance(b, jax.core.Tracer):
                    a, b, peaks = jax.device_get((a, b, peaks))
                    self._check_finite(stack, peaks)
            for path, kind, x, y in zip(stack.paths, stack.kinds, a, b, strict=True):
                modules[path] = LoRA(a=x, b=y, kind=kind)
        ordered = {path: modules[path] for path in self.order}
        return Adapter(ordered, metadata=self.metadata, extras=self.extras)

    def _check_finite(self, stack: Stack, peaks: np.ndarray) -> None:
        for path, peak in zip(stack.paths, peaks, strict=True):
            if not np.isfinite(peak):
                raise overflow(path, stack.dtypes[1])

    def auto_scales(self, updates: Updates) -> dict[tuple[int, bool], Any]:
        """Returns the automatic scales, by the `kind_of` modules."""
        found: dict[tuple[int, bool], Any] = {}
        rules: dict[tuple[int, bool], Chain] = {}
        sums: dict[tuple[int, bool], Any] = {}
        with self._computing():
            for stack, squares in zip(self.stacks, updates.squares, strict=True):
                kind = kind_of(updates.rule, stack)
                rules[kind] = rule_of(updates.rule, stack)
                found[kind] = given_scale(rules[kind], kind[0])
                if squares is not None:
                    sums[kind] = sums.get(kind, 0.0) + jnp.sum(squares, axis=0)
            for kind, total in sums.items():
                found[kind] = scale_to_norm(rules[kind], kind[0], *total)
        return found

    def traits(self) -> np.ndarray:
        """Returns ``(3, T)``, numbers by which the projected adapters can be recognized.

        They are the sums over all modules of `Projection.traits`, which are the same in all
        bases of the space: of other adapters, weights or inputs, they are others.
        """
        found = np.zeros((3, self.adapters))
        for stack in self.stacks:
            with self._computing():
                traits = np.asarray(projected_traits(stack.projection))
            for row, of_stack in zip(found, np.moveaxis(traits, 1, 0), strict=True):
                np.add.at(row, np.asarray(stack.tasks), of_stack)
        return found

    def _check_weights(self, weights: Any) -> None:
        if not isinstance(weights, Mapping):
            as_weights(weights, self.adapters)
            return
        for path, row in weights.items():
            if path not in self.order:
                raise MismatchError(f"weights of {path!r}: there is no such module")
            as_weights(row, self.adapters, f"weights of {path!r}")

    def _check_inputs(self, rule: Chain) -> None:
        """Refuses modules that lack the inputs which a rule needs, unless these are allowed."""
        if not rule.needs_inputs or self.missing_statistics != "error":
            return
        known = {x for s in self.stacks if s.projection.inputs is not None for x in s.paths}
        merged = (x for s in self.stacks if s.tasks.shape[1] > 1 for x in s.paths)
        refuse_missing(known or None, rule, merged)

    def _computing(self) -> Any:
        if are_traced(self.stacks):
            return contextlib.nullcontext()
        return computing(str(self.dtype))

    def _weights(self, stack: Stack, weights: Any) -> jax.Array | None:
        """Returns ``(L, T)``, of the adapters that have the modules."""
        if weights is None:
            return None
        ones = jnp.ones(self.adapters, self.dtype)
        if isinstance(weights, Mapping):
            rows = [jnp.asarray(weights.get(path, ones), self.dtype) for path in stack.paths]
        else:
            rows = [jnp.asarray(weights, self.dtype)] * len(stack.paths)
        return jnp.take_along_axis(jnp.stack(rows), stack.tasks, axis=1)


def kind_of(rule: Chain, stack: Stack) -> tuple[int, bool]:
    """Returns the number of adapters that have modules, and True if their inputs are missing."""
    return stack.tasks.shape[1], rule.needs_inputs and stack.projection.inputs is None


def rule_of(rule: Chain, stack: Stack) -> Chain:
    """Returns the rule by which modules are merged: another one if their inputs are missing."""
    return without_inputs(rule) if stack.projection.inputs is None else rule


def project(
    adapters: Sequence[Adapter],
    *,
    space: Space | None = None,
    weights: Sequence[float] | Array | None = None,
    elementwise: bool = True,
    precision: str | None = None,
    extras: str = "error",
    allow_other_base: bool = False,
    allow_disjoint: bool = False,
    statistics: Statistics | None = None,
    missing_statistics: str = "error",
) -> Projected:
    """Projects all modules of adapters to a merge space, once for many merges.

    Args:
        adapters: at least one. This and the others that `merge` has are as there.
        space: where to merge; core space by default.
        weights: one per adapter.
        elementwise: whether the adapters will be merged by elementwise rules; if not, a cheaper
            basis is chosen.
        precision: ``"float64"`` or ``"float32"``.
        extras: what to do with tensors that are not low-rank updates.
        allow_other_base: project also adapters that name different base models.
        allow_disjoint: project also adapters without a module in common.
        statistics: of the modules' inputs, for rules that need them.
        missing_statistics: what such rules do with modules without statistics: ``"error"``, or
            ``"tsv"`` to merge them by that rule.

    Raises:
        FormatError: a factor has NaN or infinite values.
        MismatchError: the adapters do not belong together.
        RecipeError: an argument is of another kind, or not finite.
        UnsupportedError: adapters have extras and no policy for them was given; or factors are
            traced, and sharded as their types say.
    """
    check_missing(missing_statistics)
    adapters = [implicit(adapter) for adapter in as_adapters(adapters)]
    space, weights = as_space(space), as_weights(weights, len(adapters))
    present = find_present(adapters, weights, extras, allow_other_base, allow_disjoint)
    matched = None
    if statistics is not None:
        places = present.places.tolist()
        matched = match(statistics, present.adapters, places, len(adapters))
        present = present.with_inputs(matched.kind)
    job = Job(present, space, weights=weights, precision=precision, statistics=matched)
    return Projected(
        stacks=tuple(_project(job, group, elementwise) for group in present.groups),
        space=space,
        extras=dict(present.extras),
        order=present.paths,
        adapters=len(adapters),
        metadata=present.metadata,
        missing_statistics=missing_statistics,
    )


def _project(job: Job, group: Group, elementwise: bool) -> Stack:
    present = job.present
    a, b = stack_factors(group, present.adapters)
    with job.prepared(group, a, b, job.coordinates(group)) as (inputs, settings):
        projection, kept, finite = project_stack(inputs, settings, elementwise)
        tasks, names = jnp.asarray(inputs.tasks), jnp.asarray(inputs.names)
    concrete = not isinstance(finite, jax.core.Tracer)
    if concrete and not jax.device_get(finite).all():
        refuse_values(present.adapters, group.paths, label)
        raise MismatchError(
            f"modules such as {group.paths[0]!r}: finite factors overflow in products; "
            "scale the adapters down"
        )
    return Stack(
        projection=projection,
        tasks=tasks,
        names=names,
        paths=group.paths,
        kinds=tuple(group.kinds(present.outlines)),
        keeps_a=concrete and bool(np.asarray(kept).all()),
        dtypes=(a.dtype, b.dtype),
    )
