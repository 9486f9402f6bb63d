"""Interface of merge rules, and chains of them."""

import dataclasses
import enum
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import Factored, in_loop
from coremerge_jax.lora import LoRA


class Equivariance(enum.IntEnum):
    """Changes of basis of the cores with which a rule commutes; the larger, the fewer.

    `LINEAR` rules are weighted sums, the same in every basis. `ORTHOGONAL` rules see only singular
    values and relative angles: any orthonormal basis gives the same update. `ELEMENTWISE` rules
    look at single entries: they commute with permutations and sign flips of the basis alone.
    """

    LINEAR = 0
    ORTHOGONAL = 1
    ELEMENTWISE = 2


@flax.struct.dataclass
class Context:
    """Information about the cores that a rule is given.

    Attributes:
        shape: int32 ``(2,)``, the numerical shape of the cores: rows and columns beyond it are
            zero and stand for nothing.
        tasks: int32 ``(T,)``, which adapters the cores belong to.
        cores: for steps behind the merge, the adapters' cores as they were before any step, in
            the coordinates of the merged core.
    """

    shape: jax.Array
    tasks: jax.Array
    cores: "Cores | None" = None

    @classmethod
    def of(cls, cores: "Cores") -> "Context":
        """Returns the context of cores that are all there is."""
        tasks, *shape = jax.eval_shape(dense, cores).shape
        return cls(
            shape=jnp.asarray(shape, jnp.int32),
            tasks=jnp.arange(tasks, dtype=jnp.int32),
            cores=cores,
        )


# The cores of all adapters: (T, p, q), or LoRA factors with a leading axis T. One core: without it.
Cores = jax.Array | LoRA


def dense(matrix: jax.Array | LoRA | Factored) -> jax.Array:
    """Returns a matrix, or several, as an array."""
    return jnp.asarray(matrix.dense() if isinstance(matrix, LoRA | Factored) else matrix)


def thin(cores: Cores) -> tuple[jax.Array, jax.Array]:
    """Returns factors ``(T, p, r)`` and ``(T, r, q)`` of cores; dense cores are left factors."""
    if isinstance(cores, LoRA):
        return jnp.asarray(cores.b), jnp.asarray(cores.a)
    tasks, p, q = cores.shape
    eye = jnp.broadcast_to(jnp.eye(min(p, q), dtype=cores.dtype), (tasks, min(p, q), min(p, q)))
    return (eye, cores) if p <= q else (cores, eye)


def side_by_side(x: jax.Array) -> jax.Array:
    """Returns ``(T, p, r)`` to ``(p, T r)``."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def fold(fn: Callable, cores: Cores, *per_task: Any, combine: Callable = jnp.add) -> Any:
    """Sums ``fn(core, ...)`` over adapters, without the dense cores of all of them at once.

    Args:
        fn: from one dense core ``(p, q)``, and one row of each of ``per_task``, to arrays.
        cores: those of all adapters.
        *per_task: further arrays with a leading axis T.
        combine: adds what one adapter gives to the total, which starts from zeros.
    """
    return fold_rows(lambda row: fn(dense(row[0]), *row[1:]), (cores, *per_task), combine)


def fold_rows(fn: Callable, rows: Any, combine: Callable = jnp.add) -> Any:
    """Sums ``fn`` over the rows of arrays, one after the other."""

    def step(total: Any, row: Any) -> tuple[Any, None]:
        return jax.tree.map(combine, total, fn(row)), None

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], rows))
    return jax.lax.scan(in_loop(step), jax.tree.map(jnp.zeros_like, shapes), rows)[0]


class Rule:
    """A merge rule: a pure function from cores ``(T, p, q)`` to one merged core ``(p, q)``.

    Rules are frozen dataclasses and pytrees whose numeric parameters are leaves: they may be
    traced, so that a sweep over them is one compiled program.
    """

    equivariance: ClassVar[Equivariance]
    needs_key: ClassVar[bool] = False

    def __call__(
        self, cores: Cores, *, key: jax.Array | None = None, context: Context | None = None
    ) -> jax.Array:
        """Merges.

        Args:
            cores: ``(T, p, q)``, one matrix per adapter, or their low-rank factors.
            key: PRNG key, for rules that draw random numbers.
            context: what is known of the cores; by default, that all of them counts.

        Returns:
            ``(p, q)``.
        """
        return dense(self.merge(cores, key=key, context=context or Context.of(cores)))

    def merge(
        self, cores: Cores, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Merges: what a rule has to implement. The result may stay in factors."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Returns the rule's name in text."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        parameters = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields)
        return f"{self.name()}({parameters})"


class Step(Rule):
    """A rule that changes cores: those of the adapters, or the merged one.

    Where a chain names no rule that merges, `task_arithmetic` does, after the steps whose natural
    place is ``"before"`` and before those whose place is ``"after"``.

    Attributes:
        place: ``"before"`` or ``"after"``.
        factored: whether `apply` takes a `Factored` as well as an array.
        first: whether it looks at the adapters' factors, which other steps change.
    """

    place: ClassVar[str]
    factored: ClassVar[bool] = False
    first: ClassVar[bool] = False

    def apply(self, matrix: Any, *, key: jax.Array | None, context: Context) -> Any:
        """Maps one core ``(p, q)`` to ``(p, q)``."""
        raise NotImplementedError

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        """Maps all cores before the merge, with one key each; here, each by itself."""

        def one(core: Cores, key: jax.Array | None) -> jax.Array:
            return self.apply(dense(core), key=key, context=context)

        return jax.vmap(one, (0, None if keys is None else 0))(cores, keys)

    def restore(self, merged: jax.Array | Factored, *, context: Context) -> jax.Array | Factored:
        """Undoes on the merged core what a step before the merge did; by default, nothing."""
        del context
        return merged

    def merge(
        self, cores: Cores, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Merges, as the chain of this step and a sum does."""
        return chain(self).merge(cores, key=key, context=context)


