"""Adapters left out of some layers, where they do harm."""

import sys

import numpy as np
import pytest
from helpers import assert_same, narrow, random_adapters

import coremerge_jax as cm
from coremerge_jax import search
from coremerge_jax.search.grouping import groups_of

pytestmark = pytest.mark.wide

SHAPES = {
    f"layers.{i}.{name}": shape
    for i in range(3)
    for name, shape in {"q": (12, 10), "up": (14, 12)}.items()
}
HARM = ("layers.1", 2)
"""The layer and adapter that do harm."""


@pytest.fixture(scope="module")
def adapters():
    return random_adapters(SHAPES, (2, 3, 2), dtype="float32")


def without(adapters, layer, task):
    """The adapters, of which one lacks the modules of a layer."""
    return [
        adapter.replace({path: x for path, x in adapter.items() if not path.startswith(layer)})
        if t == task
        else adapter
        for t, adapter in enumerate(adapters)
    ]


def near(target):
    """A judge: the nearer a merge is to a target, the better."""

    def evaluate(merged):
        apart = [np.linalg.norm(merged[path].dense() - target[path].dense()) for path in target]
        return {"nearness": -float(np.sum(apart)), "seen": 1}

    return evaluate


RULES = {
    "task_arithmetic": cm.task_arithmetic(),
    "tsv": cm.tsv(),
    "tsv|isotropize": cm.chain(cm.tsv(), cm.isotropize()),
}


@pytest.mark.parametrize("name", narrow(RULES, ["tsv"], night=["tsv|isotropize"]))
def test_what_is_left_out_is_absent(adapters, name):
    """A core of zeros is as good as no module."""
    weights = {
        path: np.asarray([1.0, 1.0, 0.0 if path.startswith(HARM[0]) else 1.0]) for path in SHAPES
    }
    found = cm.project(adapters).merge(RULES[name], weights=weights, scale=1.0)
    assert_same(found, cm.merge(without(adapters, *HARM), RULES[name], scale=1.0), 1e-5)


@pytest.mark.parametrize("name", ["task_arithmetic", "tsv"])
def test_finds_the_harmful_adapter(adapters, name):
    rule = RULES[name]
    projected = cm.project(adapters)
    target = cm.project(without(adapters, *HARM)).merge(rule, scale=0.5)
    found = search.masks(projected, rule, near(target), scale=0.5, budget=150)
    expected = {f"layers.{i}": np.ones(3) for i in range(3)}
    expected[HARM[0]][HARM[1]] = 0
    assert list(found.groups) == list(expected)
    for layer, mask in expected.items():
        np.testing.assert_array_equal(found.groups[layer], mask)
    assert_same(found.adapter, target, 1e-5)
    assert_same(projected.merge(rule, weights=found.weights, scale=0.5), target, 1e-5)
    assert found.history[0]["nearness"] < found.history[found.step]["nearness"]
    assert len({tuple(sorted(row.items())) for row in found.history}) <= 150


def test_the_seed_decides(adapters):
    projected = cm.project(adapters)
    given = projected, cm.mean(), near(projected.merge(cm.mean(), weights=[1, 0, 1], scale=1.0))
    first, again, other = (
        search.masks(*given, budget=30, seed=seed, per="module", scale=1.0) for seed in (0, 0, 1)
    )
    assert first.history == again.history != other.history
    assert len(first.history) <= 30
    assert len(first.seconds) == len(first.history)


def test_nothing_is_left_out_without_gain(adapters):
    """The merge of all comes first, and stays unless another is better."""
    found = search.masks(adapters, cm.tsv(), lambda _: 1.0, budget=20, per="adapter")
    assert found.step == 0
    assert found.groups["*"].tolist() == [1, 1, 1]
    worst = search.masks(
        adapters, cm.tsv(), lambda x: {"b": 0, "a": len(x)}, budget=1, objective="a", maximize=False
    )
    assert worst.history == ({"step": 0, "b": 0, "a": 6},)


def test_one_variable(adapters):
    found = search.masks(adapters[:1], cm.tsv(), near(adapters[0]), per="adapter", budget=8)
    assert_same(found.adapter, dict(adapters[0]), 1e-6)


def test_masks_of_pieces_take_away_shares_alone(adapters):
    pieces = cm.project(adapters).pieces(cm.tsv())
    rule = cm.task_arithmetic()
    target = pieces.merge(rule, weights={"layers.0.q": [0, 1, 1]}, scale=1.0)
    found = search.masks(pieces, rule, near(target), per=["layers.0.q"], scale=1.0, budget=40)
    assert found.groups["layers.0.q"].tolist() == [0, 1, 1]
    assert found.groups["*"].tolist() == [1, 1, 1]


def test_layers_are_paths_up_to_the_first_number():
    groups = {
        "model.layers.10.mlp.up": "model.layers.10",
        "blocks/3/attn/0/q": "blocks/3",
        "x.experts[2].w1": "x.experts[2]",
        "conv1.down": "*",
        "head": "*",
    }
    assert groups_of(list(groups), "layer") == groups


def test_plot(adapters, tmp_path):
    history = {"step": 0, "score": 1.0}, {"step": 1, "score": 3.0}
    figure = search.Fit(adapters[0], {}, {}, 1, history).plot(tmp_path / "x.svg")
    (panel,) = figure.axes
    assert [line.get_label() for line in panel.lines] == ["score", "kept"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"evaluate": 3}, "evaluate: expected a function"),
        ({"evaluate": lambda _: "x"}, "evaluate, with {'left out': 0}: gave 'x'"),
        ({"evaluate": lambda _: np.nan}, "none of .* masks has a finite score"),
        ({"objective": "scor"}, "unknown metric 'scor'; did you mean 'score'"),
        ({"budget": 0}, "budget=0: expected a whole number"),
        ({"seed": -1}, "seed=-1: expected a whole number"),
        ({"scale": "x"}, "scale='x': expected a number"),
        ({"per": "x"}, "pattern 'x' matches no module"),
        ({"rule": 3}, "expected a merge rule"),
    ],
)
def test_what_cannot_be_searched_is_refused(adapters, given, match):
    start = {"rule": cm.tsv(), "evaluate": lambda _: {"score": 1.0}, "budget": 3}
    with pytest.raises(cm.CoreMergeError, match=match):
        search.masks(adapters, **start | given)


def test_needs_cmaes(adapters, monkeypatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(cm.UnsupportedError, match=r"coremerge-jax\[masks\]"):
        search.masks(adapters, cm.tsv(), lambda _: 1.0)
