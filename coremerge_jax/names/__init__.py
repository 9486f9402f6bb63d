"""Module names of JAX implementations of model families, and Hugging Face's names for them."""

from coremerge_jax.errors import RecipeError
from coremerge_jax.lora import Adapter
from coremerge_jax.names.families import NAME_MAPS
from coremerge_jax.names.name_map import NameMap, Rule
from coremerge_jax.names.trees import outline_tree


def find_names(names: str) -> NameMap:
    """Returns the names of an implementation.

    Raises:
        RecipeError: there are no such names.
    """
    if names not in NAME_MAPS:
        raise RecipeError(f"names {names!r}: expected one of {', '.join(NAME_MAPS)}")
    return NAME_MAPS[names]


def translate(adapter: Adapter, names: str, *, head_dim: int | None = None) -> Adapter:
    """Translates an adapter's names: to Hugging Face's if it has those of ``names``, else to these.

    Args:
        adapter: with names of either.
        names: one of `NAME_MAPS`.
        head_dim: the size of an attention head, where outputs have to be reordered.

    Raises:
        RecipeError: there are no such names.
        MismatchError: a module has no name there, or not all parts of a fused kernel are there.
        UnsupportedError: ``head_dim`` is needed, or does not fit.
    """
    found = find_names(names)
    if found.fits(adapter.outline):
        return found.to_hugging_face(adapter, head_dim=head_dim)
    return found.from_hugging_face(adapter, head_dim=head_dim)


__all__ = ["NAME_MAPS", "NameMap", "Rule", "find_names", "outline_tree", "translate"]
