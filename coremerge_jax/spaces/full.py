"""Full space: the updates themselves."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from coremerge_jax.lora import widest
from coremerge_jax.spaces.base import Projection, split


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
    ) -> Projection:
        """See `Space.project`."""
        del elementwise
        dtype = dtype or widest(lora_a.dtype, lora_b.dtype)
        lora_a, lora_b = lora_a.astype(dtype), lora_b.astype(dtype)
        shape = jnp.asarray([lora_b.shape[0], lora_a.shape[1]], jnp.int32)
        return Projection(factors=split(lora_a, lora_b, ranks), shape=shape)
