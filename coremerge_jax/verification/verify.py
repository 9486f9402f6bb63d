"""Is a merge what its recipe makes of its sources?"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError, hint
from coremerge_jax.io.base_model.apply import find_folding
from coremerge_jax.io.formats import open_adapter
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.checks import short
from coremerge_jax.recipe import Recipe
from coremerge_jax.record import read_record
from coremerge_jax.verification.compare import Comparison, Measured
from coremerge_jax.verification.explain import explain
from coremerge_jax.verification.findings import Check, Finding, Verification, some
from coremerge_jax.verification.sources import match_sources
from coremerge_jax.verification.tolerance import coarser, wide

# How often a merge that does not fit is made of sources that differ by rounding, and how many
# times what that changes the rounding errors inside a merge may be.
_PROBES = 2

_SAFETY = 4.0


def verify(
    merged: Adapter | str | Path,
    sources: Sequence[Adapter | str | Path] | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    base: str | Path | None = None,
) -> Verification:
    """Merges again by the recorded recipe, compares, and says what is wrong.

    Modules are compared by their updates, in whichever factors they are. An error is allowed that
    rounding can explain: of the factors to their dtype, estimated for each module from their values
    and by rounding them again; and where that is not enough, inside the merge, measured by making
    it again of sources that differ by one unit in the last place. What is larger is a defect, and
    its cause is looked for: a factor, a dtype, a source that was left out, and so on
    (`verification.KINDS`).

    The merge and its sources are read batch by batch. A merge that is right is made once; one that
    is not, a few times more, and once for each source.

    Args:
        merged: a folder, a checkpoint (see `open_adapter`) or an adapter.
        sources: what was merged, in any order if there is a record, else in that of the recipe. By
            default where the record, or the recipe, says.
        recipe: how it was merged, in place of the record in ``coremerge.json``; a mapping replaces
            fields of the recorded recipe. Needed where there is no record.
        base: the base model; checks also that the merge fits it, as `apply_adapter` would.

    Raises:
        FormatError: a file is missing or broken.
        MismatchError: there are fewer sources than the record names, or they do not fit each other.
        RecipeError: there is neither a record nor a recipe.
    """
    _check_arguments(merged, sources, recipe)
    found = merged if isinstance(merged, Adapter) else open_adapter(merged)
    record = None if isinstance(recipe, Recipe) else read_record(merged)
    findings: list[Finding] = []
    if record is None:
        made = _recipe(merged, recipe)
        adapters = _open(made.adapters if sources is None else sources)
    else:
        made = Recipe.from_dict({**record.recipe.to_dict(), **_fields(recipe)})
        adapters, findings = match_sources(record, sources)
    stored = _dtype(found)
    comparison = Comparison(
        found,
        adapters,
        made,
        # Without a record, the file itself says in what it was to be written.
        dtype=made.dtype if record else coarser(stored, made.dtype),
        precision=record.precision if record else None,
    )
    # Matrices are small: threads would wait for each other for longer than they compute.
    with threadpool_limits(1, user_api="blas"):
        measured = comparison.measure()
        more = [*_modules(comparison), *_values(comparison, measured), *_extras(comparison)]
    if any(finding.defect for finding in more):
        # Sources that have changed are none where the merge is right nevertheless.
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


def _check_arguments(merged: Any, sources: Any, recipe: Any) -> None:
    """Refuses what is of another kind."""
    kinds = Adapter | str | Path
    for name, value in (("merged", merged), *((f"sources[{i}]", x) for i, x in _listed(sources))):
        if not isinstance(value, kinds):
            raise RecipeError(f"{name}: expected an adapter or its path, got {short(value)}")
    if recipe is not None and not isinstance(recipe, Recipe | Mapping):
        raise RecipeError(f"recipe: expected a mapping or a Recipe, got {short(recipe)}")


def _listed(sources: Any) -> list[tuple[int, Any]]:
    if isinstance(sources, str | Path | Mapping) or not isinstance(sources, Sequence | None):
        raise RecipeError(f"sources: expected a list of adapters, got {short(sources)}")
    return list(enumerate(sources or ()))


def _recipe(merged: Adapter | str | Path, given: Recipe | Mapping[str, Any] | None) -> Recipe:
    """Returns the recipe of a merge that has no record of it."""
    if not given:
        name = merged.metadata.name if isinstance(merged, Adapter) else merged
        raise RecipeError(
            f"{name or 'the merge'}: no coremerge.json that tells how it was merged; give a recipe "
            "(--recipe, or --rule and other options of merge)"
        )
    return given if isinstance(given, Recipe) else Recipe.from_dict(given)


def _fields(given: Recipe | Mapping[str, Any] | None) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def _open(sources: Sequence[Adapter | str | Path]) -> list[Adapter]:
    if not sources:
        raise RecipeError("no sources: name the adapters that were merged (--sources)")
    return [x if isinstance(x, Adapter) else open_adapter(x) for x in sources]


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
    """Checks which modules there are, and their shapes."""
    found, expected = comparison.found.outline, comparison.outline
    missing = tuple(path for path in expected if path not in found)
    extra = tuple(path for path in found if path not in expected)
    if missing:
        told = f"the merge lacks {some(missing)} of the sources{hint(missing[0], extra)}"
        yield Finding("missing-module", f"{told}; merge again", missing)
    if extra:
        told = f"the merge has {some(extra)}, as no source does{hint(extra[0], missing)}"
        yield Finding("extra-module", f"{told}; name all sources, or merge again", extra)
    for path in expected:
        if path in found and found[path].shape != expected[path].shape:
            told = f"module {path!r} is {found[path].shape}, in the sources {expected[path].shape}"
            yield Finding("wrong-shape", f"{told}; merge again", (path,))
    for path, told in comparison.unreadable.items():
        yield Finding("not-finite", f"{told}; merge again", (path,))


def _values(comparison: Comparison, measured: dict[str, Measured]) -> Iterator[Finding]:
    """Checks the updates."""
    off = [path for path, one in measured.items() if one.differs]
    if off:
        for path, noise in comparison.noise(off, _PROBES).items():
            measured[path] = measured[path].with_noise(_SAFETY * noise)
    yield from explain(comparison, {path: x for path, x in measured.items() if x.wrong})
    sensitive = tuple(path for path in off if not measured[path].differs)
    if sensitive:
        worst = max(measured[path].distance.relative for path in sensitive)
        told = (
            f"{some(sensitive)} differ by up to {worst:.2g} of an update, and rounding inside the "
            "merge makes as much: compare on the same kind of device to know more"
        )
        yield Finding("sensitive", told, sensitive, defect=False)
    nothing = tuple(path for path, one in measured.items() if one.nothing and not one.differs)
    if nothing:
        told = f"{some(nothing)} have no effect, as the recipe makes it: sources are 0, or cancel"
        yield Finding("zero-effect", told, nothing, defect=False)
    for t, paths in comparison.idle().items():
        told = f"source {comparison.names[t]!r} has no effect in {some(paths)}: it is 0 there"
        yield Finding("zero-effect", told, tuple(paths), defect=False)
    lost = tuple(path for path, one in measured.items() if one.underflow)
    if lost:
        told = (
            f"{some(lost)} have values too small for {comparison.dtype}; choose bfloat16 or float32"
        )
        yield Finding("rounding", told, lost, defect=False)


def _extras(comparison: Comparison) -> Iterator[Finding]:
    """Yields the tensors that are not low-rank updates."""
    found, expected = comparison.found.extras, comparison.outline.extras
    for name in dict.fromkeys([*expected, *found]):
        if name not in found:
            yield Finding("extras", f"the merge lacks {name!r} of the sources; merge again")
        elif name not in expected:
            # peft wants a bias in every layer if one has it.
            if not name.endswith(".lora_B.bias") or np.any(np.asarray(found[name])):
                yield Finding("extras", f"the merge has {name!r}, which the recipe does not keep")
        elif not _same(np.asarray(found[name]), np.asarray(expected[name]), comparison.dtype):
            yield Finding("extras", f"{name!r} is not what the recipe makes of it; merge again")


def _same(x: np.ndarray, y: np.ndarray, dtype: str) -> bool:
    """Returns True if tensors agree, those of floats up to rounding to a dtype."""
    if x.shape != y.shape:
        return False
    if np.issubdtype(y.dtype, np.integer) or y.dtype == np.bool_:
        return np.array_equal(x, y)
    info = jnp.finfo(dtype)
    bound = float(info.eps) * np.maximum(np.abs(wide(y)), float(info.tiny))
    return bool((np.abs(wide(x) - wide(y)) <= bound).all())


def _base(found: Adapter, base: str | Path) -> Iterator[Finding]:
    """Checks that the merge can be applied to a base model."""
    try:
        find_folding(found, base)
    except MismatchError as error:
        yield Finding("unmatched-base", str(error))
    except UnsupportedError as error:
        yield Finding("unmatched-base", f"not checked: {error}", defect=False)
