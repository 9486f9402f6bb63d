"""Cutting an adapter to a rank budget, without ever forming an update."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.linalg import basis, lapack, matmul, roundoff
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.precision import computing
from coremerge_jax.stack import group_modules, over_modules


def truncate(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Cuts each module to the best approximation of a lower rank.

    The singular values of ΔW = b a are those of the product of b and aᵀ in orthonormal bases of
    their columns (Eckart and Young, 1936, for why their truncation is best).

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
    with computing(None) as dtype:
        for group in group_modules([adapter]):
            a, b = group.stack([adapter])
            on_host = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
            a, b, s = _balance(jnp.asarray(a), jnp.asarray(b), dtype)
            if on_host:
                a, b = np.asarray(a), np.asarray(b)
            for i, path in enumerate(group.paths):
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
        left, left_inner, _, _ = basis(lora_b, roundoff(lora_b), singular=False)
        right, right_inner, _, _ = basis(lora_a.T, roundoff(lora_a), singular=False)
        u, s, v = lapack.svd(matmul(left_inner, right_inner.T))
        root = jnp.sqrt(s)[None, :]
        new_a, new_b = right.times(v * root).columns().T, left.times(u * root).columns()
        return new_a.astype(a.dtype), new_b.astype(b.dtype), s

    return over_modules(balance, (a, b))


def _shares(s: np.ndarray) -> np.ndarray:
    """The share of ‖ΔW‖²_F in the first 1, 2, … directions; all of it where ΔW = 0."""
    cumulative = np.cumsum(s**2)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else np.ones_like(s)


def _directions(share: np.ndarray, rank: int | None, energy: float | None) -> int:
    needed = len(share) if energy is None else int(np.searchsorted(share, energy)) + 1
    return min(needed, len(share), len(share) if rank is None else rank)
