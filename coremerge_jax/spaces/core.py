"""Core space (arXiv 2509.17786, section 4)."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import (
    basis,
    in_range,
    matmul,
    orthonormal_factors,
    roundoff,
    spectral_map,
)
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

    The cores depend on how an adapter's update is split into B_t and A_t, as does what elementwise
    rules make of them. With ``gauge="balanced"`` that is always B_t = P_t S_t^{1/2},
    A_t = S_t^{1/2} Q_tᵀ, from ΔW_t = P_t S_t Q_tᵀ: then the result depends on the updates alone.

    Attributes:
        gauge: ``"given"``, the factors as they are, as in the paper; or ``"balanced"``.
        rtol: singular values of B and A up to ``rtol`` times the largest are taken for zero. By
            default √R times the rounding error of the factors' entries, and a little more for
            the rounding errors of the decomposition itself.
    """

    gauge: str = "given"
    rtol: float | None = None

    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gauge not in ("given", "balanced"):
            raise ValueError(f"gauge={self.gauge!r}: expected 'given' or 'balanced'")

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
        balanced = elementwise and self.gauge == "balanced"
        if balanced:
            lora_a, lora_b = _balanced(lora_a.astype(dtype), lora_b.astype(dtype), ranks)
        left, b, p, _ = basis(lora_b, rtol, singular=elementwise, dtype=dtype)
        right, a, q, spread = basis(lora_a.T, rtol, singular=elementwise, dtype=dtype)
        return Projection(
            factors=split(a.T, b, ranks),
            shape=jnp.stack([p, q]),
            left=left,
            right=right,
            spread=None if balanced else spread,  # the merge is not in terms of the given A
        )

    def _rtol(self, lora_a: jax.Array, dtype: Any) -> float:
        if self.rtol is not None:
            return self.rtol
        given, computed = widest(lora_a.dtype, np.dtype(np.float32)), dtype
        eps = float(jnp.finfo(given).eps) + 8 * float(jnp.finfo(computed).eps)
        return math.sqrt(lora_a.shape[0]) * eps


def _balanced(
    lora_a: jax.Array, lora_b: jax.Array, ranks: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Stacked factors ``(R, n)`` and ``(m, R)``, balanced up to rotations, which do not matter."""
    parts = split(lora_a, lora_b, ranks)
    left, right, inner = orthonormal_factors(jnp.asarray(parts.b), jnp.asarray(parts.a))
    rtol = jnp.asarray(roundoff(right), inner.dtype)
    root, turn = jnp.moveaxis(jax.vmap(lambda x: spectral_map(_root, x, rtol))(inner), 1, 0)
    b = matmul(left, matmul(root, jnp.swapaxes(turn, 1, 2)))
    a = matmul(root, jnp.swapaxes(right, 1, 2))
    width = max(ranks)
    rows = np.asarray([t * width + i for t, rank in enumerate(ranks) for i in range(rank)])
    stacked_b = jnp.moveaxis(b, 0, 1).reshape(len(lora_b), -1)
    return a.reshape(-1, a.shape[2])[rows], stacked_b[:, rows]


def _root(s: jax.Array, rtol: jax.Array) -> jax.Array:
    live = in_range(s, rtol)
    root = jnp.where(live, jnp.sqrt(jnp.where(live, s, 1)), 0)
    return jnp.stack([root, live.astype(s.dtype)])
