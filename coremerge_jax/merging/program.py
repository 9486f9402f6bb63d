"""The compiled programs of the engine, for stacks of modules of one signature.

All merges are made of the same parts, each a function of one module: `project_module` (into a merge
space), `merge_cores` (the rule), `Projection.expand` and `finish` (scale and output dtype). A merge
of adapters runs them in one program, `merge_stack`. Adapters that are merged many times are
projected by `project_stack`, and merged by `merge_projected` and `finish_stack`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from coremerge_jax.linalg import basis, matmul, pytree, roundoff
from coremerge_jax.lora import LoRA, widest
from coremerge_jax.merging.mesh import Devices
from coremerge_jax.merging.stacks import over_modules
from coremerge_jax.rules import Chain, Context, Equivariance
from coremerge_jax.rules.rule import Cores, Merged
from coremerge_jax.spaces import Projection, Space, core
from coremerge_jax.spaces.space import of_present, well_conditioned


@pytree
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays that one compiled program maps over, with the modules along their first axis."""

    a: jax.Array  # (L, R, n)
    b: jax.Array  # (L, m, R)
    weights: jax.Array | None  # (L, T)
    tasks: Any  # int32 (L, T), places in the list that the user gave; NumPy, so also if traced
    names: Any  # uint32 (L,), hashes of the paths
    scale: Any  # (L,); None if modules are only projected
    grams: Any = None  # (L, T, k, k), of inputs; None for rules that need none
    coordinates: LoRA | None = None  # of a, (L, R, q), and b, (L, p, R); see `packed`

    def specs(self, devices: Devices) -> "Inputs":
        """Returns the partition spec of each field."""
        a, b, each = devices.specs
        specs: Any = dict.fromkeys(("weights", "tasks", "names", "scale", "grams"), each)
        given = {name: spec for name, spec in specs.items() if getattr(self, name) is not None}
        return Inputs(**{"a": a, "b": b, "weights": None, "scale": None, **given})


@pytree
@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about modules, found while they are merged, by each of C devices that share one.

    Attributes:
        sizes: ``(L, 2, T, C)``, of the B and of the A of each adapter: a number that is zero only
            if all entries are, and not finite if one is not (or, which is rare, if they are so
            large that their sum overflows).
        peaks: ``(L, C)``, the largest magnitude in the merged B; not finite if it overflowed.
        squares: ``(L, 2)``, as `Projection.auto_squares` returns them; None if they were not asked
            for.
    """

    sizes: Any
    peaks: Any
    squares: Any = None

    @property
    def finite(self) -> np.ndarray:
        """``(L,)``, True where all factors that were given are finite for certain."""
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
        devices: those that share the work; None for one device.
        norms: True if merges also find what the automatic scale is computed from.
        given: dtype to whose precision factors are known, if it is not that of A.
        whole: True if Gram matrices are of the inputs themselves, see `Projection.with_inputs`.
    """

    ranks: tuple[int, ...]
    space: Space
    dtype: np.dtype
    shape: tuple[int, int]
    devices: Devices | None = None
    norms: bool = False
    given: np.dtype | None = None
    whole: bool = False

    @property
    def axis(self) -> str | None:
        """The mesh axis that modules are split along; None if they are whole."""
        return self.devices.axis if self.devices else None


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The engine's automatic decisions for modules of one signature.

    Attributes:
        space: the merge space; None for linear rules, which give the same in every lossless space
            and are computed on the factors.
        basis: ``"singular"`` for the singular vectors that elementwise rules are defined in, or
            ``"any"`` orthonormal basis of the space, which is cheaper; None without a space.
        keeps_a: True if the merged A is the stacked A of the adapters; False if it is computed;
            None if it is kept where it is well-conditioned. The program that keeps it runs first,
            and a second one merges the stack again if it was not.
    """

    space: Space | None
    basis: str | None
    keeps_a: bool | None

    def to_dict(self) -> dict[str, str | bool | None]:
        """Returns plain data, as for JSON."""
        space = None if self.space is None else type(self.space).__name__
        return {
            "space": space,
            "basis": self.basis,
            "keeps_a": self.keeps_a,
            "in_words": str(self),
        }

    def __str__(self) -> str:
        """Returns the decisions in words."""
        if self.space is None:
            where = "on the factors"
        else:
            basis = "singular vectors" if self.basis == "singular" else "any orthonormal basis"
            where = f"in {type(self.space).__name__} space ({basis})"
        kept = {True: "A is kept", False: "A is computed", None: "A is kept if well-conditioned"}
        return f"{where}; {kept[self.keeps_a]}"


def decide(rule: Chain, settings: Settings) -> Decisions:
    """Returns the decisions for a rule; ``keeps_a`` is False only where shapes decide that.

    A rule is linear in the updates, so it needs no space, if it is a weighted sum of them. Spread
    over devices, the stacked factors must also fit into m and n.
    """
    fits = sum(settings.ranks) <= min(settings.shape)
    linear = rule.equivariance == Equivariance.LINEAR and settings.space.lossless
    if linear and (fits or settings.axis is None):
        return Decisions(space=None, basis=None, keeps_a=fits)
    elementwise = rule.equivariance == Equivariance.ELEMENTWISE
    return Decisions(settings.space, "singular" if elementwise else "any", keeps_a=None)


# --- The parts of a merge, for one module ------------------------------------------------------


def project_module(module: Inputs, settings: Settings, *, elementwise: bool) -> Projection:
    """Projects a module's updates, multiplied by their weights, to the merge space."""
    ranks, dtype = settings.ranks, settings.dtype

    def weighted(b: jax.Array) -> jax.Array:
        if module.weights is None:
            return b
        return b.astype(dtype) * _by_rank(module.weights, ranks)[None, :]

    more: dict[str, Any] = {"dtype": dtype, "given": settings.given}
    if settings.axis:
        more |= {"axis": settings.axis, "shape": settings.shape}

    def project(a: jax.Array, b: jax.Array) -> Projection:
        return settings.space.project(a, weighted(b), ranks, elementwise=elementwise, **more)

    if module.coordinates is None:
        found = project(module.a, module.b)
    else:
        a, b = map(jnp.asarray, (module.coordinates.a, module.coordinates.b))
        found = project(a, b).of_factors(module.a, weighted(module.b))
    if module.grams is None:
        return found
    grams = module.grams if module.weights is None else of_present(module.grams, module.weights)
    return found.with_inputs(grams, whole=settings.whole)


