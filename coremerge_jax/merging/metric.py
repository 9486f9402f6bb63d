"""The metric of modules' inputs: how much a part of an update adds to the module's outputs."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coremerge_jax.errors import CoreMergeWarning, MismatchError, RecipeError, UnsupportedError
from coremerge_jax.linalg import Basis, basis, in_range, inverse, lapack, matmul, roundoff
from coremerge_jax.lora import Adapter, AdapterSource
from coremerge_jax.merging.belonging import present_adapters
from coremerge_jax.merging.checks import as_adapters
from coremerge_jax.merging.groups import GramKind, Group
from coremerge_jax.merging.mesh import implicit, is_spread
from coremerge_jax.merging.stacks import stack_factors
from coremerge_jax.merging.statistics import (
    Matched,
    Statistics,
    check_rows,
    check_stack,
    match,
    match_modules,
    same_rows,
)

# Weight of directions in which there were no inputs, relative to the mean. Merges of the demo are
# as good with any from 1e-4 to 0.3.
RIDGE = 0.03

_ROOM = 2**28  # bytes of Gram matrices and rows of A that are stacked at once

# Gram matrices, and the rows of A that they are of: None for those of the inputs themselves.
Inputs = tuple[
    Float[Array, "*batch T g g"] | Float[np.ndarray, "*batch T g g"],
    Float[Array, "*batch g n"] | Float[np.ndarray, "*batch g n"] | None,
]


@dataclasses.dataclass(frozen=True)
class InputMetric:
    """Gram matrices of inputs, for modules of a merge; made by `input_metric`.

    Attributes:
        matched: the statistics.
        sources: the adapters that were merged; None if they are not at hand.
    """

    matched: Matched
    sources: Sequence[AdapterSource] | None

    def missing(self, outline: Adapter) -> list[str]:
        """Returns the modules without statistics."""
        return [path for path in outline if path not in self.matched.paths]

    def check(self, outline: Adapter) -> None:
        """Checks that there are statistics of some modules.

        Raises:
            MismatchError: there are none.

        Warns:
            CoreMergeWarning: some modules have none.
        """
        missing = self.missing(outline)
        if len(missing) == len(outline):
            raise MismatchError(
                f"statistics of no module that is to be cut (the first is {missing[0]!r}); they "
                "are of another model, or no input was read: collect them again, or cut without"
            )
        if missing and jax.process_index() == 0:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            warnings.warn(
                f"no statistics of module {missing[0]!r}{others}, so cut by the Frobenius norm; "
                "collect more inputs to cut by the outputs",
                CoreMergeWarning,
                stacklevel=4,
            )

    def split(self, group: Group) -> Iterator[tuple[Group, Group | None]]:
        """Splits modules of a merge by the statistics that they have, and by memory.

        Args:
            group: the modules, of the one adapter that is the merge.

        Yields:
            Some of the modules; and the group that `arrays` takes, or None without statistics.
        """
        kinds: dict[Any, list[str]] = {}
        for path in group.paths:
            kinds.setdefault(self._kind(path), []).append(path)
        for kind, paths in kinds.items():
            if kind is None:
                yield group.only(set(paths).__contains__), None
                continue
            ranks, grams = kind
            rows = np.asarray([self._tasks(path) for path in paths], np.int32)
            inputs = Group(tuple(paths), rows, group.shape, ranks, len(paths), grams)
            each = 8 * grams.size * (grams.size * len(ranks) + group.shape[1])
            for part in inputs.split(max(1, _ROOM // each)):
                tasks = np.zeros((len(part.paths), 1), np.int32)
                yield dataclasses.replace(part, tasks=tasks, ranks=group.ranks, inputs=None), part

    def _kind(self, path: str) -> tuple[tuple[int, ...], GramKind] | None:
        """Returns ranks of the adapters, and the kind of Gram matrices; None if there are none."""
        if path not in self.matched.paths:
            return None
        tasks, gram = self._tasks(path), self.matched.statistics[self.matched.paths[path]]
        ranks = [gram.ranks[gram.tasks.index(self.matched.places[t])] for t in tasks]
        kind = self.matched.kind(path, np.asarray(tasks))
        return None if kind is None else (tuple(ranks), kind)

    def _tasks(self, path: str) -> tuple[int, ...]:
        """Returns the adapters that have a module."""
        if self.sources is None:
            return self.matched.statistics[self.matched.paths[path]].tasks
        return tuple(t for t, source in enumerate(self.sources) if path in source.outline)

    def arrays(self, inputs: Group, a: Any) -> Inputs:
        """Returns the Gram matrices of modules, and the rows of A that they are of.

        Args:
            inputs: the modules, from `split`.
            a: ``(L, r, n)``, A of the merge.

        Raises:
            MismatchError: they are of other A factors.
        """
        grams, squares = self.matched.stack(inputs)
        if squares is None:
            return grams, None
        rows = a if self.sources is None else stack_factors(inputs, self.sources)[0]
        check_stack(
            inputs.paths, squares, rows, _check_kept if self.sources is None else check_rows
        )
        return grams, rows


def _check_kept(path: str, recorded: Any, found: Any) -> None:
    """Checks that a merge has the A factors of the adapters, so that these need not be at hand.

    Raises:
        MismatchError: it has not; or all rows are of norm 1, as those of a computed A are.
    """
    kept = len(recorded) == len(found) and same_rows(recorded, found)
    if not kept or same_rows(found, np.ones(len(found))):
        raise MismatchError(
            f"module {path!r}: the merge may not have the A factors that the statistics are of; "
            "give the adapters that were merged (sources=)"
        )


def input_metric(statistics: Any, sources: Sequence[Adapter], weights: Any = None) -> InputMetric:
    """Returns the metric of the inputs in modules of a merge.

    Args:
        statistics: of the inputs.
        sources: the adapters that were merged.
        weights: one per source, with which they were merged; those of weight 0 do not count.

    Raises:
        MismatchError: there are no statistics of a source, or they are of another model.
        RecipeError: an argument is of another kind.
        UnsupportedError: factors of sources are on devices of several processes.
    """
    given = as_adapters(sources)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoreMergeWarning)  # the merge has told of other names
        present = present_adapters(given, weights, allow_other_base=True, allow_disjoint=True)
    found = [implicit(x) if isinstance(x, Adapter) else x for x in present.values()]
    leaves = jax.tree.leaves([dict(x) for x in found if isinstance(x, Adapter) and x.in_memory])
    if any(map(is_spread, leaves)):
        raise UnsupportedError(
            "sources on devices of several processes: cut the merge without statistics, or after "
            "it was written"
        )
    return InputMetric(match(statistics, found, list(present), len(given)), found)


def metric_or_none(
    statistics: Statistics | None, sources: Sequence[Adapter] | None, outline: Adapter
) -> InputMetric | None:
    """Returns the metric of the inputs, checked; None without statistics.

    Args:
        statistics: of the inputs.
        sources: the adapters that were merged; without them, the statistics have to be of the
            inputs themselves, or the merge has to have the A factors of the adapters.
        outline: the merge, of which only the names and shapes are used.

    Raises:
        CoreMergeError: as `input_metric` and `InputMetric.check`.
        RecipeError: there are sources without statistics.
    """
    if statistics is None:
        if sources is not None:
            raise RecipeError("sources are for cuts by statistics: give statistics= too")
        return None
    if sources is None:
        metric = InputMetric(match_modules(statistics, outline), None)
    else:
        metric = input_metric(statistics, sources)
    metric.check(outline)
    return metric


def metric_roots(
    inner: Float[Array, "p q"], right: Basis, inputs: Inputs, noise: float
) -> tuple[Float[Array, "q q"], Float[Array, "q q"]]:
    """Returns the root of the metric of the inputs, and its inverse.

    In orthonormal coordinates of the update's row space, the metric is the mean K̄ of the Gram
    matrices K_t / tr K_t, multiplied so that its mean eigenvalue is 1, plus `RIDGE`, divided by 1 +
    `RIDGE`. It is a function of the update and the inputs, and is 1 if these have no direction.

    Args:
        inner: ``(p, q)``, the update in orthonormal bases.
        right: that of its rows, ``(n, q)``.
        inputs: of one module.
        noise: share of the largest singular value up to which others are rounding errors.

    Returns:
        Symmetric matrices in the coordinates of ``right``; 1 outside of the row space.
    """
    _, s, v = lapack.svd(inner)
    v = jnp.where(in_range(s, noise)[None, :], v, 0)
    size = jnp.maximum(jnp.sum(v**2), 1)
    grams = _in_rows(right.times(v), inputs, inner.dtype)
    traces = jnp.trace(grams, axis1=1, axis2=2)
    shared = jnp.sum(grams * inverse(traces)[:, None, None], axis=0)
    count = jnp.sum(traces > 0).astype(inner.dtype)
    values, turn = lapack.eigh(shared * size * inverse(count))
    # Rounding may leave negative ones. Without any inputs, all are 0.
    values = jnp.where(count > 0, (jnp.maximum(values, 0) + RIDGE) / (1 + RIDGE), 1)
    frame, roots = matmul(v, turn), jnp.sqrt(values)[None, :]
    rest = jnp.eye(inner.shape[1], dtype=inner.dtype) - matmul(frame, frame.T)
    return rest + matmul(frame * roots, frame.T), rest + matmul(frame / roots, frame.T)


def _in_rows(right: Basis, inputs: Inputs, dtype: Any) -> Float[Array, "T k k"]:
    """Returns Gram matrices of the inputs' coordinates in an orthonormal basis ``(n, k)``."""
    grams, rows = jnp.asarray(inputs[0], dtype), inputs[1]
    columns = right.columns()
    if rows is None:
        return _turned(grams, columns.T)
    rows = jnp.asarray(rows)
    # x = Q S⁻² (Qᵀ Aᵀ) z in the row space of A, with singular vectors Q: z = A x. Of smaller
    # singular values S, the Gram matrices hold rounding errors alone: inputs count as in the mean.
    least = max(roundoff(rows), float(jnp.finfo(inputs[0].dtype).eps) ** 0.5)
    found, coordinates, _, _ = basis(rows.T, least, singular=True, dtype=dtype)
    inverted = coordinates * inverse(jnp.sum(coordinates**2, axis=1))[:, None]
    known = matmul(columns.T, found.columns())
    grams = _turned(grams, matmul(known, inverted))
    mean = jnp.trace(grams, axis1=1, axis2=2) / jnp.maximum(jnp.sum(known**2), 1)
    rest = matmul(columns.T, columns) - matmul(known, known.T)
    return grams + mean[:, None, None] * rest[None]


def _turned(grams: Float[Array, "T g g"], onto: Float[Array, "k g"]) -> Float[Array, "T k k"]:
    """Returns Gram matrices in other coordinates, ``onto`` times the old."""
    return matmul(matmul(onto[None], grams), onto.T[None])


def in_words(metric: InputMetric | None, outline: Mapping[str, Any]) -> str:
    """Returns words for the norm by which modules are cut."""
    if metric is None:
        return "the Frobenius norm of the updates"
    there = sum(path in metric.matched.paths for path in outline)
    if there == len(outline):
        return "the norm of the outputs on the inputs of the statistics"
    return (
        f"the norm of the outputs on the inputs of the statistics in {there} of {len(outline)} "
        "modules, and the Frobenius norm of the updates in the others"
    )
