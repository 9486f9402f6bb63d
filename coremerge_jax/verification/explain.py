"""Finds causes for modules that are not as expected.

Each step looks at the modules that no step before has explained, and yields findings on those that
it explains.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from coremerge_jax.errors import MismatchError
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.recipe import Recipe
from coremerge_jax.verification.compare import Comparison, Measured
from coremerge_jax.verification.findings import Finding, some
from coremerge_jax.verification.tolerance import Expected, cores, distance, tolerance

# Factors with at most this relative difference are equal.
_SAME = 1e-3

_ADVICE = {
    "zero-effect": "merge again",
    "factor": "divide B by it, or merge again",
    "rounding": "merge again",
    "left-out": "merge again with it",
    "weight": "merge again, or correct the recipe",
    "reverted": "merge again",
    "differs": "merge again, or give the recipe by which it was merged",
}

Modules = Mapping[str, Measured]

Step = Callable[[Comparison, Modules], Iterator[Finding]]


def explain(comparison: Comparison, wrong: Modules) -> list[Finding]:
    """Finds causes for all modules that are wrong."""
    steps: list[Step] = [_vanished, _scaled, _rounded]
    # A merge of two adapters without one is the other alone: the likelier cause comes first.
    if len(wrong) == len(comparison.paths):
        steps += [_without_one, _weighted, _one_alone]
    else:
        steps += [_one_alone, _without_one, _weighted]
    rest, findings = dict(wrong), []
    for step in [*steps, _other]:
        for finding in step(comparison, dict(rest)) if rest else ():
            findings.append(finding)
            rest = {path: one for path, one in rest.items() if path not in finding.modules}
    return findings


def _vanished(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    paths = [path for path, one in rest.items() if one.vanished]
    if paths:
        yield _finding("zero-effect", comparison, paths, "zero, though the merge is not")


def _scaled(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    factors = {
        path: one.distance.factor
        for path, one in rest.items()
        if one.differs and one.tolerance.fits(one.distance)
    }
    for paths in _alike(factors):
        c = float(np.median([factors[path] for path in paths]))
        causes = [cause for cause, factor in _causes(comparison) if abs(c / factor - 1) <= _SAME]
        likely = f": {', or '.join(causes)}" if causes else ""
        yield _finding("factor", comparison, paths, f"{c:.4g} times the merge{likely}")


def _alike(factors: Mapping[str, float]) -> Iterator[list[str]]:
    """Yields the modules of about the same factor, in their order."""
    groups: dict[float, list[str]] = {}
    for path, factor in factors.items():
        near = (c for c in groups if abs(factor - c) <= 10 * _SAME * abs(c))
        groups.setdefault(next(near, factor), []).append(path)
    yield from groups.values()


def _causes(comparison: Comparison) -> Iterator[tuple[str, float]]:
    """Yields mistakes that multiply updates, and their factors."""
    merged, tasks = comparison.found.metadata, len(comparison.adapters)
    if merged.alpha and merged.rank and merged.alpha != merged.rank:
        yield (
            f"its alpha is {merged.alpha:g} and its rank {merged.rank}, and should be equal",
            merged.alpha / merged.rank,
        )
    sources = [x.metadata for x in comparison.adapters]
    for scaling in {x.alpha / x.rank for x in sources if x.alpha and x.rank}:
        yield "alpha / r of the sources counted twice", scaling
        yield "alpha / r of the sources left out", 1 / scaling
    ranks = {lora.rank for x in comparison.adapters for lora in x.outline.values()}
    for rank in ranks | {lora.rank for lora in comparison.found.outline.values()}:
        yield f"alpha / sqrt(r) in place of alpha / r, for r = {rank}", rank**0.5
        yield f"alpha / r in place of alpha / sqrt(r), for r = {rank}", rank**-0.5
    yield "a sum in place of a mean", tasks
    yield "a mean in place of a sum", 1 / tasks
    for scale in comparison.scales - {0}:
        yield "the scale of the recipe counted twice", scale
        yield "the scale of the recipe left out", 1 / scale
    yield "the wrong sign", -1


def _rounded(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    for dtype in sorted({one.through for one in rest.values() if one.through}):
        found = {
            path: one.distance.relative
            for path, one in rest.items()
            if one.through == dtype and one.distance.error <= one.coarse
        }
        if found:
            what = (
                f"rounded to {dtype}, though the merge is in {comparison.dtype}: up to "
                f"{max(found.values()):.2g} of an update is lost"
            )
            yield _finding("rounding", comparison, list(found), what)


def _without_one(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    present = [t for t, weight in enumerate(comparison.weights) if weight]
    left = dict(rest)
    for t in present if len(present) > 1 else ():
        try:
            paths = list(_fitting(comparison, left, *_without(comparison, t)))
        except MismatchError:  # the others do not fit the recipe
            continue
        if paths:
            left = {path: left[path] for path in left if path not in paths}
            yield _finding("left-out", comparison, paths, f"merged without {comparison.names[t]!r}")
        if not left:
            return


def _without(comparison: Comparison, t: int) -> tuple[Recipe, Sequence[Adapter]]:
    """Returns a recipe and sources of the merge without one of them."""
    weights, adapters = list(comparison.weights), list(comparison.adapters)
    if comparison.recipe.resolve().rule.needs_key:  # random numbers depend on places
        del weights[t], adapters[t]
    else:
        weights[t] = 0.0
    recipe = dataclasses.replace(
        comparison.recipe,
        adapters=(),
        weights=tuple(weights),
        extras="first",
        allow_other_base=True,
        allow_disjoint=True,
    )
    return recipe, adapters


def _fitting(
    comparison: Comparison, rest: Modules, recipe: Recipe, adapters: Sequence[Adapter]
) -> Iterator[str]:
    """Yields the modules that are a multiple of the result of another recipe."""
    for path, found, expected in comparison.pairs(rest, recipe, adapters):
        if _is_multiple(found, expected, comparison.dtype, rest[path].noise):
            yield path


def _is_multiple(found: LoRA, expected: Expected, dtype: str, noise: float = 0.0) -> bool:
    return tolerance(found, expected, dtype, noise).fits(distance(found, expected))


def _one_alone(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    groups: dict[int, list[str]] = defaultdict(list)
    for path in rest:
        for found in comparison.read([path]).values():
            for t, source in comparison.sources(path).items():
                if _is_multiple(found, Expected(source, source), comparison.dtype):
                    groups[t].append(path)
                    break
    for t, paths in groups.items():
        yield _finding("reverted", comparison, paths, f"{comparison.names[t]!r} alone")


def _weighted(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    """Explains modules that are sums of their sources with other coefficients."""
    ratios: dict[int, dict[str, float]] = defaultdict(dict)
    for path, found, expected in comparison.pairs(rest):
        sources = comparison.sources(path)
        f, e, *parts = [x.ravel() for x in cores(found, expected.cut, *sources.values())]
        table, both = np.stack(parts, axis=1), np.stack([f, e], axis=1)
        # From the cores: by their Gram matrix, coefficients would have half the digits.
        weights = np.linalg.lstsq(table, both)[0]
        errors = np.linalg.norm(table @ weights - both, axis=0)
        if (errors <= rest[path].tolerance.at()).all():
            for t, (x, y) in zip(sources, weights, strict=True):
                if abs(x - y) > _SAME * abs(y):
                    ratios[t][path] = x / y if y else np.inf
    for t, by_path in ratios.items():
        c = float(np.median(list(by_path.values())))
        what = f"merged with {c:.4g} times the weight of {comparison.names[t]!r}"
        yield _finding("weight", comparison, list(by_path), what)


def _other(comparison: Comparison, rest: Modules) -> Iterator[Finding]:
    errors = {path: one.distance.relative for path, one in rest.items()}
    worst = max(errors, key=lambda path: errors[path])
    explained = rest[worst].tolerance.at() / rest[worst].distance.size
    what = (
        f"off by up to {errors[worst]:.2g} of an update, of which rounding explains {explained:.2g}"
    )
    yield _finding("differs", comparison, list(rest), what)


def _finding(kind: str, comparison: Comparison, paths: Sequence[str], what: str) -> Finding:
    total = len(comparison.paths)
    if len(paths) == total:
        subject = f"all {total} modules are" if total > 1 else f"module {paths[0]!r} is"
    elif len(paths) == 1:
        subject = f"module {paths[0]!r} is"
    else:
        subject = f"{len(paths)} of {total} modules ({some(paths)}) are"
    return Finding(kind, f"{subject} {what}; {_ADVICE[kind]}", tuple(paths))
