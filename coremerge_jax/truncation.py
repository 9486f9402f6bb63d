"""Cutting an adapter to a rank budget, without ever forming an update."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import matmul
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.precision import computing
from coremerge_jax.stack import stack_adapters


def truncate(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Cuts each module to the best approximation of a lower rank.

    The singular values of ΔW = b a come from the r × r product of the triangular factors of b and
    aᵀ (Eckart and Young, 1936, for why their truncation is best).

    Args:
        adapter: concrete, not traced.
        rank: keep at most this many singular directions.
        energy: keep the fewest that hold this share of ‖ΔW‖²_F, in (0, 1].

    Returns:
        The adapter, its factors balanced (bᵀb = a aᵀ), and the share of ‖ΔW‖²_F that each module
        kept. At least one direction stays.

    Raises:
        ValueError: neither or an impossible ``rank`` or ``energy`` is given.
    """
    if rank is None and energy is None:
        raise ValueError("truncate needs rank= or energy=")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: expected a share in (0, 1]")
    modules: dict[str, LoRA] = {}
    kept: dict[str, float] = {}
    stacks = list(stack_adapters([adapter]))
    with computing(None, *(stack.a for stack in stacks)) as dtype:
        for stack in stacks:
            a, b, s = _balance(jnp.asarray(stack.a), jnp.asarray(stack.b), dtype)
            a, b = stack.like(a, b)
            for i, path in enumerate(stack.paths):
                share = _shares(np.asarray(s[i]))
                r = _directions(share, rank, energy)
                kept[path] = float(share[r - 1])
                modules[path] = dataclasses.replace(adapter[path], a=a[i, :r], b=b[i, :, :r])
    return adapter.replace(modules={path: modules[path] for path in adapter}), {
        path: kept[path] for path in adapter
    }


@partial(jax.jit, static_argnames="dtype")
def _balance(a: jax.Array, b: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Factors ``√σ_i v_iᵀ`` and ``√σ_i u_i`` by descending σ, and σ, for each module."""

    def balance(factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        lora_a, lora_b = (x.astype(dtype) for x in factors)
        left, left_r = jnp.linalg.qr(lora_b)
        right, right_r = jnp.linalg.qr(lora_a.T)
        u, s, vt = jnp.linalg.svd(matmul(left_r, right_r.T), full_matrices=False)
        root = jnp.sqrt(s)[None, :]
        new_a, new_b = (matmul(right, vt.T) * root).T, matmul(left, u) * root
        return new_a.astype(a.dtype), new_b.astype(b.dtype), s

    return jax.lax.map(balance, (a, b))


def _shares(s: np.ndarray) -> np.ndarray:
    """The share of ‖ΔW‖²_F in the first 1, 2, … directions; all of it where ΔW = 0."""
    cumulative = np.cumsum(s**2)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else np.ones_like(s)


def _directions(share: np.ndarray, rank: int | None, energy: float | None) -> int:
    needed = len(share) if energy is None else int(np.searchsorted(share, energy)) + 1
    return min(needed, len(share), len(share) if rank is None else rank)
