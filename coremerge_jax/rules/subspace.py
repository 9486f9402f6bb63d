"""Rules that merge in common and in task-specific subspaces: Iso-CTS and DC-Merge."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coremerge_jax.linalg import (
    Factored,
    in_range,
    inverse,
    kth_largest,
    lapack,
    matmul,
    orthonormal_factors,
    polar,
    pytree,
    rounding,
    roundoff,
    truncate,
)
from coremerge_jax.rules.linear import total
from coremerge_jax.rules.operations import (
    Operations,
    Sizes,
    decomposition,
    polar_factors,
    thin_bases,
)
from coremerge_jax.rules.rule import (
    Context,
    Cores,
    Dense,
    Equivariance,
    Rule,
    check,
    check_share,
    dense,
    side_by_side,
    tasks_in,
    thin,
)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class iso_cts(Rule):
    r"""Isotropic merging in common and task-specific subspaces (Marczak et al., arXiv 2502.04959).

    The common subspace: the k leading singular directions U_0, V_0 of Σ_t M_t. The specific ones:
    the s leading singular directions U_t, V_t of each (1 − U_0 U_0ᵀ) M_t. Then, as in `tsv`, with
    U = [U_1 … U_T U_0] and V alike, and σ̄ the mean of all their singular values,

        merged = σ̄ · U (UᵀU)^{-1/2} · (VᵀV)^{-1/2} Vᵀ.

    s = round((d − ⌊common · d⌋) / T) and k = d − T s, with d the smaller side of the numerical
    shape of the merge space (core space: the sum of the ranks). Only numerically nonzero
    directions count. In full space, d is the smaller side of the updates themselves: low-rank
    updates have fewer common directions than a large share of it, and then the result is Iso-C's.

    Attributes:
        common: the share of directions for the common subspace; or k, a whole number. The default
            is the authors'.
        specific: s, a whole number; by default all that is left for it.
    """

    common: float | int | jax.Array = 0.8
    specific: int | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL
    flat = True

    def __post_init__(self) -> None:
        whole = isinstance(self.common, int | np.integer)
        expected = "a number of singular directions ≥ 0 or a share in (0, 1]"
        check("common", self.common, lambda x: x >= 0 if whole else 0 < x <= 1, expected)
        check("specific", self.specific, lambda x: x == int(x) >= 0, "a whole number ≥ 0")

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        common, specific = self._ranks(jnp.min(context.shape), tasks_in(cores))
        joint, shared = truncate(total(cores), common)

        def own(core: Dense) -> tuple[Dense, Dense]:
            rest = core - matmul(shared, matmul(shared.T, core))
            return truncate(rest, specific, rounding(core))

        parts, frames = jax.vmap(own)(dense(cores))
        parts = jnp.concatenate([parts, joint[None]])
        frames = jnp.concatenate([frames, shared[None]])
        count = jnp.round(jnp.sum(frames**2))
        mean = jnp.sum(parts * frames) / jnp.maximum(count, 1)
        return mean * _orthogonalized(frames)

    def operations(self, cores: Sizes) -> Operations:
        count = cores.tasks + 1
        return (
            Operations(cores.forming, kept=5 * count * cores.entries)
            + count * decomposition(cores)
            + polar_factors(cores, count * cores.side)
        )

    def _ranks(self, side: Int[Array, ""], tasks: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns k and s."""
        dtype = jnp.float32
        side, common = side.astype(dtype), jnp.asarray(self.common)
        if jnp.issubdtype(common.dtype, jnp.integer):
            common = common.astype(dtype)
            rest = jnp.floor((side - common) / tasks)
        else:
            rest = jnp.round((side - jnp.floor(common.astype(dtype) * side)) / tasks)
            common = side - tasks * rest
        specific = rest if self.specific is None else jnp.asarray(self.specific, dtype)
        return common, jnp.maximum(specific, 0)


