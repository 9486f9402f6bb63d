"""Core space (arXiv 2509.17786, section 4)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import basis
from coremerge_jax.lora import widest
from coremerge_jax.spaces.base import Projection, split


@dataclasses.dataclass(frozen=True)
class Core:
    """Core space: the joint row and column spaces of all adapters, without loss.

    With B = [B_1 … B_T] and A = [A_1; …; A_T], the reference bases U and V are the left singular
    vectors of B and the right singular vectors of A, and the cores are

        M_t = (Uᵀ B_t)(A_t V),        ΔW_t = U M_t Vᵀ.

    Rules that are not elementwise merge alike in every basis of these spaces.

    U has ``p = min(m, R)`` columns and V has ``q = min(n, R)``. Where the stacks have a smaller
    numerical rank, the last columns and the cores' entries there are zero.

    Attributes:
        rtol: singular values of B and A up to ``rtol`` times the largest are taken for zero. By
            default √R times the rounding error of the factors' entries, and a little more for
            the rounding errors of the decomposition itself.
    """

    rtol: float | None = None

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
        """See `Space.project`; elementwise rules get singular vectors, others any basis."""
        dtype = dtype or widest(lora_a.dtype, lora_b.dtype)
        rtol = self._rtol(lora_a, dtype)
        left, b, p, _ = basis(lora_b, rtol, singular=elementwise, dtype=dtype)
        right, a, q, spread = basis(lora_a.T, rtol, singular=elementwise, dtype=dtype)
        return Projection(
            factors=split(a.T, b, ranks),
            shape=jnp.stack([p, q]),
            left=left,
            right=right,
            spread=spread,
        )

    def _rtol(self, lora_a: jax.Array, dtype: Any) -> float:
        if self.rtol is not None:
            return self.rtol
        given, computed = widest(lora_a.dtype, np.dtype(np.float32)), dtype
        eps = float(jnp.finfo(given).eps) + 8 * float(jnp.finfo(computed).eps)
        return math.sqrt(lora_a.shape[0]) * eps
