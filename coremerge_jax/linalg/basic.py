"""Common functions of linear algebra, and order statistics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


@jax.jit
def kth_smallest(x: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the ``k``-th smallest entry (from 1) of a nonnegative ``x``; 0 where ``k < 1``.

    Nonnegative floats are ordered as their bit patterns are. A pattern with exactly ``k`` entries
    below is found by counting, without a sort: first among the upper halves of the bits, which
    are less to look at and nearly always suffice. ``k`` may be traced. Not differentiated.

    Args:
        x: float array of any shape.
        k: integer scalar.
    """
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.dtype(f"uint{width}"))
    half = width // 2
    upper = (bits >> half).astype(jnp.dtype(f"uint{half}"))
    zeros = jnp.sum(bits == 0, dtype=k.dtype)
    largest = jnp.max(upper, initial=0)
    smallest = jnp.min(jnp.where(bits > 0, upper, largest), initial=largest)
    known = (k <= zeros) | (k == bits.size)
    place = _narrow(upper, k, _Place(smallest, largest + 1, zeros - k, bits.size - k, known))
    low, high = (end.astype(bits.dtype) << half for end in (place.low, place.high))
    place = _narrow(bits, k, place._replace(low=low, high=high))
    just_below = jnp.max(jnp.where(bits < place.high, bits, 0), initial=0)
    value = jnp.where(k <= zeros, 0, jnp.where(place.found, just_below, place.low))
    return jax.lax.bitcast_convert_type(value, x.dtype)


class _Place(NamedTuple):
    """Bounds of the ``k``-th smallest of some integers: ``low <= it < high``.

    Attributes:
        low: fewer than ``k`` integers are below.
        high: at least ``k`` integers are below.
        under: by how many they are fewer, negative.
        over: by how many they are more.
        found: whether ``over`` is 0 (or there is nothing to look for).
    """

    low: jax.Array
    high: jax.Array
    under: jax.Array
    over: jax.Array
    found: jax.Array


def _narrow(bits: jax.Array, k: jax.Array, place: _Place) -> _Place:
    """Narrows a place until ``high`` has exactly ``k`` of ``bits`` below it, or is ``low + 1``.

    By regula falsi on the counts, in its Illinois variant (Dowell and Jarratt, BIT 11, 1971), and
    a bisection now and then, for counts that it is slow on.
    """
    real = jnp.float64 if bits.dtype.itemsize == 8 else jnp.float32

    def step(state: tuple[_Place, jax.Array, jax.Array]) -> tuple:
        (low, high, under, over, _), side, count = state
        share = jnp.where(count % 4 == 3, 0.5, under / (under - over))
        way = (share * (high - low).astype(real)).astype(bits.dtype)
        middle = jnp.clip(low + way, low + 1, high - 1)
        excess = (jnp.sum(bits < middle, dtype=k.dtype) - k).astype(real)
        up = excess < 0
        # What stays counts half if it stayed before: else one end might stay for ever.
        weight = jnp.where(side == up, 0.5, 1.0).astype(real)
        place = _Place(
            low=jnp.where(up, middle, low),
            high=jnp.where(up, high, middle),
            under=jnp.where(up, excess, under * weight),
            over=jnp.where(up, over * weight, excess),
            found=excess == 0,
        )
        return place, up, count + 1

    def goes_on(state: tuple[_Place, jax.Array, jax.Array]) -> jax.Array:
        place = state[0]
        return (place.high - place.low > 1) & ~place.found

    # In loops under `jax.shard_map`, what starts constant has to say that it differs by device.
    under = place.under.astype(real)
    over = place.over.astype(real) + jnp.zeros_like(under)
    start = (
        place._replace(under=under, over=over),
        jnp.full_like(place.found, False),
        jnp.asarray(0, jnp.int32),
    )
    return jax.lax.while_loop(goes_on, step, start)[0]
