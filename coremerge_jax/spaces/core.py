"""Core space (arXiv 2509.17786, section 4)."""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import (
    basis,
    in_range,
    matmul,
    orthonormal_factors,
    roundoff,
    spectral_map,
)
from coremerge_jax.lora import LoRA, widest
from coremerge_jax.rules.rule import side_by_side
from coremerge_jax.spaces.space import Projection, check_static, split


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
            raise RecipeError(f"gauge={self.gauge!r}: expected 'given' or 'balanced'")
        if self.rtol is not None:
            check_static("rtol", self.rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")

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
        """Projects updates, see `Space.project`; elementwise rules get singular vectors."""
        dtype = dtype or widest(lora_a.dtype, lora_b.dtype)
        rtol = self._rtol(lora_a, dtype)
        balanced = elementwise and self.gauge == "balanced"
        singular = elementwise and not balanced
        find = partial(basis, rtol=rtol, singular=singular, dtype=dtype, axis=axis)
        m, n = shape or (None, None)
        left, b, p, _ = find(lora_b, rows=m)
        right, a, q, spread = find(lora_a.T, rows=n)
        if balanced:
            a, b = _balanced(split(a.T, b, ranks), ranks)
            (turn, b, p, _), (turn_a, a, q, _) = (basis(x, rtol, singular=True) for x in (b, a))
            left, right = left.times(turn.columns()), right.times(turn_a.columns())
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


def _balanced(cores: LoRA, ranks: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Balances stacked factors ``(q, R)`` and ``(p, R)``, up to rotations, which do not matter."""
    left, right, inner = orthonormal_factors(jnp.asarray(cores.b), jnp.asarray(cores.a))
    rtol = jnp.asarray(roundoff(right), inner.dtype)
    root, turn = jnp.moveaxis(jax.vmap(lambda x: spectral_map(_root, x, rtol))(inner), 1, 0)
    b = side_by_side(matmul(left, matmul(root, jnp.swapaxes(turn, 1, 2))))
    a = side_by_side(matmul(right, jnp.swapaxes(root, 1, 2)))
    width = max(ranks)
    columns = np.asarray([t * width + i for t, rank in enumerate(ranks) for i in range(rank)])
    return a[:, columns], b[:, columns]


def _root(s: jax.Array, rtol: jax.Array) -> jax.Array:
    live = in_range(s, rtol)
    root = jnp.where(live, jnp.sqrt(jnp.where(live, s, 1)), 0)
    return jnp.stack([root, live.astype(s.dtype)])
