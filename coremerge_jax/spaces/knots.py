"""KnOTS space (Stoica et al., arXiv 2410.19735)."""

import dataclasses

import jax
import jax.numpy as jnp

from coremerge_jax import linalg
from coremerge_jax.linalg import matmul
from coremerge_jax.spaces.base import Projection
from coremerge_jax.spaces.core import Core


@dataclasses.dataclass(frozen=True)
class Knots:
    """KnOTS space: the right factors of a joint singular value decomposition.

        [ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ],    V_tᵀ: (k, n)

    The rule merges the V_tᵀ, and U Σ lifts the result. Computed without any m × n matrix, from
    the decomposition of the cores side by side: [M_1 … M_T] = U' Σ [V'_1ᵀ … V'_Tᵀ] gives
    U = U_core U' and V_tᵀ = V'_tᵀ V_coreᵀ.

    Attributes:
        scaled: merge Σ V_tᵀ instead of V_tᵀ, as the authors' own code does (theirs also trims
            over all modules at once: `ties` with ``scope="model"``).
    """

    scaled: bool = False

    def project(
        self,
        lora_a: jax.Array,
        lora_b: jax.Array,
        ranks: tuple[int, ...],
        *,
        eps: float | None = None,
        elementwise: bool = True,
    ) -> Projection:
        """See `Space.project`; elementwise rules see all n columns, others those of core space."""
        core = Core().project(lora_a, lora_b, ranks, eps=eps)
        assert core.u is not None
        assert core.v is not None
        tasks, p, q = core.cores.shape
        u, s, vt = linalg.svd(jnp.moveaxis(core.cores, 0, 1).reshape(p, tasks * q))
        live = linalg.in_range(s, linalg.roundoff(core.cores[0]))
        s = jnp.where(live, s, 0)
        cores = jnp.moveaxis(jnp.where(live[:, None], vt, 0).reshape(-1, tasks, q), 1, 0)
        if self.scaled:
            cores = cores * s[None, :, None]
        if elementwise:
            cores = matmul(cores, core.v.T)
        columns = jnp.asarray(lora_a.shape[1], jnp.int32) if elementwise else core.shape[1]
        return Projection(
            cores=cores,
            shape=jnp.stack([jnp.sum(live, dtype=jnp.int32), columns]),
            u=matmul(core.u, jnp.where(live[None, :], u, 0)),
            v=None if elementwise else core.v,
            gain=None if self.scaled else s,
        )
