"""Orthogonally equivariant rules: TSV, CART and Iso-C."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from coremerge_jax.linalg import (
    Factored,
    accumulate,
    basis,
    cut_factors,
    flattened,
    isotropic,
    matmul,
    numerical_ranks,
    orthonormal_factors,
    pad_rows,
    polar,
    pytree,
    rounding,
    roundoff,
    truncate,
)
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.chain import Step
from coremerge_jax.rules.linear import total
from coremerge_jax.rules.operations import (
    Operations,
    Sizes,
    decomposition,
    polar_factors,
    thin_bases,
)
from coremerge_jax.rules.rule import (
    Context,
    Core,
    Cores,
    Dense,
    Equivariance,
    Merged,
    Rule,
    check,
    dense,
    dtype_of,
    side_by_side,
    tasks_in,
    thin,
)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class tsv(Rule):
    r"""Task singular vectors made orthogonal across tasks (Gargiulo et al., arXiv 2412.00081).

    With M_t ≈ U_t S_t V_tᵀ cut to k_t triplets, U = [U_1 … U_T] and V alike, the singular vectors
    are replaced by the nearest orthonormal ones, their polar factors U(UᵀU)^{-1/2}:

        merged = U (UᵀU)^{-1/2} · diag(S_1, …, S_T) · (VᵀV)^{-1/2} Vᵀ
               = P^{-1/2} (Σ_t U_t S_t V_tᵀ) Q^{-1/2},    P = Σ_t U_t U_tᵀ,    Q = Σ_t V_t V_tᵀ.

    The second form shows that the choice of singular vectors does not matter: any orthonormal bases
    of their spans do, with a full block in place of S_t, and are what is computed with. Inverses
    are pseudo-inverses: directions that no task uses stay unused. k_t is the rank r_t of M_t where
    Σ_t r_t ≤ min(p, q), and max(1, ⌊min(p, q) / T⌋) otherwise; the authors' code takes the latter
    always, which selects arbitrary null vectors where it exceeds r_t. (p, q) is the shape of the
    cores as they are, in core space min(m, R) × min(n, R), not their numerical shape.

    Attributes:
        rank: k_t = min(rank, r_t) for every adapter; the same in every space. None for the above.
    """

    rank: int | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL
    factored = True

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int | np.integer)
        check("rank", self.rank, lambda x: whole and x >= 1, "a whole number of at least 1")

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Factored:
        """Merges to ``u blockdiag(S) vᵀ``, in any bases of the U_t and V_t."""
        b, a = thin(cores)
        left, right, inner = orthonormal_factors(b, a)
        side = min(b.shape[1], a.shape[2])
        ranks = numerical_ranks(inner, roundoff(right))
        present = jnp.maximum(jnp.sum(ranks > 0), 1)
        limit = jnp.where(jnp.sum(ranks) <= side, side, jnp.maximum(side // present, 1))
        limit = jnp.asarray(limit if self.rank is None else self.rank, ranks.dtype)
        updates, *bases = cut_factors(left, right, inner, jnp.minimum(ranks, limit))
        # Stacked, so that both are one batch of decompositions.
        u, v = jax.vmap(polar)(pad_rows(*map(side_by_side, bases)))
        return Factored(u[: b.shape[1]], updates, v[: a.shape[2]])

    def auto_scale(self, tasks: int) -> float:
        # The norm of the merge is nearly √(Σ ‖M_t‖²), as its singular values are those of the M_t.
        return float(self.auto_norm(tasks))

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> LoRA:
        merged = self.merge(cores, key=key, context=context)
        columns = merged.blocks.shape[0], merged.blocks.shape[1]
        u = jnp.moveaxis(merged.u.reshape(-1, *columns), 1, 0)
        v = merged.v.reshape(-1, *columns)
        return LoRA(a=jnp.transpose(v, (1, 2, 0)), b=matmul(u, merged.blocks))

    def operations(self, cores: Sizes) -> Operations:
        deficient = self.rank is not None or cores.abreast > cores.side
        return thin_bases(cores) + polar_factors(cores, cores.abreast, deficient)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class cart(Rule):
    """Low-rank deviations from the mean (Choi et al., arXiv 2412.12153).

    merged = M̄ + scale · Σ_t [M_t − M̄]_k with the mean M̄ and [·]_k the truncation to rank k.

    Attributes:
        rank: k as an integer, or as a fraction ρ: k = ⌈ρ · min(p, q)⌉ of the numerical shape of
            the merge space, as in the code of the core space paper (the rule's authors round down).
            An absolute rank means the same in every space, a fraction does not.
        scale: weight of the deviations. There is no good default: the authors and the core space
            paper tune it, to 1.5 or more.
    """

    rank: float | int | jax.Array = 0.08
    scale: float | jax.Array = 1.0
    equivariance = Equivariance.ORTHOGONAL

    def __post_init__(self) -> None:
        expected = "a number of singular directions ≥ 1 or a fraction in (0, 1]"
        whole = isinstance(self.rank, int | np.integer)
        check("rank", self.rank, lambda x: x >= 1 if whole else 0 < x <= 1, expected)
        check("scale", self.scale, lambda _: True, "a finite number")

    def auto_norm(self, tasks: int) -> float:
        return min(0.85, float(super().auto_norm(tasks)))

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        dtype = dtype_of(cores)
        rank = jnp.asarray(self.rank)
        if not jnp.issubdtype(rank.dtype, jnp.integer):
            side = jnp.min(context.shape).astype(dtype)
            rank = jnp.ceil(rank.astype(dtype) * side)
        mean = total(cores) / tasks_in(cores)

        def deviation(core: Core) -> Dense:
            core = dense(core)
            return truncate(core - mean, rank, rounding(core))[0]

        return mean + jnp.asarray(self.scale, dtype) * accumulate(deviation, cores)

    def operations(self, cores: Sizes) -> Operations:
        return Operations(cores.forming) + cores.tasks * decomposition(cores)


class _Spectrum(Step):
    """A step that changes singular values and nothing else."""

    equivariance = Equivariance.ORTHOGONAL
    place = "after"
    factored = True

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        """Maps all cores before the merge: with orthonormal rows of A, their B."""
        if not isinstance(cores, LoRA):
            return super().prepare(cores, keys=keys, context=context)

        def one(core: LoRA) -> LoRA:
            a = jnp.asarray(core.a)
            rows, coordinates, _, _ = basis(a.T, roundoff(a), singular=False)
            b = matmul(jnp.asarray(core.b), coordinates.T)
            return LoRA(a=rows.columns().T, b=self.apply(b, key=None, context=context))

        return jax.vmap(one)(cores)

    def operations(self, cores: Sizes) -> Operations:
        one, width = decomposition(cores), cores.width
        if cores.dense:
            return cores.number * one
        if cores.merged:  # the decompositions of its blocks
            return replace(one, products=cores.forming, core=cores.tasks * 20.0 * width**3)
        products = 10.0 * cores.side * width * cores.abreast
        return replace(one, products=products, core=cores.tasks * 10 * width**3)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class isotropize(_Spectrum):
    """Iso-C: equal singular values (Marczak et al., arXiv 2502.04959).

    M = U S Vᵀ ↦ σ̄ · U Vᵀ with σ̄ the mean singular value. Only the numerical range counts: null
    directions stay null and do not enter the mean. (Averaged over them too, the result would
    depend on rounding errors.) By itself it merges the sum of the cores, which is Iso-C.
    """

    flat = True

    def apply(self, matrix: Merged, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        return isotropic(matrix)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class flatten(_Spectrum):
    """A flatter spectrum, of the same nuclear norm; a generalization of Iso-C, our own.

    M = U S Vᵀ ↦ U (S^power · tr S / tr S^power) Vᵀ over the numerical range: nothing with power 1,
    `isotropize` with power 0, but for the automatic scale. Before a rule that merges, it acts on
    each adapter's core.

    Attributes:
        power: at least 0; values above 1 make the spectrum steeper.
    """

    power: float | jax.Array = 0.5

    def __post_init__(self) -> None:
        check("power", self.power, lambda x: x >= 0, "a number of at least 0")

    def apply(self, matrix: Merged, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        return flattened(matrix, self.power)
