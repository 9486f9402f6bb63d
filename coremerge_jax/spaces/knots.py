"""KnOTS space (Stoica et al., arXiv 2410.19735)."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import basis, inverse, matmul, polar, root, roundoff
from coremerge_jax.rules.operations import Operations, Sizes
from coremerge_jax.spaces.core import core, count_bases
from coremerge_jax.spaces.space import Projection, Space, Stacked


@dataclass(frozen=True)
class knots(Space):
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

    def project_stacked(self, stacked: Stacked, *, elementwise: bool) -> Projection:
        if elementwise:  # rules see all n columns
            stacked.refuse_axis(self)
        inner = core().project_stacked(stacked, elementwise=False)
        assert inner.left is not None
        assert inner.right is not None
        tasks, p, q = inner.cores.shape
        joined = jnp.moveaxis(inner.cores, 0, 1).reshape(p, tasks * q)
        if not (elementwise or self.scaled):
            return _by_polar(inner, joined)
        turn, rows, size, _ = basis(joined, roundoff(inner.cores), singular=True)
        gain = root(jnp.sum(rows**2, axis=1))
        if not self.scaled:
            rows = rows * inverse(gain)[:, None]
        cores = jnp.moveaxis(rows.reshape(-1, tasks, q), 1, 0)
        if elementwise:
            cores = matmul(cores, inner.right.columns().T)
        columns = jnp.asarray(stacked.a.shape[1], jnp.int32) if elementwise else inner.shape[1]
        return Projection(
            factors=cores,
            shape=jnp.stack([size, columns]),
            left=inner.left.times(turn.columns()),
            right=None if elementwise else inner.right,
            gain=None if self.scaled else gain,
            spread=None if elementwise else inner.spread,
        )

    def operations(
        self, shape: tuple[int, int], ranks: tuple[int, ...], *, elementwise: bool
    ) -> tuple[Sizes, Operations]:
        (m, n), (cores, bases) = shape, count_bases(shape, ranks)
        p, q, every = cores.p, cores.q, cores.tasks * cores.entries
        products, kept = 2.0 * (cores.width + 2 * p) * every, 4 * every
        if elementwise:
            products += 2.0 * every * n
            kept += cores.tasks * p * n
            q = n
        sizes = Sizes(cores.tasks, p, q, width=min(p, q), dense=True)
        lift = 2 * m * sum(ranks) * sizes.side
        return sizes, bases + Operations(products + lift, 9 * p**3, kept)


def _by_polar(inner: Projection, joined: Float[Array, "p k"]) -> Projection:
    """Returns the space of the polar decomposition of the cores side by side."""
    p, q = inner.cores.shape[1:]
    rows = polar(joined)
    size = jnp.round(jnp.sum(rows**2)).astype(inner.shape.dtype)
    return dataclasses.replace(
        inner,
        factors=jnp.moveaxis(rows.reshape(p, -1, q), 1, 0),
        shape=jnp.stack([size, inner.shape[1]]),
        gain=matmul(joined, rows.T),
    )
