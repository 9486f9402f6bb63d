"""What an output records of its making: enough to make it again."""

from typing import TYPE_CHECKING, Any

from coremerge_jax import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coremerge_jax.lora import Adapter
    from coremerge_jax.recipe import Recipe


def describe_sources(recipe: "Recipe", adapters: "Sequence[Adapter]") -> list[dict[str, Any]]:
    """The adapters of a recipe, with hashes of their files."""
    from coremerge_jax.checkpoint import hash_source

    return [
        {"name": adapter.metadata.name, "path": source, "sha256": hash_source(source)}
        for source, adapter in zip(recipe.adapters, adapters, strict=True)
    ]


def provenance(recipe: "Recipe", sources: "Sequence[dict[str, Any]]") -> dict[str, Any]:
    """The record of a merge by a recipe."""
    return {
        "coremerge_version": __version__,
        "recipe": recipe.explicit().to_dict(),
        "sources": list(sources),
    }
