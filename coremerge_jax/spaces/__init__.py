"""Merge spaces: where to merge. Pairs of pure functions, project and lift."""

from collections.abc import Callable

from coremerge_jax.spaces.core import Core
from coremerge_jax.spaces.full import Full
from coremerge_jax.spaces.knots import Knots
from coremerge_jax.spaces.space import Projection, Space
from coremerge_jax.spaces.tucker import Tucker

core = Core
full = Full
knots = Knots
tucker = Tucker

SPACES: dict[str, Callable[..., Space]] = {
    "core": core,
    "full": full,
    "knots": knots,
    "tucker": tucker,
}

__all__ = ["SPACES", "Core", "Projection", "Space", "core", "full", "knots", "tucker"]
