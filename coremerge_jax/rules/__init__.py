"""Merge rules: pure functions from the adapters' cores ``(T, p, q)`` to one core ``(p, q)``."""

from collections.abc import Callable

from coremerge_jax.rules.base import (
    Chain,
    Context,
    Equivariance,
    Rule,
    Step,
    as_rule,
    chain,
    from_function,
)
from coremerge_jax.rules.linear import mean, task_arithmetic
from coremerge_jax.rules.sparse import Ties, TiesAbove, dare, ties
from coremerge_jax.rules.spectral import cart, isotropize, tsv

RULES: dict[str, Callable[..., Rule]] = {
    "mean": mean,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "tsv": tsv,
    "cart": cart,
    "isotropize": isotropize,
}

__all__ = [
    "RULES",
    "Chain",
    "Context",
    "Equivariance",
    "Rule",
    "Step",
    "Ties",
    "TiesAbove",
    "as_rule",
    "cart",
    "chain",
    "dare",
    "from_function",
    "isotropize",
    "mean",
    "task_arithmetic",
    "ties",
    "tsv",
]
