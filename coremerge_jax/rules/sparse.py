"""Elementwise rules: TIES and DARE."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax import linalg
from coremerge_jax.rules.base import Context, Equivariance, Rule, Step, check
from coremerge_jax.rules.linear import weighted


@flax.struct.dataclass(kw_only=True, repr=False)
class Ties(Rule):
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
        scope: whether the trimming threshold of an adapter is found per ``"module"``, or is one
            over all modules of the ``"model"`` (`merge` finds it; a call on one module's cores
            has no other module to look at).
    """

    density: float | jax.Array = 0.2
    elect: str = flax.struct.field(pytree_node=False, default="sum")
    reduce: str = flax.struct.field(pytree_node=False, default="mean")
    weights: tuple[float, ...] | jax.Array | None = None
    scope: str = flax.struct.field(pytree_node=False, default="module")
    equivariance = Equivariance.ELEMENTWISE

    def __post_init__(self) -> None:
        check("density", self.density, lambda x: 0 < x <= 1, "a share in (0, 1]")
        for name, options in (
            ("elect", ("sum", "count")),
            ("reduce", ("mean", "sum", "max")),
            ("scope", ("module", "model")),
        ):
            if getattr(self, name) not in options:
                value, expected = getattr(self, name), " or ".join(map(repr, options))
                raise ValueError(f"{name}={value!r}: expected {expected}")

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key
        context = context or Context.of(cores)
        size = context.shape[0] * context.shape[1]
        threshold = jax.vmap(lambda x: self.threshold(x, size))(jnp.abs(cores))
        return self.merge_above(threshold, cores, context)

    def merge_above(self, threshold: jax.Array, cores: jax.Array, context: Context) -> jax.Array:
        """Merges what is at least the adapters' thresholds ``(T,)``."""
        kept = jnp.where(jnp.abs(cores) >= threshold[:, None, None], cores, 0)
        kept = weighted(kept, self.weights, context)
        votes = jnp.sign(kept) if self.elect == "count" else kept
        elected = jnp.sign(jnp.sum(votes, axis=0))
        agree = jnp.sign(kept) * elected[None] > 0
        kept = jnp.where(agree, kept, 0)
        if self.reduce == "max":
            return elected * jnp.max(jnp.abs(kept), axis=0)
        total = jnp.sum(kept, axis=0)
        if self.reduce == "sum":
            return total
        return total / jnp.maximum(jnp.sum(agree, axis=0), 1).astype(total.dtype)

    def threshold(self, magnitude: jax.Array, size: jax.Array) -> jax.Array:
        """The trimming threshold of one adapter.

        Args:
            magnitude: absolute values of its entries, of any shape.
            size: int32, how many of them count; the others are zero.
        """
        density = jnp.asarray(self.density, magnitude.dtype)
        kept = jnp.floor(size.astype(magnitude.dtype) * density).astype(size.dtype)
        return linalg.kth_smallest(magnitude, magnitude.size - kept)


@flax.struct.dataclass(kw_only=True, repr=False)
class TiesAbove(Rule):
    """`Ties` with given trimming thresholds.

    Attributes:
        ties: the rule, whose density is not used.
        thresholds: one per adapter.
    """

    ties: Ties
    thresholds: jax.Array
    equivariance = Equivariance.ELEMENTWISE

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key
        context = context or Context.of(cores)
        thresholds = self.thresholds.astype(cores.dtype)[context.tasks]
        return self.ties.merge_above(thresholds, cores, context)


@flax.struct.dataclass(kw_only=True, repr=False)
class Dare(Step):
    """Drops entries at random and rescales the rest (Yu et al., arXiv 2311.03099).

    M ↦ Z ∘ M / (1 − drop) with Z_ij = 0 with probability ``drop`` and 1 otherwise. The mask
    depends on the key, the module and the adapter's place in the list, and on nothing else.

    Attributes:
        drop: probability of dropping an entry, in [0, 1).
    """

    drop: float | jax.Array = 0.1
    equivariance = Equivariance.ELEMENTWISE
    needs_key = True
    place = "before"

    def __post_init__(self) -> None:
        check("drop", self.drop, lambda x: 0 <= x < 1, "a probability in [0, 1)")

    def apply(self, matrix: jax.Array, *, key: jax.Array | None, shape: jax.Array) -> jax.Array:
        """Maps ``(p, q)`` to ``(p, q)``."""
        del shape
        if key is None:
            raise ValueError("dare draws random numbers: pass key=jax.random.key(seed)")
        # Always float32, so that the mask does not depend on the precision of the merge.
        drawn = jax.random.uniform(key, matrix.shape, jnp.float32)
        drop = jnp.asarray(self.drop, jnp.float32)
        scale = 1 / (1 - jnp.asarray(self.drop, matrix.dtype))
        return jnp.where(drawn >= drop, matrix * scale, 0)


ties = Ties
dare = Dare
