"""Outputs of the paper's reference implementation (github.com/apanariello4/core-space-merging)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from helpers import dense, distance, map_factors, plain_merge

import coremerge_jax as cm

DATA = Path(__file__).parents[1] / "data"
SETS = ("equal_ranks", "mixed_ranks", "saturated")
SPACES = {
    "core": cm.core(),
    "full": cm.full(),
    "knots": cm.knots(),
    "vector": cm.full(),
    "svd": cm.knots(scaled=True),
}


@functools.cache
def load(name):
    with np.load(DATA / f"{name}.npz") as arrays:
        arrays = dict(arrays)
    spec = json.loads((DATA / f"{name}.json").read_text())
    adapters = [
        cm.Adapter(
            {
                path: cm.LoRA(a=arrays[f"in/{t}/{path}/A"], b=arrays[f"in/{t}/{path}/B"])
                for path in spec["shapes"]
            }
        )
        for t in range(len(spec["ranks"]))
    ]
    expected = [
        {path: arrays[f"out/{i}/{path}"] for path in spec["shapes"]}
        for i in range(len(spec["cases"]))
    ]
    return adapters, spec["cases"], expected


def core_or_irregular(name, space):
    return space == "core" or name == "mixed_ranks"


def core_and_irregular(name, space):
    return space == "core" and name == "mixed_ranks"


def cases(well_posed, by_day=core_or_irregular):
    for name in SETS:
        for i, case in enumerate(load(name)[1]):
            if case["well_posed"] == well_posed:
                parts = [name, case["space"], case["method"], *map(str, case["params"].values())]
                place = name, case["space"]
                marks = [] if core_and_irregular(*place) else [pytest.mark.wide]
                marks += [] if by_day(*place) else [pytest.mark.nightly]
                label = "-".join(parts + ["iso"] * case["isotropize"])
                yield pytest.param(name, i, id=label, marks=marks)


def rule_of(case):
    params = case["params"]
    rule = {
        "mean": cm.mean,
        "tv": cm.task_arithmetic,
        "ties": lambda: cm.ties(
            density=params["topK"] / 100,
            reduce=params.get("merging_type", "mean"),
            scope="model" if case["space"] in ("vector", "svd") else "module",
        ),
        "tsv": cm.tsv,
        "cart": lambda: cm.cart(
            rank=params["cart_pruning_rank"], scale=params["cart_scaling_coeffs"]
        ),
    }[case["method"]]()
    return cm.chain(rule, cm.isotropize()) if case["isotropize"] else rule


def merge(name, i, precision, adapters=None):
    case = load(name)[1][i]
    adapters = adapters or load(name)[0]
    return plain_merge(adapters, rule_of(case), space=SPACES[case["space"]], precision=precision)


def check(name, i, precision, tolerance):
    merged = merge(name, i, precision)
    for path, expected in load(name)[2][i].items():
        assert distance(dense(merged[path]), expected) <= tolerance, path


@pytest.mark.parametrize(("name", "i"), list(cases(well_posed=True)))
def test_equals_the_reference(name, i):
    check(name, i, "float64", 1e-5)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "i"), list(cases(well_posed=True, by_day=core_and_irregular)))
def test_equals_the_reference_in_float32(name, i):
    check(name, i, "float32", 1e-4)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "i"), list(cases(well_posed=False, by_day=core_and_irregular)))
def test_is_well_defined_where_the_reference_is_not(name, i):
    """Finite, and a permutation of rows and columns permutes the result and does no more."""
    adapters, _, _ = load(name)
    rng = np.random.default_rng(i)
    merged = merge(name, i, "float64")
    orders = {
        shape: (rng.permutation(shape[0]), rng.permutation(shape[1]))
        for shape in {lora.shape for lora in merged.values()}
    }

    def permute(a, b):
        rows, columns = orders[b.shape[0], a.shape[1]]
        return a[:, columns], b[rows]

    permuted = merge(name, i, "float64", map_factors(adapters, permute))
    for path, lora in merged.items():
        rows, columns = orders[lora.shape]
        update = dense(lora)
        assert np.isfinite(update).all()
        assert np.linalg.norm(update) > 0
        assert distance(dense(permuted[path]), update[np.ix_(rows, columns)]) <= 1e-5
