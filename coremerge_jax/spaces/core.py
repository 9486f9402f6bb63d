"""Core space (arXiv 2509.17786, section 4)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from coremerge_jax import linalg
from coremerge_jax.linalg import matmul
from coremerge_jax.spaces.base import Projection, split


@dataclasses.dataclass(frozen=True)
class Core:
    """Core space: the joint row and column spaces of all adapters, without loss.

    With B = [B_1 … B_T] and A = [A_1; …; A_T], the reference bases U and V are the left singular
    vectors of B and the right singular vectors of A, and the cores are

        M_t = (Uᵀ B_t)(A_t V),        ΔW_t = U M_t Vᵀ.

    U has ``p = min(m, R)`` columns and V has ``q = min(n, R)``. Where the stacks have a smaller
    numerical rank, the last columns and the cores' entries there are zero.

    Attributes:
        rtol: singular values of B and A up to ``rtol`` times the largest are taken for zero. By
            default √R times the rounding error of the factors' entries, and a little more for
            the rounding errors of the decomposition itself.
    """

    rtol: float | None = None

    def project(
        self,
        lora_a: jax.Array,
        lora_b: jax.Array,
        ranks: tuple[int, ...],
        *,
        eps: float | None = None,
        elementwise: bool = True,
    ) -> Projection:
        """See `Space.project`; core space has one basis for all rules."""
        del elementwise
        rtol = self._rtol(lora_a, eps)
        u, p = _basis(lora_b, rtol)
        v, q = _basis(lora_a.T, rtol)
        left = split(matmul(u.T, lora_b), ranks)
        right = split(matmul(lora_a, v).T, ranks)
        cores = jnp.einsum("tir,tjr->tij", left, right, precision="highest")
        return Projection(cores=cores, shape=jnp.stack([p, q]), u=u, v=v)

    def _rtol(self, stacked: jax.Array, eps: float | None) -> float:
        if self.rtol is not None:
            return self.rtol
        own = float(jnp.finfo(stacked.dtype).eps)
        return math.sqrt(stacked.shape[0]) * ((own if eps is None else eps) + 8 * own)


def _basis(x: jax.Array, rtol: float) -> tuple[jax.Array, jax.Array]:
    """Left singular vectors of ``x: (m, R)``, those of null directions zero, and their number."""
    u, s, _ = linalg.svd(x)
    live = linalg.in_range(s, rtol)
    return jnp.where(live[None, :], u, 0), jnp.sum(live, dtype=jnp.int32)
