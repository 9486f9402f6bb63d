"""Full space: the updates themselves."""

import dataclasses

import jax
import jax.numpy as jnp

from coremerge_jax.spaces.base import Projection, split


@dataclasses.dataclass(frozen=True)
class Full:
    """Full space: the dense updates ΔW_t (m × n). For comparison; costs T·m·n memory."""

    def project(
        self,
        lora_a: jax.Array,
        lora_b: jax.Array,
        ranks: tuple[int, ...],
        *,
        eps: float | None = None,
        elementwise: bool = True,
    ) -> Projection:
        """See `Space.project`."""
        del eps, elementwise
        left, right = split(lora_b, ranks), split(lora_a.T, ranks)
        updates = jnp.einsum("tir,tjr->tij", left, right, precision="highest")
        return Projection(cores=updates, shape=jnp.asarray(updates.shape[1:], jnp.int32))
