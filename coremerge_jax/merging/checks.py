"""Checks of a merge's arguments."""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, RecipeError, hint
from coremerge_jax.lora import Adapter, AdapterSource
from coremerge_jax.rules import Chain
from coremerge_jax.rules.chain import validated
from coremerge_jax.rules.rule import AUTO
from coremerge_jax.spaces import SPACES, Space, core
from coremerge_jax.text import short

# A number, or "auto"; or such by pattern of module paths.
Scale = float | str | Mapping[str, float | str]


def as_adapters(adapters: Any) -> Sequence[Adapter]:
    """Returns adapters as a sequence.

    Raises:
        RecipeError: they are no adapters, or not in a sequence.
    """
    if isinstance(adapters, Adapter):
        raise RecipeError("adapters: got a single adapter; expected a list, such as [adapter]")
    if isinstance(adapters, str | Mapping) or not isinstance(adapters, Iterable):
        raise RecipeError(f"adapters: expected a list of adapters, got {short(adapters)}")
    found = adapters if isinstance(adapters, Sequence) else list(adapters)
    for i, adapter in enumerate(found):
        as_adapter(adapter, f"adapters[{i}]")
    return found


def as_adapter(adapter: Any, name: str) -> Adapter:
    """Returns an adapter as it is.

    Raises:
        RecipeError: it is something else.
    """
    if not isinstance(adapter, Adapter):
        raise RecipeError(
            f"{name}: expected an adapter, got {short(adapter)}; read files with open_adapter or "
            "load_peft, and trees of parameters with from_tree"
        )
    return adapter


def as_space(space: Any) -> Space:
    """Returns a merge space as it is; core space for None.

    Raises:
        RecipeError: it is something else.
    """
    if space is None:
        return core()
    if isinstance(space, str):
        name = space.partition(":")[0]
        advice = f"write it as an object, {name}()" if name in SPACES else hint(name, SPACES)[2:]
        raise RecipeError(f"space={space!r} is text; {advice}")
    if isinstance(space, type) or not callable(getattr(space, "project", None)):
        advice = "; call it, with ()" if isinstance(space, type) else ""
        raise RecipeError(
            f"space: expected a merge space such as core(), got {short(space)}{advice}"
        )
    return space


def as_weights(weights: Any, adapters: int, name: str = "weights") -> Any:
    """Returns weights as they are: one number for each adapter, or None. They may be traced.

    Raises:
        MismatchError: there are more or fewer.
        RecipeError: one is no number, or not finite.
    """
    if weights is None:
        return None
    expected = "expected a list of numbers, one for each adapter in their order"
    if isinstance(weights, jax.core.Tracer):
        if weights.ndim != 1:
            raise MismatchError(f"{name} of shape {weights.shape}: {expected}")
        _check_length(len(weights), adapters, name)
        return weights
    if isinstance(weights, jax.Array):
        weights = jax.device_get(weights)
    if isinstance(weights, int | float) or getattr(weights, "shape", None) == ():
        raise MismatchError(f"{name}={short(weights)}: {expected}")
    if isinstance(weights, str | bytes | Mapping | set) or not isinstance(
        weights, Collection | np.ndarray
    ):
        raise RecipeError(f"{name}: got {short(weights)}; {expected}")
    _check_length(len(weights), adapters, name)
    for i, weight in enumerate(weights):
        check_number(f"{name}[{i}]", weight)
    return weights


def _check_length(found: int, adapters: int, name: str) -> None:
    if found != adapters:
        raise MismatchError(f"{found} {name} for {adapters} adapters; expected one each")


def check_scale(scale: Any) -> None:
    """Checks that a scale is a number or ``"auto"``, or such by pattern. Numbers may be traced.

    Raises:
        RecipeError: it is not, or not finite.
    """
    if not isinstance(scale, Mapping):
        if not is_auto(scale):
            check_number("scale", scale, ", 'auto', or such by pattern of module paths")
        return
    for pattern, value in scale.items():
        if not isinstance(pattern, str):
            raise RecipeError(f"scale of {pattern!r}: expected a pattern of module paths as text")
        if not is_auto(value):
            check_number(f"scale of {pattern!r}", value, " or 'auto'")


