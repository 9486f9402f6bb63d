"""Shared subspaces of a fixed rank (Compress then Merge, arXiv 2606.03723)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from coremerge_jax.linalg import lapack, matmul
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.operations import Operations, Sizes
from coremerge_jax.rules.rule import dense
from coremerge_jax.spaces.core import core, count_bases
from coremerge_jax.spaces.space import Projection, Space, Stacked, check_static


@dataclass(frozen=True)
class tucker(Space):
    r"""Subspaces of a given rank that keep most of all adapters: the merged rank is that at most.

    With the cores M_t of core space, N_t = ‖M_t‖ and their mean N̄, the balanced cores
    X_t = M_t (beta + (1 − beta) N̄ / N_t) are approximated together,

        P, Q = argmax Σ_t ‖Pᵀ X_t Q‖²    with orthonormal P (p, rank) and Q (q, rank),

    which is a Tucker decomposition in two modes, by higher-order orthogonal iteration from the
    leading singular vectors (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21, 2000). The rule
    merges Pᵀ M_t Q, and U P and V Q lift the result. For derivatives, P and Q count as constants,
    in bases U and V that turn no more than the spaces they span.

    Attributes:
        rank: of the subspaces. This default, and the following, are the authors'.
        beta: 1 counts adapters by their norms, 0 counts all alike. The authors choose it on
            validation data; the default is that of their published command for vision models.
        iterations: the largest number of iterations.
        tolerance: after the third iteration, they end when the share that is lost changes by less.
    """

    rank: int = 16
    beta: float = 0.25
    iterations: int = 1000
    tolerance: float = 1e-6
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rank", "iterations"):
            whole = "a whole number of at least 1"
            check_static(name, getattr(self, name), lambda x: x == int(x) >= 1, whole, whole=True)
        check_static("beta", self.beta, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        check_static("tolerance", self.tolerance, lambda x: x >= 0, "a number of at least 0")

    @property
    def takes_coordinates(self) -> bool:
        return True

    def project_stacked(self, stacked: Stacked, *, elementwise: bool) -> Projection:
        inner = core().project_stacked(stacked, elementwise=False)
        assert inner.left is not None
        assert inner.right is not None
        assert isinstance(inner.factors, LoRA)
        p, q = self._subspaces(jax.lax.stop_gradient(dense(inner.factors)))
        a, b = jnp.asarray(inner.factors.a), jnp.asarray(inner.factors.b)
        return Projection(
            factors=LoRA(a=matmul(a, q), b=matmul(p.T, b)),
            shape=jnp.minimum(inner.shape, self.rank),
            left=inner.left.times(p),
            right=inner.right.times(q),
        )

    def operations(
        self, shape: tuple[int, int], ranks: tuple[int, ...], *, elementwise: bool
    ) -> tuple[Sizes, Operations]:
        cores, bases = count_bases(shape, ranks)
        p, q, every = cores.p, cores.q, cores.tasks * cores.entries
        rank = min(p, q, self.rank)
        # About ten iterations, each with products and eigenvectors on both sides.
        products = 2.0 * (cores.width + p + q + 10 * 2 * rank) * every
        lift = 2 * shape[0] * sum(ranks) * rank
        iterated = Operations(products + lift, 11 * 9 * (p**3 + q**3), 8 * every)
        return replace(cores, p=rank, q=rank), bases + iterated

    def _subspaces(
        self, cores: Float[Array, "T p q"]
    ) -> tuple[Float[Array, "p k"], Float[Array, "q l"]]:
        """Returns P and Q, with columns of zeros where there is nothing left to keep."""
        norms = jnp.sqrt(jnp.sum(cores**2, axis=(1, 2)))
        mean = jnp.mean(norms)
        ratio = jnp.where(norms > 0, mean / jnp.where(norms > 0, norms, 1), 0)
        x = cores * (self.beta + (1 - self.beta) * ratio)[:, None, None]
        total = jnp.sum(x**2)

        def step(state: tuple) -> tuple:
            _, q, _, lost, count = state
            p, _ = _leading(matmul(x, q), self.rank)
            q, kept = _leading(matmul(jnp.swapaxes(x, 1, 2), p), self.rank)
            share = jnp.sqrt(jnp.abs(1 - kept / total))
            return p, q, lost, share, count + 1

        def goes_on(state: tuple) -> Bool[Array, ""]:
            *_, before, lost, count = state
            return (count < 3) | (jnp.abs(before - lost) >= self.tolerance) & (
                count < self.iterations
            )

        p, _ = _leading(x, self.rank)
        q, _ = _leading(jnp.swapaxes(x, 1, 2), self.rank)
        infinite = jnp.full_like(total, jnp.inf)
        start = p, q, infinite, infinite, jnp.asarray(0, jnp.int32)
        p, q, *_ = jax.lax.while_loop(goes_on, step, start)
        return p, q


def _leading(x: Float[Array, "T p k"], rank: int) -> tuple[Float[Array, "p r"], Float[Array, ""]]:
    """Returns leading left singular vectors of ``x_1 … x_T`` side by side.

    Also returns the sum of the squares of their singular values.
    """
    gram = jnp.einsum("tpk,tqk->pq", x, x, precision="highest")
    squares, vectors = lapack.eigh(gram)
    squares, vectors = squares[:rank], vectors[:, :rank]
    live = squares > len(gram) * float(jnp.finfo(x.dtype).eps) * squares[0]
    return jnp.where(live[None, :], vectors, 0), jnp.sum(jnp.where(live, squares, 0))
