"""Merge spaces: where to merge. Pairs of pure functions, project and lift."""

from collections.abc import Callable

from coremerge_jax.spaces.base import Projection, Space
from coremerge_jax.spaces.core import Core
from coremerge_jax.spaces.full import Full
from coremerge_jax.spaces.knots import Knots

core = Core
full = Full
knots = Knots

SPACES: dict[str, Callable[..., Space]] = {"core": core, "full": full, "knots": knots}

__all__ = ["SPACES", "Projection", "Space", "core", "full", "knots"]
