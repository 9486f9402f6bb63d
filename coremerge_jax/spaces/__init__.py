"""Merge spaces: where to merge. Pairs of pure functions, project and lift."""

from coremerge_jax.spaces.core import core
from coremerge_jax.spaces.full import full
from coremerge_jax.spaces.knots import knots
from coremerge_jax.spaces.space import Projection, Space, Stacked
from coremerge_jax.spaces.tucker import tucker

# In the order of tables, by the names of their classes, which are those of recipes.
SPACES: dict[str, type[Space]] = {space.__name__: space for space in (core, full, knots, tucker)}

__all__ = ["SPACES", "Projection", "Space", "Stacked", "core", "full", "knots", "tucker"]
