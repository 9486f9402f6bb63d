"""The compiled programs of a merge, for stacks of modules of one signature."""

from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from coremerge_jax.linalg import accumulate, matmul
from coremerge_jax.lora import Array, LoRA
from coremerge_jax.merging.groups import over_modules
from coremerge_jax.merging.mesh import Devices
from coremerge_jax.rules import Chain, Context, Equivariance
from coremerge_jax.rules.rule import Cores, dense
from coremerge_jax.spaces import Projection, Space, core

BITS = 16  # of a magnitude that one count of all modules settles


@flax.struct.dataclass
class Inputs:
    """Arrays that one compiled program maps over, with the modules along their first axis."""

    a: jax.Array  # (L, R, n)
    b: jax.Array  # (L, m, R)
    weights: jax.Array | None  # (L, T)
    tasks: Any  # (L, T), places in the list that the user gave; NumPy
    names: Array  # (L,), hashes of the paths
    scale: jax.Array  # (L,)

    def specs(self, grid: Devices) -> "Inputs":
        """Returns the partition spec of each field on a grid."""
        a, b, each = grid.specs
        weights: Any = None if self.weights is None else each
        return Inputs(a=a, b=b, weights=weights, tasks=each, names=each, scale=each)  # type: ignore[arg-type]


@flax.struct.dataclass
class Facts:
    """Facts about modules, found while they are merged, by each of C devices that share one.

    Attributes:
        sizes: ``(L, 2, T, C)``, the largest magnitude in the B and in the A of each adapter.
        peaks: ``(L, C)``, the same of the merged B; infinite or NaN if it overflowed.
    """

    sizes: Any
    peaks: Any

    @property
    def finite(self) -> np.ndarray:
        """``(L,)``, whether all factors that were given are."""
        return np.isfinite(self.sizes).all(axis=(1, 2, 3))

    @property
    def alive(self) -> np.ndarray:
        """``(L, T)``, whether the updates of the adapters are not zero."""
        return (self.sizes.max(axis=-1) > 0).all(axis=1)

    @property
    def peak(self) -> np.ndarray:
        """``(L,)``, the largest magnitude in the merged B."""
        return self.peaks.max(axis=-1)


class Settings(NamedTuple):
    """Static settings that one program is compiled for.

    Attributes:
        ranks: of the adapters.
        space: where to merge.
        dtype: to compute in.
        shape: ``(m, n)`` of the modules.
        grid: the devices that share the work.
    """

    ranks: tuple[int, ...]
    space: Space
    dtype: Any
    shape: tuple[int, int]
    grid: Devices | None = None

    @property
    def axis(self) -> str | None:
        """The mesh axis that modules are split along; None if they are whole."""
        return self.grid.axis if self.grid else None


@partial(jax.jit, static_argnames=("settings", "keep_a"))
def merge_stack(
    rule: Chain,
    arrays: Inputs,
    key: jax.Array | None,
    settings: Settings,
    *,
    keep_a: bool | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array, Facts]:
    """Returns the merged A and B of each module, whether these are good, and facts.

    With ``keep_a``, the A factors are those of ``arrays`` where that can be: then the first result
    is None, and the third says whether it should be.
    """

    def merge_module(
        rule: Chain, key: jax.Array | None, module: Inputs
    ) -> tuple[jax.Array | None, jax.Array, jax.Array, Facts]:
        good: bool | jax.Array = True
        factors = None
        if _needs_no_space(rule, settings):
            lora, kept = _merge_linear(rule, module, settings)
        else:
            projection = _project(rule, module, settings)
            good = projection.keeps_a
            factors = projection.factors
            kept = bool(keep_a) and good is not False
            lora = projection.merge(
                rule,
                key=_module_key(key, module),
                tasks=module.tasks,
                keep_a=True if kept else None,
            )
        b = (jnp.asarray(lora.b) * module.scale).astype(arrays.b.dtype)
        facts = _facts(module, factors, b, settings)
        if keep_a and kept:
            return None, b, jnp.asarray(good), facts
        return jnp.asarray(lora.a).astype(arrays.a.dtype), b, jnp.asarray(True), facts

    def merge_modules(shared: tuple, modules: Inputs) -> Any:
        return over_modules(partial(merge_module, *shared), modules)

    if settings.grid is None:
        return merge_modules((rule, key), arrays)
    specs = settings.grid.specs
    modules, axis = settings.grid.mesh.axis_names[0], settings.axis
    told = Facts(sizes=PartitionSpec(modules, None, None, axis), peaks=PartitionSpec(modules, axis))
    out_specs = (*specs, told)
    return settings.grid.map(
        merge_modules, (rule, key), arrays, arrays.specs(settings.grid), out_specs
    )


def _facts(module: Inputs, factors: Cores | None, b: jax.Array, settings: Settings) -> Facts:
    """Returns the facts of one module.

    Coordinates in core space are small, zero where factors are, and not finite if any of them is
    not. Where there are none, the factors themselves are summed up.
    """
    peak = jnp.max(jnp.abs(b)).astype(settings.dtype)
    if isinstance(factors, LoRA) and isinstance(settings.space, core):
        b_sizes = jnp.max(jnp.abs(jnp.asarray(factors.b)), axis=(1, 2))
        a_sizes = jnp.max(jnp.abs(jnp.asarray(factors.a)), axis=(1, 2))
    else:
        ends = np.cumsum(settings.ranks)[:-1]
        b_sizes = _sizes(jnp.max(jnp.abs(module.b), axis=0), ends, settings.dtype)
        a_sizes = _sizes(jnp.max(jnp.abs(module.a), axis=1), ends, settings.dtype)
    # Each device tells what it has: they need not tell each other.
    facts = Facts(sizes=jnp.stack([b_sizes, a_sizes])[:, :, None], peaks=peak[None])
    return jax.lax.stop_gradient(facts)


