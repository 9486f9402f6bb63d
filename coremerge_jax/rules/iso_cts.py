"""Iso-CTS: equal singular values in a common and in task-specific subspaces."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import matmul, polar, rounding, truncate
from coremerge_jax.rules.base import Context, Cores, Equivariance, Rule, check, dense, side_by_side
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
        whole = isinstance(self.common, int | np.integer)
        expected = "a number of singular directions ≥ 0 or a share in (0, 1]"
        check("common", self.common, lambda x: x >= 0 if whole else 0 < x <= 1, expected)
        check("specific", self.specific, lambda x: x == int(x) >= 0, "a whole number ≥ 0")

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Merges: all cores to one."""
        del key
        tasks = len(jax.tree.leaves(cores)[0])
        common, specific = self._ranks(jnp.min(context.shape), tasks)
        joint, shared = truncate(total(cores), common)

        def own(core: jax.Array) -> tuple[jax.Array, jax.Array]:
            rest = core - matmul(shared, matmul(shared.T, core))
            return truncate(rest, specific, rounding(core))

        parts, frames = jax.vmap(own)(dense(cores))
        parts = jnp.concatenate([parts, joint[None]])
        frames = jnp.concatenate([frames, shared[None]])
        count = jnp.round(jnp.sum(frames**2))
        mean = jnp.sum(parts * frames) / jnp.maximum(count, 1)
        return mean * _orthogonalized(frames)

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


def _orthogonalized(frames: jax.Array) -> jax.Array:
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


iso_cts = IsoCts
