"""The parameters of a chain of rules, by name: ``"ties.density"``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from coremerge_jax.errors import RecipeError, unknown
from coremerge_jax.rules import Chain, as_rule, chain

SCALE = "scale"
"""The name of the parameter that multiplies the merged update, whatever the rule."""


def parameters(rule: Any) -> dict[str, Any]:
    """Returns the parameters of a rule and their values, by name.

    A name is that of the rule and of its field, ``"ties.density"``; where a chain has a rule
    twice, ``"flatten[0].power"`` and ``"flatten[1].power"``.
    """
    parts = chain(as_rule(rule))
    return {name: getattr(parts.rules[i], field) for name, (i, field) in _places(parts).items()}


def configure(rule: Any, values: Mapping[str, Any]) -> Chain:
    """Returns the rule with other values of some parameters.

    Args:
        rule: as in `merge`.
        values: by name, see `parameters`; ``"scale"``, which is not the rule's, is left out.

    Raises:
        RecipeError: the rule has no parameter of a name, or a value is out of range.
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
            rules[i] = dataclasses.replace(rules[i], **{field: value})  # type: ignore[type-var]
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{name}: {error}") from error
    return chain(*rules)


def label(rule: Chain) -> str:
    """Returns ``"ties + isotropize"``."""
    return " + ".join(part.name() for part in rule.rules)


def _places(rule: Chain) -> dict[str, tuple[int, str]]:
    """Maps each parameter to the place of its rule in the chain, and to its field."""
    names = [part.name() for part in rule.rules]
    found = {}
    for i, (part, name) in enumerate(zip(rule.rules, names, strict=True)):
        called = name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]"
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            found[f"{called}.{field.name}"] = i, field.name
    return found