def module_key(key: PRNGKeyArray | None, name: UInt[Array, ""]) -> PRNGKeyArray | None:
    """Returns the key of a module, which does not depend on other modules or their order."""
    return None if key is None else jax.random.fold_in(key, name)


def merge_cores(
    rule: Chain,
    key: PRNGKeyArray | None,
    projection: Projection,
    tasks: Int[Array, " T"],
    name: UInt[Array, ""],
) -> Merged:
    """Merges a projected module to one core, not yet lifted nor scaled."""
    return projection.merge_cores(rule, key=module_key(key, name), tasks=tasks)


def merge_linear(rule: Chain, module: Inputs, settings: Settings) -> LoRA:
    """Merges without a space: multiplies the factors by the rule's coefficients."""
    ranks, dtype = settings.ranks, settings.dtype
    coefficients = _coefficients(rule, module, settings)
    if module.weights is not None:
        coefficients = coefficients * module.weights
    a, b = module.a, module.b.astype(dtype) * _by_rank(coefficients, ranks)[None, :]
    m, n = settings.shape
    if sum(ranks) <= min(m, n):
        return LoRA(a=a, b=b)
    update = matmul(b, a.astype(dtype))
    if n <= m:
        return LoRA(a=jnp.eye(n, dtype=dtype), b=update)
    return LoRA(a=update, b=jnp.eye(m, dtype=dtype))


def _coefficients(rule: Chain, module: Inputs, settings: Settings) -> Float[Array, " T"]:
    """Returns the numbers by which a linear rule multiplies the updates."""
    units = jnp.eye(len(settings.ranks), dtype=settings.dtype)[:, None, :]
    context = Context(shape=jnp.asarray(units.shape[1:], jnp.int32), tasks=module.tasks)
    return rule(units, context=context)[0]


def finish(b: Float[Array, "m r"], scale: Float[Array, ""], dtype: np.dtype) -> Float[Array, "m r"]:
    """Returns the merged B as it is given out: scaled and rounded."""
    return (b * scale).astype(dtype)


def _by_rank(values: Float[Array, " T"], ranks: tuple[int, ...]) -> Float[Array, " R"]:
    """Repeats one value per adapter for each of its ranks: ``(T,)`` to ``(R,)``."""
    return jnp.repeat(values, np.asarray(ranks), total_repeat_length=sum(ranks))


