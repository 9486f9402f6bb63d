"""Order statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt


@jax.jit
def kth_smallest(x: Float[Array, "*shape"], k: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the ``k``-th smallest entry (from 1) of a nonnegative ``x``; 0 where ``k < 1``.

    Nonnegative floats are ordered as their bit patterns are. A pattern with exactly ``k`` entries
    below is found by counting, without a sort: first among the upper halves of the bits, which
    are half the memory and nearly always suffice. ``k`` may be traced. The derivative is zero.

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


def kth_largest(x: Float[Array, "*shape"], k: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the ``k``-th largest entry (from 1) of a nonnegative ``x``; 0 if it has fewer."""
    return kth_smallest(x, x.size - k + 1)


class _Place(NamedTuple):
    """Bounds of the ``k``-th smallest of some integers: ``low <= it < high``.

    Attributes:
        low: fewer than ``k`` integers are below.
        high: at least ``k`` integers are below.
        under: the number below ``low``, less ``k``: negative.
        over: the number below ``high``, less ``k``.
        found: True if ``over`` is 0, or the value is known without a search.
    """

    low: UInt[Array, ""]
    high: UInt[Array, ""]
    under: Num[Array, ""]
    over: Num[Array, ""]
    found: Bool[Array, ""]


def _narrow(bits: UInt[Array, "*shape"], k: Int[Array, ""], place: _Place) -> _Place:
    """Narrows a place until ``high`` has exactly ``k`` of ``bits`` below it, or is ``low + 1``.

    Uses regula falsi on the counts, in its Illinois variant (Dowell and Jarratt, BIT 11, 1971), and
    a bisection in every fourth step, for counts on which it is slow.
    """
    real = jnp.float64 if bits.dtype.itemsize == 8 else jnp.float32

    def step(state: tuple[_Place, jax.Array, jax.Array]) -> tuple:
        (low, high, under, over, _), side, count = state
        share = jnp.where(count % 4 == 3, 0.5, under / (under - over))
        way = (share * (high - low).astype(real)).astype(bits.dtype)
        middle = jnp.clip(low + way, low + 1, high - 1)
        excess = (jnp.sum(bits < middle, dtype=k.dtype) - k).astype(real)
        up = excess < 0
        # An end that stays twice counts half: otherwise it might stay for ever.
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

    # The state of a loop under `jax.shard_map` has to differ by device from the start.
    under = place.under.astype(real)
    over = place.over.astype(real) + jnp.zeros_like(under)
    start = (
        place._replace(under=under, over=over),
        jnp.full_like(place.found, False),
        jnp.asarray(0, jnp.int32),
    )
    return jax.lax.while_loop(goes_on, step, start)[0]
