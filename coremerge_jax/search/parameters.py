"""The parameters of a chain of rules, by name: ``"ties.density"``."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from coremerge_jax.errors import RecipeError, unknown
from coremerge_jax.rules import Chain, Rule, as_rule, chain

# A rule, or a function of cores, (T, p, q) -> (p, q).
MergeRule = Rule | Callable[[jax.Array], jax.Array]

# Values by the name of a parameter: numbers, words, None or sequences of numbers.
Parameters = Mapping[str, Any]


@runtime_checkable
class Distribution(Protocol):
    """A distribution to draw values from, such as those of `scipy.stats`."""

    def rvs(self, *, random_state: np.random.Generator) -> Any:
        """Returns a random value."""


# The values to try, by the name of a parameter.
Choices = Mapping[str, Iterable[Any] | Distribution]

SCALE = "scale"
"""Name of the parameter that multiplies the merged update, for every rule."""


def parameters(rule: MergeRule) -> Parameters:
    """Returns the values of a rule's parameters, by name.

    Names join rule and field, ``"ties.density"``; with an index if a chain has a rule several
    times, ``"flatten[0].power"`` and ``"flatten[1].power"``.
    """
    parts = chain(as_rule(rule))
    return {name: getattr(parts.rules[i], field) for name, (i, field) in _places(parts).items()}


def configure(rule: MergeRule, values: Parameters) -> Chain:
    """Returns the rule with other values of some parameters.

    Args:
        rule: a rule, or a chain of rules.
        values: the new values by name, see `parameters`; ``"scale"`` is ignored, as it is a
            parameter of the merge and not of the rule.

    Raises:
        RecipeError: the rule has no such parameter, or a value is out of range.
    """
    parts = chain(as_rule(rule))
    places, rules = _places(parts), list(parts.rules)
    for name, value in values.items():
        if name == SCALE:
            continue
        if name not in places:
            raise unknown(f"parameter of {label(parts)!r}:", name, [*places, SCALE])
        i, field = places[name]
        try:
            # Each rule is a dataclass, though its base is not.
            rules[i] = dataclasses.replace(rules[i], **{field: value})  # type: ignore[type-var]  # rules are dataclasses
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{name}: {error}") from error
    return chain(*rules)


def label(rule: Chain) -> str:
    """Returns the names of the rules, such as ``"ties + isotropize"``."""
    return " + ".join(part.name() for part in rule.rules)


def _places(rule: Chain) -> dict[str, tuple[int, str]]:
    """Returns the place in the chain, and the field, of each parameter by name."""
    names = [part.name() for part in rule.rules]
    found = {}
    for i, (part, name) in enumerate(zip(rule.rules, names, strict=True)):
        called = name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]"
        for field in dataclasses.fields(part):  # type: ignore[arg-type]  # as above
            found[f"{called}.{field.name}"] = i, field.name
    return found
