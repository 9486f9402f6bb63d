"""Chains of rules, and functions as rules."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from coremerge_jax.errors import RecipeError
from coremerge_jax.linalg import Factored
from coremerge_jax.rules.rule import Context, Cores, Equivariance, Rule, dense


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
