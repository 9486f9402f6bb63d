"""What a merge space is: where the updates of one module are merged, and the way back."""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.linalg import matmul
from coremerge_jax.lora import LoRA
from coremerge_jax.rules import Chain, Context, Rule, chain


@flax.struct.dataclass
class Projection:
    """The adapters' updates of one module in a merge space: ``ΔW_t = u diag(gain) cores_t vᵀ``.

    ``u`` and ``v`` have orthonormal columns, up to columns of zeros behind the numerical shape.

    Attributes:
        cores: ``(T, p, q)``, the updates in the merge space.
        shape: int32 ``(2,)``, the numerical shape: rows and columns of the cores beyond it are
            zero.
        u: ``(m, p)``, or None for the identity.
        v: ``(n, q)``, or None for the identity.
        gain: ``(p,)``, or None for ones.
    """

    cores: jax.Array
    shape: jax.Array
    u: jax.Array | None = None
    v: jax.Array | None = None
    gain: jax.Array | None = None

    def merge(
        self, rule: Rule, *, key: jax.Array | None = None, tasks: jax.Array | None = None
    ) -> LoRA:
        """Merges the cores and lifts the result.

        Steps of the rule behind the merge act on ``diag(gain) · merged``, whose singular values
        are those of the merged update.

        Args:
            rule: the merge rule.
            key: PRNG key, for rules that draw random numbers.
            tasks: int32 ``(T,)``, which adapters these are; by default 0 to T - 1.
        """
        if tasks is None:
            tasks = jnp.arange(self.cores.shape[0], dtype=jnp.int32)
        context = Context(shape=self.shape, tasks=tasks)
        rule = rule if isinstance(rule, Chain) else chain(rule)
        merged = self._weigh(rule.reduce(self.cores, key=key, context=context))
        return self._expand(rule.finish(merged, key, context))

    def lift(self, merged: jax.Array) -> LoRA:
        """The update that a matrix of the merge space stands for.

        Args:
            merged: ``(p, q)``.

        Returns:
            Factors of rank ``min(p, q)``.
        """
        return self._expand(self._weigh(merged))

    def _weigh(self, merged: jax.Array) -> jax.Array:
        return merged if self.gain is None else self.gain[:, None] * merged

    def _expand(self, merged: jax.Array) -> LoRA:
        p, q = merged.shape
        u = jnp.eye(p, dtype=merged.dtype) if self.u is None else self.u
        v = jnp.eye(q, dtype=merged.dtype) if self.v is None else self.v
        if q <= p:
            return LoRA(a=v.T, b=merged if self.u is None else matmul(u, merged))
        return LoRA(a=merged if self.v is None else matmul(merged, v.T), b=u)


class Space(Protocol):
    """A merge space: a hashable object with one pure method."""

    def project(
        self,
        lora_a: jax.Array,
        lora_b: jax.Array,
        ranks: tuple[int, ...],
        *,
        eps: float | None = None,
        elementwise: bool = True,
    ) -> Projection:
        """Brings the updates of one module into the merge space.

        Args:
            lora_a: ``(R, n)``, the A factors of all adapters below each other.
            lora_b: ``(m, R)``, the B factors side by side.
            ranks: the rank of each adapter, ``sum(ranks) == R``; static.
            eps: relative rounding error of the factors' entries; by default the machine epsilon
                of their dtype. Directions within it of zero are dropped from the bases.
            elementwise: whether the rule looks at single entries; for other rules the space may
                choose cheaper coordinates that give the same merged update.
        """
        ...


def split(stacked: jax.Array, ranks: tuple[int, ...]) -> jax.Array:
    """Splits the columns ``(p, R)`` by adapter: ``(T, p, max(ranks))``, padded with zeros."""
    width = max(ranks)
    padded = jnp.pad(stacked, ((0, 0), (0, 1)))
    columns, start = [], 0
    for rank in ranks:
        columns.append([start + i if i < rank else sum(ranks) for i in range(width)])
        start += rank
    return jnp.moveaxis(padded[:, jnp.asarray(columns)], 1, 0)
