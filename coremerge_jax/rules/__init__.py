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
from coremerge_jax.rules.calibration import pico, svc
from coremerge_jax.rules.dc_merge import dc_merge
from coremerge_jax.rules.iso_cts import iso_cts
from coremerge_jax.rules.linear import mean, task_arithmetic
from coremerge_jax.rules.sparse import Ties, TiesAbove, dare, prune, sce, ties
from coremerge_jax.rules.spectral import cart, flatten, isotropize, tsv

RULES: dict[str, Callable[..., Rule]] = {
    "mean": mean,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "sce": sce,
    "dare": dare,
    "prune": prune,
    "tsv": tsv,
    "cart": cart,
    "iso_cts": iso_cts,
    "dc_merge": dc_merge,
    "isotropize": isotropize,
    "flatten": flatten,
    "svc": svc,
    "pico": pico,
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
    "dc_merge",
    "flatten",
    "from_function",
    "iso_cts",
    "isotropize",
    "mean",
    "pico",
    "prune",
    "sce",
    "svc",
    "task_arithmetic",
    "ties",
    "tsv",
]
