"""DC-Merge: smoothed spectra merged in a cover of all adapters' subspaces."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.linalg import in_range, inverse, kth_smallest, lapack, matmul, polar, roundoff
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.base import Context, Cores, Equivariance, Rule, check, dense


@flax.struct.dataclass(kw_only=True, repr=False)
class DcMerge(Rule):
    r"""Merging along balanced directions in a cover space (DC-Merge, arXiv 2603.06242).

    With M_t = U_t S_t V_tᵀ of rank r_t:

    1. the singular values S_t are smoothed at equal sum: to their mean (``rho`` None), or to a
       linear descent, whose first is min(rho, σ_1 / σ_r) times its last;
    2. U and V are the polar factors of [U_1 … U_T] and [V_1 … V_T];
    3. of each Uᵀ M̂_t V the ``density`` largest entries are kept;
    4. where the kept entries of the adapters have a sum ≠ 0, the mean of those with its sign;
    5. of that, the diagonal blocks (t, t), between an adapter's own directions;
    6. merged = U (…) Vᵀ.

    Not defined where singular values of one M_t coincide, and without a derivative.

    Attributes:
        density: the share of entries kept.
        rho: see above.
    """

    density: float | jax.Array = 0.001
    rho: float | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL

    def __post_init__(self) -> None:
        check("density", self.density, lambda x: 0 < x <= 1, "a share in (0, 1]")
        check("rho", self.rho, lambda x: x >= 1, "a number of at least 1")

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Merges: all cores to one."""
        del key, context
        u, s, v = jax.vmap(lapack.svd)(_without_derivative(dense(cores)))
        width = min(cores.b.shape[2], s.shape[1]) if isinstance(cores, LoRA) else s.shape[1]
        u, s, v = u[:, :, :width], s[:, :width], v[:, :, :width]
        live = jax.vmap(in_range, (0, None))(s, roundoff(u))
        u, v = (jnp.where(live[:, None, :], x, 0) for x in (u, v))
        cover = [polar(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)) for x in (u, v)]
        smooth = jax.vmap(self._smooth)(s, live)

        def coordinates(u: jax.Array, s: jax.Array, v: jax.Array) -> jax.Array:
            return self._largest(matmul(matmul(cover[0].T, u * s[None, :]), matmul(v.T, cover[1])))

        kept = jax.vmap(coordinates)(u, smooth, v)
        sign = jnp.sign(jnp.sum(kept, axis=0))
        agrees = (jnp.sign(kept) == sign[None]) & (sign != 0)[None]
        count = jnp.sum(agrees, axis=0).astype(s.dtype)
        mean = jnp.sum(jnp.where(agrees, kept, 0), axis=0) * inverse(count)
        owner = jnp.repeat(jnp.arange(len(s)), width)
        blocks = jnp.where(owner[:, None] == owner[None, :], mean, 0)
        return matmul(matmul(cover[0], blocks), cover[1].T)

    def _smooth(self, s: jax.Array, live: jax.Array) -> jax.Array:
        """Smoothed singular values ``(r,)`` of the same sum."""
        rank = jnp.maximum(jnp.sum(live), 1).astype(s.dtype)
        shape = jnp.ones_like(s)
        if self.rho is not None:
            last = jnp.min(jnp.where(live, s, jnp.inf))
            ratio = jnp.minimum(jnp.asarray(self.rho, s.dtype), s[0] * inverse(last))
            steps = jnp.arange(len(s), dtype=s.dtype) * inverse(rank - 1)
            shape = ratio + (1 - ratio) * steps
        shape = jnp.where(live, shape, 0)
        return shape * jnp.sum(jnp.where(live, s, 0)) * inverse(jnp.sum(shape))

    def _largest(self, x: jax.Array) -> jax.Array:
        """Only the largest entries, and those as large."""
        wanted = jnp.asarray(self.density, jnp.float32) * x.size
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
