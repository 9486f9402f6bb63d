"""Elementwise rules: TIES, SCE, DARE and magnitude pruning."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import accumulate, inverse, kth_largest, pytree, roundoff
from coremerge_jax.rules.chain import Step
from coremerge_jax.rules.linear import by_task
from coremerge_jax.rules.operations import Operations, Sizes, entrywise
from coremerge_jax.rules.rule import (
    Context,
    Core,
    Cores,
    Dense,
    Equivariance,
    Rule,
    check,
    check_choice,
    check_share,
    check_weights,
    dense,
    dtype_of,
)

_Scalar = Float[Array, ""]


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class ties(Rule):
    r"""Trim, elect signs, merge what agrees (Yadav et al., arXiv 2306.01708).

    M̂_t keeps the entries of M_t that are at least its k-th smallest magnitude, with
    k = d − ⌊density · d⌋ of d entries. The sign γ of each entry is elected over the adapters, and

        merged = Σ_t 1[sign M̂_t = γ] M̂_t  /  #{t : sign M̂_t = γ}        (entry by entry).

    Where the election is a tie the entry is 0.

    Attributes:
        density: share of entries kept per adapter, in (0, 1].
        elect: ``"sum"``: sign of Σ_t M̂_t; ``"count"``: sign of Σ_t sign M̂_t.
        reduce: ``"mean"`` of the entries that agree, their ``"sum"``, or the ``"max"``: the one
            of the largest magnitude.
        weights: one weight per adapter, applied after trimming; None is 1 for all.
        scope: each adapter has one trimming threshold per ``"module"``, or one over all modules of
            the ``"model"``. The latter is found by `merge`: a call on the cores of one module
            takes the threshold of this module.
    """

    density: float | jax.Array = 0.2
    elect: str = field(default="sum", metadata={"static": True})
    reduce: str = field(default="mean", metadata={"static": True})
    weights: tuple[float, ...] | jax.Array | None = None
    scope: str = field(default="module", metadata={"static": True})
    equivariance = Equivariance.ELEMENTWISE

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_weights(self.weights)
        for name, options in (
            ("elect", ("sum", "count")),
            ("reduce", ("mean", "sum", "max")),
            ("scope", ("module", "model")),
        ):
            check_choice(name, getattr(self, name), options)

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        size = context.shape[0] * context.shape[1]
        thresholds = jax.lax.map(
            lambda core: _threshold(jnp.abs(dense(core)), size, self.density), cores
        )
        return self.merge_above(thresholds, cores, context)

    def merge_above(self, thresholds: Float[Array, " T"], cores: Cores, context: Context) -> Dense:
        """Merges what is at least the adapters' thresholds ``(T,)``."""
        weights = jnp.ones_like(thresholds)
        if self.weights is not None:
            weights = by_task(self.weights, context).astype(thresholds.dtype)

        def trim(core: Core, threshold: _Scalar, weight: _Scalar) -> Dense:
            core = dense(core)
            return jnp.where(jnp.abs(core) >= threshold, core * weight, 0)

        def vote(core: Core, threshold: _Scalar, weight: _Scalar) -> Dense:
            kept = trim(core, threshold, weight)
            return jnp.sign(kept) if self.elect == "count" else kept

        elected = jnp.sign(accumulate(vote, cores, thresholds, weights))

        def agreeing(core: Core, threshold: _Scalar, weight: _Scalar) -> tuple[Dense, Dense]:
            kept = trim(core, threshold, weight)
            agrees = jnp.sign(kept) * elected > 0
            return jnp.where(agrees, jnp.abs(kept), 0), agrees.astype(np.float32)

        combine = jnp.maximum if self.reduce == "max" else jnp.add
        merged, number = accumulate(agreeing, cores, thresholds, weights, combine=combine)
        if self.reduce == "mean":
            merged = merged / jnp.maximum(number, 1).astype(merged.dtype)
        return elected * merged

    def operations(self, cores: Sizes) -> Operations:
        # Dense cores are formed three times: for thresholds, for signs, and for the sum.
        operations = 80 * cores.tasks * cores.entries
        return Operations(3 * cores.forming, operations, passing=12 * cores.entries)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class ties_above(Rule):
    """`ties` with given trimming thresholds.

    Attributes:
        rule: its density is not used.
        thresholds: one per adapter.
    """

    rule: ties
    thresholds: Float[Array, " T"]
    equivariance = Equivariance.ELEMENTWISE

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        thresholds = self.thresholds.astype(dtype_of(cores))[context.tasks]
        return self.rule.merge_above(thresholds, cores, context)

    def operations(self, cores: Sizes) -> Operations:
        return self.rule.operations(cores)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class dare(Step):
    """Drops entries at random and rescales the rest (Yu et al., arXiv 2311.03099).

    M ↦ Z ∘ M / (1 − drop) with Z_ij = 0 with probability ``drop`` and 1 otherwise. The mask
    depends on the key, the module and the adapter's place in the list, and on nothing else. For
    derivatives it is constant, also by ``drop``.

    Attributes:
        drop: probability of dropping an entry, in [0, 1).
    """

    drop: float | jax.Array = 0.1
    equivariance = Equivariance.ELEMENTWISE
    needs_key = True
    place = "before"

    def __post_init__(self) -> None:
        check("drop", self.drop, lambda x: 0 <= x < 1, "a probability in [0, 1)")

    def apply(self, matrix: Dense, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        if key is None:
            raise RecipeError("dare draws random numbers: pass key=jax.random.key(seed)")
        # Always float32, so that the mask does not depend on the precision of the merge.
        drawn = jax.random.uniform(key, matrix.shape, jnp.float32)
        drop = jnp.asarray(self.drop, jnp.float32)
        scale = 1 / (1 - jnp.asarray(self.drop, matrix.dtype))
        return jnp.where(drawn >= drop, matrix * scale, 0)

    def operations(self, cores: Sizes) -> Operations:
        return entrywise(cores, 60)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class prune(Step):
    """Keeps the largest entries of each core, as the trimming of `ties` does.

    Attributes:
        density: share of entries kept, in (0, 1].
    """

    density: float | jax.Array = 0.2
    equivariance = Equivariance.ELEMENTWISE
    place = "before"

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def apply(self, matrix: Dense, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        magnitude = jnp.abs(matrix)
        size = context.shape[0] * context.shape[1]
        return jnp.where(magnitude >= _threshold(magnitude, size, self.density), matrix, 0)

    def operations(self, cores: Sizes) -> Operations:
        return entrywise(cores, 80)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class sce(Rule):
    r"""Select, calculate, erase (Wan et al., FuseChat, arXiv 2408.07990, section 3.2).

    The ⌊density · d⌋ entries with the largest variance over the adapters are selected, of the d
    where it is not 0; w_t = ‖M̂_t‖² / Σ_s ‖M̂_s‖² from what is left of each adapter; and

        merged = Σ_t w_t 1[sign M̂_t = γ] M̂_t / Σ_t w_t 1[sign M̂_t = γ],    γ = sign Σ_t M̂_t,

    entry by entry, and 0 where γ = 0. Entries that all adapters have alike are lost (with density
    1, all entries count); a module that only one adapter has is kept as it is.

    Attributes:
        density: share of entries selected, in (0, 1]. The default is that of the authors' model.
    """

    density: float | jax.Array = 0.1
    equivariance = Equivariance.ELEMENTWISE

    def __post_init__(self) -> None:
        check_share("density", self.density)

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        every = dense(cores)
        if len(every) == 1:
            return every[0]
        chosen = jnp.where(self._selected(every)[None], every, 0)
        squares = jnp.sum(chosen**2, axis=(1, 2))
        agrees = jnp.sign(chosen) * jnp.sign(jnp.sum(chosen, axis=0))[None] > 0
        weights = jnp.where(agrees, (squares * inverse(jnp.sum(squares)))[:, None, None], 0)
        return jnp.sum(weights * chosen, axis=0) * inverse(jnp.sum(weights, axis=0))

    def operations(self, cores: Sizes) -> Operations:
        every = cores.tasks * cores.entries
        return Operations(cores.forming, 60 * every, passing=3 * every + 12 * cores.entries)

    def _selected(self, every: Float[Array, "T p q"]) -> Bool[Array, "p q"]:
        """Marks the entries of the largest variance, ``(p, q)``."""
        variance = jnp.var(every, axis=0)
        noise = roundoff(variance) ** 2 * jnp.max(every**2)
        variance = jnp.where(variance > noise, variance, 0)
        number = _share(jnp.sum(variance > 0), self.density, variance.dtype)
        least = kth_largest(variance, jnp.maximum(number, 1))
        among = (variance >= least) & (variance > 0) & (number > 0)
        return among | (jnp.asarray(self.density) >= 1)


def _threshold(magnitude: Dense, size: Int[Array, ""], density: ArrayLike) -> _Scalar:
    """Returns the largest entry that ⌊density · size⌋ are above; TIES keeps it as well."""
    return kth_largest(magnitude, _share(size, density, magnitude.dtype) + 1)


def _share(size: Int[Array, ""], density: ArrayLike, dtype: np.dtype) -> Int[Array, ""]:
    """Returns ``⌊density · size⌋``."""
    return jnp.floor(size.astype(dtype) * jnp.asarray(density, dtype)).astype(size.dtype)
