"""Full space: the updates themselves."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from coremerge_jax.rules.operations import Operations, Sizes
from coremerge_jax.spaces.space import Projection, Space, Stacked


@dataclass(frozen=True)
class full(Space):
    """Full space: the dense updates ΔW_t (m × n). For comparison; costs T·m·n memory."""

    lossless: ClassVar[bool] = True

    def project_stacked(self, stacked: Stacked, *, elementwise: bool) -> Projection:
        stacked.refuse_axis(self)
        a, b = stacked.a.astype(stacked.dtype), stacked.b.astype(stacked.dtype)
        return Projection(stacked.split(a, b), shape=jnp.asarray(stacked.shape, jnp.int32))

    def operations(
        self, shape: tuple[int, int], ranks: tuple[int, ...], *, elementwise: bool
    ) -> tuple[Sizes, Operations]:
        # The merged update is a factor, and an identity matrix the other.
        return Sizes(len(ranks), *shape, max(ranks)), Operations(kept=min(shape) ** 2)
