"""Rules that use inputs: regression to each adapter's own outputs."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from coremerge_jax.errors import UnsupportedError
from coremerge_jax.linalg import (
    cut_factors,
    inverse,
    inverse_definite,
    matmul,
    numerical_ranks,
    orthonormal_factors,
    polar,
    pytree,
    root,
    roundoff,
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
    squared_norms,
    squared_outputs,
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

    Where tasks conflict, the result is too small: merge with ``scale="auto"``, which is about
    outputs here. With y_t and y those of adapter t and of the merge on task t's inputs, weighted by
    λ_t of IterIS, it is for one module the geometric mean of two scales: that at which Σ_t ‖y‖² is
    Σ_t ‖y_t‖², and the larger one at which Σ_t y · y_t is.

    Attributes:
        ridge: above 0; with few inputs, S does not have full rank.
        weighting: λ_t. ``"iteris"``: ‖M_t‖² / tr(M_t K_t M_tᵀ) (Chen et al., IterIS, arXiv
            2411.15231). ``"trace"``: 1 / tr K_t. With both, tasks with many or large inputs do not
            count for more. ``"none"``: 1, as in RegMean's paper.
        orthogonalize: False for the solution itself, as in RegMean's paper.
    """

    ridge: float | jax.Array = 0.03
    weighting: str = field(default="iteris", metadata={"static": True})
    orthogonalize: bool = field(default=True, metadata={"static": True})
    equivariance = Equivariance.ORTHOGONAL
    needs_inputs = True

    def __post_init__(self) -> None:
        check("ridge", self.ridge, lambda x: x > 0, "a number above 0")
        check_choice("weighting", self.weighting, ("trace", "iteris", "none"))
        check_choice("orthogonalize", self.orthogonalize, (False, True))

    def auto_norm(self, tasks: int) -> float:
        return 1.0

    def auto_square(self, merged: Dense, *, cores: Cores, context: Context) -> Float[Array, ""]:
        """Returns the squared norm of outputs, times their correlation with the adapters' own."""
        if context.inputs is None:  # of one adapter
            return super().auto_square(merged, cores=cores, context=context)
        b, a = thin(cores)
        grams = _balanced(b, a, context.inputs)
        seen = matmul(merged[None], grams)
        outputs = jnp.sum(seen * merged[None])
        common = jnp.sum(matmul(seen, jnp.swapaxes(a, 1, 2)) * b)
        alone = jnp.sum(squared_outputs(b, a, grams))
        return common * root(outputs * inverse(alone))

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
            ranks = numerical_ranks(inner, roundoff(right))  # of M_t, which B_t may exceed
            inner, left, right = cut_factors(left, right, inner, ranks)
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
        return _balanced(b, a, grams)

    def operations(self, cores: Sizes) -> Operations:
        q, abreast = cores.q, cores.abreast
        products = 4.0 * abreast * q**2 + 2.0 * abreast * cores.entries
        counted = Operations(products, 2 / 3 * q**3, kept=2 * cores.tasks * q**2)
        if not self.orthogonalize:
            return counted
        polars = polar_factors(cores, abreast)
        # Of one side.
        return counted + thin_bases(cores) + Operations(polars.products / 2, passing=polars.passing)


def _balanced(
    b: Float[Array, "T p r"], a: Float[Array, "T r q"], grams: Float[Array, "T q q"]
) -> Float[Array, "T q q"]:
    """Multiplies Gram matrices so that outputs are as large as the updates: λ_t of IterIS."""
    norms = squared_norms(LoRA(a=a, b=b))
    return grams * (norms * inverse(squared_outputs(b, a, grams)))[:, None, None]
