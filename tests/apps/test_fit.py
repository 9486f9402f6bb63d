"""Coefficients learned by gradients through the merge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, assert_same, narrow, random_adapters

import coremerge_jax as cm
from coremerge_jax import search

SHAPES = {"a.q": (12, 10), "a.up": (14, 12), "b.q": (12, 10)}
TRUE = {"a.q": [0.5, 2.0, 1.0], "a.up": [1.5, 0.2, 0.7], "b.q": [1.0, 1.0, 0.3]}


@pytest.fixture(scope="module")
def adapters():
    return random_adapters(SHAPES, (2, 3, 2), dtype="float32")


def inputs(count, seed=0):
    """Batches of inputs for each module."""
    rng = np.random.default_rng(seed)
    return [
        {path: rng.standard_normal((8, n)).astype(np.float32) for path, (_, n) in SHAPES.items()}
        for _ in range(count)
    ]


def loss_to(target):
    """Mean squared difference of the outputs to those of another adapter."""
    kept = {path: jnp.asarray(lora.dense(), jnp.float32) for path, lora in target.items()}

    def loss(merged, batch):
        return sum(
            jnp.mean((batch[path] @ (merged[path].dense() - kept[path]).T) ** 2) for path in SHAPES
        )

    return loss


RULES = {
    "task_arithmetic": cm.task_arithmetic(),
    "tsv|isotropize": cm.chain(cm.tsv(), cm.isotropize()),
    "dare|task_arithmetic": cm.chain(cm.dare(), cm.task_arithmetic()),
}


@pytest.mark.parametrize("name", narrow(RULES, ["task_arithmetic"], night=["tsv|isotropize"]))
def test_finds_the_coefficients_of_a_merge(adapters, name):
    rule = RULES[name]
    projected = cm.project(adapters)
    weights = {path: np.asarray(x) for path, x in TRUE.items()}
    target = projected.merge(rule, weights=weights, scale=1.0, key=KEY)
    found = search.fit(
        loss_to(target),
        projected,
        rule,
        inputs(300),
        per="module",
        optimizer=optax.adam(0.05),
        key=KEY,
    )
    assert found.step == 300
    assert found.history[-1]["loss"] < 1e-3 * found.history[1]["loss"]
    assert_same(found.adapter, target, 0.05)
    expected = projected.merge(rule, weights=found.weights, scale=1.0, key=KEY)
    assert_same(expected, found.adapter, 1e-6)
    if name != "tsv|isotropize":  # of which some coefficients hardly matter
        for path, expected in TRUE.items():
            np.testing.assert_allclose(found.weights[path], expected, atol=0.05)


@pytest.mark.wide
def test_groups(adapters):
    loss = loss_to(adapters[0])
    by_adapter = search.fit(loss, adapters, cm.mean(), inputs(5))
    assert {name: x.shape for name, x in by_adapter.groups.items()} == {"*": (3,)}
    by_pattern = search.fit(loss, adapters, cm.mean(), inputs(5), per=["b.*", "*.q"])
    assert list(by_pattern.groups) == ["*.q", "*", "b.*"]
    assert by_pattern.weights["a.q"] is by_pattern.groups["*.q"]
    assert by_pattern.weights["b.q"] is by_pattern.groups["b.*"]
    by_module = search.fit(loss, adapters, cm.mean(), inputs(5), per="module", initial=[1, 0, 2])
    assert list(by_module.groups) == list(SHAPES)


@pytest.mark.wide
def test_stops_early_and_keeps_the_best(adapters):
    """The batches lead away from where the validation batches are best."""
    projected = cm.project(adapters)
    rule = cm.task_arithmetic()
    best = projected.merge(rule, weights=[0.9, 0.9, 0.9], scale=1.0)

    def loss(merged, batch):
        sign = batch["sign"]
        return sign * loss_to(best)(merged, batch)

    batches = [{**x, "sign": np.float32(-1)} for x in inputs(100)]
    validation = [{**x, "sign": np.float32(1)} for x in inputs(2, seed=1)]
    found = search.fit(loss, projected, rule, batches, validation=validation, every=2, patience=3)
    assert found.step == 0
    assert [row["step"] for row in found.history] == [0, 2, 4, 6]
    np.testing.assert_array_equal(found.groups["*"], 1)
    losses = [row["validation"] for row in found.history]
    assert losses == sorted(losses)


@pytest.mark.wide
def test_one_compilation(adapters):
    traced = 0

    def loss(merged, batch):
        nonlocal traced
        traced += 1
        return loss_to(adapters[0])(merged, batch)

    search.fit(loss, adapters, cm.tsv(), inputs(20), validation=inputs(2), every=5)
    assert traced == 2  # the step, and the loss alone


@pytest.mark.wide
def test_what_is_refused(adapters):
    loss = loss_to(adapters[0])
    with pytest.raises(ValueError, match="no batches to learn from"):
        search.fit(loss, adapters, cm.mean(), [])
    with pytest.raises(cm.MismatchError, match=r"pattern '\*\.k' matches no module.*'a\.q'"):
        search.fit(loss, adapters, cm.mean(), inputs(1), per=["*.k"])
    with pytest.raises(cm.MismatchError, match=r"of shape \(2,\) for 3 adapters"):
        search.fit(loss, adapters, cm.mean(), inputs(1), initial=[1.0, 2.0])
    with pytest.raises(NotImplementedError, match="dc_merge has no derivative"):
        search.fit(loss, adapters, cm.dc_merge(), inputs(1))
    with pytest.raises(ValueError, match="the loss is nan"):
        search.fit(
            lambda merged, batch: loss(merged, batch) * jnp.nan, adapters, cm.mean(), inputs(1)
        )


@pytest.mark.wide
def test_losses_of_logits():
    logits = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]])
    assert float(search.entropy(logits)) == pytest.approx(np.log(4) / 2, rel=1e-6)
    found = search.cross_entropy(logits, jnp.asarray([2, 0]))
    assert float(found) == pytest.approx(np.log(4) / 2, rel=1e-6)
    gradient = jax.grad(search.entropy)(logits)
    assert np.isfinite(gradient).all()
    ruled_out = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    assert float(search.entropy(ruled_out)) == pytest.approx(search.entropy(ruled_out[:, :2]))
    assert np.isfinite(jax.grad(search.entropy)(ruled_out)).all()


@pytest.mark.wide
def test_plot(adapters, tmp_path):
    found = search.fit(
        loss_to(adapters[0]), adapters, cm.mean(), inputs(25), validation=inputs(1), every=10
    )
    figure = found.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 1000
    loss, validation, _ = figure.axes[0].lines
    assert list(loss.get_xdata()) == [10, 20, 25]
    assert list(validation.get_xdata()) == [0, 10, 20, 25]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"loss": lambda merged, _: jnp.nan * jnp.sum(merged["a.q"].a)}, "nan at the initial"),
        ({"loss": lambda merged, _: merged["a.q"].a}, "the loss gave shape .* expected a scalar"),
        ({"loss": lambda *_: None}, "the loss gave None; expected a scalar"),
        ({"loss": 3}, "loss: expected a function, got 3"),
        ({"batches": 3}, "batches: expected a list of batches, got 3"),
        ({"every": 0}, "every=0: expected a whole number"),
        ({"patience": 1.5}, "patience=1.5: expected a whole number"),
        ({"initial": float("nan")}, "initial=nan: expected a finite number"),
        ({"initial": ["1", 2, 3]}, "initial='1': expected a number"),
        ({"rule": "mean"}, "expected a merge rule"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(adapters, given, match):
    start = {
        "loss": lambda merged, _: jnp.sum(merged["a.q"].a),
        "rule": cm.mean(),
        "batches": [np.zeros(1, np.float32)],
    }
    with pytest.raises(cm.CoreMergeError, match=match):
        search.fit(adapters=adapters, **start | given)
