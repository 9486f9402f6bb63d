"""Rules that use inputs: regression to each adapter's own outputs."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.linalg import (
    inverse,
    inverse_definite,
    matmul,
    orthonormal_factors,
    polar,
    pytree,
)
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.linear import total
from coremerge_jax.rules.operations import Operations, Sizes, polar_factors, thin_bases
from coremerge_jax.rules.rule import (
    Context,
    Cores,
    Dense,
    Equivariance,
    Rule,
    check,
    check_choice,
    side_by_side,
    thin,
)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class regmean(Rule):
    r"""Least squares on inputs of each task (RegMean, Jin et al., arXiv 2212.09849).

    With the Gram matrices K_t of task t's inputs in the coordinates of the cores' columns, weights
    λ_t and S = Σ_t λ_t K_t,

        M = (Σ_t λ_t M_t K_t) (S + ridge · tr(S) / q · 1)^{-1},

    which minimizes the squared difference of the outputs of M and of each M_t on task t's inputs,
    Σ_t λ_t tr((M − M_t) K_t (M − M_t)ᵀ), up to the ridge. In core space it is exact among the
    updates with the adapters' rows: no n × n matrix is needed. With ``core(rows="free")`` and Gram
    matrices (n, n), rows are free, as in the paper.

    By default it is then multiplied from the left by P^{-1/2}, P = Σ_t U_t U_tᵀ with orthonormal
    U_t of the columns of M_t, as `tsv` does on both sides. That is our own.

    The norm of the result is too small by about two: merge with ``scale="auto"``.

    Attributes:
        ridge: above 0; with few inputs, S does not have full rank.
        weighting: λ_t. ``"iteris"``: ‖M_t‖² / tr(M_t K_t M_tᵀ) (Chen et al., IterIS, arXiv
            2411.15231). ``"trace"``: 1 / tr K_t. With both, tasks with many or large inputs do not
            count for more. ``"none"``: 1, as in RegMean's paper.
        orthogonalize: False for the solution itself, as in RegMean's paper.
        norm: of the result at the automatic scale, as a multiple of √(Σ_t ‖ΔW_t‖²) over all
            modules; None is 1, or 0.75 if not orthogonalized.
    """

    ridge: float | jax.Array = 0.03
    weighting: str = field(default="iteris", metadata={"static": True})
    orthogonalize: bool = field(default=True, metadata={"static": True})
    norm: float | jax.Array | None = None
    equivariance = Equivariance.ORTHOGONAL
    needs_inputs = True

    def __post_init__(self) -> None:
        check("ridge", self.ridge, lambda x: x > 0, "a number above 0")
        check("norm", self.norm, lambda x: x > 0, "a number above 0")
        check_choice("weighting", self.weighting, ("trace", "iteris", "none"))
        check_choice("orthogonalize", self.orthogonalize, (False, True))

    def auto_norm(self, tasks: int) -> float | jax.Array:
        if self.norm is not None:
            return self.norm
        return 1.0 if self.orthogonalize else 0.75

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        return total(self.pieces(cores, key=key, context=context))

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> LoRA:
        """Splits the merge into the terms of the sum over adapters."""
        if context.tasks.shape[0] == 1:
            b, a = thin(cores)
            return LoRA(a=a, b=b)
        if context.inputs is None:
            raise UnsupportedError(
                f"{self!r} needs inputs of each task: give statistics (cm.collect, "
                "coremerge collect)"
            )
        b, a = thin(cores)
        grams = self._weighted(b, a, context.inputs)
        shared = jnp.sum(grams, axis=0)
        side = jnp.maximum(context.shape[1], 1).astype(shared.dtype)
        level = jnp.asarray(self.ridge, shared.dtype) * jnp.trace(shared) / side
        level = jnp.where(level > 0, level, 1)  # without any inputs, the merge is 0
        solution = inverse_definite(shared + level * jnp.eye(len(shared), dtype=shared.dtype))
        if self.orthogonalize:
            left, right, inner = orthonormal_factors(b, a)
            u = polar(side_by_side(left)).reshape(b.shape[1], *inner.shape[:2])
            b, a = matmul(jnp.moveaxis(u, 1, 0), inner), jnp.swapaxes(right, 1, 2)
        return LoRA(a=matmul(matmul(a, grams), solution[None]), b=b)

    def _weighted(
        self, b: Float[Array, "T p r"], a: Float[Array, "T r q"], grams: Float[Array, "T q q"]
    ) -> Float[Array, "T q q"]:
        """Returns ``λ_t K_t``."""
        if self.weighting == "none":
            return grams
        if self.weighting == "trace":
            return grams * inverse(jnp.trace(grams, axis1=1, axis2=2))[:, None, None]
        squares = matmul(jnp.swapaxes(b, 1, 2), b)
        a_t = jnp.swapaxes(a, 1, 2)
        norms = jnp.sum(squares * matmul(a, a_t), axis=(1, 2))
        outputs = jnp.sum(squares * matmul(matmul(a, grams), a_t), axis=(1, 2))
        return grams * (norms * inverse(outputs))[:, None, None]

    def operations(self, cores: Sizes) -> Operations:
        q, abreast = cores.q, cores.abreast
        products = 4.0 * abreast * q**2 + 2.0 * abreast * cores.entries
        counted = Operations(products, 2 / 3 * q**3, kept=2 * cores.tasks * q**2)
        if not self.orthogonalize:
            return counted
        polars = polar_factors(cores, abreast)
        # Of one side.
        return counted + thin_bases(cores) + Operations(polars.products / 2, passing=polars.passing)