# --- Programs ----------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("settings", "keep_a"))
def merge_stack(
    rule: Chain,
    inputs: Inputs,
    key: PRNGKeyArray | None,
    settings: Settings,
    *,
    keep_a: bool = False,
) -> tuple[Float[Array, "L r n"] | None, Float[Array, "L m r"], Bool[Array, " L"], Facts]:
    """Merges modules: projects them, applies the rule and finishes.

    Args:
        rule: the merge rule.
        inputs: the stacked modules.
        key: PRNG key, for rules that draw random numbers.
        settings: what the program is compiled for.
        keep_a: keep the stacked A where shapes allow it.

    Returns:
        The merged A ``(L, r, n)``, or None where the stacked A is kept; the merged B
        ``(L, m, r)``; bool ``(L,)``, False where the A that was kept is ill-conditioned, so that
        the module has to be merged again without ``keep_a``; and facts.
    """
    decisions = decide(rule, settings)

    def merge_module(
        rule: Chain, key: jax.Array | None, module: Inputs
    ) -> tuple[jax.Array | None, jax.Array, jax.Array, Facts]:
        good: bool | jax.Array = True
        squares = None
        if decisions.space is None:
            factors, kept = None, keep_a and bool(decisions.keeps_a)
            lora = merge_linear(rule, module, settings)
            if settings.norms:
                squares = _linear_squares(rule, module, settings)
        else:
            projection = project_module(module, settings, elementwise=decisions.basis == "singular")
            factors, good = projection.factors, projection.keeps_a
            kept = keep_a and good is not False
            core = merge_cores(rule, key, projection, module.tasks, module.names)
            lora = projection.expand(core, keep_a=True if kept else None)
            if settings.norms:
                squares = projection.auto_squares(rule, core)
        b = finish(jnp.asarray(lora.b), module.scale, inputs.b.dtype)
        facts = dataclasses.replace(_facts(rule, module, factors, b, settings), squares=squares)
        if kept:
            return None, b, jnp.asarray(good), facts
        return jnp.asarray(lora.a).astype(inputs.a.dtype), b, jnp.asarray(True), facts

    def specs(devices: Devices) -> tuple:
        modules, axis = devices.mesh.axis_names[0], devices.axis
        facts = Facts(
            sizes=PartitionSpec(modules, None, None, axis),
            peaks=PartitionSpec(modules, axis),
            squares=PartitionSpec(modules) if settings.norms else None,
        )
        return (*devices.specs, facts)

    return _on_devices(
        lambda shared, modules: over_modules(partial(merge_module, *shared), modules),
        (rule, key),
        inputs,
        settings.devices,
        specs,
    )


@partial(jax.jit, static_argnames="settings")
def compile_stack(
    rule: Chain, inputs: Inputs, key: PRNGKeyArray | None, settings: Settings
) -> Float[Array, "L R R"]:
    """Merges modules to the matrices between their stacked factors.

    Args:
        rule: the merge rule.
        inputs: the stacked modules.
        key: PRNG key, for rules that draw random numbers.
        settings: what the program is compiled for.

    Returns:
        ``(L, R, R)``, the scaled C of each module, in the dtype of the computation: its merged
        update is ``b @ C @ a``.
    """
    decisions = decide(rule, settings)

    def compile_module(rule: Chain, key: jax.Array | None, module: Inputs) -> jax.Array:
        given = jnp.ones(len(settings.ranks), settings.dtype)
        by_rank = _by_rank(given if module.weights is None else module.weights, settings.ranks)
        if decisions.space is None:
            found = jnp.diag(_by_rank(_coefficients(rule, module, settings), settings.ranks))
        else:
            elementwise = decisions.basis == "singular"
            projection = project_module(module, settings, elementwise=elementwise)
            core = merge_cores(rule, key, projection, module.tasks, module.names)
            b = module.b.astype(settings.dtype) * by_rank[None, :]
            found = projection.between_factors(core, module.a, b)
        return by_rank[:, None] * found * module.scale

    return over_modules(partial(compile_module, rule, key), inputs)


@partial(jax.jit, static_argnames="settings")
def measure_stack(
    rule: Chain, inputs: Inputs, key: PRNGKeyArray | None, settings: Settings
) -> Float[Array, "L 2"]:
    """Merges modules only for what the automatic scale is computed from.

    Args:
        rule: the merge rule.
        inputs: the stacked modules.
        key: PRNG key, for rules that draw random numbers.
        settings: what the program is compiled for.

    Returns:
        ``(L, 2)``, as `Projection.auto_squares` returns them.
    """
    decisions = decide(rule, settings)

    def measure_module(rule: Chain, key: jax.Array | None, module: Inputs) -> jax.Array:
        if decisions.space is None:
            return _linear_squares(rule, module, settings)
        elementwise = decisions.basis == "singular"
        projection = project_module(module, settings, elementwise=elementwise)
        core = merge_cores(rule, key, projection, module.tasks, module.names)
        return projection.auto_squares(rule, core)

    return _on_devices(
        lambda shared, modules: over_modules(partial(measure_module, *shared), modules),
        (rule, key),
        inputs,
        settings.devices,
        lambda devices: devices.specs[2],
    )


