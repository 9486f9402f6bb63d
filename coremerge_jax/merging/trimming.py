"""One trimming threshold per adapter over all modules, for ties with ``scope="model"``.

Nonnegative floats are ordered as their bit patterns are. Each pass over the modules counts, for
every adapter, the next `BITS` bits of the magnitudes that agree with the threshold in all bits
before.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from coremerge_jax.linalg import accumulate
from coremerge_jax.merging.precision import computing
from coremerge_jax.merging.program import Inputs, Settings, module_key, project_module
from coremerge_jax.rules import Chain, Context, Equivariance, ties
from coremerge_jax.rules.rule import dense

BITS = 16

# Counts ``(T, 2^BITS)`` of the next bits of magnitudes, and ``(T,)``, the number of magnitudes.
Counts = tuple[Array | np.ndarray, Array | np.ndarray]


def find_thresholds(
    rule: ties,
    adapters: int,
    passes: Callable[..., Iterable[Counts]],
    over_all: Callable[..., Sequence],
    dtype: np.dtype,
    traced: Sequence[jax.core.Tracer],
) -> Float[Array, " T"]:
    """Finds the thresholds of a model-wide `ties`, over the cores of all modules.

    A threshold would be an entry itself, and the program that merges may compute this entry with
    other rounding errors. So that it is kept there too, thresholds lie halfway to the next smaller
    entry, or to where the last digit is 0. Of float64, 48 bits are enough. In float32, an adapter
    can have up to 2³¹ - 1 entries.

    Args:
        rule: the rule.
        adapters: the number of adapters.
        passes: called with the bits that are known, ``known: (T,)``, and ``shift``, that of the
            next digit; yields the counts of each batch of modules.
        over_all: adds counts up over all processes.
        dtype: to compute in.
        traced: values that a transformation of JAX traces.

    Returns:
        ``(T,)``, magnitudes.
    """
    width = 8 * dtype.itemsize
    uint, counting = (np.dtype(f"{sign}int{width}") for sign in ("u", ""))
    with computing(dtype.name, *traced):
        known = margin = jnp.zeros(adapters, uint)
    wanted = None
    for place in (48, 32, 16) if width == 64 else (16, 0):
        shift = np.asarray(place, uint)
        found: Any = np.zeros((adapters, 2**BITS), counting), np.zeros(adapters, counting)
        for counts in passes(known=known, shift=shift):
            with computing(dtype.name, *traced):
                found = [x + y.astype(counting) for x, y in zip(found, counts, strict=True)]
        found = over_all(*found)
        with computing(dtype.name, *traced):
            digits, sizes = map(jnp.asarray, found)
            if wanted is None:
                kept = jnp.floor(sizes.astype(dtype) * jnp.asarray(rule.density, dtype))
                wanted = jnp.sum(digits, axis=1, dtype=counting) - kept.astype(counting)
            known, wanted, margin = _next_digit(digits, known, wanted, shift)
    with computing(dtype.name, *traced):
        return jax.lax.bitcast_convert_type(known - margin, dtype)


@partial(jax.jit, static_argnames="settings")
def count_stack(
    rule: Chain,
    inputs: Inputs,
    key: PRNGKeyArray | None,
    settings: Settings,
    once: Bool[Array, " L"],
    known: UInt[Array, " T"],
    shift: UInt[Array, ""],
) -> tuple[Int[Array, "T digits"], Int[Array, " T"]]:
    """Counts the next digits in the cores of each adapter, and the cores' entries.

    Args:
        rule: the rule, of which the steps before the merge are applied.
        inputs: the stacked modules.
        key: PRNG key, for rules that draw random numbers.
        settings: what the program is compiled for.
        once: bool ``(L,)``, the modules that count: not those that only fill up the stack.
        known: unsigned ``(T,)``, the bits of thresholds above the digit.
        shift: unsigned, the bits below the digit.

    Returns:
        int32 ``(T, 2^BITS)`` and int32 ``(T,)``.
    """

    def count_core(core: jax.Array, known: jax.Array, shift: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(jnp.abs(core).ravel(), known.dtype) >> shift
        agrees = bits >> BITS == known >> shift >> BITS
        digits = (bits & (2**BITS - 1)).astype(jnp.int32)
        return jnp.zeros(2**BITS, jnp.int32).at[digits].add(agrees.astype(jnp.int32))

    def count_module(shared: tuple, row: tuple[Inputs, jax.Array]) -> tuple:
        rule, key, known, shift = shared
        module, counted = row[0], row[1].astype(jnp.int32)
        elementwise = rule.equivariance == Equivariance.ELEMENTWISE
        projection = project_module(module, settings, elementwise=elementwise)
        context = Context(shape=projection.shape, tasks=module.tasks)
        own_key = module_key(key, module.names)
        cores = rule.prepare(projection.factors, key=own_key, context=context)
        rows = cores, known[module.tasks]
        found = jax.lax.map(lambda row: count_core(dense(row[0]), row[1], shift), rows)
        size = jnp.prod(projection.shape, dtype=jnp.int32)
        counts = jnp.zeros((len(known), 2**BITS), jnp.int32).at[module.tasks].add(counted * found)
        return counts, jnp.zeros(len(known), jnp.int32).at[module.tasks].add(counted * size)

    def count_modules(shared: tuple, rows: tuple[Inputs, jax.Array]) -> tuple:
        return accumulate(partial(count_module, shared), rows)

    shared, rows = (rule, key, known, shift), (inputs, once)
    devices = settings.devices
    if devices is None:
        return count_modules(shared, rows)
    modules = devices.mesh.axis_names[0]
    return devices.map(
        lambda *given: jax.lax.psum(count_modules(*given), modules),
        shared,
        rows,
        (inputs.specs(devices), devices.specs[2]),
        PartitionSpec(),
    )


@jax.jit
def _next_digit(
    counts: Int[Array, "T digits"],
    known: UInt[Array, " T"],
    wanted: Int[Array, " T"],
    shift: UInt[Array, ""],
) -> tuple[UInt[Array, " T"], Int[Array, " T"], UInt[Array, " T"]]:
    """Adds the next digit of the ``wanted``-th smallest entries to what is known of them.

    Args:
        counts: integers ``(T, 2^BITS)``, how often each digit occurs.
        known: unsigned ``(T,)``, the bits above the digit.
        wanted: integers ``(T,)``, the place of the entry among those that are counted.
        shift: unsigned, the bits below the digit.

    Returns:
        The bits with the digit, the place among the entries of that digit, and half the distance
        to the next smaller digit that occurs, or to 0.
    """
    digits = jnp.arange(2**BITS, dtype=jnp.int32)[None, :]
    up_to = jnp.cumsum(counts, axis=1, dtype=counts.dtype)
    digit = jnp.sum(up_to < wanted[:, None], axis=1, dtype=jnp.int32)[:, None]
    fewer = jnp.max(jnp.where(digits < digit, up_to, 0), axis=1)
    below = jnp.max(jnp.where((digits < digit) & (counts > 0), digits, 0), axis=1)
    margin = (digit[:, 0] - below) // 2
    return (
        known | (digit[:, 0].astype(known.dtype) << shift),
        wanted - fewer,
        margin.astype(known.dtype) << shift,
    )
