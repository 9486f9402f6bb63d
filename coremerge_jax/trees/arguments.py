"""Checks of what users say of a tree: patterns of keys, the rank and alpha."""

import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from coremerge_jax.errors import FormatError, UnsupportedError, hint
from coremerge_jax.lora import Adapter
from coremerge_jax.text import short
from coremerge_jax.trees.paths import matches


def check_patterns(patterns: Iterable[str], keys: Collection[str], option: str) -> None:
    """Refuses patterns that match nothing: a mistyped one would go unnoticed.

    Raises:
        FormatError: a pattern matches no key; the message has the nearest.
    """
    for pattern in patterns:
        if not any(matches(key, [pattern]) for key in keys):
            what = "key" if option == "ignore" else "module"
            raise FormatError(
                f"{option} (--{option}): pattern {pattern!r} matches no {what}{hint(pattern, keys)}"
            )


def refuse_extras(adapter: Adapter, holder: str) -> None:
    """Refuses tensors that are not low-rank updates.

    Args:
        adapter: what is written, or its outline.
        holder: what cannot hold them, for the message.

    Raises:
        UnsupportedError: there are some.
    """
    if adapter.extras:
        raise UnsupportedError(
            f"the adapter has {len(adapter.extras)} tensors that are not low-rank updates (first: "
            f"{min(adapter.extras)!r}), which {holder} cannot hold; keep it in PEFT's format, "
            "or leave them out (merge --extras drop; in Python, adapter.replace(extras={}))"
        )


def check_rank(value: object, name: str) -> int:
    """Returns a rank that was given.

    Raises:
        FormatError: it is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise FormatError(f"{name} is {short(value)}; expected a positive integer")
    return int(value)


def check_alpha(value: Any, name: str) -> float:
    """Returns an alpha that was given.

    Raises:
        FormatError: it is not a positive finite number.
    """
    number = isinstance(value, numbers.Real | np.ndarray) and not isinstance(value, bool)
    try:
        fits = number and np.ndim(value) == 0 and math.isfinite(value) and value > 0
    except (OverflowError, TypeError):  # an integer above all floats, an array of objects
        fits = False
    if not fits:
        raise FormatError(f"{name} is {short(value)}; expected a positive number")
    return float(value)
