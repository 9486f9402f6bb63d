"""Extras: tensors of an adapter that are not low-rank updates, and policies to merge them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coremerge_jax.errors import MismatchError, RecipeError, UnsupportedError
from coremerge_jax.lora import AdapterSource, Array
from coremerge_jax.merging.groups import label


def merge_extras(
    adapters: Sequence[AdapterSource], policy: str
) -> tuple[dict[str, Array], Mapping[str, Any]]:
    """Applies the policy for extras (full weights, biases, trained token rows).

    Args:
        adapters: the adapters that are merged.
        policy: ``"error"`` refuses them; ``"first"`` takes those of the first adapter that has
            any, ``"keep=NAME"`` those of the adapter of that name, ``"mean"`` averages them over
            all adapters, which must have the same.

    Returns:
        The merged extras, and the configuration fields that writing them needs.

    Raises:
        UnsupportedError: there are extras and the policy is ``"error"``.
        MismatchError: the policy does not fit the adapters.
        RecipeError: the policy is not one of these.
    """
    having = [t for t, adapter in enumerate(adapters) if adapter.extras]
    kind, _, name = policy.partition("=") if isinstance(policy, str) else ("", "", "")
    if policy not in ("error", "first", "mean") and not (kind == "keep" and name):
        raise RecipeError(f"extras={policy!r}: expected 'error', 'first', 'mean' or 'keep=NAME'")
    if kind == "keep":
        return _keep(adapters, name)
    if not having:
        return {}, {}
    if policy == "error":
        t = having[0]
        raise UnsupportedError(
            f"{label(adapters, t)} has {len(adapters[t].extras)} tensors that are not low-rank "
            f"updates (first: {next(iter(adapters[t].extras))!r}); choose what to do with them: "
            "extras='first', 'mean' or 'keep=NAME' (--extras)"
        )
    chosen = adapters[having[0]]
    if policy == "first":
        return dict(chosen.extras), chosen.metadata.config
    for t, adapter in enumerate(adapters):
        if _layout(adapter) != _layout(chosen):
            raise MismatchError(
                f"extras='mean' needs the same extra tensors in all adapters, but "
                f"{label(adapters, t)} and {label(adapters, having[0])} differ"
            )
    return {
        key: np.mean(
            [np.asarray(adapter.extras[key], np.float64) for adapter in adapters], axis=0
        ).astype(value.dtype)
        for key, value in chosen.extras.items()
    }, chosen.metadata.config


def _keep(
    adapters: Sequence[AdapterSource], name: str
) -> tuple[dict[str, Array], Mapping[str, Any]]:
    named = [adapter for adapter in adapters if adapter.metadata.name == name]
    if len(named) != 1:
        names = ", ".join(repr(adapter.metadata.name) for adapter in adapters)
        found = "several adapters are" if named else "no adapter is"
        raise MismatchError(f"extras='keep={name}': {found} named {name!r}; names are {names}")
    return dict(named[0].extras), named[0].metadata.config


def _layout(adapter: AdapterSource) -> tuple:
    shapes = {key: tuple(value.shape) for key, value in adapter.extras.items()}
    return shapes, dict(adapter.metadata.config)
