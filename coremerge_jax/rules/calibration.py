"""Calibration of directions that several adapters share: SVC and Pico."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.linalg import Factored, basis, inverse, matmul, rounding, roundoff, spectral_map
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.chain import Step
from coremerge_jax.rules.rule import Context, Cores, Equivariance, check, dense, fold


@flax.struct.dataclass(kw_only=True, repr=False)
class Svc(Step):
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

    def apply(self, matrix: jax.Array, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Maps ``(p, q)`` to ``(p, q)``."""
        del key
        cores = context.cores
        assert cores is not None
        tasks = len(jax.tree.leaves(cores)[0])
        least = jnp.asarray(1 / tasks if self.alpha is None else self.alpha, matrix.dtype)
        found, merged, _, _ = basis(matrix, roundoff(matrix), singular=True)
        u = found.columns()

        def share(core: jax.Array) -> jax.Array:
            rows = matmul(u.T, core)
            squares = jnp.sum(rows**2, axis=1)
            agreement = jnp.sum(merged * rows, axis=1) * inverse(squares, rounding(core) ** 2)
            return jnp.maximum(agreement, least)

        gain = tasks * inverse(fold(share, cores))
        return matmul(u * gain[None, :], merged)


@flax.struct.dataclass(kw_only=True, repr=False)
class Pico(Step):
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

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        """Maps all cores before the merge."""
        del keys, context
        if not isinstance(cores, LoRA):
            raise UnsupportedError(
                "pico looks at the factors B of the adapters, which only core and full space have"
            )
        b = jnp.asarray(cores.b)
        change = _calibration(jnp.einsum("tpr,tqr->pq", b, b, precision="highest"), len(b))
        return LoRA(a=cores.a, b=b + jax.vmap(matmul, (None, 0))(change, b), kind=cores.kind)

    def restore(self, merged: jax.Array | Factored, *, context: Context) -> jax.Array:
        """Scales the merged core."""
        assert context.cores is not None
        tasks = len(jax.tree.leaves(context.cores)[0])
        mean = fold(_norm, context.cores) / tasks
        found = dense(merged)
        return found * mean * inverse(_norm(found))


def _norm(x: jax.Array) -> jax.Array:
    """Frobenius norm, with derivative 0 at 0."""
    squares = jnp.sum(x**2)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _calibration(gram: jax.Array, tasks: int) -> jax.Array:
    """Returns ``U diag(α − 1) Uᵀ``, given ``B Bᵀ``: a function of its singular values σ²."""

    def change(squares: jax.Array) -> jax.Array:
        share = squares * inverse(jnp.sum(squares))
        return (1 / (1 + (tasks - 1) * share) - 1)[None]

    return spectral_map(change, gram)[0]


svc = Svc

pico = Pico
