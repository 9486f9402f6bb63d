"""Functions of the singular values."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from coremerge_jax.linalg import lapack
from coremerge_jax.linalg.numerics import (
    GRAM_CONDITION,
    GRAM_SIZE,
    complement,
    fast_or_robust,
    gram_pays,
    in_range,
    inverse,
    matmul,
    pytree,
    rounding,
    roundoff,
)

_Scalar = Float[Array, ""]

# Of the iteration for polar factors: the first guess of the smallest singular value over the
# largest, and the most steps. With 0.1, singular vectors of eight tasks take six.
_LEAST = 0.1
_STEPS = 14

# u, s and v of a singular value decomposition.
_Triple = tuple[Float[Array, "p k"], Float[Array, " k"], Float[Array, "q k"]]


@pytree
@dataclasses.dataclass(frozen=True)
class Factored:
    """The matrix ``u @ blockdiag(blocks) @ vᵀ``.

    Attributes:
        u: ``(p, T r)``.
        blocks: ``(T, r, r)``.
        v: ``(q, T r)``.
    """

    u: Float[Array, "p k"]
    blocks: Float[Array, "T r r"]
    v: Float[Array, "q k"]

    def dense(self) -> Float[Array, "p q"]:
        """Returns the matrix itself."""
        return matmul(_times_blocks(self.u, self.blocks), self.v.T)


def _times_blocks(x: Float[Array, "p k"], blocks: Float[Array, "T r r"]) -> Float[Array, "p k"]:
    """Returns ``x @ blockdiag(blocks)``."""
    tasks, rank, _ = blocks.shape
    columns = x.reshape(len(x), tasks, rank)
    product = jnp.einsum("pti,tij->ptj", columns, blocks, precision="highest")
    return product.reshape(x.shape)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def spectral_map(
    fn: Callable, x: Float[Array, "p q"] | Factored, *params: Shaped[Array, ""]
) -> Float[Array, "c p q"]:
    """Maps ``x = u @ diag(s) @ vᵀ`` to ``u @ diag(f) @ vᵀ`` for each row f of ``fn(s, *params)``.

    The derivative is exact also where singular values coincide: Daleckii and Krein's divided
    differences, in the form for singular values (Noferini, "A formula for the Fréchet derivative
    of a generalized matrix function", SIAM J. Matrix Anal. Appl. 38, 2017). The selection that
    ``fn`` makes is constant. So null directions stay null if it keeps the numerical range: the
    part of a change between left and right null vectors has no effect.

    Args:
        fn: maps the descending singular values ``(k,)`` to ``(c, k)``, c replacements for them; it
            must send numerically zero values to zero.
        x: ``(p, q)``. A `Factored` is nearly free if the columns of its u and v that matter are
            orthonormal, which is tested here.
        *params: further arguments of ``fn``.

    Returns:
        ``(c, p, q)``.
    """
    if isinstance(x, Factored):
        return _map_factored(fn, x, params)
    u, s, v = _decompose(x)
    return _reassemble(u, fn(s, *params), v)


def _decompose(x: Float[Array, "p q"]) -> _Triple:
    """Returns ``u (p, k)``, descending ``s`` and ``v (q, k)`` with ``x = u @ diag(s) @ vᵀ``."""
    if not gram_pays(x):
        return lapack.svd(x)
    return fast_or_robust(_by_gram, lapack.svd)(x)


def _by_gram(x: Float[Array, "p q"]) -> tuple[_Triple, Bool[Array, ""]]:
    if x.shape[0] < x.shape[1]:
        (v, s, u), exact = _by_gram(x.T)
        return (u, s, v), exact
    squares, v = lapack.eigh(matmul(x.T, x))
    s = jnp.sqrt(jnp.abs(squares))
    exact = squares[-1] * GRAM_CONDITION**2 > squares[0]
    return (matmul(x, v) * inverse(s)[None, :], s, v), exact


def _map_factored(fn: Callable, x: Factored, params: tuple) -> Float[Array, "c p q"]:
    """Decomposes the blocks alone, or the dense matrix where u or v are not orthonormal."""
    if x.u.shape[1] > min(len(x.u), len(x.v)):  # they cannot be, and may be many
        return _map_dense(fn, x, params)

    def of_blocks(x: Factored, params: tuple) -> tuple[Float[Array, "c p q"], Bool[Array, ""]]:
        left, s, right = jax.vmap(lapack.svd)(x.blocks)
        u, v = _times_blocks(x.u, left), _times_blocks(x.v, right)
        order = jnp.argsort(-s.ravel())
        u, s, v = u[:, order], s.ravel()[order], v[:, order]
        live = in_range(s, roundoff(u)).astype(s.dtype)
        error = [matmul(w.T, w) * jnp.outer(live, live) - jnp.diag(live) for w in (u, v)]
        tolerance = max(1e-8, 64 * float(jnp.finfo(s.dtype).eps))
        orthonormal = jnp.all(jnp.abs(jnp.stack(error)) < tolerance)
        return _reassemble(u, fn(s, *params), v), orthonormal

    return fast_or_robust(of_blocks, partial(_map_dense, fn))(x, params)


def _map_dense(fn: Callable, x: Factored, params: tuple) -> Float[Array, "c p q"]:
    return _map_by_svd(fn, x.dense(), *params)


def _map_by_svd(
    fn: Callable, x: Float[Array, "p q"], *params: Shaped[Array, ""]
) -> Float[Array, "c p q"]:
    u, s, v = lapack.svd(x)
    return _reassemble(u, fn(s, *params), v)


def _reassemble(
    u: Float[Array, "p k"], f: Float[Array, "c k"], v: Float[Array, "q k"]
) -> Float[Array, "c p q"]:
    """Returns ``u diag(f) vᵀ`` for each row of f."""
    return jax.vmap(lambda f: matmul(u * f[None, :], v.T))(f)


@spectral_map.defjvp
def _spectral_map_jvp(
    fn: Callable, primals: tuple, tangents: tuple
) -> tuple[Float[Array, "c p q"], Float[Array, "c p q"]]:
    x, *params = primals
    dx, *dparams = tangents
    if isinstance(x, Factored):
        x, dx = jax.jvp(Factored.dense, (x,), (dx,))
    value, u, s, v = _parts(fn, x, *params)
    return value, _tangent(fn, (u, s, v), params, dx, dparams)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _parts(
    fn: Callable, x: Float[Array, "p q"], *params: Shaped[Array, ""]
) -> tuple[Float[Array, "c p q"], Float[Array, "p k"], Float[Array, " k"], Float[Array, "q k"]]:
    """Returns `spectral_map` of a matrix, and its ``u``, ``s`` and ``v``: a derivative needs them.

    They have derivatives of their own, for second derivatives. Vectors of coinciding singular
    values have none: here they do not turn.
    """
    u, s, v = lapack.svd(x)
    return _reassemble(u, fn(s, *params), v), u, s, v


@_parts.defjvp
def _parts_jvp(fn: Callable, primals: tuple, tangents: tuple) -> tuple:
    x, *params = primals
    dx, *dparams = tangents
    value, u, s, v = _parts(fn, x, *params)
    dxv, dxu = matmul(dx, v), matmul(dx.T, u)
    dp = matmul(u.T, dxv)
    largest = jnp.maximum(s[:, None], s[None, :])
    fixed = _close(s) | (largest <= rounding(x))
    gap = s[None, :] ** 2 - s[:, None] ** 2
    inverted = jnp.where(fixed, 0, 1 / jnp.where(fixed, 1, gap))
    columns, rows = dp * s[None, :], dp * s[:, None]
    turn_u, turn_v = inverted * (columns + columns.T), inverted * (rows + rows.T)
    reciprocal = inverse(s)[None, :]
    du = matmul(u, turn_u) + complement(u, dxv * reciprocal)
    dv = matmul(v, turn_v) + complement(v, dxu * reciprocal)
    tangent = _tangent(fn, (u, s, v), params, dx, dparams)
    return (value, u, s, v), (tangent, du, jnp.diagonal(dp), dv)


def _close(s: Float[Array, " k"]) -> Bool[Array, "k k"]:
    """Marks the pairs for which a difference quotient has more rounding error than its limit."""
    eps = float(jnp.finfo(s.dtype).eps)
    return (s[:, None] - s[None, :]) ** 2 <= eps * s[0] * jnp.maximum(s[:, None], s[None, :])


def _tangent(
    fn: Callable, frames: _Triple, params: list, dx: Float[Array, "p q"], dparams: list
) -> Float[Array, "c p q"]:
    """Returns the derivative of `spectral_map`."""
    u, s, v = frames
    dxv, dxu = matmul(dx, v), matmul(dx.T, u)
    dp = matmul(u.T, dxv)
    f, df = jax.jvp(fn, (s, *params), (jnp.diagonal(dp), *dparams))
    slope = jax.jacfwd(fn)(s, *params)
    gap, close = s[:, None] - s[None, :], _close(s)

    def tangent(
        f: Float[Array, " k"], df: Float[Array, " k"], slope: Float[Array, "k k"]
    ) -> Float[Array, "p q"]:
        # Of a difference quotient of f, at singular values that coincide.
        limit = jnp.diagonal(slope)[:, None] - slope
        limit = (limit + limit.T) / 2
        even = jnp.where(close, limit, (f[:, None] - f[None, :]) / jnp.where(close, 1, gap))
        odd = (f[:, None] + f[None, :]) * inverse(s[:, None] + s[None, :])
        inner = (even * (dp + dp.T) + odd * (dp - dp.T)) / 2
        inner = inner - jnp.diag(jnp.diagonal(inner)) + jnp.diag(df)
        ratio = (f * inverse(s))[None, :]
        outer = matmul(complement(u, dxv) * ratio, v.T)
        outer += matmul(u * ratio, complement(v, dxu).T)
        return matmul(matmul(u, inner), v.T) + outer

    return jax.vmap(tangent)(f, df, slope)


def truncate(
    x: Float[Array, "p q"], rank: ArrayLike, noise: ArrayLike = 0
) -> tuple[Float[Array, "p q"], Float[Array, "p q"]]:
    """Cuts ``x`` to its leading singular directions.

    Directions whose singular value equals the last one kept are kept too: to drop some of them
    would be an arbitrary choice. The number kept is constant under differentiation; derivatives
    are large where singular values at the cut are close.

    Args:
        x: ``(p, q)``.
        rank: the number of directions; may be traced.
        noise: singular values up to this are null as well; not differentiated.

    Returns:
        The best approximation of ``x`` of that rank, and its partial isometry: the same with
        every nonzero singular value replaced by one. Both ``(p, q)``.
    """
    params = [jnp.asarray(value, x.dtype) for value in (rank, roundoff(x), noise)]
    update, frame = spectral_map(_leading, x, *params)
    return update, frame


def cut_factors(
    left: Float[Array, "T p k"],
    right: Float[Array, "T q k"],
    inner: Float[Array, "T k k"],
    ranks: Float[Array, " T"],
) -> tuple[Float[Array, "T k k"], Float[Array, "T p k"], Float[Array, "T q k"]]:
    """Cuts updates ``left inner rightᵀ`` in orthonormal bases, and the bases, to some ranks.

    Args:
        left: ``(T, p, k)``.
        right: ``(T, q, k)``.
        inner: ``(T, k, k)``.
        ranks: ``(T,)``, as those of `truncate`.

    Returns:
        The cut ``inner``; and the bases, projected to the singular directions that are kept.
    """

    def cut() -> tuple[Float[Array, "T k k"], Float[Array, "T p k"], Float[Array, "T q k"]]:
        updates, frames = jax.vmap(truncate)(inner, ranks)
        frames_t = jnp.swapaxes(frames, 1, 2)
        left_kept = matmul(left, matmul(frames, frames_t))
        return updates, left_kept, matmul(right, matmul(frames_t, frames))

    whole = jnp.all(ranks >= inner.shape[1])
    return jax.lax.cond(whole, lambda: (inner, left, right), cut)


def numerical_ranks(inner: Float[Array, "T k k"], cutoff: float) -> Float[Array, " T"]:
    """Returns the numbers of singular values above a share of the largest, as constants."""
    s = jax.vmap(lapack.singular_values)(jax.lax.stop_gradient(inner))
    return jnp.sum(s > cutoff * s[:, :1], axis=1).astype(s.dtype)


def _leading(
    s: Float[Array, " k"], rank: _Scalar, rtol: _Scalar, noise: _Scalar
) -> Float[Array, "2 k"]:
    """Returns the singular values that `truncate` keeps, and ones in their places."""
    first = jnp.arange(s.shape[0], dtype=s.dtype) < rank
    last = jnp.min(jnp.where(first, s, jnp.inf))
    kept = (s >= last * (1 - rtol)) & in_range(s, rtol) & (s > noise)
    return jnp.stack([jnp.where(kept, s, 0), kept.astype(s.dtype)])


@jax.custom_jvp
def polar(x: Float[Array, "p q"]) -> Float[Array, "p q"]:
    """Returns ``x`` with each of its (numerically) nonzero singular values replaced by one.

    Of a square matrix, Newton and Schulz's iteration finds it by products alone; of another, a
    Gram matrix of its shorter side. Matrices for which that is not exact are decomposed. As for
    `spectral_map`, derivatives are exact along changes that keep the rank.
    """
    if max(x.shape) <= GRAM_SIZE:
        return _polar_by_svd(x)
    by_gram = gram_pays(x) and x.shape[0] != x.shape[1]
    return fast_or_robust(_polar_by_gram if by_gram else _polar_by_products, _polar_by_svd)(x)


@polar.defjvp
def _polar_jvp(primals: tuple, tangents: tuple) -> tuple[Float[Array, "p q"], Float[Array, "p q"]]:
    (value, *_), (tangent, *_) = _isometry_jvp(primals, tangents)
    return value, tangent


@jax.custom_jvp
def _isometry(
    x: Float[Array, "p q"],
) -> tuple[Float[Array, "p q"], Float[Array, " q"], Float[Array, "q q"]]:
    """Returns polar factor, singular values and right vectors of a matrix with p >= q."""
    u, s, v = lapack.svd(x)
    s = jnp.where(in_range(s, roundoff(x)), s, 0)
    return _reassemble(u, jnp.sign(s)[None], v)[0], s, v


@_isometry.defjvp
def _isometry_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Derives W, with x = W H and H = Wᵀ x.

    The derivative of W solves linear equations in H. W and H are smooth where singular values
    coincide, and singular vectors are not. So the vectors only solve the equations:
    `custom_linear_solve` differentiates the equations themselves for second derivatives.
    """
    (x,), (dx,) = primals, tangents
    if x.shape[0] < x.shape[1]:
        flipped = _isometry_jvp((x.T,), (dx.T,))
        return tuple((w.T, *rest) for w, *rest in flipped)
    w, s, v = parts = _isometry(x)
    null = jnp.eye(len(v), dtype=x.dtype) - matmul(w.T, w)
    live = jnp.eye(len(v), dtype=x.dtype) - null
    filler = jnp.where(s[0] > 0, s[0], 1)  # in null directions; any positive number will do
    h = matmul(w.T, x) + filler * null
    along, filled = matmul(w.T, dx), jnp.where(s > 0, s, filler)
    sums = filled[:, None] + filled[None, :]
    solve = partial(jax.lax.custom_linear_solve, symmetric=True)
    skew = matmul(along, live)
    turn = solve(
        lambda z: matmul(h, z) + matmul(z, h),
        skew - skew.T,
        lambda _, c: matmul(v, matmul(matmul(matmul(v.T, c), v) / sums, v.T)),
    )
    rest = jnp.concatenate([matmul(complement(w, dx), live).T, matmul(along, null)], axis=1)
    rest = solve(
        lambda z: matmul(h, z),
        rest,
        lambda _, c: matmul(v / filled[None, :], matmul(v.T, c)),
    )
    rows, columns = rest[:, : len(x)], rest[:, len(x) :]
    tangent = matmul(w, turn + columns) + rows.T
    return parts, (tangent, jnp.zeros_like(s), jnp.zeros_like(v))


def _polar_by_svd(x: Float[Array, "p q"]) -> Float[Array, "p q"]:
    return _map_by_svd(_ones, x, jnp.asarray(roundoff(x), x.dtype))[0]


def _polar_by_gram(x: Float[Array, "p q"]) -> tuple[Float[Array, "p q"], Bool[Array, ""]]:
    """Uses the eigenvectors of a Gram matrix, also of a matrix without full rank."""
    if x.shape[0] > x.shape[1]:
        value, exact = _polar_by_gram(x.T)
        return value.T, exact
    _, u = lapack.eigh(matmul(x, x.T))
    rows = matmul(u.T, x)
    # Not the roots of the eigenvalues: those of the null space would be rounding noise.
    s = jnp.linalg.norm(rows, axis=1)
    cutoff = roundoff(x) * jnp.max(s)
    least = jnp.min(jnp.where(s > cutoff, s, jnp.inf))
    exact = least * GRAM_CONDITION >= jnp.max(s)
    return matmul(u, inverse(s, cutoff)[:, None] * rows), exact


def _polar_by_products(x: Float[Array, "p q"]) -> tuple[Float[Array, "p q"], Bool[Array, ""]]:
    """Uses the iteration of Newton and Schulz (Higham, Functions of Matrices, 2008, section 8.3).

    Each step maps the singular values in [l, 1] by the odd cubic polynomial that takes them into
    the narrowest interval below 1, whose lower end is the next l (Chen and Chow, "A stable scaling
    of Newton-Schulz for improving the sign function computation of a Hermitian matrix",
    ANL/MCS-P5059-0114, 2014). The first l is a guess: smaller singular values take more steps.
    """
    if x.shape[0] > x.shape[1]:
        value, exact = _polar_by_products(x.T)
        return value.T, exact
    gram = matmul(x, x.T)
    bound = _eigenvalue_bound(gram)
    small = float(jnp.finfo(x.dtype).eps) ** 0.5

    def step(state: tuple) -> tuple:
        x, gram, low, _, count = state
        # a s - s³ is least at both ends of [l, 1], and largest at s² = a / 3. Singular values above
        # 1 would change their sign.
        a = 1 + low + low**2
        least, most = low + low**2, 2 * (a / 3) ** 1.5
        x = (a * x - matmul(gram, x)) / most
        gram = matmul(x, x.T)
        error = jnp.max(jnp.abs(gram - jnp.eye(len(x), dtype=x.dtype)))
        return x, gram, least / most, error, count + 1

    def goes_on(state: tuple) -> Bool[Array, ""]:
        return (state[3] > small) & (state[4] < _STEPS)

    low, error = jnp.full_like(bound, _LEAST), jnp.full_like(bound, jnp.inf)
    start = x / jnp.sqrt(bound), gram / bound, low, error, jnp.asarray(0, jnp.int32)
    x, gram, _, error, _ = jax.lax.while_loop(goes_on, step, start)
    # On CPU, a maximum may lose NaN; a sum does not.
    exact = (error <= small) & jnp.isfinite(jnp.trace(gram))
    return 1.5 * x - 0.5 * matmul(gram, x), exact  # a step that squares the error


def _eigenvalue_bound(gram: Float[Array, "p p"]) -> _Scalar:
    """Returns a number that all eigenvalues of a Gram matrix are below, and mostly close to it."""
    start = jnp.sum(jnp.abs(gram), axis=0)
    x = jax.lax.fori_loop(0, 12, lambda _, x: matmul(gram, x / jnp.linalg.norm(x)), start)
    bound = 1.25 * jnp.linalg.norm(x)
    # The power method may miss the largest. A Cholesky factorization tells.
    factor = lapack.cholesky(bound * jnp.eye(len(gram), dtype=gram.dtype) - gram)
    return jnp.where(jnp.isfinite(factor[-1, -1]), bound, jnp.linalg.norm(gram))


def _ones(s: Float[Array, " k"], rtol: _Scalar) -> Float[Array, "1 k"]:
    return in_range(s, rtol).astype(s.dtype)[None]


def flattened(x: Float[Array, "p q"] | Factored, power: ArrayLike) -> Float[Array, "p q"]:
    """Raises the singular values of ``x`` to a power, and scales them to the sum they had.

    With power 0, each (numerically) nonzero one becomes their mean.
    """
    dtype = jax.tree.leaves(x)[0].dtype
    rtol = roundoff(x.u if isinstance(x, Factored) else x)
    return spectral_map(_flat, x, jnp.asarray(rtol, dtype), jnp.asarray(power, dtype))[0]


@jax.custom_jvp
def isotropic(x: Float[Array, "p q"] | Factored) -> Float[Array, "p q"]:
    """Replaces each (numerically) nonzero singular value of ``x`` by their mean."""
    return flattened(x, 0)


@isotropic.defjvp
def _isotropic_jvp(
    primals: tuple, tangents: tuple
) -> tuple[Float[Array, "p q"], Float[Array, "p q"]]:
    """Derives the mean times the polar factor, which is smooth where singular values coincide."""

    def by_polar(x: Float[Array, "p q"] | Factored) -> Float[Array, "p q"]:
        x = x.dense() if isinstance(x, Factored) else x
        isometry = polar(x)
        rank = jax.lax.stop_gradient(jnp.round(jnp.sum(isometry**2)))
        return jnp.sum(isometry * x) / jnp.maximum(rank, 1) * isometry

    return jax.jvp(by_polar, primals, tangents)


def _flat(s: Float[Array, " k"], rtol: _Scalar, power: _Scalar) -> Float[Array, "1 k"]:
    live = in_range(s, rtol)
    raised = jnp.where(live, jnp.where(live, s, 1) ** power, 0)
    total = jnp.sum(raised)
    factor = jnp.sum(jnp.where(live, s, 0)) / jnp.where(total > 0, total, 1)
    return (raised * factor)[None]
