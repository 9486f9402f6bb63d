"""What the other modules of linear algebra share, and order statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Up to this condition number, what a Gram matrix in float64 loses is below 1e-8.
GRAM_CONDITION = 1e4
# Up to this size, decompositions of the matrix itself are about as fast.
GRAM_SIZE = 64


def in_range(s: jax.Array, rtol: float | jax.Array) -> jax.Array:
    """Which of the singular values ``s`` are above ``rtol`` times the largest."""
    return s > rtol * jnp.max(s)


def roundoff(x: jax.Array) -> float:
    """Relative size below which a singular value of the computed matrix ``x`` is rounding noise.

    The usual ``max(p, q) * eps``, as in `numpy.linalg.matrix_rank`.
    """
    return max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)


def inverse(s: jax.Array, cutoff: jax.Array | float = 0) -> jax.Array:
    """``1 / s`` where ``s`` is above the cutoff, else 0."""
    return jnp.where(s > cutoff, 1 / jnp.where(s > cutoff, s, 1), 0)


def complement(q: jax.Array, x: jax.Array) -> jax.Array:
    """The part of ``x`` orthogonal to the columns of ``q``."""
    return x - matmul(q, matmul(q.T, x))


def gram_pays(x: jax.Array) -> bool:
    """Whether a Gram matrix of ``x`` can be precise enough, and saves time."""
    return x.dtype == jnp.float64 and max(x.shape) > GRAM_SIZE


def fast_or_robust(fast: Callable, robust: Callable) -> Callable:
    """A function of arrays: ``fast``, and ``robust`` where that says it is not exact.

    Under `jax.vmap`, ``robust`` runs only if some matrix of the whole batch needs it.

    Args:
        fast: gives a result and whether it is exact.
        robust: gives a result of the same structure.
    """

    @jax.custom_batching.custom_vmap
    def chosen(*args: Any) -> Any:
        result, exact = fast(*args)

        def mixed() -> Any:
            def pick(x: jax.Array, y: jax.Array) -> jax.Array:
                return jnp.where(exact.reshape(exact.shape + (1,) * (x.ndim - exact.ndim)), x, y)

            return jax.tree.map(pick, result, robust(*args))

        return jax.lax.cond(jnp.all(exact), lambda: result, mixed)

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


@jax.jit
def kth_smallest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The ``k``-th smallest entry (from 1) of a nonnegative ``x``; 0 where ``k < 1``.

    Nonnegative floats are ordered as their bit patterns are, so the answer is built bit by bit,
    each bit by one count over ``x``, until exactly ``k`` entries are below: no sort, and ``k`` may
    be traced. Not differentiated.

    Args:
        x: float array of any shape.
        k: integer scalar.
    """
    uint = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), uint)
    top = 8 * x.dtype.itemsize - 2  # the bit below the sign

    def refine(state: tuple) -> tuple:
        place, low, _ = state
        candidate = low | (jnp.ones((), uint) << place.astype(uint))
        below = jnp.sum(bits < candidate, dtype=k.dtype)
        return place - 1, jnp.where(below <= k, candidate, low), below == k

    def goes_on(state: tuple) -> jax.Array:
        return (state[0] >= 0) & ~state[2]

    start = jnp.asarray(top, jnp.int32), jnp.zeros((), uint), k < 1
    _, low, found = jax.lax.while_loop(goes_on, refine, start)
    largest = jnp.max(jnp.where(bits < low, bits, 0), initial=0)
    return jax.lax.bitcast_convert_type(jnp.where(found, largest, low), x.dtype)
