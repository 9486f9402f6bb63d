"""KnOTS space (Stoica et al., arXiv 2410.19735)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import basis, inverse, matmul, polar, roundoff
from coremerge_jax.spaces.core import Core
from coremerge_jax.spaces.space import Projection, refuse_axis


@dataclasses.dataclass(frozen=True)
class Knots:
    """KnOTS space: the right factors of a joint singular value decomposition.

        [ΔW_1 … ΔW_T] = U Σ [V_1ᵀ … V_Tᵀ],    V_tᵀ: (k, n)

    The rule merges the V_tᵀ, and U Σ lifts the result. Computed without any m × n matrix, from
    the decomposition of the cores side by side: [M_1 … M_T] = U' Σ [V'_1ᵀ … V'_Tᵀ] gives
    U = U_core U' and V_tᵀ = V'_tᵀ V_coreᵀ. Rules that are not elementwise merge alike with a polar
    decomposition (U' Σ U'ᵀ)(U' V'ᵀ) instead, which has derivatives where values in Σ coincide.

    Attributes:
        scaled: merge Σ V_tᵀ instead of V_tᵀ, as the authors' own code does (theirs also trims
            over all modules at once: `ties` with ``scope="model"``).
    """

    scaled: bool = False

    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.scaled, bool):
            raise RecipeError(f"scaled={self.scaled!r}: expected True or False")

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
        """Projects updates, see `Space.project`; elementwise rules see all n columns."""
        if elementwise:
            refuse_axis(self, axis)
        core = Core().project(
            lora_a, lora_b, ranks, dtype=dtype, elementwise=False, axis=axis, shape=shape
        )
        assert core.left is not None
        assert core.right is not None
        tasks, p, q = core.cores.shape
        joined = jnp.moveaxis(core.cores, 0, 1).reshape(p, tasks * q)
        if not (elementwise or self.scaled):
            return _by_polar(core, joined)
        turn, rows, size, _ = basis(joined, roundoff(core.cores), singular=True)
        squares = jnp.sum(rows**2, axis=1)
        gain = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
        if not self.scaled:
            rows = rows * inverse(gain)[:, None]
        cores = jnp.moveaxis(rows.reshape(-1, tasks, q), 1, 0)
        if elementwise:
            cores = matmul(cores, core.right.columns().T)
        columns = jnp.asarray(lora_a.shape[1], jnp.int32) if elementwise else core.shape[1]
        return Projection(
            factors=cores,
            shape=jnp.stack([size, columns]),
            left=core.left.times(turn.columns()),
            right=None if elementwise else core.right,
            gain=None if self.scaled else gain,
            spread=None if elementwise else core.spread,
        )


def _by_polar(core: Projection, joined: jax.Array) -> Projection:
    """Returns the space of the polar decomposition of the cores side by side."""
    p, q = core.cores.shape[1:]
    rows = polar(joined)
    size = jnp.round(jnp.sum(rows**2)).astype(core.shape.dtype)
    return dataclasses.replace(
        core,
        factors=jnp.moveaxis(rows.reshape(p, -1, q), 1, 0),
        shape=jnp.stack([size, core.shape[1]]),
        gain=matmul(joined, rows.T),
    )
