"""Chains of rules, and functions as rules."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from coremerge_jax.errors import RecipeError, UnsupportedError
from coremerge_jax.linalg import pytree
from coremerge_jax.rules.linear import task_arithmetic
from coremerge_jax.rules.operations import Operations, Sizes, counted
from coremerge_jax.rules.rule import (
    Context,
    Core,
    Cores,
    Dense,
    Equivariance,
    Merged,
    Rule,
    abstract,
    dense,
)
from coremerge_jax.text import short


class Step(Rule):
    """A rule that changes cores: those of the adapters before a merge, or the merged one behind it.

    In a chain without a rule that merges, `task_arithmetic` merges: after the steps whose natural
    place is ``"before"``, and ahead of those whose place is ``"after"``.

    Attributes:
        place: ``"before"`` or ``"after"``.
        first: True if the step uses the adapters' factors, which other steps change.
    """

    place: ClassVar[str]
    first: ClassVar[bool] = False

    def apply(self, matrix: Dense, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        """Maps one core ``(p, q)`` to ``(p, q)``."""
        raise NotImplementedError

    def prepare(self, cores: Cores, *, keys: jax.Array | None, context: Context) -> Cores:
        """Maps all cores before the merge, with one key each; by default, each by `apply`."""

        def one(core: Core, key: PRNGKeyArray | None) -> Dense:
            return self.apply(dense(core), key=key, context=context)

        return jax.vmap(one, (0, None if keys is None else 0))(cores, keys)

    def restore(self, merged: Merged, *, context: Context) -> Merged:
        """Undoes on the merged core what a step before the merge did; by default, nothing."""
        return merged

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Merged:
        """Merges like the chain of this step and a sum."""
        return chain(self).merge(cores, key=key, context=context)

    def operations(self, cores: Sizes) -> Operations:
        """Counts operations and memory, from leading terms; here, in the step's jaxpr."""
        every, key, context = abstract(cores)
        if cores.merged:
            one = jax.ShapeDtypeStruct((cores.p, cores.q), jnp.float64)
            return counted(_apply, self, one, key, context)
        keys = jax.ShapeDtypeStruct((cores.tasks,), key.dtype)
        return counted(_prepare, self, every, keys, context)

    def sizes_after(self, cores: Sizes) -> Sizes:
        """Returns the sizes of the cores that this step hands on."""
        if self.factored and not cores.merged:
            return cores
        return dataclasses.replace(cores, width=cores.side, dense=True)


def _apply(step: Step, matrix: Dense, key: PRNGKeyArray, context: Context) -> Dense:
    return step.apply(matrix, key=key, context=context)


def _prepare(step: Step, cores: Cores, keys: jax.Array, context: Context) -> Cores:
    return step.prepare(cores, keys=keys, context=context)


