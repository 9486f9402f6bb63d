"""DC-Merge: smoothed spectra merged in a cover of all adapters' subspaces."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.linalg import (
    Factored,
    in_range,
    inverse,
    kth_smallest,
    lapack,
    matmul,
    orthonormal_factors,
    polar,
    roundoff,
)
from coremerge_jax.rules.base import Context, Cores, Equivariance, Rule, check, side_by_side, thin


@flax.struct.dataclass(kw_only=True, repr=False)
class DcMerge(Rule):
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

    def __post_init__(self) -> None:
        check("density", self.density, lambda x: 0 < x <= 1, "a share in (0, 1]")
        check("rho", self.rho, lambda x: x >= 1, "a number of at least 1")

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> Factored:
        """Merges: all cores to one, as ``U blockdiag(…) Vᵀ``."""
        del key, context
        left, right, inner = orthonormal_factors(*thin(cores))
        u, s, v = jax.vmap(lapack.svd)(_without_derivative(inner))
        live = jax.vmap(in_range, (0, None))(s, max(map(roundoff, (left, right))))
        u, v = (matmul(x, jnp.where(live[:, None, :], y, 0)) for x, y in ((left, u), (right, v)))
        cover = [polar(side_by_side(x)) for x in (u, v)]
        smooth = jax.vmap(self._smooth)(s, live)
        tasks, width = s.shape
        size = jnp.sum(live) ** 2

        def kept_blocks(row: tuple) -> jax.Array:
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

    def _smooth(self, s: jax.Array, live: jax.Array) -> jax.Array:
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

    def _largest(self, x: jax.Array, size: jax.Array) -> jax.Array:
        """Keeps only the largest entries, a share of ``size``, and those as large."""
        wanted = jnp.asarray(self.density, jnp.float32) * size.astype(jnp.float32)
        number = jnp.maximum(1, jnp.floor(wanted)).astype(jnp.int32)
        magnitude = jnp.abs(x)
        return jnp.where(magnitude >= kth_smallest(magnitude, x.size - number + 1), x, 0)


@jax.custom_jvp
def _without_derivative(x: jax.Array) -> jax.Array:
    return x


@_without_derivative.defjvp
def _refuse_derivative(primals: tuple, tangents: tuple) -> tuple:
    raise NotImplementedError("dc_merge has no derivative: it selects entries of singular vectors")


dc_merge = DcMerge
