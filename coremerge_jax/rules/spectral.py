"""Orthogonally equivariant rules: TSV, CART and Iso-C."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax import linalg
from coremerge_jax.rules.base import Context, Equivariance, Rule, Step, check


@flax.struct.dataclass(kw_only=True, repr=False)
class Tsv(Rule):
    r"""Task singular vectors made orthogonal across tasks (Gargiulo et al., arXiv 2412.00081).

    With M_t ≈ U_t S_t V_tᵀ cut to k_t triplets, U = [U_1 … U_T] and V alike, the singular vectors
    are replaced by the nearest orthonormal ones, their polar factors U(UᵀU)^{-1/2}:

        merged = U (UᵀU)^{-1/2} · diag(S_1, …, S_T) · (VᵀV)^{-1/2} Vᵀ
               = P^{-1/2} (Σ_t U_t S_t V_tᵀ) Q^{-1/2},    P = Σ_t U_t U_tᵀ,    Q = Σ_t V_t V_tᵀ.

    The second form, used here, does not depend on the choice of singular vectors. Inverses are
    pseudo-inverses: directions that no task uses stay unused. k_t is the rank r_t of M_t where
    Σ_t r_t ≤ min(p, q), and ⌊min(p, q) / T⌋ otherwise; the authors' code takes the latter
    always, which selects arbitrary null vectors where it exceeds r_t.
    """

    equivariance = Equivariance.ORTHOGONAL

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key, context
        side = min(cores.shape[1:])
        s = jnp.linalg.svd(jax.lax.stop_gradient(cores), compute_uv=False)
        ranks = jax.vmap(lambda s: jnp.sum(s > linalg.roundoff(cores[0]) * s[0]))(s)
        present = jnp.maximum(jnp.sum(ranks > 0), 1)
        limit = jnp.where(jnp.sum(ranks) <= side, side, side // present)
        ranks = jnp.minimum(ranks, limit).astype(cores.dtype)

        updates, frames = jax.vmap(linalg.truncate)(cores, ranks)
        left = jnp.einsum("tij,tkj->ik", frames, frames, precision="highest")
        right = jnp.einsum("tji,tjk->ik", frames, frames, precision="highest")
        merged = linalg.matmul(linalg.inverse_sqrt(left), jnp.sum(updates, axis=0))
        return linalg.matmul(merged, linalg.inverse_sqrt(right))


@flax.struct.dataclass(kw_only=True, repr=False)
class Cart(Rule):
    """Low-rank deviations from the mean (Choi et al., arXiv 2412.12153).

    merged = M̄ + scale · Σ_t [M_t − M̄]_k with the mean M̄ and [·]_k the truncation to rank k.

    Attributes:
        rank: k as an integer, or as a fraction ρ: k = ⌈ρ · min(p, q)⌉ of the numerical shape of
            the merge space. An absolute rank means the same in every space, a fraction does not.
        scale: weight of the deviations.
    """

    rank: float | int | jax.Array = 0.08
    scale: float | jax.Array = 1.0
    equivariance = Equivariance.ORTHOGONAL

    def __post_init__(self) -> None:
        expected = "a number of singular directions ≥ 1 or a fraction in (0, 1]"
        whole = isinstance(self.rank, int)
        check("rank", self.rank, lambda x: x >= 1 if whole else 0 < x <= 1, expected)

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key
        rank = jnp.asarray(self.rank)
        if not jnp.issubdtype(rank.dtype, jnp.integer):
            side = jnp.min((context or Context.of(cores)).shape).astype(cores.dtype)
            rank = jnp.ceil(rank.astype(cores.dtype) * side)
        mean = jnp.mean(cores, axis=0)
        deviations, _ = jax.vmap(linalg.truncate, (0, None))(cores - mean[None], rank)
        return mean + jnp.asarray(self.scale, cores.dtype) * jnp.sum(deviations, axis=0)


@flax.struct.dataclass(kw_only=True, repr=False)
class Isotropize(Step):
    """Iso-C: equal singular values (Marczak et al., arXiv 2502.04959).

    M = U S Vᵀ ↦ σ̄ · U Vᵀ with σ̄ the mean singular value. Only the numerical range counts: null
    directions stay null and do not enter the mean. (Averaged over them too, the result would
    depend on rounding errors.) By itself it merges the sum of the cores, which is Iso-C.
    """

    equivariance = Equivariance.ORTHOGONAL
    place = "after"

    def apply(self, matrix: jax.Array, *, key: jax.Array | None, shape: jax.Array) -> jax.Array:
        """Maps ``(p, q)`` to ``(p, q)``."""
        del key, shape
        return linalg.isotropic(matrix)


tsv = Tsv
cart = Cart
isotropize = Isotropize
