"""Truncation of an adapter to a rank budget, without forming any update."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError, UnsupportedError
from coremerge_jax.linalg import Basis, basis, inverse, lapack, matmul, roundoff
from coremerge_jax.linalg import truncate as leading
from coremerge_jax.lora import Adapter, LoRA
from coremerge_jax.merging.checks import as_adapter, check_number, check_whole, refuse_values
from coremerge_jax.merging.groups import group_modules, label, over_modules
from coremerge_jax.merging.mesh import implicit, placed_like, refuse_explicit
from coremerge_jax.merging.precision import computing


def truncate(
    adapter: Adapter, *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapter, dict[str, Any]]:
    """Cuts each module to the best approximation of a lower rank.

    The singular values of ΔW = b a are those of the product of b and aᵀ in orthonormal bases of
    their columns (Eckart and Young, 1936, for why their truncation is best).

    May be called inside a jitted or differentiated function with traced factors; derivatives are
    those of the update, with the choice of directions held constant.

    Args:
        adapter: the adapter to cut.
        rank: keep at most this many singular directions.
        energy: keep the fewest that hold this share of ‖ΔW‖²_F, in (0, 1]; not of traced factors.

    Returns:
        The adapter, its factors balanced (bᵀb = a aᵀ), and the share of ‖ΔW‖²_F that each module
        kept: numbers, or scalar arrays if factors are traced. At least one direction stays.

    Raises:
        FormatError: a factor has NaN or infinite values.
        RecipeError: neither or an impossible ``rank`` or ``energy`` is given.
        UnsupportedError: factors are traced and ``energy`` is given.
    """
    as_adapter(adapter, "adapter")
    _check_budget(rank, energy)
    traced = any(isinstance(x, jax.core.Tracer) for x in _leaves(adapter))
    if traced and energy is not None:
        raise UnsupportedError(
            f"energy={energy} with traced factors: how many directions stay would depend on their "
            "values; give rank=, or truncate outside of the traced function"
        )
    modules: dict[str, LoRA]
    kept: dict[str, Any]
    modules, kept = _cut_traced(adapter, rank) if traced else _cut(adapter, rank, energy)
    return adapter.replace(modules={path: modules[path] for path in adapter}), {
        path: kept[path] for path in adapter
    }


def _leaves(adapter: Adapter) -> list[Any]:
    return jax.tree.leaves(dict(adapter)) if adapter.in_memory else []


def _check_budget(rank: Any, energy: Any) -> None:
    if rank is None and energy is None:
        raise RecipeError("truncate needs rank= or energy=")
    if rank is not None:
        if isinstance(rank, jax.core.Tracer):
            raise RecipeError("rank is traced: expected a whole number, which shapes depend on")
        check_whole("rank", rank, 1)
    if energy is not None:
        check_number("energy", energy)
        if not 0 < energy <= 1:
            raise RecipeError(f"energy={energy}: expected a share in (0, 1]")


def _cut(
    given: Adapter, rank: int | None, energy: float | None
) -> tuple[dict[str, LoRA], dict[str, float]]:
    modules: dict[str, LoRA] = {}
    kept: dict[str, float] = {}
    adapter = implicit(given)
    with computing(None) as dtype:
        for group in group_modules([adapter]):
            a, b = group.stack([adapter])
            on_host = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
            a, b, s = _balance(jnp.asarray(a), jnp.asarray(b), dtype)
            s = jax.device_get(s)
            if not np.isfinite(s).all():
                refuse_values([adapter], group.paths, label)
            if on_host:
                a, b = np.asarray(a), np.asarray(b)
            for i, path in enumerate(group.paths):
                share = _shares(s[i])
                r = _directions(share, rank, energy)
                kept[path] = float(share[r - 1])
                lora = given[path]
                cut = dataclasses.replace(lora, a=a[i, :r], b=b[i, :, :r])
                modules[path] = cut if adapter is given else placed_like(cut, lora)
    return modules, kept


def _cut_traced(adapter: Adapter, rank: int | None) -> tuple[dict[str, LoRA], dict[str, jax.Array]]:
    refuse_explicit(_leaves(adapter))
    modules: dict[str, LoRA] = {}
    kept: dict[str, jax.Array] = {}
    with computing(None, *_leaves(adapter)) as dtype:
        for group in group_modules([adapter]):
            a, b, shares = _balance_to_rank(*group.stack([adapter]), dtype, rank)
            for i, path in enumerate(group.paths):
                modules[path] = dataclasses.replace(adapter[path], a=a[i], b=b[i])
                kept[path] = shares[i]
    return modules, kept


@partial(jax.jit, static_argnames=("dtype", "rank"))
def _balance_to_rank(
    a: jax.Array, b: jax.Array, dtype: np.dtype, rank: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns balanced factors of a rank, and the share of energy that they keep, by module.

    A matrix X near one of rank k with leading singular vectors U and V is, if cut to that rank,
    (X V) (Uᵀ X V)⁻¹ (Uᵀ X) with constant U and V, so that only X is differentiated.
    """

    def cut(factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        left, right, inner = _inner(*(x.astype(dtype) for x in factors))
        found = lapack.svd(jax.lax.stop_gradient(inner))
        u, s, v = (x[..., :rank] for x in found)
        update, _ = leading(inner, jnp.asarray(s.shape[0], jnp.int32))
        core = matmul(u.T, matmul(update, v))
        root = jnp.sqrt(s)
        rows = jax.lax.custom_linear_solve(
            lambda z: matmul(core, z),
            matmul(u.T, update),
            lambda _, z: inverse(s)[:, None] * z,
            transpose_solve=lambda _, z: inverse(s)[:, None] * z,
        )
        new_a = right.times((root[:, None] * rows).T).columns().T
        new_b = left.times(matmul(update, v) * inverse(root)[None, :]).columns()
        whole = jnp.sum(inner**2)
        share = jnp.where(whole > 0, jnp.sum(core**2) / jnp.where(whole > 0, whole, 1), 1)
        return new_a.astype(a.dtype), new_b.astype(b.dtype), share

    return over_modules(cut, (a, b))


def _inner(lora_a: jax.Array, lora_b: jax.Array) -> tuple[Basis, Basis, jax.Array]:
    """Returns bases of both factors' columns, and the update in these bases."""
    left, left_inner, _, _ = basis(lora_b, roundoff(lora_b), singular=False)
    right, right_inner, _, _ = basis(lora_a.T, roundoff(lora_a), singular=False)
    return left, right, matmul(left_inner, right_inner.T)


@partial(jax.jit, static_argnames="dtype")
def _balance(a: jax.Array, b: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns factors ``√σ_i v_iᵀ`` and ``√σ_i u_i`` by descending σ, and σ, for each module."""

    def balance(factors: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        left, right, inner = _inner(*(x.astype(dtype) for x in factors))
        u, s, v = lapack.svd(inner)
        root = jnp.sqrt(s)[None, :]
        new_a, new_b = right.times(v * root).columns().T, left.times(u * root).columns()
        return new_a.astype(a.dtype), new_b.astype(b.dtype), s

    return over_modules(balance, (a, b))


def _shares(s: np.ndarray) -> np.ndarray:
    """Returns the share of ‖ΔW‖²_F in the first 1, 2, … directions; all of it where ΔW = 0."""
    cumulative = np.cumsum(s**2)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else np.ones_like(s)


def _directions(share: np.ndarray, rank: int | None, energy: float | None) -> int:
    needed = len(share) if energy is None else int(np.searchsorted(share, energy)) + 1
    return min(needed, len(share), len(share) if rank is None else rank)
