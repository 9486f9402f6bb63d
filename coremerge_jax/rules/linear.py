"""Linear rules: weighted sums of the updates."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.linalg import matmul
from coremerge_jax.lora import LoRA
from coremerge_jax.rules.rule import Context, Cores, Equivariance, Rule, check_weights


@flax.struct.dataclass(kw_only=True, repr=False)
class Mean(Rule):
    """Mean of the updates that a module has: ΔW = (1/T) Σ_t ΔW_t."""

    equivariance = Equivariance.LINEAR

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Merges: all cores to one."""
        del key, context
        return total(cores) / len(jax.tree.leaves(cores)[0])


@flax.struct.dataclass(kw_only=True, repr=False)
class TaskArithmetic(Rule):
    """Weighted sum of the updates: ΔW = Σ_t w_t ΔW_t (Ilharco et al., arXiv 2212.04089).

    Attributes:
        weights: one weight per adapter; None is 1 for all.
    """

    weights: tuple[float, ...] | jax.Array | None = None
    equivariance = Equivariance.LINEAR

    def __post_init__(self) -> None:
        check_weights(self.weights)

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Merges: all cores to one."""
        del key
        if self.weights is not None:
            weights = by_task(self.weights, context)
            cores = jax.vmap(scale)(cores, weights.astype(jax.tree.leaves(cores)[0].dtype))
        return total(cores)


def total(cores: Cores) -> jax.Array:
    """Returns the sum of all cores."""
    if not isinstance(cores, LoRA):
        return jnp.sum(cores, axis=0)
    b = jnp.moveaxis(jnp.asarray(cores.b), 0, 1)
    a = jnp.asarray(cores.a)
    return matmul(b.reshape(len(b), -1), a.reshape(-1, a.shape[-1]))


def scale(core: Cores, weight: jax.Array) -> Cores:
    """Returns a core times a weight."""
    return LoRA(a=core.a, b=core.b * weight) if isinstance(core, LoRA) else core * weight


def by_task(values: tuple[float, ...] | jax.Array, context: Context) -> jax.Array:
    """Returns the values that belong to the adapters at hand.

    Raises:
        ValueError: there is not one value per adapter.
    """
    values = jnp.asarray(values)
    if values.ndim != 1 or values.shape[0] < context.tasks.shape[0]:
        raise ValueError(f"weights of shape {values.shape}: expected one per adapter")
    return values[context.tasks]


mean = Mean

task_arithmetic = TaskArithmetic