@pytree
@dataclass(frozen=True, kw_only=True, repr=False)
class Chain(Rule):
    """Steps on every core, a rule that merges, and steps on the merged core; made by `chain`."""

    before: tuple[Step, ...]
    reducer: Rule
    after: tuple[Step, ...]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The parts in order."""
        return (*self.before, self.reducer, *self.after)

    @property
    def equivariance(self) -> Equivariance:  # type: ignore[override]  # of the object, not the class
        """The equivariance of the least equivariant part."""
        return max(rule.equivariance for rule in self.rules)

    @property
    def needs_key(self) -> bool:  # type: ignore[override]  # the same
        """True if any part draws random numbers."""
        return any(rule.needs_key for rule in self.rules)

    @property
    def needs_inputs(self) -> bool:  # type: ignore[override]  # the same
        """True if any part uses Gram matrices of the modules' inputs."""
        return any(rule.needs_inputs for rule in self.rules)

    def auto_scale(self, tasks: int) -> float | None:
        """Returns the automatic scale of the rule that merges, if it is the only one."""
        return None if self.before or self.after else self.reducer.auto_scale(tasks)

    def auto_norm(self, tasks: int) -> float | jax.Array:
        """Returns the norm that the result should have."""
        return self._deciding.auto_norm(tasks)

    def auto_square(self, merged: Dense, *, cores: Cores, context: Context) -> Float[Array, ""]:
        """Returns the squared size of a result."""
        return self._deciding.auto_square(merged, cores=cores, context=context)

    @property
    def _deciding(self) -> Rule:
        """The part that decides on the automatic scale: one with a flat result, or the reducer."""
        parts = (*reversed(self.after), self.reducer)
        return next((part for part in parts if part.flat), self.reducer)

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Merged:
        """Applies all parts in order."""
        merged = self.combine(cores, key=key, context=context)
        return self.finish(merged, key=key, context=context)

    def prepare(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Cores:
        """Applies the steps before the merge: all cores to all cores."""
        for i, step in enumerate(self.before):
            keys = None
            if step.needs_key:
                # By adapter, so that a mask does not depend on which others share the module.
                keys = jax.vmap(jax.random.fold_in, (None, 0))(_key_of(key, i, step), context.tasks)
            cores = step.prepare(cores, keys=keys, context=context)
        return cores

    def combine(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Merged:
        """Applies the steps before the merge, and the merge: all cores to one."""
        cores = self.prepare(cores, key=key, context=context)
        return self.reducer.merge(cores, key=self._reducer_key(key), context=context)

    def _reducer_key(self, key: PRNGKeyArray | None) -> PRNGKeyArray | None:
        return _key_of(key, len(self.before), self.reducer) if self.reducer.needs_key else None

    def pieces(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Cores:
        """Applies the steps before the merge, and splits the merge into the adapters' shares."""
        changed = [step for step in self.before if type(step).restore is not Step.restore]
        if self.after or changed:
            step = (*changed, *self.after)[0]
            raise UnsupportedError(
                f"{step!r} changes the merged core, so it is no sum of the adapters' shares that "
                "coefficients could multiply; leave it out"
            )
        cores = self.prepare(cores, key=key, context=context)
        return self.reducer.pieces(cores, key=self._reducer_key(key), context=context)

    def finish(self, merged: Merged, *, key: PRNGKeyArray | None, context: Context) -> Merged:
        """Applies the steps after the merge: one core to one core."""
        for step in reversed(self.before):
            merged = step.restore(merged, context=context)
        for i, step in enumerate(self.after, start=len(self.before) + 1):
            step_key = _key_of(key, i, step) if step.needs_key else None
            matrix = merged if step.factored else dense(merged)
            merged = step.apply(matrix, key=step_key, context=context)  # type: ignore[arg-type]  # a factored step takes both
        return merged

    def operations(self, cores: Sizes) -> Operations:
        """Counts operations and memory of all parts."""
        total = Operations()
        for rule in self.rules:
            total += rule.operations(cores)
            cores = rule.sizes_after(cores)
        return total

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.rules))})"


def _key_of(key: PRNGKeyArray | None, i: int, rule: Rule) -> PRNGKeyArray:
    """Returns the key of the i-th part of a chain."""
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
    return Chain(before=tuple(parts[:i]), reducer=parts[i], after=tuple(parts[i + 1 :]))  # type: ignore[arg-type]  # all but one are steps


@pytree
@dataclass(frozen=True, repr=False)
class function(Rule):
    """A user's function as a rule; made by `from_function`."""

    fn: Callable[[jax.Array], jax.Array] = field(metadata={"static": True})
    equivariance: Equivariance = field(  # type: ignore[misc]  # of the object, not of the class
        default=Equivariance.ELEMENTWISE, metadata={"static": True}
    )

    def merge(self, cores: Cores, *, key: PRNGKeyArray | None, context: Context) -> Dense:
        """Calls the function."""
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
        equivariance: ``"linear"``, ``"orthogonal"`` or ``"elementwise"``, as defined by
            `Equivariance`. The default is right for every function. A stronger claim must be true;
            it lets `merge` choose a cheaper basis.

    Raises:
        RecipeError: there is no such equivariance.
    """
    if not isinstance(equivariance, str) or equivariance.upper() not in Equivariance.__members__:
        names = ", ".join(repr(x.name.lower()) for x in Equivariance)
        raise RecipeError(f"equivariance={equivariance!r}: expected one of {names}")
    return function(fn, Equivariance[equivariance.upper()])


def as_rule(rule: Any) -> Rule:
    """Returns a rule unchanged, and a plain function as a rule.

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
    """Checks the parameters of a chain that are arrays, and returns the chain.

    Raises:
        RecipeError: a parameter is out of range, or there is none.
    """
    for part in rule.rules:
        plain = {}
        for one in dataclasses.fields(part):  # type: ignore[arg-type]  # all rules are dataclasses
            value = getattr(part, one.name)
            if value is None and one.default is not None:
                raise RecipeError(f"{part.name()}: {one.name} is None; expected a value")
            if isinstance(value, bool) and not isinstance(one.default, bool):
                raise RecipeError(f"{part.name()}: {one.name}={short(value)}: expected a number")
            is_array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
            if is_array and not isinstance(value, jax.core.Tracer):
                plain[one.name] = jax.device_get(value).item()
        if plain:
            dataclasses.replace(part, **plain)  # type: ignore[type-var]  # checks the values
    return rule
