"""Arguments of a merge, checked: errors name the argument and say what to write."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from coremerge_jax.errors import FormatError, MismatchError, RecipeError, hint
from coremerge_jax.lora import Adapter
from coremerge_jax.spaces import SPACES, Space, core


def as_adapters(adapters: Any) -> Sequence[Adapter]:
    """Checks that these are adapters, in a sequence.

    Raises:
        RecipeError: they are something else.
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
    """Checks that this is an adapter.

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
        told = f"write it as an object, {name}()" if name in SPACES else hint(name, SPACES)[2:]
        raise RecipeError(f"space={space!r} is text; {told}")
    if isinstance(space, type) or not callable(getattr(space, "project", None)):
        told = "; call it, with ()" if isinstance(space, type) else ""
        raise RecipeError(f"space: expected a merge space such as core(), got {short(space)}{told}")
    return space


def as_weights(weights: Any, adapters: int, name: str = "weights") -> Any:
    """Checks that there is one number for each adapter. They may be traced.

    Raises:
        MismatchError: there is another number of them.
        RecipeError: they are no numbers, or not finite.
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
        raise MismatchError(f"{name}={weights}: {expected}")
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
    """Checks that a scale is a number, or numbers by pattern. They may be traced.

    Raises:
        RecipeError: it is not, or not finite.
    """
    if not isinstance(scale, Mapping):
        check_number("scale", scale, ", or numbers by pattern of module paths")
        return
    for pattern, value in scale.items():
        if not isinstance(pattern, str):
            raise RecipeError(f"scale of {pattern!r}: expected a pattern of module paths as text")
        check_number(f"scale of {pattern!r}", value)


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
        raise RecipeError(f"{name}={value}: expected a finite number{more}")


def is_finite(value: Any) -> bool:
    """Tells whether a number is finite as a float."""
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
    """Checks that a PRNG key is one.

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


def refuse_values(adapters: Sequence[Adapter], paths: Iterable[str], describe: Callable) -> None:
    """Names the first factor with values that are not finite, if there is one.

    Raises:
        FormatError: there is one.
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


def short(value: Any) -> str:
    """Returns a value for a message: briefly."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | int | float | complex | bool | None):
        shown = repr(value)
        return shown if len(shown) <= 60 else f"{shown[:60]} …"
    return f"{type(value).__name__}"
