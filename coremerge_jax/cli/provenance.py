"""Record of how an output was made, enough to make it again."""

from typing import TYPE_CHECKING, Any

from coremerge_jax import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coremerge_jax.lora import Adapter
    from coremerge_jax.recipe import Recipe


def describe_sources(recipe: "Recipe", adapters: "Sequence[Adapter]") -> list[dict[str, Any]]:
    """Returns the adapters of a recipe, with hashes of their files: each process hashes some."""
    import jax

    from coremerge_jax.checkpoint import hash_source
    from coremerge_jax.processes import exchange, failing_together

    with failing_together():
        own = range(jax.process_index(), len(adapters), jax.process_count())
        hashes = [(t, hash_source(recipe.adapters[t])) for t in own]
    found = dict(pair for pairs in exchange(hashes) for pair in pairs)
    return [
        {"name": adapter.metadata.name, "path": source, "sha256": found[t]}
        for t, (source, adapter) in enumerate(zip(recipe.adapters, adapters, strict=True))
    ]


def provenance(recipe: "Recipe", sources: "Sequence[dict[str, Any]]") -> dict[str, Any]:
    """Returns the record of a merge by a recipe."""
    from coremerge_jax.precision import computing

    with computing(recipe.precision) as dtype:
        precision = dtype.name
    return {
        "coremerge_version": __version__,
        "precision": precision,
        "recipe": recipe.explicit().to_dict(),
        "sources": list(sources),
    }