def _orthogonalized(frames: Float[Array, "T p q"]) -> Dense:
    """Returns ``P^{-1/2} (Σ F_i) Q^{-1/2}`` of partial isometries; P = Σ F_i F_iᵀ, Q = Σ F_iᵀ F_i.

    As F_i = F_i F_iᵀ F_i, it is the sum of (P^{-1/2} F_i) F_iᵀ (F_i Q^{-1/2}), and the outer
    factors are the blocks of the polar factors of all F_i side by side.
    """
    count, p, q = frames.shape
    swapped = jnp.swapaxes(frames, 1, 2)
    left = polar(side_by_side(frames)).reshape(p, count, q)
    right = polar(side_by_side(swapped)).reshape(q, count, p)
    inner = jnp.einsum("ptj,tjk->ptk", left, swapped, precision="highest")
    return jnp.einsum("ptk,qtk->pq", inner, right, precision="highest")


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class dc_merge(Rule):
    r"""Merging along balanced directions in a cover space (DC-Merge, arXiv 2603.06242).

    With M_t = U_t S_t V_tᵀ of rank r_t:

    1. the singular values S_t are smoothed at equal sum: to their mean (``rho`` None), or to a
       linear descent, whose first is min(rho, σ_1 / σ_r) times its last;
    2. U and V are the polar factors of [U_1 … U_T] and [V_1 … V_T];
    3. of each Uᵀ M̂_t V, of (Σ_t r_t)² entries, the share ``density`` is kept, the largest, and
       at least one;
    4. where the kept entries of the adapters have a sum ≠ 0, the mean of those with its sign;
    5. of that, the diagonal blocks (t, t), between an adapter's own directions;
    6. merged = U (…) Vᵀ.

    Not defined where singular values of one M_t coincide, and without a derivative.

    Attributes:
        density: the share of entries kept; the default is that of the authors' code.
        rho: see above. The authors use None for ViT-B/16 and ViT-L/14, and 5 for ViT-B/32.
    """

    density: float | jax.Array = 0.001
    rho: float | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL
    flat = True
    factored = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check("rho", self.rho, lambda x: x >= 1, "a number of at least 1")

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Factored:
        """Merges to ``U blockdiag(…) Vᵀ``."""
        left, right, inner = orthonormal_factors(*thin(cores))
        u, s, v = jax.vmap(lapack.svd)(_without_derivative(inner))
        live = jax.vmap(in_range, (0, None))(s, max(map(roundoff, (left, right))))
        u, v = (matmul(x, jnp.where(live[:, None, :], y, 0)) for x, y in ((left, u), (right, v)))
        cover = [polar(side_by_side(x)) for x in (u, v)]
        smooth = jax.vmap(self._smooth)(s, live)
        tasks, width = s.shape
        size = jnp.sum(live) ** 2

        def kept_blocks(row: tuple) -> Float[Array, "T r r"]:
            u, s, v = row
            x = matmul(matmul(cover[0].T, u * s[None, :]), matmul(v.T, cover[1]))
            kept = self._largest(x, size).reshape(tasks, width, tasks, width)
            return jnp.einsum("iajb,ij->iab", kept, jnp.eye(tasks, dtype=kept.dtype))

        kept = jax.lax.map(kept_blocks, (u, smooth, v))  # not all adapters' (T r)² entries at once
        sign = jnp.sign(jnp.sum(kept, axis=0))
        agrees = (jnp.sign(kept) == sign[None]) & (sign != 0)[None]
        count = jnp.sum(agrees, axis=0).astype(s.dtype)
        mean = jnp.sum(jnp.where(agrees, kept, 0), axis=0) * inverse(count)
        return Factored(cover[0], mean, cover[1])

    def operations(self, cores: Sizes) -> Operations:
        abreast, polars = cores.abreast, polar_factors(cores, cores.abreast)
        products = 2.0 * abreast**2 * (2 * cores.side + abreast)
        selection = 60 * cores.tasks * abreast**2
        passing = polars.passing + 4 * abreast**2
        return thin_bases(cores) + polars + Operations(products, selection, passing=passing)

    def _smooth(self, s: Float[Array, " r"], live: Bool[Array, " r"]) -> Float[Array, " r"]:
        """Returns the smoothed singular values ``(r,)`` of the same sum."""
        rank = jnp.maximum(jnp.sum(live), 1).astype(s.dtype)
        shape = jnp.ones_like(s)
        if self.rho is not None:
            last = jnp.min(jnp.where(live, s, jnp.inf))
            ratio = jnp.minimum(jnp.asarray(self.rho, s.dtype), s[0] * inverse(last))
            steps = jnp.arange(len(s), dtype=s.dtype) * inverse(rank - 1)
            shape = ratio + (1 - ratio) * steps
        shape = jnp.where(live, shape, 0)
        return shape * jnp.sum(jnp.where(live, s, 0)) * inverse(jnp.sum(shape))

    def _largest(self, x: Float[Array, "k k"], size: Int[Array, ""]) -> Float[Array, "k k"]:
        """Keeps only the largest entries, a share of ``size``, and those equal to rounding."""
        wanted = jnp.asarray(self.density, jnp.float32) * size.astype(jnp.float32)
        number = jnp.maximum(1, jnp.floor(wanted)).astype(jnp.int32)
        magnitude = jnp.abs(x)
        least = kth_largest(magnitude, number) - rounding(x)
        return jnp.where(magnitude >= least, x, 0)


@jax.custom_jvp
def _without_derivative(x: Float[Array, "T r r"]) -> Float[Array, "T r r"]:
    return x


@_without_derivative.defjvp
def _refuse_derivative(primals: tuple, tangents: tuple) -> tuple:
    raise NotImplementedError("dc_merge has no derivative: it selects entries of singular vectors")
