"""Calibration of directions that several adapters share: SVC and Pico."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.linalg import (
    accumulate,
    basis,
    inverse,
    matmul,
    pytree,
    root,
    rounding,
    roundoff,
    spectral_map,
)
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.chain import Step
from coremerge_jax.rules.operations import Operations, Sizes, decomposition
from coremerge_jax.rules.rule import (
    Context,
    Core,
    Cores,
    Dense,
    Equivariance,
    Merged,
    check,
    dense,
    tasks_in,
)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class svc(Step):
    r"""Singular value calibration (arXiv 2602.05536).

    With the merged M = Σ_r σ_r u_r v_rᵀ and the adapters' M_t, each singular value becomes γ_r σ_r,

        γ_r = T / Σ_t max(alpha, s_rt),    s_rt = ⟨u_rᵀ M, u_rᵀ M_t⟩ / ‖u_rᵀ M_t‖²,

    which shrinks directions that several adapters share and that the merge has thus counted
    several times; s_rt = 0 where u_rᵀ M_t is. What M is multiplied by matters to the comparison
    with ``alpha`` alone: the sum has T times the shares that the mean has. Not defined where
    singular values of M coincide: do not put it behind `isotropize`. (Derivatives are finite
    there, those of some choice of the u_r.)

    Attributes:
        alpha: the least share; None is 1 / T, as in the authors' script (which has 1 behind TSV).
    """

    alpha: float | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL
    place = "after"

    def __post_init__(self) -> None:
        check("alpha", self.alpha, lambda x: x > 0, "a number above 0")

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        """Refuses to be a step before the merge: nothing is merged yet."""
        del cores, keys, context
        raise UnsupportedError(
            "svc compares the merged core with those of the adapters: put it behind the rule that "
            "merges"
        )

    def apply(self, matrix: Dense, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        cores = context.cores
        assert cores is not None
        tasks = tasks_in(cores)
        least = jnp.asarray(1 / tasks if self.alpha is None else self.alpha, matrix.dtype)
        found, merged, _, _ = basis(matrix, roundoff(matrix), singular=True)
        u = found.columns()

        def share(core: Core) -> Float[Array, " k"]:
            core = dense(core)
            rows = matmul(u.T, core)
            squares = jnp.sum(rows**2, axis=1)
            agreement = jnp.sum(merged * rows, axis=1) * inverse(squares, rounding(core) ** 2)
            return jnp.maximum(agreement, least)

        gain = tasks * inverse(accumulate(share, cores))
        return matmul(u * gain[None, :], merged)

    def operations(self, cores: Sizes) -> Operations:
        products = cores.forming + 2.0 * cores.tasks * cores.entries * (cores.side + cores.width)
        core = 20 * cores.entries * cores.side
        return Operations(products, core, passing=12 * cores.entries)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class pico(Step):
    r"""Calibration of directions that the adapters' B share (Tang and Yang, arXiv 2604.16826).

    With the stacked B = U diag(σ) Vᵀ and s_j = σ_j² / Σ_i σ_i²,

        B_t ↦ (1 + U diag(α − 1) Uᵀ) B_t,    α_j = 1 / (1 + (T − 1) s_j),

    and the merged update is scaled to the mean Frobenius norm of the M_t. The first step of a
    chain, in core or full space. Unlike other rules it looks at B alone: (B G, G⁻¹ A) gives
    another result than (B, A). The scaling alpha / r of an adapter counts as part of B, while the
    authors' code takes B as it is in the file.
    """

    equivariance = Equivariance.ORTHOGONAL
    place = "before"
    first = True
    factored = True

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        if not isinstance(cores, LoRA):
            raise UnsupportedError(
                "pico looks at the factors B of the adapters, which only core and full space have"
            )
        b = jnp.asarray(cores.b)
        change = _calibration(jnp.einsum("tpr,tqr->pq", b, b, precision="highest"), len(b))
        return LoRA(a=cores.a, b=b + jax.vmap(matmul, (None, 0))(change, b), kind=cores.kind)

    def restore(self, merged: Merged, *, context: Context) -> Dense:
        """Scales the merged core."""
        assert context.cores is not None
        mean = accumulate(_norm, context.cores) / tasks_in(context.cores)
        found = dense(merged)
        return found * mean * inverse(_norm(found))

    def operations(self, cores: Sizes) -> Operations:
        products = 4.0 * cores.p**2 * cores.abreast + 2 * cores.forming
        return Operations(products) + decomposition(replace(cores, q=cores.p))


def _norm(core: Core) -> Float[Array, ""]:
    """Returns the Frobenius norm of a core, with derivative 0 at 0."""
    return root(jnp.sum(dense(core) ** 2))


def _calibration(gram: Float[Array, "p p"], tasks: int) -> Float[Array, "p p"]:
    """Returns ``U diag(α − 1) Uᵀ``, given ``B Bᵀ``: a function of its singular values σ²."""

    def change(squares: Float[Array, " p"]) -> Float[Array, "1 p"]:
        share = squares * inverse(jnp.sum(squares))
        return (1 / (1 + (tasks - 1) * share) - 1)[None]

    return spectral_map(change, gram)[0]
