"""Merges of the shipped adapters with unlabelled images of each task."""

from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util

import coremerge_jax as cm
from coremerge_jax.demo.data import adapters, base, questions
from coremerge_jax.demo.model import Params, fold, forward

# Images of each task: for statistics, and for coefficients; and in a batch.
INPUTS, LEARNED, BATCH = 64, 80, 8

REGMEAN = cm.regmean(orthogonalize=False, ridge=0.01)


def inputs(count: int = INPUTS) -> list[list[jax.Array]]:
    """Returns batches of images ``(8, 8, 8)`` of each task, without labels."""
    images = np.asarray(questions("validation")[0])
    return [list(task[:count].reshape(-1, BATCH, *task.shape[1:])) for task in images]


def statistics(count: int = INPUTS) -> cm.Statistics:
    """Returns statistics of so many images of each task, read by the task's own adapter."""

    def read(params: dict, images: jax.Array) -> jax.Array:
        return forward(traverse_util.flatten_dict(params, sep="."), images)

    tree = traverse_util.unflatten_dict(dict(base()), sep=".")
    return cm.collect(tree, _adapters(), inputs(count), read)


def predict(params: Params, adapter: cm.Adapter, images: jax.Array) -> jax.Array:
    """Returns the logits of the model with an adapter."""
    return forward(fold(params, adapter), images)


def distill(rule: cm.rules.Rule) -> cm.Adapter:
    """Returns a merge whose coefficients are learned from the adapters' own predictions."""
    given = statistics(LEARNED) if rule.needs_inputs else None
    projected = cm.project(_adapters(), statistics=given)
    return cm.search.distill(predict, projected, rule, inputs(LEARNED), params=base()).adapter


def _adapters() -> list[cm.Adapter]:
    return [cm.load_peft(path) for path in adapters()]


WITH_INPUTS: dict[str, Callable[[], cm.Adapter]] = {
    "regmean": lambda: cm.merge(_adapters(), REGMEAN, statistics=statistics()),
    "tsv, distilled": lambda: distill(cm.tsv()),
    "regmean, distilled": lambda: distill(REGMEAN),
}
"""Merges at the automatic scale, or with learned coefficients, by name."""
