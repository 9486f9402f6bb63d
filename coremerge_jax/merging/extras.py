"""Extras: tensors of an adapter that are not low-rank updates, and policies to merge them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import AdapterSource, Array, is_traced
from coremerge_jax.merging.groups import label

Config = Mapping[str, Any]

_CHOICES = "'error', 'first', 'mean', 'drop' or 'keep=ADAPTER'"

# The field of a configuration that says which rows trained tokens are.
_ROWS = "trainable_token_indices"


@dataclasses.dataclass(frozen=True)
class MergedExtras:
    """Extras of a merge.

    Attributes:
        tensors: the tensors, by name.
        config: the configuration fields that writing them needs.
        beside: files with other trained weights, which go along.
    """

    tensors: dict[str, Array] = dataclasses.field(default_factory=dict)
    config: Config = dataclasses.field(default_factory=dict)
    beside: tuple[Path, ...] = ()

    @classmethod
    def of(cls, adapter: AdapterSource) -> Self:
        """Returns those of one adapter."""
        metadata = adapter.metadata
        return cls(dict(adapter.extras), metadata.config, metadata.beside)


def merge_extras(
    adapters: Sequence[AdapterSource], policy: str, numbers: Sequence[int] | None = None
) -> MergedExtras:
    """Applies the policy for extras (full weights, biases, trained token rows).

    Files with other trained weights beside an adapter (`Metadata.beside`) are extras, too, but are
    not read: they can be kept as they are, or left out.

    Args:
        adapters: the adapters that are merged.
        policy: ``"error"`` refuses them, unless all adapters have the same with equal values;
            ``"first"`` takes those of the first adapter that has any; ``"keep=ADAPTER"`` those of
            one adapter, by its name, its folder, or its number from 1 on; ``"mean"`` averages them
            over all adapters, which must have tensors of the same names and shapes; ``"drop"``
            leaves them out.
        numbers: number of each adapter; 1, 2, … by default.

    Raises:
        UnsupportedError: there are extras and the policy is ``"error"``, or files and it is
            ``"mean"``.
        MismatchError: the policy does not fit the adapters.
        RecipeError: the policy is not one of these.
    """
    kind, _, name = policy.partition("=") if isinstance(policy, str) else ("", "", "")
    if policy not in ("error", "first", "mean", "drop") and not (kind == "keep" and name):
        raise RecipeError(f"extras={policy!r}: expected {_CHOICES}")
    if kind == "keep":
        numbers = numbers or range(1, len(adapters) + 1)
        return MergedExtras.of(adapters[_find(adapters, name, numbers)])
    having = [t for t, adapter in enumerate(adapters) if adapter.extras or adapter.metadata.beside]
    if not having or policy == "drop":
        return MergedExtras()
    chosen = adapters[having[0]]
    if policy == "first" or (policy == "error" and _all_equal(adapters)):
        return MergedExtras.of(chosen)
    if policy == "error":
        raise UnsupportedError(
            f"{label(adapters, having[0])} has {_listed(chosen)}; choose what to do with them: "
            "extras='first', 'mean', 'drop' or 'keep=ADAPTER' (--extras)"
        )
    for t, adapter in enumerate(adapters):
        if adapter.metadata.beside:
            raise UnsupportedError(
                f"extras='mean': {label(adapters, t)} has {_listed(adapter)}, which are not read; "
                "choose 'first', 'drop' or 'keep=ADAPTER' (--extras)"
            )
        if difference := _difference(adapters, having[0], t):
            raise MismatchError(
                f"extras='mean': {difference}; choose 'first', 'drop' or 'keep=ADAPTER' (--extras)"
            )
    return _mean(adapters)


def _listed(adapter: AdapterSource) -> str:
    """Returns the extras of an adapter in words."""
    if files := adapter.metadata.beside:
        names = ", ".join(sorted(file.name for file in files))
        return f"other trained weights beside it ({names})"
    first = next(iter(adapter.extras))
    return f"{len(adapter.extras)} tensors that are not low-rank updates (first: {first!r})"


def _mean(adapters: Sequence[AdapterSource]) -> MergedExtras:
    first, *others = adapters
    means = {
        key: np.mean(
            [np.asarray(adapter.extras[key], np.float64) for adapter in adapters], axis=0
        ).astype(value.dtype)
        for key, value in first.extras.items()
    }
    config = dict(first.metadata.config)
    if saved := [x for a in adapters for x in a.metadata.config.get("modules_to_save") or ()]:
        config["modules_to_save"] = list(dict.fromkeys(saved))
    revision = config.get("revision")
    if any(other.metadata.config.get("revision") != revision for other in others):
        config.pop("revision", None)
    return MergedExtras(means, config)


def _difference(adapters: Sequence[AdapterSource], first: int, t: int) -> str:
    """Returns how the extras of two adapters differ in names, shapes or rows; "" if not at all."""
    one, other = adapters[first].extras, adapters[t].extras
    names = f"{label(adapters, first)} and {label(adapters, t)}"
    if one.keys() != other.keys():
        name = min(one.keys() ^ other.keys())
        return f"only one of {names} has {name!r}"
    for name, value in one.items():
        shapes = tuple(value.shape), tuple(other[name].shape)
        if shapes[0] != shapes[1]:
            return f"{name!r} has the shapes {shapes[0]} and {shapes[1]} in {names}"
    rows = [adapters[i].metadata.config.get(_ROWS) for i in (first, t)]
    return f"the trained rows of {names} are not of the same tokens" if rows[0] != rows[1] else ""


def _all_equal(adapters: Sequence[AdapterSource]) -> bool:
    """Returns True if the extras of all adapters agree in names, shapes, rows and values."""
    if len(adapters) == 1 or any(adapter.metadata.beside for adapter in adapters):
        return False
    if any(_difference(adapters, 0, t) for t in range(len(adapters))):
        return False
    if any(is_traced(x) for a in adapters for x in a.extras.values()):
        return False
    return all(
        np.array_equal(np.asarray(value), np.asarray(adapter.extras[name]))
        for name, value in adapters[0].extras.items()
        for adapter in adapters[1:]
    )


def _find(adapters: Sequence[AdapterSource], text: str, numbers: Sequence[int]) -> int:
    """Returns the place of the adapter that a text names."""
    place = os.path.realpath(text)
    ways = (
        [t for t, adapter in enumerate(adapters) if adapter.metadata.name == text],
        [t for t, a in enumerate(adapters) if place in map(os.path.realpath, a.folders)],
        [t for t, number in enumerate(numbers) if str(number) == text],
    )
    for found in ways:
        if len(found) == 1:
            return found[0]
    told = ", ".join(
        f"{number}: {adapter.metadata.name!r}"
        for number, adapter in zip(numbers, adapters, strict=True)
    )
    many = "several adapters are" if any(ways) else "no adapter is"
    raise MismatchError(
        f"extras='keep={text}': {many} named {text!r}; give a name, a folder or a number ({told})"
    )
