"""The record of a merge, coremerge.json: its recipe, its precision and its sources."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from coremerge_jax import __version__
from coremerge_jax.errors import CoreMergeWarning, FormatError, RecipeError
from coremerge_jax.io import untrusted
from coremerge_jax.io.formats import hash_source
from coremerge_jax.io.outputs import RECORD
from coremerge_jax.io.statistics_files import hash_statistics
from coremerge_jax.lora import Adapter
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.processes import exchange, failing_together
from coremerge_jax.recipe import PRECISIONS, Recipe, Resolved


def describe_sources(recipe: Recipe, adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """Returns name, path and hashes of each adapter of a recipe.

    Args:
        recipe: the recipe, with the paths of its adapters.
        adapters: the same adapters, opened.

    Raises:
        FormatError: a file cannot be read.
        ProcessError: another process of the job has failed; each hashes a share of the files.
    """
    with failing_together():
        own = range(jax.process_index(), len(adapters), jax.process_count())
        hashes = [(t, hash_source(recipe.adapters[t])) for t in own]
    found = dict(pair for pairs in exchange(hashes) for pair in pairs)
    return [
        {"name": adapter.metadata.name, "path": source, "sha256": found[t]}
        for t, (source, adapter) in enumerate(zip(recipe.adapters, adapters, strict=True))
    ]


def warn_of_copies(sources: Sequence[Mapping[str, Any]]) -> None:
    """Warns of adapters that are the same, file by file.

    Args:
        sources: from `describe_sources`.
    """
    first: dict[Any, Mapping[str, Any]] = {}
    for source in sources:
        other = first.setdefault(tuple(sorted(source["sha256"].items())), source)
        if other is not source:
            paths = dict.fromkeys(x["path"] for x in (other, source))
            warnings.warn(
                f"adapter {source['name']!r} is in the merge more than once "
                f"({' and '.join(paths)}); to give it more weight, name it once and use --weights",
                CoreMergeWarning,
                stacklevel=3,
            )


def describe_statistics(recipe: Recipe) -> list[dict[str, Any]]:
    """Returns path and hashes of each folder of statistics that a recipe names.

    Raises:
        FormatError: a file cannot be read.
    """
    return [{"path": path, "sha256": hash_statistics(path)} for path in recipe.statistics or ()]


def provenance(
    resolved: Resolved, sources: Sequence[dict[str, Any]], scales: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the record of a merge by a recipe.

    Args:
        resolved: the recipe.
        sources: its adapters, from `describe_sources`.
        scales: the automatic scales, by words for the kind of modules.
    """
    with computing(resolved.recipe.precision) as dtype:
        precision = dtype.name
    return {
        "coremerge_version": __version__,
        "precision": precision,
        "recipe": resolved.explicit.to_dict(),
        "sources": list(sources),
        **({"statistics": found} if (found := describe_statistics(resolved.recipe)) else {}),
        **({"auto_scale": dict(scales)} if scales else {}),
    }


_FIELDS = {
    "recipe": untrusted.OBJECT,
    "precision": (lambda value: value in PRECISIONS, " or ".join(PRECISIONS)),
    "sources": (lambda value: isinstance(value, list), "a list"),
    "statistics": (lambda value: isinstance(value, list), "a list"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """An adapter that was merged, as a record has it or as it was found.

    Attributes:
        name: name of the adapter.
        path: its folder or Hugging Face id; None for an adapter in memory.
        sha256: hexadecimal digests of its files, by file name; empty if unknown.
    """

    name: str | None
    path: str | None
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class MergeRecord:
    """Record of a merge, as read from its folder.

    Attributes:
        recipe: the recipe.
        sources: the adapters, in the order of the recipe.
        precision: precision of the computation, if known.
        statistics: the folders of statistics, in the order of the recipe.
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    precision: str | None = None
    statistics: tuple[Source, ...] = ()


def read_record(merged: Adapter | str | Path) -> MergeRecord | None:
    """Returns the record in the folder of a merge; None if there is none.

    Raises:
        FormatError: the record is broken.
        RecipeError: this version does not know a field or value of its recipe.
    """
    if isinstance(merged, Adapter) or not untrusted.is_regular(file := Path(merged) / RECORD):
        return None
    content = untrusted.read_json(file, "a merged adapter")
    if content.get("recipe") is None:  # written by `save_peft`, not by a recipe
        return None
    untrusted.check_kinds(file, content, _FIELDS)
    try:
        recipe = Recipe.from_dict(content["recipe"])
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error
    sources = _read_sources(file, content, "sources", ("name", "path"))
    statistics = _read_sources(file, content, "statistics", ("path",))
    return MergeRecord(recipe, sources, content.get("precision"), statistics)


def _read_sources(
    file: Path, content: Mapping[str, Any], key: str, names: Sequence[str]
) -> tuple[Source, ...]:
    """Returns what a record says of sources."""
    found = content.get(key) or []
    if not all(_is_source(source, names) for source in found):
        raise FormatError(f"{file}: expected {key} with {', '.join(names)} and sha256 by file")
    return tuple(Source(x.get("name"), x["path"], x["sha256"]) for x in found)


def _is_source(found: Any, names: Sequence[str]) -> bool:
    if not isinstance(found, dict) or not {*names, "sha256"} <= found.keys():
        return False
    texts = all(found[key] is None or untrusted.is_text(found[key]) for key in names)
    digests = found["sha256"]
    return texts and isinstance(digests, dict) and all(map(untrusted.is_text, digests.values()))
