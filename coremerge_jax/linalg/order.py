"""Order statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt

# Order statistics of larger arrays are bracketed by those of a sample. Its stride is a prime, so
# that it has entries of all columns of a matrix.
_LARGE, _STRIDE = 2**16, 251


@jax.jit
def kth_smallest(x: Float[Array, "*shape"], k: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the ``k``-th smallest entry (from 1) of a nonnegative ``x``; 0 where ``k < 1``.

    Nonnegative floats are ordered as their bit patterns are. A pattern with exactly ``k`` entries
    below is found by counting, without a sort. ``k`` may be traced. The derivative is zero.

    Args:
        x: float array of any shape.
        k: integer scalar.
    """
    width = 8 * x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), jnp.dtype(f"uint{width}"))
    return jax.lax.bitcast_convert_type(_select(bits.ravel(), k), x.dtype)


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


def _select(bits: UInt[Array, " n"], k: Int[Array, ""]) -> UInt[Array, ""]:
    """Returns the ``k``-th smallest integer; 0 where ``k < 1``."""
    place = _sampled(bits, k) if bits.size >= _LARGE else _whole(bits, k)
    # First by the leading of the bits in which both ends differ: these cells take half the memory,
    # and nearly always suffice.
    half = 4 * bits.dtype.itemsize
    varying = 2 * half - jax.lax.clz(place.high - place.low).astype(jnp.int32)
    shift = jnp.maximum(varying - half + 1, 0).astype(bits.dtype)
    inside = jnp.clip(bits, place.low, place.high - 1) - place.low
    cells = (inside >> shift).astype(jnp.dtype(f"uint{half}"))
    end = ((place.high - 1 - place.low) >> shift).astype(cells.dtype) + 1
    found = _narrow(cells, k, place._replace(low=end - end, high=end))
    low, high = (place.low + (x.astype(bits.dtype) << shift) for x in (found.low, found.high))
    high = jnp.where(found.high == end, place.high, high)
    place = _narrow(bits, k, found._replace(low=low, high=high))
    just_below = jnp.max(jnp.where(bits < place.high, bits, 0), initial=0)
    return jnp.where(place.found, just_below, place.low)


def _whole(bits: UInt[Array, " n"], k: Int[Array, ""]) -> _Place:
    """Returns the bounds from the smallest to the largest of the integers but 0."""
    zeros = jnp.sum(bits == 0, dtype=k.dtype)
    largest = jnp.max(bits, initial=0)
    smallest = jnp.min(jnp.where(bits > 0, bits, largest), initial=largest)
    zero = k <= zeros
    return _Place(
        low=jnp.where(zero, 0, smallest),
        high=jnp.where(zero, 1, largest + 1),
        under=zeros - k,
        over=jnp.where(zero, zeros, bits.size) - k,
        found=zero | (k == bits.size),
    )


def _sampled(bits: UInt[Array, " n"], k: Int[Array, ""]) -> _Place:
    """Returns bounds from a sample; or of all integers, where they do not hold."""
    sample = bits[::_STRIDE]
    # The place in a random sample is off by half of the root of its size, or less, on average.
    middle, margin = k.astype(jnp.float32) * (sample.size / bits.size), 2 * sample.size**0.5 + 2
    first, last = ((middle + off).astype(k.dtype) for off in (-margin, margin))
    low = _select(sample, first)
    most = jnp.asarray(jnp.iinfo(bits.dtype).max // 2 + 1, bits.dtype)  # no float has that bit
    high = jnp.where(last > sample.size, most, _select(sample, last) + 1)
    under, over = (jnp.sum(bits < bound, dtype=k.dtype) - k for bound in (low, high))
    place = _Place(low, high, under, over, over == 0)
    return jax.lax.cond((under < 0) & (over >= 0), lambda: place, lambda: _whole(bits, k))


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
