"""Common functions of linear algebra, and order statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Up to this condition number, what a Gram matrix in float64 loses is below 1e-8.
GRAM_CONDITION = 1e4

# Up to this size, decompositions of the matrix itself are about as fast.
GRAM_SIZE = 64


def in_range(s: jax.Array, rtol: float | jax.Array) -> jax.Array:
    """Marks the singular values ``s`` that are above ``rtol`` times the largest."""
    return s > rtol * jnp.max(s)


def roundoff(x: jax.Array) -> float:
    """Returns the relative size below which a singular value of ``x`` is rounding noise.

    The usual ``max(p, q) * eps``, as in `numpy.linalg.matrix_rank`.
    """
    return max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)


def rounding(x: jax.Array) -> jax.Array:
    """Returns the size below which a singular value is noise of ``x`` less its parts."""
    least = 64 * float(jnp.finfo(x.dtype).eps)  # of small matrices, whose parts are less exact
    return max(roundoff(x), least) * jnp.linalg.norm(jax.lax.stop_gradient(x))


def inverse(s: jax.Array, cutoff: jax.Array | float = 0) -> jax.Array:
    """Returns ``1 / s`` where ``s`` is above the cutoff, else 0."""
    return jnp.where(s > cutoff, 1 / jnp.where(s > cutoff, s, 1), 0)


def complement(q: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the part of ``x`` orthogonal to the columns of ``q``."""
    return x - matmul(q, matmul(q.T, x))


def product_norm(b: np.ndarray, a: np.ndarray) -> float:
    """Returns ‖b a‖ from Gram matrices, on the host: to half the digits where terms cancel."""
    return float(np.sqrt(max(np.sum((b.T @ b) * (a @ a.T)), 0.0)))


def gram_pays(x: jax.Array) -> bool:
    """Returns True if a Gram matrix of ``x`` can be precise enough, and saves time."""
    return x.dtype == jnp.float64 and max(x.shape) > GRAM_SIZE


def in_loop(fn: Callable) -> Callable:
    """Returns the function as the body of a loop (`jax.lax.scan`) that is differentiated twice.

    Loops of JAX 0.9 forget custom derivatives once they are differentiated backwards, and then
    differentiate decompositions. Nothing is forgotten of what a checkpoint holds: this has one for
    each derivative, and they keep all that the function computes.
    """
    keep = partial(
        jax.checkpoint, policy=jax.checkpoint_policies.everything_saveable, prevent_cse=False
    )
    return keep(keep(fn))


def fast_or_robust(fast: Callable, robust: Callable) -> Callable:
    """Returns a function of arrays: ``fast``, and ``robust`` where that says it is not exact.

    Under `jax.vmap`, ``robust`` runs only if some matrix of the whole batch needs it.

    Args:
        fast: gives a result and whether it is exact.
        robust: gives a result of the same structure.
    """

    @jax.custom_batching.custom_vmap
    def chosen(*args: Any) -> Any:
        result, exact = fast(*args)

        def pick(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(exact.reshape(exact.shape + (1,) * (x.ndim - exact.ndim)), x, y)

        # Both ways by `pick`, so that under `jax.shard_map` both differ by device.
        return jax.lax.cond(
            jnp.all(exact),
            lambda: jax.tree.map(pick, result, result),
            lambda: jax.tree.map(pick, result, robust(*args)),
        )

    @chosen.def_vmap
    def batched(size: int, in_batched: list, *args: Any) -> tuple[Any, Any]:
        result = fast_or_robust(jax.vmap(fast), jax.vmap(robust))(*_repeat(size, in_batched, args))
        return result, jax.tree.map(lambda _: True, result)

    return chosen


def _repeat(size: int, in_batched: Any, args: Any) -> Any:
    """Repeats what is not batched, for the rules of `jax.custom_batching.custom_vmap`."""

    def one(x: jax.Array, is_batched: bool) -> jax.Array:
        return x if is_batched else jnp.broadcast_to(x, (size, *x.shape))

    return jax.tree.map(one, args, tuple(in_batched))
