"""Full space: the updates themselves."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from coremerge_jax.lora import widest
from coremerge_jax.spaces.space import Projection, refuse_axis, split


@dataclasses.dataclass(frozen=True)
class Full:
    """Full space: the dense updates ΔW_t (m × n). For comparison; costs T·m·n memory."""

    lossless: ClassVar[bool] = True

    def project(
        self,
        lora_a: jax.Array,
        lora_b: jax.Array,
        ranks: tuple[int, ...],
        *,
        dtype: Any = None,
        elementwise: bool = True,
        axis: str | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Projection:
        """Projects updates, see `Space.project`."""
        del elementwise
        refuse_axis(self, axis)
        dtype = dtype or widest(lora_a.dtype, lora_b.dtype)
        lora_a, lora_b = lora_a.astype(dtype), lora_b.astype(dtype)
        m, n = shape or (lora_b.shape[0], lora_a.shape[1])
        factors = split(lora_a, lora_b, ranks)
        return Projection(factors=factors, shape=jnp.asarray([m, n], jnp.int32))
