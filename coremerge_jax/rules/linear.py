"""Linear rules: weighted sums of the updates."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num, PRNGKeyArray

from coremerge_jax.linalg import matmul, pytree
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.operations import Operations, Sizes
from coremerge_jax.rules.rule import (
    Context,
    Core,
    Cores,
    Dense,
    Equivariance,
    Rule,
    check_weights,
    dtype_of,
    tasks_in,
)


class _Sum(Rule):
    """A weighted sum."""

    equivariance = Equivariance.LINEAR

    def operations(self, cores: Sizes) -> Operations:
        return Operations(cores.forming, cores.tasks * cores.entries, passing=12 * cores.entries)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class mean(_Sum):
    """Mean of the updates that a module has: ΔW = (1/T) Σ_t ΔW_t."""

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Cores:
        tasks = tasks_in(cores)
        return jax.vmap(scale)(cores, jnp.full(tasks, 1 / tasks, dtype_of(cores)))

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        return total(cores) / tasks_in(cores)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class task_arithmetic(_Sum):
    """Weighted sum of the updates: ΔW = Σ_t w_t ΔW_t (Ilharco et al., arXiv 2212.04089).

    Attributes:
        weights: one weight per adapter; None is 1 for all.
    """

    weights: tuple[float, ...] | jax.Array | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Cores:
        if self.weights is None:
            return cores
        weights = by_task(self.weights, context)
        return jax.vmap(scale)(cores, weights.astype(dtype_of(cores)))

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        return total(self.pieces(cores, key=key, context=context))


def total(cores: Cores) -> Dense:
    """Returns the sum of all cores, ``(p, q)``; of LoRA factors, in one product."""
    if not isinstance(cores, LoRA):
        return jnp.sum(cores, axis=0)
    b = jnp.moveaxis(jnp.asarray(cores.b), 0, 1)
    a = jnp.asarray(cores.a)
    return matmul(b.reshape(len(b), -1), a.reshape(-1, a.shape[-1]))


def scale(core: Core, weight: Float[Array, ""]) -> Core:
    """Multiplies one core by a weight; of LoRA factors, B."""
    return LoRA(a=core.a, b=core.b * weight) if isinstance(core, LoRA) else core * weight


def by_task(values: tuple[ArrayLike, ...] | ArrayLike, context: Context) -> Num[Array, " T"]:
    """Picks the values ``(T,)`` of the adapters at hand.

    Raises:
        ValueError: there is not one value per adapter.
    """
    values = jnp.asarray(values)
    if values.ndim != 1 or values.shape[0] < context.tasks.shape[0]:
        raise ValueError(f"weights of shape {values.shape}: expected one per adapter")
    return values[context.tasks]
