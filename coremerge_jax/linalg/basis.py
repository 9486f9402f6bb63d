"""Orthonormal bases of column spaces, as coordinates of the matrix itself."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coremerge_jax.linalg import lapack
from coremerge_jax.linalg.numerics import (
    GRAM_CONDITION,
    complement,
    fast_or_robust,
    gram_pays,
    in_range,
    inverse,
    matmul,
    pytree,
    root,
    roundoff,
)


@pytree
@dataclasses.dataclass(frozen=True)
class Basis:
    """Orthonormal columns ``u: (m, p)`` of the space that a matrix ``x: (m, R)`` spans.

    Columns behind the numerical rank are zero. For a tall ``x``, ``u = x @ frame`` is not formed:
    a change of the basis changes the small frame alone.

    Attributes:
        x: the matrix, or None where ``u`` is the frame itself.
        frame: ``(R, p)``, or ``(m, p)`` without ``x``; its dtype is the one to compute in.
    """

    x: Float[Array, "m R"] | None
    frame: Float[Array, "k p"]

    def columns(self) -> Float[Array, "m p"]:
        """Returns ``u`` itself."""
        if self.x is None:
            return self.frame
        return matmul(self.x.astype(self.frame.dtype), self.frame)

    def times(self, z: Float[Array, "p k"]) -> "Basis":
        """Returns ``u @ z`` for ``z: (p, k)``: a basis if the columns of ``z`` are orthonormal."""
        return Basis(x=self.x, frame=matmul(self.frame, z))

    def multiples_of(self, x: Float[Array, "m R"]) -> Float[Array, "R p"]:
        """Returns ``z: (R, p)`` with ``u = x z``, for the matrix that the basis was found for."""
        if self.x is not None:
            return self.frame
        x = x.astype(self.frame.dtype)
        left, coordinates, _, _ = basis(x, roundoff(x), singular=True)
        squares = jnp.sum(coordinates**2, axis=1)
        inner = matmul(left.columns().T, self.frame)
        return matmul((coordinates * inverse(squares)[:, None]).T, inner)


class _Parts(NamedTuple):
    """Parts of the result of `basis`."""

    frame: Float[Array, "k p"]
    coordinates: Float[Array, "p R"]
    size: Int[Array, ""]
    spread: Float[Array, ""]


class _Options(NamedTuple):
    """Options of `basis`."""

    rtol: float | int
    singular: bool
    axis: str | None
    rank: int  # how many columns the basis has


def basis(
    x: Float[Array, "m R"],
    rtol: float | int,
    *,
    singular: bool,
    dtype: DTypeLike | None = None,
    axis: str | None = None,
    rows: int | None = None,
) -> tuple[Basis, Float[Array, "p R"], Int[Array, ""], Float[Array, ""]]:
    """Returns an orthonormal basis ``u`` of the column space of ``x``.

    The rank is constant under differentiation; tangents orthogonal to both the columns and the
    rows of ``x`` leave the basis unchanged.

    Args:
        x: ``(m, R)``.
        rtol: singular values up to ``rtol`` times the largest are taken for zero.
        singular: True if the columns must be the left singular vectors. If any others will do,
            they come from a Cholesky factorization, which is much cheaper. Where singular
            vectors are not unique, their derivatives are those of one smooth choice.
        dtype: the dtype to compute in; by default that of ``x``.
        axis: a mapped axis (of `jax.shard_map`) over which the rows of ``x`` are spread. The rows
            of ``u`` are spread alike. The only communication is a psum of Gram matrices.
        rows: the number of rows on all devices, without those that only fill up, with zeros.

    Returns:
        ``u``; the coordinates ``uᵀ x: (p, R)`` with ``p = min(m, R)``; the numerical rank, int32;
        and the spread of the singular values, ``rms(s) · rms(1 / s)``, which is the factor by
        which rounding errors grow on average when a matrix is written as a multiple of ``x``.
    """
    if rows is None:
        rows = x.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    how = _Options(rtol, singular, axis, min(rows, x.shape[1]))
    parts = _basis(x.astype(dtype or x.dtype), how)
    return Basis(x if _is_tall(x, how) else None, parts.frame), *parts[1:]


def _is_tall(x: Float[Array, "m R"], how: _Options) -> bool:
    """Returns True if ``u`` is kept as a multiple of ``x``."""
    return how.axis is not None or x.shape[0] >= x.shape[1]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _basis(x: Float[Array, "m R"], how: _Options) -> _Parts:
    if how.axis is not None:
        return _spread_basis(x.T, how)
    rtol, singular, *_ = how
    tall = _is_tall(x, how)
    # The barrier keeps the transpose in memory: on CPU, products of long rows are up to twice as
    # fast as those of long columns.
    rows = jax.lax.optimization_barrier(x.T if tall else x)
    robust = partial(_by_svd, tall=tall, rtol=rtol)
    if not gram_pays(x):
        return robust(rows)
    return fast_or_robust(partial(_by_eigh if singular else _by_cholesky, tall=tall), robust)(rows)


def _gram(rows: Float[Array, "R m"], axis: str | None = None) -> Float[Array, "R R"]:
    gram = matmul(rows, rows.T)
    return gram if axis is None else jax.lax.psum(gram, axis)


def _by_cholesky(
    rows: Float[Array, "R m"], tall: bool, axis: str | None = None
) -> tuple[_Parts, Bool[Array, ""]]:
    """Uses a Gram matrix L Lᵀ: ``u = x L⁻ᵀ``; a wide matrix of full rank has ``u = 1``."""
    lower = lapack.cholesky(_gram(rows, axis))
    inverted = lapack.inverse_lower(lower)
    size = len(rows)
    product = jnp.linalg.norm(lower) * jnp.linalg.norm(inverted)
    # The product is at least the condition number. False where it is NaN: the Gram matrix is not
    # positive definite.
    exact = product <= GRAM_CONDITION * size**0.5
    frame, coordinates = (inverted.T, lower.T) if tall else (jnp.eye(size, dtype=rows.dtype), rows)
    return _Parts(frame, coordinates, jnp.asarray(size, jnp.int32), product / size), exact


def _by_eigh(
    rows: Float[Array, "R m"], tall: bool, axis: str | None = None
) -> tuple[_Parts, Bool[Array, ""]]:
    """Uses a Gram matrix E S² Eᵀ: ``u = x E S⁻¹`` of a tall matrix, ``E`` of a wide one."""
    squares, vectors = lapack.eigh(_gram(rows, axis))
    s = jnp.sqrt(jnp.abs(squares))
    exact = squares[-1] * GRAM_CONDITION**2 > squares[0]
    frame = vectors * inverse(s)[None, :] if tall else vectors
    coordinates = s[:, None] * vectors.T if tall else matmul(vectors.T, rows)
    return _Parts(frame, coordinates, jnp.asarray(len(s), jnp.int32), _spread(s)), exact


def _by_svd(rows: Float[Array, "R m"], tall: bool, rtol: float | int) -> _Parts:
    """Returns the singular vectors, from the triangular factor."""
    upper = lapack.triangular(rows.T)
    left, s, right = lapack.svd(upper.T)
    live = in_range(s, rtol) | jnp.isnan(s)  # NaN must not pass for zero
    s = jnp.where(live, s, 0)
    left, right = (jnp.where(live[None, :], z, 0) for z in (left, right))
    # rows = left S rightᵀ Q: those of a tall x are its columns. Zero columns must have coordinates
    # that are exactly zero, which S leftᵀ, the same but for rounding, would not give.
    frame = left * inverse(s)[None, :] if tall else left
    coordinates = matmul(right.T, upper) if tall else matmul(left.T, rows)
    return _Parts(frame, coordinates, jnp.sum(live, dtype=jnp.int32), _spread(s))


def _spread_basis(columns: Float[Array, "R m"], how: _Options) -> _Parts:
    """Finds a basis of a matrix of which each device has some rows, given transposed."""
    robust = partial(_by_grams, how=how)
    if columns.dtype != jnp.float64 or how.rank < len(columns):
        return robust(columns)
    fast = partial(_by_eigh if how.singular else _by_cholesky, tall=True, axis=how.axis)
    return fast_or_robust(fast, robust)(columns)


def _by_grams(columns: Float[Array, "R m"], how: _Options) -> _Parts:
    """Returns the singular vectors, from a few Gram matrices, each of the matrix that is left.

    A Gram matrix loses directions below √eps of the largest. So each step scales small directions
    up by as much as its Gram matrix resolves, for the next one, as in iterated Cholesky QR (Fukaya
    et al., SIAM J. Sci. Comput. 42, 2020).
    """
    size = len(columns)
    eps = float(jnp.finfo(columns.dtype).eps)
    frame = coordinates = jnp.eye(size, dtype=columns.dtype)
    gram = _gram(columns, how.axis)
    used = jnp.diagonal(gram) > 0
    for step in range(2 if columns.dtype == jnp.float64 else 3):
        if step > 0:
            gram = _gram(matmul(frame.T, columns), how.axis)
        squares, vectors = lapack.eigh(gram)
        s = jnp.sqrt(jnp.maximum(squares, size * eps * squares[0]))
        frame = matmul(frame, vectors) * inverse(s)[None, :]
        coordinates = s[:, None] * matmul(vectors.T, coordinates)
    _, s, right = (x[..., : how.rank] for x in lapack.svd(coordinates))
    live = in_range(s, how.rtol) | jnp.isnan(s)
    s = jnp.where(live, s, 0)
    frame = right * inverse(s)[None, :]
    # Zero columns have coordinates that are exactly zero.
    coordinates = jnp.where(used[None, :], s[:, None] * right.T, 0)
    return _Parts(frame, coordinates, jnp.sum(live, dtype=jnp.int32), _spread(s))


def _spread(s: Float[Array, " k"]) -> Float[Array, ""]:
    """Returns ``rms(s) · rms(1 / s)`` over nonzero singular values."""
    live = jnp.maximum(jnp.sum(s > 0), 1).astype(s.dtype)
    return jnp.sqrt(jnp.sum(s**2) * jnp.sum(inverse(s) ** 2)) / live


@_basis.defjvp
def _basis_jvp(how: _Options, primals: tuple, tangents: tuple) -> tuple[_Parts, _Parts]:
    (x,), (dx,) = primals, tangents
    parts = _basis(x, how)
    frame, coordinates, size, spread = parts
    tall = _is_tall(x, how)
    u = matmul(x, frame) if tall else frame
    d = matmul(u.T, dx)
    if how.axis is not None:
        d = jax.lax.psum(d, how.axis)
    # Any skew-symmetric uᵀ du keeps u orthonormal; only singular vectors ask for a certain one.
    turn = _turn(d, coordinates, roundoff(x)) if how.singular else jnp.zeros_like(matmul(d, d.T))
    if tall:
        dframe = matmul(frame, turn - matmul(d, frame))
    else:
        squares = jnp.sum(coordinates**2, axis=1)
        pseudo = (coordinates * inverse(squares)[:, None]).T
        dframe = matmul(frame, turn) + complement(u, matmul(dx, pseudo))
    dcoordinates = d - matmul(turn, coordinates)
    no_tangent = np.zeros(size.shape, jax.dtypes.float0)
    return parts, _Parts(dframe, dcoordinates, no_tangent, jnp.zeros_like(spread))  # type: ignore[arg-type]  # integers have float0 tangents


def _turn(
    d: Float[Array, "p R"], coordinates: Float[Array, "p R"], rtol: float
) -> Float[Array, "p p"]:
    """Returns ``uᵀ du`` of the left singular vectors; zero where their singular values coincide."""
    squares = jnp.sum(coordinates**2, axis=1)
    s = root(squares)
    dp = matmul(d, coordinates.T) * inverse(s)[None, :]
    gap = s[None, :] ** 2 - s[:, None] ** 2
    distinct = jnp.abs(gap) > rtol * jnp.max(s) ** 2
    f = jnp.where(distinct, 1 / jnp.where(distinct, gap, 1), 0)
    dps = dp * s[None, :]
    return f * (dps + dps.T)


def orthonormal_factors(
    b: Float[Array, "T p r"], a: Float[Array, "T r q"]
) -> tuple[Float[Array, "T p k"], Float[Array, "T q k"], Float[Array, "T k k"]]:
    """Returns orthonormal ``left (T, p, k)``, ``right (T, q, k)``: ``b a = left inner rightᵀ``.

    ``k = min(r, max(p, q))``.
    """
    # Both in one batch: two batches of LAPACK calls could wait for each other, see `lapack`.
    both = pad_rows(b, jnp.swapaxes(a, 1, 2))

    def orthonormal(x: Float[Array, "m r"]) -> tuple[Float[Array, "m k"], Float[Array, "k r"]]:
        found, coordinates, _, _ = basis(x, roundoff(x), singular=False)
        return found.columns(), coordinates

    columns, coordinates = jax.vmap(jax.vmap(orthonormal))(both)
    inner = matmul(coordinates[0], jnp.swapaxes(coordinates[1], 1, 2))
    return columns[0, :, : b.shape[1]], columns[1, :, : a.shape[2]], inner


def pad_rows(x: Float[Array, "*T p r"], y: Float[Array, "*T q r"]) -> Float[Array, "2 *T m r"]:
    """Stacks two arrays after giving them as many rows each, with zeros."""
    rows = max(x.shape[-2], y.shape[-2])
    before = ((0, 0),) * (x.ndim - 2)
    return jnp.stack([jnp.pad(z, (*before, (0, rows - z.shape[-2]), (0, 0))) for z in (x, y)])
