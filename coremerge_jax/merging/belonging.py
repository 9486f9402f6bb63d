"""Adapters that belong together, and the metadata on which they agree. Does without JAX."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coremerge_jax.errors import CoreMergeWarning, MismatchError
from coremerge_jax.lora import AdapterSource, Lengths, Metadata, is_traced
from coremerge_jax.merging.alignment import align
from coremerge_jax.merging.base_names import best_name, same_base
from coremerge_jax.merging.groups import label


def present_adapters(
    adapters: Sequence[AdapterSource], weights: Any, allow_other_base: bool, allow_disjoint: bool
) -> dict[int, AdapterSource]:
    """Returns the adapters that take part, those of a weight other than 0, by their indices.

    Their modules have common names (`align`).

    Raises:
        MismatchError: there is none, or they do not belong together.
    """
    if not adapters:
        raise MismatchError("no adapters to merge; expected at least one")
    tasks = [t for t in range(len(adapters)) if not _is_zero(weights, t)]
    if not tasks:
        raise MismatchError("all weights are 0: nothing to merge")
    present = align([adapters[t] for t in tasks])
    if not allow_other_base:
        check_same_base(present)
    if not allow_disjoint:
        check_common_modules(present)
    return dict(zip(tasks, present, strict=True))


def check_same_base(adapters: Sequence[AdapterSource]) -> None:
    """Checks that the base models that adapters name can be one (`base_names.same_base`).

    Raises:
        MismatchError: two of them cannot.
    """
    bases: dict[str, int] = {}
    for t, adapter in enumerate(adapters):
        if adapter.metadata.base_model:
            bases.setdefault(adapter.metadata.base_model, t)
    for (x, i), (y, j) in itertools.combinations(bases.items(), 2):
        if not same_base(x, y):
            raise MismatchError(
                f"{label(adapters, i)} was trained on base model {x!r}, {label(adapters, j)} on "
                f"{y!r}; if they are the same model, say so with allow_other_base "
                "(--allow-other-base)"
            )


def check_common_modules(adapters: Sequence[AdapterSource]) -> None:
    """Checks that each adapter shares a module with another.

    Raises:
        MismatchError: one does not.
    """
    for t, adapter in enumerate(adapters):
        others = [other for other in adapters if other is not adapter]
        if others and not any(path in other for other in others for path in adapter):
            raise MismatchError(
                f"{label(adapters, t)} has no module in common with the others (its first is "
                f"{next(iter(adapter))!r}, theirs {next(iter(others[0]))!r}); if that is meant, "
                "allow it with allow_disjoint (--allow-disjoint)"
            )


def _is_zero(weights: Any, t: int) -> bool:
    if weights is None or is_traced(weights):
        return False
    return not is_traced(weights[t]) and float(weights[t]) == 0


def common_metadata(
    adapters: Sequence[AdapterSource], config: Mapping[str, Any], beside: tuple[Path, ...] = ()
) -> Metadata:
    """Returns the metadata on which all sources agree.

    Args:
        adapters: the sources.
        config: the fields of a configuration that the extras need.
        beside: the files with other trained weights that go along.

    Warns:
        CoreMergeWarning: the sources are of several task types, so the result has none.
    """
    tasks = {adapter.metadata.task_type for adapter in adapters} - {None}
    if len(tasks) > 1:
        warnings.warn(
            f"the adapters have the task types {', '.join(sorted(map(str, tasks)))}, so the result "
            "has none; peft then loads it as an adapter of any model",
            CoreMergeWarning,
            stacklevel=2,
        )

    def same(field: str) -> Any:
        first, *others = (getattr(adapter.metadata, field) for adapter in adapters)
        return first if all(other == first for other in others) else None

    return Metadata(
        base_model=best_name(a.metadata.base_model for a in adapters if a.metadata.base_model),
        task_type=tasks.pop() if len(tasks) == 1 else None,
        config=config,
        lengths=_common_lengths(adapters),
        format=same("format"),
        header=_common_header(adapters),
        prefix=same("prefix"),
        beside=beside,
    )


def _common_header(adapters: Sequence[AdapterSource]) -> dict[str, str]:
    """Returns the fields of all headers; those on which the adapters differ are empty."""
    headers = [adapter.metadata.header for adapter in adapters]
    names = dict.fromkeys(name for header in headers for name in header)
    values = {name: {header.get(name, "") for header in headers} for name in names}
    return {name: found.pop() if len(found) == 1 else "" for name, found in values.items()}


def _common_lengths(adapters: Sequence[AdapterSource]) -> tuple[Lengths, ...]:
    """Returns the lengths of the modules on which all adapters agree."""
    entries = [entry for adapter in adapters for entry in adapter.metadata.lengths]
    found: dict[str, set[Lengths]] = {}
    for entry in entries:
        found.setdefault(entry[0], set()).add(entry)
    return tuple(next(iter(same)) for same in found.values() if len(same) == 1)