def _sizes(x: jax.Array, ends: np.ndarray, dtype: Any) -> jax.Array:
    """Returns the largest of the ``(R,)`` numbers of each adapter."""
    return jnp.stack([jnp.max(part) for part in jnp.split(x.astype(dtype), ends)])


def _needs_no_space(rule: Chain, settings: Settings) -> bool:
    """Returns True if a merge is a weighted sum of factors that, spread, fit into m and n."""
    fits = settings.axis is None or sum(settings.ranks) <= min(settings.shape)
    return rule.equivariance == Equivariance.LINEAR and settings.space.lossless and fits


def _module_key(key: jax.Array | None, module: Inputs) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, module.names)


def _project(rule: Chain, module: Inputs, settings: Settings) -> Projection:
    elementwise = rule.equivariance == Equivariance.ELEMENTWISE
    return project_module(module.a, module.b, module.weights, settings, elementwise=elementwise)


def project_module(
    a: jax.Array,
    b: jax.Array,
    weights: jax.Array | None,
    settings: Settings,
    *,
    elementwise: bool,
) -> Projection:
    """Projects a module's updates, multiplied by weights ``(T,)``, to a space."""
    ranks, dtype = settings.ranks, settings.dtype
    if weights is not None:
        b = b.astype(dtype) * _by_rank(weights, ranks)[None, :]
    spread: dict[str, Any] = {}
    if settings.axis:
        spread = {"axis": settings.axis, "shape": settings.shape}
    return settings.space.project(a, b, ranks, dtype=dtype, elementwise=elementwise, **spread)


def _merge_linear(rule: Chain, module: Inputs, settings: Settings) -> tuple[LoRA, bool]:
    """Merges without a space: coefficients go to the factors. Returns also if A is kept."""
    ranks, dtype = settings.ranks, settings.dtype
    units = jnp.eye(len(ranks), dtype=dtype)[:, None, :]
    context = Context(shape=jnp.asarray(units.shape[1:], jnp.int32), tasks=module.tasks)
    coefficients = rule(units, context=context)[0]
    if module.weights is not None:
        coefficients = coefficients * module.weights
    a, b = module.a, module.b.astype(dtype) * _by_rank(coefficients, ranks)[None, :]
    m, n = settings.shape
    if sum(ranks) <= min(m, n):
        return LoRA(a=a, b=b), True
    update = matmul(b, a.astype(dtype))
    if n <= m:
        return LoRA(a=jnp.eye(n, dtype=dtype), b=update), False
    return LoRA(a=update, b=jnp.eye(m, dtype=dtype)), False


def _by_rank(values: jax.Array, ranks: tuple[int, ...]) -> jax.Array:
    """Repeats one value per adapter for each of its ranks: ``(T,)`` to ``(R,)``."""
    return jnp.repeat(values, np.asarray(ranks), total_repeat_length=sum(ranks))


@partial(jax.jit, static_argnames="settings")
def count_stack(
    rule: Chain,
    arrays: Inputs,
    key: jax.Array | None,
    settings: Settings,
    once: jax.Array,
    known: jax.Array,
    shift: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Counts the next digits in the cores of each adapter, and the cores' entries.

    Modules count where ``once: (L,)`` is true: not those that only fill up the stack. ``known:
    (T,)`` has the bits of thresholds above the digit, which is ``shift`` bits from the end.
    """

    def count_core(core: jax.Array, known: jax.Array, shift: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.abs(core).ravel(), known.dtype) >> shift
        agrees = bits >> BITS == known >> shift >> BITS
        digits = (bits & (2**BITS - 1)).astype(jnp.int32)
        return jnp.zeros(2**BITS, jnp.int32).at[digits].add(agrees.astype(jnp.int32))

    def count_module(shared: tuple, row: tuple[Inputs, jax.Array]) -> tuple:
        rule, key, known, shift = shared
        module, counted = row[0], row[1].astype(jnp.int32)
        projection = _project(rule, module, settings)
        context = Context(shape=projection.shape, tasks=module.tasks)
        cores = rule.prepare(projection.factors, key=_module_key(key, module), context=context)
        rows = cores, known[module.tasks]
        found = jax.lax.map(lambda row: count_core(dense(row[0]), row[1], shift), rows)
        size = jnp.prod(projection.shape, dtype=jnp.int32)
        counts = jnp.zeros((len(known), 2**BITS), jnp.int32).at[module.tasks].add(counted * found)
        return counts, jnp.zeros(len(known), jnp.int32).at[module.tasks].add(counted * size)

    def count_modules(shared: tuple, rows: tuple[Inputs, jax.Array]) -> tuple:
        return accumulate(partial(count_module, shared), rows)

    shared, rows = (rule, key, known, shift), (arrays, once)
    grid = settings.grid
    if grid is None:
        return count_modules(shared, rows)
    modules = grid.mesh.axis_names[0]
    return grid.map(
        lambda *given: jax.lax.psum(count_modules(*given), modules),
        shared,
        rows,
        (arrays.specs(grid), grid.specs[2]),
        PartitionSpec(),
    )
