"""Iso-CTS: equal singular values in a common and in task-specific subspaces."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.linalg import (
    Factored,
    matmul,
    orthonormal_factors,
    polar,
    roundoff,
    truncate,
)
from coremerge_jax.linalg.basic import complement
from coremerge_jax.rules.base import Context, Cores, Equivariance, Rule, check, side_by_side, thin
from coremerge_jax.rules.linear import total


@flax.struct.dataclass(kw_only=True, repr=False)
class IsoCts(Rule):
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

    def __post_init__(self) -> None:
        whole = isinstance(self.common, int)
        expected = "a number of singular directions ≥ 0 or a share in (0, 1]"
        check("common", self.common, lambda x: x >= 0 if whole else 0 < x <= 1, expected)
        check("specific", self.specific, lambda x: x == int(x) >= 0, "a whole number ≥ 0")

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Merges: all cores to one."""
        del key
        b, a = thin(cores)
        common, specific = self._ranks(jnp.min(context.shape), len(b))
        joint, shared = truncate(total(cores), common)
        rest = jax.vmap(complement, (None, 0))(shared, b)
        left, right, inner = orthonormal_factors(rest, a)
        parts, frames = jax.vmap(truncate, (0, None, 0))(inner, specific, jax.vmap(_rounding)(b, a))
        count = jnp.round(jnp.sum(frames**2) + jnp.sum(shared**2))
        mean = (jnp.sum(parts * frames) + jnp.sum(joint * shared)) / jnp.maximum(count, 1)
        return mean * _orthogonalized(shared, left, frames, right)

    def _ranks(self, side: jax.Array, tasks: int) -> tuple[jax.Array, jax.Array]:
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


def _rounding(b: jax.Array, a: jax.Array) -> jax.Array:
    """Size below which a singular value of a difference from ``b @ a`` is rounding noise."""
    b, a = jax.lax.stop_gradient((b, a))
    norm = jnp.sqrt(jnp.abs(jnp.sum(matmul(b.T, b) * matmul(a, a.T))))
    return max(roundoff(b), roundoff(a)) * norm


def _orthogonalized(
    shared: jax.Array, left: jax.Array, frames: jax.Array, right: jax.Array
) -> jax.Array:
    """``P^{-1/2} (F_0 + Σ F_t) Q^{-1/2}`` with ``P = Σ F_t F_tᵀ`` and ``Q = Σ F_tᵀ F_t`` over all.

    The F_0 ``shared`` and F_t = L_t C_t R_tᵀ are partial isometries, of orthonormal L_t and R_t.
    So are the C_t, and F_t = (L_t C_t) C_tᵀ (C_t R_tᵀ): what stands outside becomes blocks of the
    polar factors of [F_0, L_1 C_1 …] and [F_0ᵀ, R_1 C_1ᵀ …].
    """
    inner = jnp.swapaxes(frames, 1, 2)
    p, q = shared.shape
    u = polar(jnp.hstack([shared, side_by_side(matmul(left, frames))]))
    v = polar(jnp.hstack([shared.T, side_by_side(matmul(right, inner))]))
    own = Factored(u[:, q:], inner, v[:, p:]).dense()
    return own + matmul(matmul(u[:, :q], shared.T), v[:, :p].T)


iso_cts = IsoCts