@flax.struct.dataclass(kw_only=True, repr=False)
class Chain(Rule):
    """Steps on every core, a rule that merges, and steps on the merged core. See `chain`."""

    before: tuple[Step, ...]
    reducer: Rule
    after: tuple[Step, ...]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The parts in order."""
        return (*self.before, self.reducer, *self.after)

    @property
    def equivariance(self) -> Equivariance:  # type: ignore[override]
        """The equivariance of the least equivariant part."""
        return max(rule.equivariance for rule in self.rules)

    @property
    def needs_key(self) -> bool:  # type: ignore[override]
        """True if any part draws random numbers."""
        return any(rule.needs_key for rule in self.rules)

    def merge(
        self, cores: Cores, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Merges: all parts in order."""
        merged = self.combine(cores, key=key, context=context)
        return self.finish(merged, key=key, context=context)

    def prepare(self, cores: Cores, *, key: jax.Array | None, context: Context) -> Cores:
        """Applies the steps before the merge: all cores to all cores."""
        for i, step in enumerate(self.before):
            keys = None
            if step.needs_key:
                # By adapter, so that a mask does not depend on which others share the module.
                keys = jax.vmap(jax.random.fold_in, (None, 0))(_fold(key, i, step), context.tasks)
            cores = step.prepare(cores, keys=keys, context=context)
        return cores

    def combine(
        self, cores: Cores, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Applies the steps before the merge, and the merge: all cores to one."""
        cores = self.prepare(cores, key=key, context=context)
        reducer_key = _fold(key, len(self.before), self.reducer) if self.reducer.needs_key else None
        return self.reducer.merge(cores, key=reducer_key, context=context)

    def finish(
        self, merged: jax.Array | Factored, *, key: jax.Array | None, context: Context
    ) -> jax.Array | Factored:
        """Applies the steps after the merge: one core to one core."""
        for step in reversed(self.before):
            merged = step.restore(merged, context=context)
        for i, step in enumerate(self.after, start=len(self.before) + 1):
            step_key = _fold(key, i, step) if step.needs_key else None
            matrix = merged if step.factored else dense(merged)
            merged = step.apply(matrix, key=step_key, context=context)
        return merged

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"


def _fold(key: jax.Array | None, i: int, rule: Rule) -> jax.Array:
    if key is None:
        raise RecipeError(f"{rule!r} draws random numbers: pass key=jax.random.key(seed)")
    return jax.random.fold_in(key, i)


def chain(*rules: "Rule | Callable") -> Chain:
    """Composes rules, applied from left to right.

    A `Step` (`dare`, `isotropize`) before the rule that merges acts on every adapter's core,
    behind it on the merged core. At most one part merges; where none does, the cores are summed.

    Args:
        *rules: rules, or plain functions ``(T, p, q) -> (p, q)``.

    Raises:
        RecipeError: more than one part merges, or a part must be the first and is not.
    """
    from coremerge_jax.rules.linear import task_arithmetic

    parts: list[Rule] = []
    for rule in map(as_rule, rules):
        parts.extend(rule.rules if isinstance(rule, Chain) else (rule,))
    reducers = [i for i, rule in enumerate(parts) if not isinstance(rule, Step)]
    if len(reducers) > 1:
        names = " and ".join(repr(parts[i]) for i in reducers)
        raise RecipeError(f"a chain merges once, but {names} all merge; keep one of them")
    for late in parts[1:]:
        if isinstance(late, Step) and late.first:
            raise RecipeError(f"{late!r} looks at the adapters' factors: it must be the first part")
    if not reducers:
        after = [isinstance(rule, Step) and rule.place == "after" for rule in parts]
        reducers = [after.index(True) if any(after) else len(parts)]
        parts.insert(reducers[0], task_arithmetic())
    i = reducers[0]
    return Chain(before=tuple(parts[:i]), reducer=parts[i], after=tuple(parts[i + 1 :]))  # type: ignore[arg-type]


@flax.struct.dataclass(repr=False)
class Function(Rule):
    """A user's function as a rule. See `from_function`."""

    fn: Callable[[jax.Array], jax.Array] = flax.struct.field(pytree_node=False)
    equivariance: Equivariance = flax.struct.field(  # type: ignore[misc]
        pytree_node=False, default=Equivariance.ELEMENTWISE
    )

    def merge(self, cores: Cores, *, key: jax.Array | None, context: Context) -> jax.Array:
        """Calls the function."""
        del key, context
        cores = dense(cores)
        merged = self.fn(cores)
        if jnp.shape(merged) != cores.shape[1:]:
            raise RecipeError(
                f"the function {getattr(self.fn, '__name__', self.fn)!r} gave shape "
                f"{jnp.shape(merged)} for cores of shape {cores.shape}; expected {cores.shape[1:]}"
            )
        return merged


def from_function(fn: Callable[[jax.Array], jax.Array], equivariance: str = "elementwise") -> Rule:
    """Makes a rule of a function ``(T, p, q) -> (p, q)``.

    Args:
        fn: pure and traceable by JAX.
        equivariance: ``"linear"``, ``"orthogonal"`` or ``"elementwise"``, see `Equivariance`. The
            default is right for every function; a stronger claim lets `merge` choose a cheaper
            basis and must be true.

    Raises:
        RecipeError: there is no such equivariance.
    """
    if not isinstance(equivariance, str) or equivariance.upper() not in Equivariance.__members__:
        names = ", ".join(repr(x.name.lower()) for x in Equivariance)
        raise RecipeError(f"equivariance={equivariance!r}: expected one of {names}")
    return Function(fn, Equivariance[equivariance.upper()])


def as_rule(rule: Any) -> Rule:
    """Returns a rule as it is; a plain function as a rule.

    Raises:
        RecipeError: it is neither.
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise RecipeError(f"expected a merge rule, got the class {rule.__name__}; call it, with ()")
    if callable(rule):
        return from_function(rule)
    expected = "expected a merge rule such as tsv(), or a function (T, p, q) -> (p, q)"
    if isinstance(rule, str):
        expected += "; rules are objects, several in one chain(...)"
    if isinstance(rule, tuple | list):
        expected += "; make one of several by chain(...)"
    raise RecipeError(f"{expected}, got {rule!r:.80}")


def check(name: str, value: Any, ok: Callable[[Any], bool], expected: str) -> None:
    """Validates a parameter where it is a plain number.

    Arrays may be traced, or be derivatives by the parameter in its place: those that are used in
    a merge are checked there, see `validated`.

    Raises:
        RecipeError: naming the parameter, its value and what is expected.
    """
    number = isinstance(value, int | float | np.integer | np.floating)
    wrong = isinstance(value, tuple | list | str | complex | dict)
    if wrong or (number and not (_is_finite(value) and ok(value))):
        raise RecipeError(f"{name}={value!r}: expected {expected}")
    if isinstance(value, int | np.integer) and abs(int(value)) >= 2**31:
        raise RecipeError(f"{name}={value!r}: expected {expected}, below 2^31")  # as JAX's int32


def check_weights(weights: Any) -> None:
    """Validates one weight per adapter, as far as these are plain numbers.

    Raises:
        RecipeError: one is not a finite number.
    """
    if isinstance(weights, str | dict):
        raise RecipeError(f"weights={weights!r}: expected a list of numbers, one per adapter")
    for i, weight in enumerate(weights) if isinstance(weights, tuple | list) else ():
        check(f"weights[{i}]", weight, lambda _: True, "a finite number")


def validated(rule: Chain) -> Chain:
    """Returns a chain that is used: also parameters that are arrays have been checked.

    Raises:
        RecipeError: a parameter is out of range, or there is none.
    """
    for part in rule.rules:
        plain = {}
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            value = getattr(part, field.name)
            if value is None and field.default is not None:
                raise RecipeError(f"{part.name()}: {field.name} is None; expected a value")
            if isinstance(value, bool) and not isinstance(field.default, bool):
                raise RecipeError(f"{part.name()}: {field.name}={value}: expected a number")
            is_array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
            if is_array and not isinstance(value, jax.core.Tracer):
                plain[field.name] = jax.device_get(value).item()
        if plain:
            dataclasses.replace(part, **plain)  # type: ignore[type-var]
    return rule


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