def _linear_squares(rule: Chain, module: Inputs, settings: Settings) -> Float[Array, "2"]:
    """Returns the squared norms of a linear merge, and of the updates, from Gram matrices."""
    ranks, dtype = settings.ranks, settings.dtype
    a, b = module.a.astype(dtype), module.b.astype(dtype)
    both = matmul(b.T, b), matmul(a, a.T)
    grams = both if settings.axis is None else jax.lax.psum(both, settings.axis)
    inner = grams[0] * grams[1]  # entry ij: the inner product of b_i a_i and b_j a_j
    weights = jnp.ones(len(ranks), dtype) if module.weights is None else module.weights
    by_rank = _by_rank(weights * _coefficients(rule, module, settings), ranks)
    owner = np.repeat(np.arange(len(ranks)), ranks)
    own = jnp.asarray(owner[:, None] == owner[None, :], dtype)
    given = _by_rank(weights, ranks)
    merged = jnp.sum(inner * by_rank[:, None] * by_rank[None, :])
    return jnp.stack([merged, jnp.sum(inner * own * given[:, None] * given[None, :])])


@partial(jax.jit, static_argnames=("settings", "elementwise"))
def project_stack(
    inputs: Inputs, settings: Settings, elementwise: bool
) -> tuple[Projection, Bool[Array, " L"], Bool[Array, " L"]]:
    """Projects modules.

    Returns:
        The projections; bool ``(L,)``, whether merges can have the stacked A; and bool ``(L,)``,
        whether all factors and cores are finite.
    """

    def one(module: Inputs) -> tuple[Projection, jax.Array, jax.Array]:
        found = project_module(module, settings, elementwise=elementwise)
        arrays = (module.a, module.b, *jax.tree.leaves(found.factors))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]))
        return found, jnp.asarray(found.keeps_a), finite

    return over_modules(one, inputs)


@partial(jax.jit, static_argnames=("keep_a", "norms"))
def merge_projected(
    rule: Chain,
    key: PRNGKeyArray | None,
    projection: Projection,
    tasks: Int[Array, "L T"],
    names: UInt[Array, " L"],
    weights: Float[Array, "L T"] | None,
    *,
    keep_a: bool,
    norms: bool,
) -> tuple[Float[Array, "L r n"], Float[Array, "L m r"], Float[Array, "L 2"] | None]:
    """Merges projected modules, multiplied by weights ``(L, T)``.

    Returns:
        A ``(L, r, n)`` and B ``(L, m, r)``, neither scaled nor rounded; and with ``norms``,
        ``(L, 2)``, as `Projection.auto_squares` returns them.
    """

    def one(row: tuple) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        projection, tasks, name, weight = row
        if weight is not None:
            projection = projection.weighted(weight)
        core = merge_cores(rule, key, projection, tasks, name)
        lora = projection.expand(core, keep_a=True if keep_a else None)
        squares = projection.auto_squares(rule, core) if norms else None
        return jnp.asarray(lora.a), jnp.asarray(lora.b), squares

    return over_modules(one, (projection, tasks, names, weights))


@jax.jit
def split_projected(
    rule: Chain,
    key: PRNGKeyArray | None,
    projection: Projection,
    tasks: Int[Array, "L T"],
    names: UInt[Array, " L"],
) -> Projection:
    """Splits merges of projected modules into the adapters' shares, in place of their updates."""

    def one(row: tuple) -> Projection:
        projection, tasks, name = row
        context = Context(shape=projection.shape, tasks=tasks, inputs=projection.inputs)
        own_key = module_key(key, name)
        shares = rule.pieces(projection.factors, key=own_key, context=context)
        return dataclasses.replace(projection, factors=shares)

    return over_modules(one, (projection, tasks, names))


@partial(jax.jit, static_argnames="dtypes")
def finish_stack(
    a: Float[Array, "L r n"],
    b: Float[Array, "L m r"],
    scales: Float[Array, " L"],
    dtypes: tuple[np.dtype, np.dtype],
) -> tuple[Float[Array, "L r n"], Float[Array, "L m r"], Float[Array, " L"]]:
    """Returns the merged factors as they are given out, and the largest magnitude in each B."""
    of_a, of_b = map(jax.dtypes.canonicalize_dtype, dtypes)
    b = jax.vmap(partial(finish, dtype=of_b))(b.astype(scales.dtype), scales)
    return a.astype(of_a), b, _peaks(b, (1, 2)).astype(jnp.float32)


