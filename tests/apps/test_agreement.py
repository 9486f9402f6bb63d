"""Merges judged by the adapters' own predictions."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_adapters

import coremerge_jax as cm
from coremerge_jax import search

pytestmark = pytest.mark.wide

SHAPES = {"up": (12, 10), "out": (9, 12)}
PARAMS = {
    path: np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    for path, shape in SHAPES.items()
}


@pytest.fixture(scope="module")
def projected():
    return cm.project(random_adapters(SHAPES, (2, 3), dtype="float32"))


def forward(params, adapter, batch):
    up, out = (params[path] + adapter[path].dense() for path in SHAPES)
    return jnp.tanh(batch @ up.T) @ out.T


def inputs(sizes=((8, 8), (8,)), seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal((n, 10)).astype(np.float32) for n in task] for task in sizes]


def own(projected, t):
    return projected.merge(cm.task_arithmetic(), weights=np.eye(2)[t], scale=1.0)


def test_an_adapter_agrees_with_itself():
    (adapter,) = random_adapters(SHAPES, (3,), dtype="float32")
    evaluate = search.agreement(forward, [adapter], inputs()[:1], params=PARAMS)
    assert evaluate(adapter) == pytest.approx({"agreement": 1, "kl": 0}, abs=1e-5)


def test_means_over_tasks_of_what_is_counted_by_hand(projected):
    given = inputs()
    merged = projected.merge(cm.tsv(), scale=1.0)
    found = search.agreement(forward, projected, given, params=PARAMS)(merged)
    shares, apart = [], []
    for t, batches in enumerate(given):
        x = np.concatenate(batches)
        logits = [forward(PARAMS, adapter, x) for adapter in (merged, own(projected, t))]
        shares.append(float(np.mean(np.argmax(logits[0], -1) == np.argmax(logits[1], -1))))
        apart.append(float(np.mean(search.divergence(*logits))))
    assert shares[0] != shares[1]
    expected = {"agreement": np.mean(shares), "kl": np.mean(apart)}
    assert found == pytest.approx(expected, rel=1e-4)


def test_it_decides_a_sweep(projected):
    evaluate = search.agreement(forward, projected, inputs(((64,), (64,))), params=PARAMS)
    swept = search.sweep(
        projected, cm.tsv(), evaluate, {"scale": [0.0, 0.7, 30.0]}, method=search.line()
    )
    assert swept.objective == "agreement"
    assert swept.best.scale == 0.7
    assert swept.best.metrics["kl"] < swept.records[2].metrics["kl"]


def test_the_adapters_predict_once(projected):
    calls = []

    def counted(adapter, batch):
        calls.append(1)
        return forward(PARAMS, adapter, batch)

    evaluate = search.agreement(counted, projected, inputs())
    assert len(calls) == 1  # traced
    for scale in (0.5, 1.0):
        evaluate(projected.merge(cm.tsv(), scale=scale))
    assert len(calls) == 2


def test_positions_of_weight_0_do_not_count(projected):
    given = inputs()
    longer = [[np.concatenate([x, 9 * x]) for x in task] for task in given]
    merged = projected.merge(cm.tsv(), scale=1.0)
    found = search.agreement(
        forward, projected, longer, params=PARAMS, mask=lambda x: jnp.arange(len(x)) < len(x) // 2
    )(merged)
    plain = search.agreement(forward, projected, given, params=PARAMS)(merged)
    assert found == pytest.approx(plain, rel=1e-5)


def test_other_teachers(projected):
    merged = projected.merge(cm.tsv(), scale=1.0)
    evaluate = search.agreement(
        forward, projected, inputs(), params=PARAMS, teachers=[merged, merged]
    )
    assert evaluate(merged) == pytest.approx({"agreement": 1, "kl": 0}, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"forward": None}, "forward: expected a function"),
        ({"inputs": inputs()[:1]}, "inputs of 1 tasks for 2 adapters"),
        ({"temperature": -1.0}, "temperature=-1.0: expected a number above 0"),
        ({"mask": 1}, "mask: expected a function"),
        ({"teachers": ["x", "y"]}, r"adapters\[0\]: expected an adapter"),
    ],
)
def test_what_cannot_be_compared_is_refused(projected, given, match):
    start = {"forward": forward, "inputs": inputs(), "params": PARAMS}
    with pytest.raises(cm.CoreMergeError, match=match):
        search.agreement(adapters=projected, **start | given)
