"""Matrix functions of the singular values, differentiable everywhere, and order statistics.

All functions take one matrix; `jax.vmap` batches them. Matrix products are in full precision.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def in_range(s: jax.Array, rtol: float | jax.Array) -> jax.Array:
    """Which of the descending singular values ``s`` are above ``rtol`` times the first."""
    return s > rtol * s[0]


def roundoff(x: jax.Array) -> float:
    """Relative size below which a singular value of the computed matrix ``x`` is rounding noise.

    The usual ``max(p, q) * eps``, as in `numpy.linalg.matrix_rank`.
    """
    return max(x.shape) * float(jnp.finfo(x.dtype).eps)


@jax.custom_jvp
def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Thin singular value decomposition ``x = (u * s) @ vt`` with finite derivatives.

    Where singular values coincide, their vectors are not differentiable functions of ``x``: the
    rotation inside their common subspace is given the derivative zero. Functions that do not
    depend on that rotation get their true derivative.

    Args:
        x: ``(p, q)``.

    Returns:
        ``u: (p, k)``, descending ``s: (k,)`` and ``vt: (k, q)`` with ``k = min(p, q)``.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


@svd.defjvp
def _svd_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,), (dx,) = primals, tangents
    u, s, vt = svd(x)
    dp = matmul(u.T, matmul(dx, vt.T))
    gap = s[None, :] ** 2 - s[:, None] ** 2
    distinct = jnp.abs(gap) > roundoff(x) * s[0] ** 2
    f = jnp.where(distinct, 1 / jnp.where(distinct, gap, 1), 0)
    inverse = _inverse(s, roundoff(x) * s[0])[None, :]
    dps, sdp = dp * s[None, :], s[:, None] * dp
    du = matmul(u, f * (dps + dps.T)) + _complement(u, matmul(dx, vt.T)) * inverse
    dv = matmul(vt.T, f * (sdp + sdp.T)) + _complement(vt.T, matmul(dx.T, u)) * inverse
    return (u, s, vt), (du, jnp.diagonal(dp), dv.T)


def _complement(q: jax.Array, x: jax.Array) -> jax.Array:
    """The part of ``x`` orthogonal to the columns of ``q``."""
    return x - matmul(q, matmul(q.T, x))


def _inverse(s: jax.Array, cutoff: jax.Array | float = 0) -> jax.Array:
    return jnp.where(s > cutoff, 1 / jnp.where(s > cutoff, s, 1), 0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def spectral_map(fn: Callable, x: jax.Array, *params: jax.Array) -> jax.Array:
    """``u @ diag(f) @ vt`` for each row f of ``fn(s, *params)``, with ``u, s, vt = svd(x)``.

    The derivative is exact also where singular values coincide: Daleckii and Krein's divided
    differences, in the form for singular values (Noferini, "A formula for the Fréchet derivative
    of a generalized matrix function", SIAM J. Matrix Anal. Appl. 38, 2017).

    Args:
        fn: maps the descending singular values ``(k,)`` to ``(c, k)``, c replacements for them; it
            must send numerically zero values to zero.
        x: ``(p, q)``.
        *params: what else ``fn`` depends on.

    Returns:
        ``(c, p, q)``.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return _reassemble(u, fn(s, *params), vt)


def _reassemble(u: jax.Array, f: jax.Array, vt: jax.Array) -> jax.Array:
    return jax.vmap(lambda f: matmul(u * f[None, :], vt))(f)


@spectral_map.defjvp
def _spectral_map_jvp(fn: Callable, primals: tuple, tangents: tuple) -> tuple:
    x, *params = primals
    dx, *dparams = tangents
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    dxv, dxu = matmul(dx, vt.T), matmul(dx.T, u)
    dp = matmul(u.T, dxv)
    f, df = jax.jvp(fn, (s, *params), (jnp.diagonal(dp), *dparams))
    slope = jax.jacfwd(fn)(s, *params)
    gap = s[:, None] - s[None, :]
    close = jnp.abs(gap) <= float(jnp.finfo(x.dtype).eps) ** 0.5 * s[0]

    def tangent(f: jax.Array, df: jax.Array, slope: jax.Array) -> jax.Array:
        limit = jnp.diagonal(slope)[:, None] - slope
        even = jnp.where(close, limit, (f[:, None] - f[None, :]) / jnp.where(close, 1, gap))
        odd = (f[:, None] + f[None, :]) * _inverse(s[:, None] + s[None, :])
        inner = (even * (dp + dp.T) + odd * (dp - dp.T)) / 2
        inner = inner - jnp.diag(jnp.diagonal(inner)) + jnp.diag(df)
        ratio = (f * _inverse(s))[None, :]
        outer = matmul(_complement(u, dxv) * ratio, vt)
        outer += matmul(u * ratio, _complement(vt.T, dxu).T)
        return matmul(matmul(u, inner), vt) + outer

    return _reassemble(u, f, vt), jax.vmap(tangent)(f, df, slope)


def truncate(x: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts ``x`` to its leading singular directions.

    Directions whose singular value equals the last one kept are kept too: which of them to drop
    would be an arbitrary choice.

    Args:
        x: ``(p, q)``.
        rank: how many; may be traced.

    Returns:
        The best approximation of ``x`` of that rank, and its partial isometry: the same with
        every nonzero singular value replaced by one. Both ``(p, q)``.
    """
    rtol = jnp.asarray(roundoff(x), x.dtype)
    update, frame = spectral_map(_leading, x, jnp.asarray(rank, x.dtype), rtol)
    return update, frame


def _leading(s: jax.Array, rank: jax.Array, rtol: jax.Array) -> jax.Array:
    first = jnp.arange(s.shape[0], dtype=s.dtype) < rank
    last = jnp.min(jnp.where(first, s, jnp.inf))
    kept = (s >= last * (1 - rtol)) & in_range(s, rtol)
    return jnp.stack([jnp.where(kept, s, 0), kept.astype(s.dtype)])


def isotropic(x: jax.Array) -> jax.Array:
    """``x`` with each of its (numerically) nonzero singular values replaced by their mean."""
    return spectral_map(_flat, x, jnp.asarray(roundoff(x), x.dtype))[0]


def _flat(s: jax.Array, rtol: jax.Array) -> jax.Array:
    live = in_range(s, rtol)
    mean = jnp.sum(jnp.where(live, s, 0)) / jnp.maximum(jnp.sum(live), 1).astype(s.dtype)
    return jnp.where(live, mean, 0)[None]


def inverse_sqrt(x: jax.Array) -> jax.Array:
    """The pseudo-inverse square root of a symmetric positive semidefinite ``x``."""
    return spectral_map(_inverse_sqrt, x, jnp.asarray(roundoff(x), x.dtype))[0]


def _inverse_sqrt(s: jax.Array, rtol: jax.Array) -> jax.Array:
    live = in_range(s, rtol)
    return jnp.where(live, jax.lax.rsqrt(jnp.where(live, s, 1)), 0)[None]


@jax.jit
def kth_smallest(x: jax.Array, k: jax.Array) -> jax.Array:
    """The ``k``-th smallest entry (from 1) of a nonnegative ``x``; 0 where ``k < 1``.

    Nonnegative floats are ordered as their bit patterns are, so the answer is built bit by bit,
    each bit by one count over ``x``: no sort, and ``k`` may be traced. Not differentiated.

    Args:
        x: float array of any shape.
        k: integer scalar.
    """
    uint = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x), uint)
    top = 8 * x.dtype.itemsize - 2  # the bit below the sign

    def refine(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (jnp.ones((), uint) << (top - i).astype(uint))
        below = jnp.sum(bits < candidate, dtype=k.dtype)
        return jnp.where(below < k, candidate, low)

    found = jax.lax.fori_loop(0, top + 1, refine, jnp.zeros((), uint))
    return jax.lax.bitcast_convert_type(found, x.dtype)
