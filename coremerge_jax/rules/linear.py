"""Linear rules: weighted sums of the updates."""

import flax.struct
import jax
import jax.numpy as jnp

from coremerge_jax.rules.base import Context, Equivariance, Rule


@flax.struct.dataclass(kw_only=True, repr=False)
class Mean(Rule):
    """Mean of the updates that a module has: ΔW = (1/T) Σ_t ΔW_t."""

    equivariance = Equivariance.LINEAR

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key, context
        return jnp.mean(cores, axis=0)


@flax.struct.dataclass(kw_only=True, repr=False)
class TaskArithmetic(Rule):
    """Weighted sum of the updates: ΔW = Σ_t w_t ΔW_t (Ilharco et al., arXiv 2212.04089).

    Attributes:
        weights: one weight per adapter; None is 1 for all.
    """

    weights: tuple[float, ...] | jax.Array | None = None
    equivariance = Equivariance.LINEAR

    def __call__(
        self, cores: jax.Array, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges ``(T, p, q)`` to ``(p, q)``."""
        del key
        return jnp.sum(weighted(cores, self.weights, context), axis=0)


def weighted(
    cores: jax.Array, weights: tuple[float, ...] | jax.Array | None, context: Context | None
) -> jax.Array:
    """Each core times its adapter's weight.

    Raises:
        ValueError: there is not one weight per adapter.
    """
    if weights is None:
        return cores
    values = jnp.asarray(weights, cores.dtype)
    tasks = (context or Context.of(cores)).tasks
    if values.ndim != 1 or values.shape[0] < tasks.shape[0]:
        raise ValueError(f"weights of shape {values.shape}: expected one per adapter")
    return cores * values[tasks][:, None, None]


mean = Mean
task_arithmetic = TaskArithmetic