def is_auto(scale: Any) -> bool:
    """Returns True if a scale is ``"auto"``."""
    return isinstance(scale, str) and scale == AUTO


def check_number(name: str, value: Any, more: str = "") -> None:
    """Checks that a value is a finite real number. It may be traced.

    Raises:
        RecipeError: it is not.
    """
    if isinstance(value, jax.core.Tracer):
        if value.ndim:
            raise RecipeError(f"{name} of shape {value.shape}: expected a number{more}")
        return
    if isinstance(value, jax.Array):
        value = jax.device_get(value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    is_real = isinstance(value, int | float | np.integer | np.floating)
    if not is_real or isinstance(value, bool):
        raise RecipeError(f"{name}={short(value)}: expected a number{more}")
    if not is_finite(value):
        raise RecipeError(f"{name}={short(value)}: expected a finite number{more}")


def is_finite(value: Any) -> bool:
    """Returns True if a number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def check_whole(name: str, value: Any, least: int) -> None:
    """Checks that a value is a whole number of at least ``least``.

    Raises:
        RecipeError: it is not.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise RecipeError(f"{name}={short(value)}: expected a whole number of at least {least}")


def check_function(name: str, value: Any) -> None:
    """Checks that a value can be called.

    Raises:
        RecipeError: it cannot.
    """
    if not callable(value):
        raise RecipeError(f"{name}: expected a function, got {short(value)}")


def check_key(key: Any) -> None:
    """Checks that a value is a PRNG key, or None.

    Raises:
        RecipeError: it is something else.
    """
    if key is None:
        return
    is_key = isinstance(key, jax.Array | np.ndarray) and (
        jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == np.uint32
    )
    if not is_key:
        raise RecipeError(f"key: expected jax.random.key(seed), got {short(key)}")


def refuse_values(
    adapters: Sequence[AdapterSource], paths: Iterable[str], describe: Callable
) -> None:
    """Refuses factors with values that are not finite.

    Raises:
        FormatError: there is such a factor; it names the first.
    """
    for path in paths:
        for t, adapter in enumerate(adapters):
            if path not in adapter:
                continue
            lora = adapter[path]
            for name, factor in (("A", lora.a), ("B", lora.b)):
                if not np.isfinite(np.asarray(jax.device_get(factor), np.float64)).all():
                    raise FormatError(
                        f"{describe(adapters, t)}, module {path!r}: {name} has NaN or infinite "
                        "values; leave this adapter out, or train it again"
                    )


def check_rule(rule: Chain, key: jax.Array | None, adapters: int) -> jax.Array | None:
    """Checks that a rule has a key, if it needs one, valid parameters, and one weight per adapter.

    Returns:
        The key; None if the rule draws no random numbers, so that a key that was given anyway does
        not make another program to compile.

    Raises:
        MismatchError: naming the number of weights and of adapters.
        RecipeError: there is no key for a rule that draws random numbers, or a parameter is out
            of range.
    """
    check_key(key)
    if rule.needs_key and key is None:
        raise RecipeError(f"{rule!r} draws random numbers: pass key=jax.random.key(seed)")
    for part in validated(rule).rules:
        as_weights(getattr(part, "weights", None), adapters)
    return key if rule.needs_key else None


def module_scales(paths: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Returns the scale of each module, by path: a number or `AUTO`.

    Raises:
        MismatchError: a pattern matches no module.
        RecipeError: a scale is no number.
    """
    check_scale(scale)
    if not isinstance(scale, Mapping):
        return dict.fromkeys(paths, AUTO if is_auto(scale) else scale)
    for pattern in scale:
        if not fnmatch.filter(paths, pattern):
            raise MismatchError(
                f"scale pattern {pattern!r} matches no module; module paths look like {paths[0]!r}"
            )
    found = {
        path: next((scale[p] for p in scale if fnmatch.fnmatchcase(path, p)), AUTO)
        for path in paths
    }
    return {path: AUTO if is_auto(value) else value for path, value in found.items()}
