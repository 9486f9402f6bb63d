"""Automatic scales: the norm that a merge should have, from those of the adapters' updates."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coremerge_jax.linalg import inverse, root
from coremerge_jax.rules import Chain

# Share of the squared norm of all updates below which their merge is what rounding left of zero.
_NOTHING = 1e-12


def given_scale(rule: Chain, tasks: int) -> float | None:
    """Returns the automatic scale of modules that so many adapters have; None if norms decide."""
    return 1.0 if tasks == 1 else rule.auto_scale(tasks)


def scale_to_norm(rule: Chain, tasks: int, merged: Any, updates: Any) -> Any:
    """Returns the scale at which merged updates have the norm that they should have.

    It is one scale for all modules that so many adapters have. If each merged update had such a
    norm, merges would be worse.

    Args:
        rule: by which they were merged.
        tasks: the number T of adapters.
        merged: sum of the squared sizes of the merged updates, see `Rule.auto_square`.
        updates: sum of the squared norms of the adapters' updates.

    Returns:
        ``auto_norm(T) · √(updates / merged)``; 1 where that is 0 or not finite. A number, unless
        an argument is traced.
    """
    scale = _to_norm(rule.auto_norm(tasks), merged, updates)
    return scale if isinstance(scale, jax.core.Tracer) else float(scale)


@jax.jit
def _to_norm(
    norm: Float[Array, ""], merged: Float[Array, ""], updates: Float[Array, ""]
) -> Float[Array, ""]:
    scale = norm * root(updates * inverse(merged, _NOTHING * updates))
    return jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