@jax.jit
def projected_traits(projection: Projection) -> Float[Array, "L 3 T"]:
    """Returns ``(L, 3, T)``, the `Projection.traits` of each module."""
    return over_modules(lambda one: one.traits, projection)


def _on_devices(
    program: Callable, shared: Any, inputs: Any, devices: Devices | None, specs: Callable
) -> Any:
    """Runs a program on each device's part of the modules, or whole where there is one device."""
    if devices is None:
        return program(shared, inputs)
    return devices.map(program, shared, inputs, inputs.specs(devices), specs(devices))


@partial(jax.jit, static_argnames="keep_a")
def lift_stack(
    a: Float[Array, "L R n"],
    b: Float[Array, "L m R"],
    cores: Float[Array, "L R R"],
    *,
    keep_a: bool,
) -> tuple[Float[Array, "L q n"] | None, Float[Array, "L m q"], Bool[Array, " L"]]:
    """Multiplies stacked factors by the matrices between them.

    Args:
        a: the stacked A.
        b: the stacked B.
        cores: what `compile_stack` returns.
        keep_a: the result has the stacked A, if it can.

    Returns:
        A, or None where the stacked A is kept; B; and bool ``(L,)``, as of `merge_stack`.
    """

    def lift_module(
        module: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array | None, jax.Array, jax.Array]:
        a, b, core = module
        product = matmul(b.astype(core.dtype), core)
        right, coordinates, _, spread = basis(
            a.T, roundoff(a), singular=False, dtype=core.dtype, rows=a.shape[1]
        )
        if keep_a and len(a) <= min(a.shape[1], len(b)):
            return None, product.astype(b.dtype), well_conditioned(spread)
        rows = right.columns().T.astype(a.dtype)
        return rows, matmul(product, coordinates.T).astype(b.dtype), jnp.asarray(True)

    return over_modules(lift_module, (a, b, cores))


# --- Facts -------------------------------------------------------------------------------------


def _facts(
    rule: Chain,
    module: Inputs,
    factors: Cores | None,
    b: Float[Array, "m r"],
    settings: Settings,
) -> Facts:
    """Returns the facts of one module.

    Coordinates in core space are small, zero where factors are, and not finite if any of them is
    not. Where there are none, the factors themselves are read.
    """
    merged = b
    if isinstance(factors, LoRA) and isinstance(settings.space, core):
        b_sizes = _peaks(jnp.asarray(factors.b), (1, 2))
        a_sizes = _peaks(jnp.asarray(factors.a), (1, 2))
    else:
        ends, columns = np.cumsum(settings.ranks)[:-1], _peaks(module.b, 0)
        b_sizes = _largest(columns, ends, settings.dtype)
        a_sizes = _largest(_row_sums(module.a), ends, settings.dtype)
        if factors is None and b.shape == module.b.shape:
            # Each column was multiplied by a number, and so is its largest magnitude: this saves
            # reading B once more.
            peaks = dataclasses.replace(module, b=columns[None, :])
            scaled = jnp.asarray(merge_linear(rule, peaks, settings).b)
            merged = finish(scaled, module.scale, b.dtype)
    peak = _peaks(_peaks(merged, 0), 0).astype(settings.dtype)
    # Each device returns its own facts, so that none has to wait for another.
    facts = Facts(sizes=jnp.stack([b_sizes, a_sizes])[:, :, None], peaks=peak[None])
    return jax.lax.stop_gradient(facts)


def _row_sums(x: Float[Array, "p q"]) -> Float[Array, " p"]:
    """Returns ``(p,)``, the sum of the magnitudes in each row of ``(p, q)``.

    It is zero only for zeros, and not finite if an entry is not. On CPU, a product with a vector
    takes a fourth of the time of a maximum.
    """
    wide = jnp.abs(x.astype(widest(x.dtype, np.dtype(np.float32))))
    return matmul(wide, jnp.ones(x.shape[1], wide.dtype))


def _peaks(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the largest magnitude along some axes; NaN if one is NaN.

    Magnitudes are compared as integers, whose order is that of their bit patterns, with NaN above
    infinity. On CPU, a maximum of floats takes four times as long, and loses NaN if the array is
    large (seen with JAX 0.9.2 and 0.12).
    """
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(jnp.abs(x)), integer)
    return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis), x.dtype)


def _largest(x: Float[Array, " R"], ends: np.ndarray, dtype: np.dtype) -> Float[Array, " T"]:
    """Returns the largest of the ``(R,)`` numbers of each adapter."""
    return jnp.stack([_peaks(part, 0) for part in jnp.split(x.astype(dtype), ends)])
