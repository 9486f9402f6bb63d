"""Truncation of an adapter to a limit of its size, without forming any update."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.linalg import Basis, basis, inverse, lapack, matmul, roundoff
from coremerge_jax.linalg import truncate as leading
from coremerge_jax.lora import Adapter, LoRA, widest
from coremerge_jax.merging.checks import as_adapter, check_number, check_whole, refuse_values
from coremerge_jax.merging.groups import Group, group_modules, label
from coremerge_jax.merging.limits import Limit
from coremerge_jax.merging.mesh import implicit, placed_like, refuse_explicit
from coremerge_jax.merging.metric import InputMetric, Inputs, metric_or_none, metric_roots
from coremerge_jax.merging.precision import are_traced, computing
from coremerge_jax.merging.stacks import over_modules, stack_factors
from coremerge_jax.merging.statistics import Statistics


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    parameters: int | None = None,
    statistics: Statistics | None = None,
    sources: Sequence[Adapter] | None = None,
) -> tuple[Adapter, dict[str, Any]]:
    """Cuts modules to the best approximation of a lower rank.

    The singular values of ΔW = b a are those of the product of b and aᵀ in orthonormal bases of
    their columns (Eckart and Young, 1936, for why their truncation is best).

    With statistics of inputs, the cut is best for the outputs: reduced-rank regression. Of M = ΔW
    in orthonormal coordinates of its row space, and the mean K̄ of the tasks' Gram matrices there,
    each divided by its trace, it keeps the leading singular directions of M S with S² = K̄ + ridge:
    the cut is [M S]_k S⁻¹ = U_k U_kᵀ M, so only b is projected, from the left. No m × n or n × n
    matrix is formed. Modules without statistics are cut as above.

    A budget is spent where it keeps most energy over all modules together.

    May be called inside a jitted or differentiated function with traced factors; derivatives are
    those of the update, with the choice of directions and the metric of the inputs held constant.

    Args:
        adapter: the adapter to cut.
        rank: keep at most this many singular directions of each module.
        energy: keep the fewest that hold this share of ‖ΔW‖²_F (with statistics, of ‖M S‖²_F), in
            (0, 1]; not of traced factors.
        budget: keep at most this many directions per module on average, those of most energy in
            the whole adapter, and at least one of each module; not of traced factors. A budget
            for the whole adapter is the only limit, like ``parameters``.
        parameters: keep at most so many entries of all factors, by energy per entry.
        statistics: of inputs of the modules (`collect`, `load_statistics`).
        sources: the adapters that were merged, in whose A factors the statistics have coordinates.
            Not needed for statistics of the inputs themselves (``full``), or if the merge has just
            these factors, as those by most rules have.

    Returns:
        The adapter; and the share of energy that each module kept: numbers, or scalar arrays if
        factors are traced. The i-th column of b has the norm of the i-th row of a, unless factors
        are traced and there are statistics; without statistics, bᵀb = a aᵀ.

    Raises:
        FormatError: a factor has NaN or infinite values.
        MismatchError: the statistics are of other modules or factors, or not finite.
        RecipeError: no limit, or an impossible one, or two that exclude each other are given.
        UnsupportedError: factors are traced and another limit than ``rank`` is given.

    Warns:
        CoreMergeWarning: there are no statistics of some modules.
    """
    as_adapter(adapter, "adapter")
    limit = checked_limit(rank, energy, budget, parameters)
    cut = Cut(limit, metric_or_none(statistics, sources, adapter.outline))
    modules: dict[str, LoRA]
    kept: dict[str, Any]
    if are_traced(_leaves(adapter)):
        modules, kept = cut.traced(adapter)
    else:
        modules, kept = cut.planned([adapter], adapter.outline)(adapter)
    return adapter.replace(modules={path: modules[path] for path in adapter}), {
        path: kept[path] for path in adapter
    }


def _leaves(adapter: Adapter) -> list[Any]:
    return jax.tree.leaves(dict(adapter)) if adapter.in_memory else []


def checked_limit(rank: Any, energy: Any, budget: Any, parameters: Any) -> Limit:
    """Returns the limit that arguments of `truncate` describe.

    Raises:
        RecipeError: there is none, an impossible one, or two that exclude each other.
    """
    for name, value in {"rank": rank, "parameters": parameters}.items():
        if isinstance(value, jax.core.Tracer):
            raise RecipeError(f"{name} is traced: expected a whole number, which shapes depend on")
        if value is not None:
            check_whole(name, value, 1)
    for name, share in {"energy": energy, "budget": budget}.items():
        if isinstance(share, jax.core.Tracer):
            raise RecipeError(f"{name} is traced: expected a number, which shapes depend on")
    if energy is not None:
        check_number("energy", energy)
        if not 0 < energy <= 1:
            raise RecipeError(f"energy={energy}: expected a share in (0, 1]")
    if budget is not None:
        check_number("budget", budget)
        if budget < 1:
            raise RecipeError(f"budget={budget}: expected a mean rank of at least 1")
    limit = Limit(rank, energy, budget, parameters)
    if limit.nothing:
        raise RecipeError("truncate needs rank=, energy=, budget= or parameters=")
    return limit


@dataclasses.dataclass(frozen=True)
class Cut:
    """A cut of modules, for whole adapters or part by part.

    Attributes:
        limit: the size that is left.
        metric: of the inputs; None to cut by the Frobenius norm.
        ranks: rank of each module, by path, where the limit does not decide it by itself: of a
            limit of the whole model, from `planned`.
    """

    limit: Limit
    metric: InputMetric | None = None
    ranks: Mapping[str, int] | None = None

    def planned(self, parts: Iterable[Adapter], outline: Adapter) -> "Cut":
        """Returns the cut with the ranks that a limit of the whole model gives.

        Args:
            parts: all modules, some at a time; read only for such a limit.
            outline: the modules, of which only the shapes are used.
        """
        return self.with_energies(self.energies(parts), outline) if self.limit.whole_model else self

    def energies(self, parts: Iterable[Adapter]) -> dict[str, np.ndarray]:
        """Returns ``(k,)`` by path, the energies of the directions of each module, descending."""
        found: dict[str, np.ndarray] = {}
        for part in map(implicit, parts):
            with computing(None) as dtype:
                for group, stacks in self._stacks(part):
                    s = _finite(part, group, _spectra(*stacks, dtype))
                    found |= dict(zip(group.paths, s**2, strict=False))
            del part  # before the next one is made
        return found

    def with_energies(self, energies: Mapping[str, np.ndarray], outline: Adapter) -> "Cut":
        """Returns the cut with the ranks that energies of all modules give."""
        shapes = {path: outline[path].shape for path in energies}
        return dataclasses.replace(self, ranks=self.limit.ranks(energies, shapes))

    def __call__(self, given: Adapter) -> tuple[dict[str, LoRA], dict[str, float]]:
        """Returns modules, cut; and the share of energy that each kept."""
        modules: dict[str, LoRA] = {}
        kept: dict[str, float] = {}
        adapter = implicit(given)
        with computing(None) as dtype:
            for group, (a, b, inputs) in self._stacks(adapter):
                on_host = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
                a, b, found = _balance(jnp.asarray(a), jnp.asarray(b), inputs, dtype)
                s = _finite(adapter, group, found)
                if on_host:
                    a, b = np.asarray(a), np.asarray(b)
                for i, path in enumerate(group.paths):
                    share = _shares(s[i])
                    r = self._rank_of(path, share)
                    kept[path] = float(share[r - 1])
                    lora = given[path]
                    cut = dataclasses.replace(lora, a=a[i, :r], b=b[i, :, :r])
                    modules[path] = cut if adapter is given else placed_like(cut, lora)
        return modules, kept

    def _rank_of(self, path: str, share: np.ndarray) -> int:
        if self.ranks is None:
            return self.limit.rank_of(share)
        return min(self.ranks[path], len(share))

    def _stacks(self, adapter: Adapter) -> Iterator[tuple[Group, tuple[Any, Any, Inputs | None]]]:
        """Yields groups of modules, and their stacks: A, B and inputs."""
        for whole in group_modules([adapter]):
            parts = self.metric.split(whole) if self.metric else [(whole, None)]
            for group, inputs in parts:
                a, b = stack_factors(group, [adapter])
                yield group, (a, b, self._inputs(inputs, a))

    def _inputs(self, inputs: Group | None, a: Any) -> Inputs | None:
        return None if inputs is None or self.metric is None else self.metric.arrays(inputs, a)

    def traced(self, adapter: Adapter) -> tuple[dict[str, LoRA], dict[str, jax.Array]]:
        """Returns modules of traced factors, cut; and the share of energy that each kept.

        Raises:
            UnsupportedError: how many directions stay would depend on traced values.
        """
        rank, leaves = self.limit.rank, _leaves(adapter)
        others = dataclasses.replace(self.limit, rank=None)
        if not others.nothing:
            name, value = next((k, v) for k, v in vars(others).items() if v is not None)
            raise UnsupportedError(
                f"{name}={value} with traced factors: how many directions stay would depend on "
                "their values; give rank=, or truncate outside of the traced function"
            )
        refuse_explicit(leaves)
        modules: dict[str, LoRA] = {}
        kept: dict[str, jax.Array] = {}
        with computing(None, *leaves) as dtype:
            for group, stacks in self._stacks(adapter):
                a, b, shares = _balance_to_rank(*stacks, dtype, rank)
                for i, path in enumerate(group.paths):
                    modules[path] = dataclasses.replace(adapter[path], a=a[i], b=b[i])
                    kept[path] = shares[i]
        return modules, kept


def _finite(adapter: Adapter, group: Group, s: Any) -> np.ndarray:
    """Returns singular values ``(L, k)`` on the host, if they are finite."""
    s = jax.device_get(s)
    if not np.isfinite(s).all():
        refuse_values([adapter], group.paths, label)
        raise MismatchError(
            f"module {group.paths[0]!r}, or one like it: the statistics have NaN or infinite "
            "values; collect them again"
        )
    return s


# --- Programs -------------------------------------------------------------------------------
@partial(jax.jit, static_argnames=("dtype", "rank"))
def _balance_to_rank(
    a: Float[Array, "L r n"],
    b: Float[Array, "L m r"],
    inputs: Inputs | None,
    dtype: np.dtype,
    rank: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns balanced factors of a rank, and the share of energy that they keep, by module.

    A matrix X near one of rank k with leading singular vectors U and V is, if cut to that rank,
    (X V) (Uᵀ X V)⁻¹ (Uᵀ X) with constant U and V, so that only X is differentiated.
    """

    def cut(module: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        *factors, inputs = module
        left, right, inner = _inner(*(x.astype(dtype) for x in factors))
        back = None
        if inputs is not None:
            fixed = jax.tree.map(jax.lax.stop_gradient, (inner, right, inputs))
            root, back = metric_roots(fixed[0], fixed[1], fixed[2], _noise(inner, *factors))
            inner = matmul(inner, root)
        found = lapack.svd(jax.lax.stop_gradient(inner))
        u, s, v = (x[..., :rank] for x in found)
        update, _ = leading(inner, jnp.asarray(s.shape[0], jnp.int32))
        core = matmul(u.T, matmul(update, v))
        size = jnp.sqrt(s)
        rows = jax.lax.custom_linear_solve(
            lambda z: matmul(core, z),
            matmul(u.T, update),
            lambda _, z: inverse(s)[:, None] * z,
            transpose_solve=lambda _, z: inverse(s)[:, None] * z,
        )
        if back is not None:
            rows = matmul(rows, back)
        new_a = right.times((size[:, None] * rows).T).columns().T
        new_b = left.times(matmul(update, v) * inverse(size)[None, :]).columns()
        whole = jnp.sum(inner**2)
        share = jnp.where(whole > 0, jnp.sum(core**2) / jnp.where(whole > 0, whole, 1), 1)
        return new_a.astype(a.dtype), new_b.astype(b.dtype), share

    return over_modules(cut, (a, b, inputs))


def _inner(lora_a: jax.Array, lora_b: jax.Array) -> tuple[Basis, Basis, jax.Array]:
    """Returns bases of both factors' columns, and the update in these bases."""
    left, left_inner, _, _ = basis(lora_b, roundoff(lora_b), singular=False)
    right, right_inner, _, _ = basis(lora_a.T, roundoff(lora_a), singular=False)
    return left, right, matmul(left_inner, right_inner.T)


@partial(jax.jit, static_argnames="dtype")
def _balance(
    a: Float[Array, "L r n"], b: Float[Array, "L m r"], inputs: Inputs | None, dtype: np.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns factors whose leading parts are the best cuts, and σ, descending, for each module.

    With left singular vectors U of M S, those are columns of U and rows of Uᵀ M, balanced. Without
    inputs S = 1: then they are ``√σ_i u_i`` and ``√σ_i v_iᵀ``.
    """

    def balance(module: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
        *factors, inputs = module
        left, right, inner = _inner(*(x.astype(dtype) for x in factors))
        u, s, v = lapack.svd(_weighed(inner, right, inputs, _noise(inner, *factors)))
        lengths = s
        if inputs is not None:
            rows = matmul(inner.T, u)
            lengths = jnp.linalg.norm(rows, axis=0)
            v = rows * inverse(lengths)[None, :]
        size = jnp.sqrt(lengths)[None, :]
        new_a, new_b = right.times(v * size).columns().T, left.times(u * size).columns()
        return new_a.astype(a.dtype), new_b.astype(b.dtype), s

    return over_modules(balance, (a, b, inputs))


@partial(jax.jit, static_argnames="dtype")
def _spectra(
    a: Float[Array, "L r n"], b: Float[Array, "L m r"], inputs: Inputs | None, dtype: np.dtype
) -> Float[Array, "L k"]:
    """Returns the σ of `_balance`."""

    def spectrum(module: tuple) -> jax.Array:
        *factors, inputs = module
        _, right, inner = _inner(*(x.astype(dtype) for x in factors))
        return lapack.singular_values(_weighed(inner, right, inputs, _noise(inner, *factors)))

    return over_modules(spectrum, (a, b, inputs))


def _weighed(
    inner: Float[Array, "p q"], right: Basis, inputs: Inputs | None, noise: float
) -> Float[Array, "p q"]:
    """Returns the update in coordinates in which the norm is that of the outputs."""
    if inputs is None:
        return inner
    return matmul(inner, metric_roots(inner, right, inputs, noise)[0])


def _noise(inner: jax.Array, a: jax.Array, b: jax.Array) -> float:
    """Returns the share of the largest singular value that rounding of the factors may make."""
    dtype = widest(np.dtype(np.float32), a.dtype, b.dtype)
    return max(inner.shape) * float(jnp.finfo(dtype).eps)


def _shares(s: np.ndarray) -> np.ndarray:
    """Returns the share of the energy in the first 1, 2, … directions; all of it where ΔW = 0."""
    cumulative = np.cumsum(s**2)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else np.ones_like(s)
