"""Parameters of rules and spaces: what is out of range is refused where it is given."""

import dataclasses

import numpy as np
import pytest

import coremerge_jax as cm
from coremerge_jax.rules import RULES
from coremerge_jax.spaces import SPACES

NEVER = [float("nan"), float("inf"), -float("inf"), "0.5", 1j, np.float32("nan"), [1], 2**31]
# What else is out of range; no entry: any finite number will do.
OUTSIDE = {
    "ties.density": [0, -0.1, 1.1, 2, np.float32(2)],
    "sce.density": [0, 1.1],
    "prune.density": [0, 1.1],
    "dare.drop": [-0.1, 1, 1.5],
    "tsv.rank": [0, -1, 1.5, np.int64(0)],
    "cart.rank": [0, -1, 1.5],
    "cart.scale": [10**400],
    "iso_cts.common": [-1, 0.0, 1.5],
    "iso_cts.specific": [-1, 0.5],
    "dc_merge.density": [0, 1.1],
    "dc_merge.rho": [0, 0.5],
    "flatten.power": [-0.5],
    "svc.alpha": [0, -1],
    "ties.weights": [(1.0, float("nan")), ("1", 2), {"a": 1}],
    "task_arithmetic.weights": [(1.0, float("inf")), {"a": 1}],
    "core.rtol": [1, 2, -0.1, True],
    "tucker.rank": [0, -1, 1.5, True],
    "tucker.beta": [-0.1, 1.1],
    "tucker.iterations": [0, 1.5],
    "tucker.tolerance": [-1],
    "knots.scaled": [0, "yes"],
    "core.gauge": ["balance", 1],
}
WORDS = {"elect", "reduce", "scope", "gauge", "scaled", "weights"}
MADE = {**RULES, **SPACES}
EVERY = [(name, field.name) for name, make in MADE.items() for field in dataclasses.fields(make)]


@pytest.mark.parametrize(("name", "field"), EVERY, ids=".".join)
def test_what_is_out_of_range_is_refused(name, field):
    values = OUTSIDE.get(f"{name}.{field}", [])
    assert values or field in WORDS, "a parameter without a test"
    for value in [*values, *([] if field in WORDS else NEVER)]:
        with pytest.raises(cm.RecipeError, match=rf"{field}.*: expected"):
            MADE[name](**{field: value})


def test_what_is_in_range_is_taken():
    cm.core(rtol=0)
    cm.tsv(rank=np.int64(2))
    cm.cart(rank=np.int32(2), scale=-1)
    cm.flatten(power=0)
    cm.ties(density=np.float32(0.5), weights=(1, 0.5))
    cm.tucker(rank=1, beta=0, iterations=1, tolerance=0)
