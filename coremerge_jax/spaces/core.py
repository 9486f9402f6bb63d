"""Core space (arXiv 2509.17786, section 4)."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import (
    basis,
    in_range,
    matmul,
    orthonormal_factors,
    root,
    roundoff,
    spectral_map,
)
from coremerge_jax.lora import LoRA, widest
from coremerge_jax.rules.operations import Operations, Sizes
from coremerge_jax.rules.rule import side_by_side
from coremerge_jax.spaces.space import Projection, Space, Stacked, check_static


@dataclass(frozen=True)
class core(Space):
    """Core space: the joint row and column spaces of all adapters, without loss.

    With B = [B_1 … B_T] and A = [A_1; …; A_T], the reference bases U and V are the left singular
    vectors of B and the right singular vectors of A, and the cores are

        M_t = (Uᵀ B_t)(A_t V),        ΔW_t = U M_t Vᵀ.

    Rules that are not elementwise merge alike in every basis of these spaces.

    U has ``p = min(m, R)`` columns and V has ``q = min(n, R)``. Where the stacks have a smaller
    numerical rank, the last columns and the cores' entries there are zero.

    The cores depend on how an adapter's update is split into B_t and A_t, and so does the result
    of elementwise rules. With ``gauge="balanced"`` the split is always B_t = P_t S_t^{1/2},
    A_t = S_t^{1/2} Q_tᵀ, from ΔW_t = P_t S_t Q_tᵀ: then the result depends on the updates alone.

    Attributes:
        gauge: ``"given"``, the factors as they are, as in the paper; or ``"balanced"``.
        rows: ``"given"``: rows of merged updates are combinations of those of the adapters.
            ``"free"``: V is the identity, for rules that may choose other rows, such as `regmean`
            with Gram matrices (n, n); cores are p × n.
        rtol: singular values of B and A up to ``rtol`` times the largest are taken for zero. By
            default √R times the rounding error of the factors' entries, and a little more for
            the rounding errors of the decomposition itself.
    """

    gauge: str = "given"
    rows: str = "given"
    rtol: float | None = None
    lossless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.gauge not in ("given", "balanced"):
            raise RecipeError(f"gauge={self.gauge!r}: expected 'given' or 'balanced'")
        if self.rows not in ("given", "free"):
            raise RecipeError(f"rows={self.rows!r}: expected 'given' or 'free'")
        if self.rows == "free" and self.gauge != "given":
            raise RecipeError("gauge='balanced' with rows='free': choose one of them")
        if self.rtol is not None:
            check_static("rtol", self.rtol, lambda x: 0 <= x < 1, "a number in [0, 1)")

    @property
    def takes_coordinates(self) -> bool:
        return self.rows == "given"

    def project_stacked(self, stacked: Stacked, *, elementwise: bool) -> Projection:
        (m, n), rtol = stacked.shape, self._rtol(stacked)
        balanced = elementwise and self.gauge == "balanced"
        singular = elementwise and not balanced  # other rules merge alike in a cheaper basis
        find = partial(basis, rtol=rtol, singular=singular, dtype=stacked.dtype, axis=stacked.axis)
        left, b, p, _ = find(stacked.b, rows=m)
        if self.rows == "free":
            stacked.refuse_axis(self)
            factors = stacked.split(stacked.a.astype(stacked.dtype), b)
            columns = jnp.asarray(n, p.dtype)
            return Projection(factors=factors, shape=jnp.stack([p, columns]), left=left)
        right, a, q, spread = find(stacked.a.T, rows=n)
        if balanced:
            a, b = _balanced(stacked.split(a.T, b), stacked.ranks)
            (turn, b, p, _), (turn_a, a, q, _) = (basis(x, rtol, singular=True) for x in (b, a))
            left, right = left.times(turn.columns()), right.times(turn_a.columns())
        return Projection(
            factors=stacked.split(a.T, b),
            shape=jnp.stack([p, q]),
            left=left,
            right=right,
            spread=spread,
        )

    def _rtol(self, stacked: Stacked) -> float:
        if self.rtol is not None:
            return float(self.rtol)
        return default_rtol(stacked.a.shape[0], stacked.given, stacked.dtype)

    def operations(
        self, shape: tuple[int, int], ranks: tuple[int, ...], *, elementwise: bool
    ) -> tuple[Sizes, Operations]:
        sizes, bases = count_bases(shape, ranks)
        if self.rows == "free":
            sizes = dataclasses.replace(sizes, q=shape[1])
        p, q, total, width, kept = sizes.p, sizes.q, sum(ranks), sizes.width, 0
        products, core = bases.products, bases.core
        if elementwise:
            core = 9.0 * (p**3 + q**3)
        if elementwise and self.gauge == "balanced":
            products += 6 * width * total * (p + q) + 2 * total * (p**2 + q**2)
            core += 2 / 3 * (p**3 + q**3) + sizes.tasks * 20 * width**3
            kept = 6 * total * max(p, q)
        lift = 2 * shape[0] * total * sizes.side
        return sizes, Operations(products + lift, core, kept)


def default_rtol(total: int, given: np.dtype, computed: np.dtype) -> float:
    """Returns the default `core.rtol`, for factors of a rank in all, of a given dtype."""
    known = widest(given, np.dtype(np.float32))
    return math.sqrt(total) * (float(jnp.finfo(known).eps) + 8 * float(jnp.finfo(computed).eps))


def count_bases(shape: tuple[int, int], ranks: tuple[int, ...]) -> tuple[Sizes, Operations]:
    """Returns the sizes of cores, and counts bases from Gram matrices and Cholesky factors."""
    (m, n), total = shape, sum(ranks)
    sizes = Sizes(len(ranks), min(m, total), min(n, total), max(ranks))
    return sizes, Operations(2.0 * total**2 * (m + n), 2 / 3 * (sizes.p**3 + sizes.q**3))


def _balanced(
    cores: LoRA, ranks: tuple[int, ...]
) -> tuple[Float[Array, "q R"], Float[Array, "p R"]]:
    """Balances stacked factors ``(q, R)`` and ``(p, R)``, up to rotations, which do not matter."""
    left, right, inner = orthonormal_factors(jnp.asarray(cores.b), jnp.asarray(cores.a))
    rtol = jnp.asarray(roundoff(right), inner.dtype)
    roots, turn = jnp.moveaxis(jax.vmap(lambda x: spectral_map(_roots, x, rtol))(inner), 1, 0)
    b = side_by_side(matmul(left, matmul(roots, jnp.swapaxes(turn, 1, 2))))
    a = side_by_side(matmul(right, jnp.swapaxes(roots, 1, 2)))
    width = max(ranks)
    columns = np.asarray([t * width + i for t, rank in enumerate(ranks) for i in range(rank)])
    return a[:, columns], b[:, columns]


def _roots(s: Float[Array, " k"], rtol: Float[Array, ""]) -> Float[Array, "2 k"]:
    """Returns the roots of singular values, and ones in their places; zeros below ``rtol``."""
    live = in_range(s, rtol)
    return jnp.stack([root(jnp.where(live, s, 0)), live.astype(s.dtype)])
