"""Verifies that a merge is the result of its recipe and its sources."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, hint
from coremerge_jax.io.base_model.apply import find_folding
from coremerge_jax.lora import Adapter
from coremerge_jax.recipe import Recipe
from coremerge_jax.record import read_record
from coremerge_jax.text import short
from coremerge_jax.verification.compare import Comparison, Measured
from coremerge_jax.verification.explain import explain
from coremerge_jax.verification.findings import Check, Finding, Verification, some
from coremerge_jax.verification.sources import (
    AdapterOrPath,
    changed_statistics,
    match_sources,
    opened,
)
from coremerge_jax.verification.tolerance import coarser, wide

# Number of merges of slightly moved sources that measure rounding inside a merge, and the factor
# from the largest change among them to the tolerance.
_PROBES = 2

_SAFETY = 4.0


def verify(
    merged: AdapterOrPath,
    sources: Sequence[AdapterOrPath] | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    base: str | Path | None = None,
) -> Verification:
    """Merges again by the recorded recipe, compares, and finds the causes of differences.

    Modules are compared by their updates, whatever their factors. Errors that rounding explains
    are allowed: rounding of the factors to their dtype, estimated for each module from their values
    and by rounding them again; and if that is not enough, rounding inside the merge, measured by
    merging sources that differ by one unit in the last place. Larger errors are defects, and
    `verify` looks for their cause: a factor, a dtype, a source that was left out, and so on
    (`verification.KINDS`).

    The merge and its sources are read batch by batch. A right merge is made once; a wrong one a
    few times more, and once for each source.

    Args:
        merged: a folder, a checkpoint (see `open_adapter`) or an adapter.
        sources: the adapters that were merged, in any order if there is a record, else in that of
            the recipe. By default, those that the record or the recipe names.
        recipe: the recipe of the merge, in place of the record in ``coremerge.json``; a mapping
            replaces fields of the recorded recipe. Required if there is no record.
        base: the base model; if given, checks that the merge fits it, as for `apply_adapter`.

    Raises:
        FormatError: a file is missing or broken.
        MismatchError: there are fewer sources than the record names, or they do not fit each other.
        RecipeError: there is neither a record nor a recipe.
    """
    _check_arguments(merged, sources, recipe)
    found = opened(merged)
    record = None if isinstance(recipe, Recipe) else read_record(merged)
    fields = recipe if isinstance(recipe, Mapping) else {}
    findings: list[Finding] = []
    if record is None:
        made = _recipe(merged, recipe)
        given = made.adapters if sources is None else sources
        adapters = [opened(source) for source in given]
        if not adapters:
            raise RecipeError("no sources: name the adapters that were merged (--sources)")
    else:
        made = Recipe.from_dict({**record.recipe.to_dict(), **fields})
        adapters, findings = match_sources(record, sources)
        if made.statistics == record.recipe.statistics:
            findings += changed_statistics(record)
    stored = _dtype(found)
    comparison = Comparison(
        found,
        adapters,
        made,
        # Without a record, only the file itself shows the dtype that was asked for.
        dtype=made.dtype if record else coarser(stored, made.dtype),
        precision=record.precision if record else None,
    )
    # Matrices are small: BLAS threads would wait for each other for longer than they compute.
    with threadpool_limits(1, user_api="blas"):
        measured = comparison.measure()
        more = [*_modules(comparison), *_values(comparison, measured), *_extras(comparison)]
    if any(finding.defect for finding in more):
        # A changed source is a defect only if the merge is wrong.
        findings = [dataclasses.replace(finding, defect=True) for finding in findings]
    if base is not None:
        more += _base(found, base)
    return Verification(
        modules={path: _check(measured[path]) for path in comparison.paths if path in measured},
        findings=tuple(sorted(findings + more, key=lambda finding: not finding.defect)),
        sources=tuple(comparison.names),
        recipe=made.to_dict(),
        dtype=stored,
    )


def _check_arguments(merged: object, sources: object, recipe: object) -> None:
    """Refuses arguments of other kinds."""
    if isinstance(sources, str | Path | Mapping) or not isinstance(sources, Sequence | None):
        raise RecipeError(f"sources: expected a list of adapters, got {short(sources)}")
    named = {"merged": merged, **{f"sources[{i}]": x for i, x in enumerate(sources or ())}}
    for name, value in named.items():
        if not isinstance(value, AdapterOrPath):
            raise RecipeError(f"{name}: expected an adapter or its path, got {short(value)}")
    if recipe is not None and not isinstance(recipe, Recipe | Mapping):
        raise RecipeError(f"recipe: expected a mapping or a Recipe, got {short(recipe)}")


def _recipe(merged: AdapterOrPath, given: Recipe | Mapping[str, Any] | None) -> Recipe:
    """Returns the recipe of a merge that has no record."""
    if not given:
        name = merged.metadata.name if isinstance(merged, Adapter) else merged
        raise RecipeError(
            f"{name or 'the merge'}: no coremerge.json with the recipe of the merge; give a recipe "
            "(--recipe, or --rule and other options of merge)"
        )
    return given if isinstance(given, Recipe) else Recipe.from_dict(given)


def _dtype(found: Adapter) -> str:
    """Returns the name of the dtype in which factors are stored."""
    return found.metadata.dtype or coarser(*{str(lora.dtype) for lora in found.outline.values()})


def _check(one: Measured) -> Check:
    apart = one.distance
    return Check(
        norm=apart.norm,
        expected=apart.expected,
        error=apart.relative,
        tolerance=one.tolerance.at() / apart.size,
        losses=one.losses,
    )


def _modules(comparison: Comparison) -> Iterator[Finding]:
    """Yields findings on the paths and shapes of modules, and on unreadable ones."""
    found, expected = comparison.found.outline, comparison.outline
    missing = tuple(path for path in expected if path not in found)
    extra = tuple(path for path in found if path not in expected)
    if missing:
        message = f"the merge lacks {some(missing)} of the sources{hint(missing[0], extra)}"
        yield Finding("missing-module", f"{message}; merge again", missing)
    if extra:
        message = f"the merge has {some(extra)}, as no source does{hint(extra[0], missing)}"
        yield Finding("extra-module", f"{message}; name all sources, or merge again", extra)
    for path in expected:
        if path in found and found[path].shape != expected[path].shape:
            shapes = f"is {found[path].shape}, in the sources {expected[path].shape}"
            yield Finding("wrong-shape", f"module {path!r} {shapes}; merge again", (path,))
    for path, message in comparison.unreadable.items():
        yield Finding("not-finite", f"{message}; merge again", (path,))


def _values(comparison: Comparison, measured: dict[str, Measured]) -> Iterator[Finding]:
    """Yields findings on the updates; adds noise to the measurements of modules that differ."""
    off = [path for path, one in measured.items() if one.differs]
    if off:
        for path, noise in comparison.noise(off, _PROBES).items():
            measured[path] = measured[path].with_noise(_SAFETY * noise)
    yield from explain(comparison, {path: x for path, x in measured.items() if x.wrong})
    sensitive = [path for path in off if not measured[path].differs]
    if sensitive:
        worst = max(measured[path].distance.relative for path in sensitive)
        yield _note(
            "sensitive",
            f"{some(sensitive)} differ by up to {worst:.2g} of an update, and rounding inside the "
            "merge explains as much: compare on the same kind of device to know more",
            sensitive,
        )
    nothing = [path for path, one in measured.items() if one.nothing and not one.differs]
    if nothing:
        message = (
            f"{some(nothing)} have no effect, as expected: sources are 0, or cancel each other"
        )
        yield _note("zero-effect", message, nothing)
    for t, paths in comparison.idle().items():
        message = f"source {comparison.names[t]!r} has no effect in {some(paths)}: it is 0 there"
        yield _note("zero-effect", message, paths)
    lost = [path for path, one in measured.items() if one.underflow]
    if lost:
        small = f"{some(lost)} have values too small for {comparison.dtype}"
        yield _note("rounding", f"{small}; choose bfloat16 or float32", lost)


def _note(kind: str, message: str, paths: Sequence[str]) -> Finding:
    return Finding(kind, message, tuple(paths), defect=False)


def _extras(comparison: Comparison) -> Iterator[Finding]:
    """Yields findings on tensors that are not low-rank updates."""
    found, expected = comparison.found.extras, comparison.outline.extras
    for name in dict.fromkeys([*expected, *found]):
        if name not in found:
            yield Finding("extras", f"the merge lacks {name!r} of the sources; merge again")
        elif name not in expected:
            # peft needs a bias in every layer if one has it: a bias of zeros is no difference.
            if not name.endswith(".lora_B.bias") or np.any(np.asarray(found[name])):
                yield Finding("extras", f"the merge has {name!r}, which the recipe does not keep")
        elif not _same(np.asarray(found[name]), np.asarray(expected[name]), comparison.dtype):
            yield Finding("extras", f"{name!r} is not what the recipe makes of it; merge again")


def _same(x: np.ndarray, y: np.ndarray, dtype: str) -> bool:
    """Returns True if tensors agree, floats up to rounding to a dtype."""
    if x.shape != y.shape:
        return False
    if np.issubdtype(y.dtype, np.integer) or y.dtype == np.bool_:
        return np.array_equal(x, y)
    info = jnp.finfo(dtype)
    bound = float(info.eps) * np.maximum(np.abs(wide(y)), float(info.tiny))
    return bool((np.abs(wide(x) - wide(y)) <= bound).all())


def _base(found: Adapter, base: str | Path) -> Iterator[Finding]:
    """Yields findings on a merge that cannot be applied to a base model."""
    try:
        find_folding(found, base)
    except MismatchError as error:
        yield Finding("unmatched-base", str(error))
    except UnsupportedError as error:
        yield Finding("unmatched-base", f"not checked: {error}", defect=False)
