"""Coefficients learned from the adapters' own predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KEY, assert_same, narrow, random_adapters

import coremerge_jax as cm
from coremerge_jax import search
from coremerge_jax.merging.statistics import Gram, Statistics
from coremerge_jax.search.distilling import natural_size, sum_over

pytestmark = pytest.mark.wide

SHAPES = {"layers.0.up": (9, 8), "layers.1.out": (7, 9)}
RANKS = (2, 3, 2)
PARAMS = {
    path: np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    for path, shape in SHAPES.items()
}


@pytest.fixture(scope="module")
def adapters():
    return random_adapters(SHAPES, RANKS, dtype="float32")


@pytest.fixture(scope="module")
def projected(adapters):
    return cm.project(adapters, statistics=statistics(adapters))


def statistics(adapters):
    """Inputs are drawn at random."""
    rng = np.random.default_rng(3)
    grams = {}
    for path, (_, n) in SHAPES.items():
        a = np.concatenate([adapter[path].a for adapter in adapters]).astype(np.float64)
        z = [rng.standard_normal((20, n)) @ a.T for _ in adapters]
        matrices, counts = np.stack([x.T @ x for x in z]), np.full(len(z), 20.0)
        tasks, ranks = tuple(range(len(z))), tuple(x[path].rank for x in adapters)
        grams[path] = Gram(matrices, counts, np.sum(a**2, axis=1), tasks, ranks)
    return Statistics(grams, [adapter.metadata.name for adapter in adapters])


def forward(params, adapter, batch):
    """Logits of a network of two layers; of other classes where the batch has a head."""
    up, out = (params[path] + adapter[path].dense() for path in SHAPES)
    logits = jnp.tanh(batch["x"] @ up.T) @ out.T
    return logits @ batch["head"] if "head" in batch else logits


def batches(tasks=3, count=2, size=8, seed=0):
    """Inputs of each task."""
    rng = np.random.default_rng(seed)
    return [
        [{"x": rng.standard_normal((size, 8)).astype(np.float32)} for _ in range(count)]
        for _ in range(tasks)
    ]


INPUTS = batches()

RULES = {
    "mean": cm.mean(),
    "task_arithmetic": cm.task_arithmetic(weights=(1.0, 0.5, 2.0)),
    "dare|task_arithmetic": cm.chain(cm.dare(), cm.task_arithmetic()),
    "tsv": cm.tsv(),
    "regmean": cm.rules.regmean(),
    "regmean, orthogonalized": cm.rules.regmean(orthogonalize=True),
}


@pytest.mark.parametrize("name", narrow(RULES, ["tsv", "regmean, orthogonalized"]))
def test_pieces_add_up_to_the_merge(projected, name):
    pieces = projected.pieces(RULES[name], key=KEY)
    merged = pieces.merge(cm.task_arithmetic(), weights=np.ones(3), scale=1.0)
    assert_same(merged, projected.merge(RULES[name], scale=1.0, key=KEY), 1e-5)


@pytest.mark.parametrize("name", narrow(RULES, ["tsv", "regmean, orthogonalized"]))
def test_learning_begins_with_the_merge_at_the_automatic_scale(projected, name):
    rule = cm.chain(RULES[name])
    size = natural_size(rule, projected, KEY)
    first = projected.pieces(rule, key=KEY).merge(cm.task_arithmetic(), scale=size)
    assert_same(first, projected.merge(rule, key=KEY), 1e-5)


def test_the_automatic_scale_is_that_of_the_adapters_that_modules_have():
    adapters = random_adapters({"q": (8, 6)}, (2, 3, 2))
    rule = cm.chain(cm.tsv())
    projected = cm.project(adapters, weights=[1, 1, 0])
    assert natural_size(rule, projected, None) == natural_size(rule, cm.project(adapters[:2]), None)


@pytest.mark.parametrize("name", narrow(RULES, ["tsv"]))
def test_learns_to_predict_like_the_adapters(projected, name):
    found = search.distill(
        forward, projected, RULES[name], INPUTS, params=PARAMS, validation=INPUTS, key=KEY, steps=20
    )
    first, *_, last = found.history
    assert last["kl"] < 0.8 * first["kl"]
    assert last["loss"] < found.history[1]["loss"]
    assert len(found.seconds) == 20
    assert 0 < found.seconds_per_step < found.seconds[0]
    pieces = projected.pieces(RULES[name], key=KEY)
    again = pieces.merge(cm.task_arithmetic(), weights=found.weights, scale=1.0)
    assert_same(again, found.adapter, 1e-6)
    assert list(found.groups) == list(SHAPES)
    evaluate = search.agreement(forward, projected, INPUTS, params=PARAMS)
    kept = next(row for row in found.history if row["step"] == found.step)
    assert evaluate(found.adapter) == pytest.approx(
        {name: kept[name] for name in ("agreement", "kl")}, rel=1e-3
    )


def test_the_gradient_through_pieces_is_that_through_the_rule(projected):
    def loss(weights, projected):
        weights = {path: weights[i] for i, path in enumerate(SHAPES)}
        merged = projected.merge(cm.task_arithmetic(), weights=weights, scale=1.0)
        return jnp.sum(forward(PARAMS, merged, INPUTS[0][0]) ** 2)

    weights = jnp.asarray(np.random.default_rng(0).random((2, 3)), jnp.float32)
    small = projected.astype("float32")
    whole = jax.grad(loss)(weights, small)
    pieces = jax.grad(loss)(weights, projected.pieces(cm.task_arithmetic()).astype("float32"))
    np.testing.assert_allclose(pieces, whole, rtol=1e-4)


def test_fit_learns_coefficients_of_pieces(projected):
    pieces = projected.pieces(cm.tsv())
    target = pieces.merge(cm.task_arithmetic(), weights=[2.0, 0.5, 1.0], scale=1.0)

    def loss(merged, batch):
        expected = forward(PARAMS, target, batch)
        return jnp.mean((forward(PARAMS, merged, batch) - expected) ** 2)

    rule, steps = cm.task_arithmetic(), 8 * INPUTS[0] + 8 * INPUTS[1] + 8 * INPUTS[2]
    found = search.fit(loss, pieces, rule, 5 * steps, optimizer=optax.adam(0.03))
    np.testing.assert_allclose(found.groups["*"], [2.0, 0.5, 1.0], atol=0.05)


def test_one_adapter_is_kept(adapters):
    found = search.distill(
        forward, adapters[:1], cm.tsv(), INPUTS[:1], params=PARAMS, validation=INPUTS[:1], steps=20
    )
    assert_same(found.adapter, adapters[0], 1e-3)
    assert found.history[0] == pytest.approx({"step": 0, "agreement": 1, "kl": 0}, abs=1e-6)


def test_tasks_of_other_shapes_count_alike(adapters):
    """The value and the derivative are those of a plain sum, which differentiates all at once."""
    rng = np.random.default_rng(1)
    lessons = [*(task[0] for task in batches()), *batches(1, 1, size=3)[0]]
    lessons.append({**lessons[0], "head": rng.standard_normal((7, 5)).astype(np.float32)})

    def term(adapter, batch):
        return jnp.mean(jax.nn.logsumexp(forward(PARAMS, adapter, batch), axis=-1))

    def plain(adapter):
        return sum(term(adapter, batch) for batch in lessons)

    def taken_apart(adapter):
        return 2 * sum_over(term, adapter, lessons)

    found, expected = (
        jax.tree.leaves(jax.jit(jax.value_and_grad(x))(adapters[0])) for x in (taken_apart, plain)
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, 2 * y, rtol=1e-4, atol=1e-5)


def test_tasks_with_their_own_heads(projected):
    rng = np.random.default_rng(2)
    inputs = [
        [{**batch, "head": rng.standard_normal((7, classes)).astype(np.float32)} for batch in task]
        for task, classes in zip(batches(size=4), (3, 5, 3), strict=True)
    ]
    inputs[1] = inputs[1][:1]
    found = search.distill(forward, projected, cm.tsv(), inputs, params=PARAMS, steps=20)
    assert found.history[-1]["loss"] < found.history[1]["loss"]


def test_tasks_of_one_shape_share_what_is_compiled(projected):
    traced = []

    def counted(adapter, batch):
        traced.append(1)
        return forward(PARAMS, adapter, batch)

    search.distill(counted, projected, cm.tsv(), INPUTS, steps=1)
    assert len(traced) <= 3  # the teachers, the shapes of a lesson's derivative, and the steps


def test_stops_early_and_keeps_the_best(projected):
    """Steps are too long, and lead away."""
    found = search.distill(
        forward,
        projected,
        cm.tsv(),
        INPUTS,
        params=PARAMS,
        validation=INPUTS,
        optimizer=optax.sgd(-3.0),
        per="adapter",
        every=1,
        patience=3,
    )
    keys = [(-row["agreement"], row["kl"]) for row in found.history]
    assert keys[found.step] == min(keys)
    assert len(keys) == found.step + 4 < 40
    assert list(found.groups) == ["*"]


def test_temperature():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((4, 3, 6)) * 5, jnp.float32) for _ in range(2))
    assert search.divergence(x, y).shape == (4, 3)
    np.testing.assert_allclose(
        search.divergence(x, y, 4.0), search.divergence(x / 4, y / 4), rtol=1e-5
    )
    np.testing.assert_allclose(search.divergence(x + 3, x), 0, atol=1e-5)
    probabilities = np.asarray(jax.nn.softmax(y))
    expected = np.sum(probabilities * np.log(probabilities / np.asarray(jax.nn.softmax(x))), -1)
    np.testing.assert_allclose(search.divergence(x, y), expected, rtol=1e-4)
    hot = [float(jnp.mean(search.divergence(x, y, t))) for t in (1.0, 10.0, 100.0)]
    assert hot[0] > hot[1] > hot[2] > 0


def test_classes_that_are_ruled_out():
    x = jnp.asarray([1.0, 2.0, -jnp.inf])
    value, gradient = jax.value_and_grad(search.divergence)(x, x[jnp.asarray([1, 0, 2])])
    assert float(value) > 0
    np.testing.assert_allclose(gradient[2], 0)
    assert np.isfinite(gradient).all()


def test_positions_of_weight_0_do_not_count(projected):
    def padded(batch, fill):
        x = np.concatenate([batch["x"], np.full((3, 8), fill, np.float32)])
        return {"x": x, "real": np.arange(len(x)) < len(batch["x"])}

    inputs = [[[padded(batch, fill) for batch in task] for task in INPUTS] for fill in (0, 50)]
    given = {"params": PARAMS, "steps": 5, "mask": lambda batch: batch["real"]}
    found = [search.distill(forward, projected, cm.tsv(), x, **given) for x in inputs]
    plain = search.distill(forward, projected, cm.tsv(), INPUTS, params=PARAMS, steps=5)
    for path in SHAPES:
        for one in found:
            np.testing.assert_allclose(one.weights[path], plain.weights[path], rtol=1e-3)


@pytest.mark.parametrize("loss", ["cosine", lambda x, y: jnp.mean((x - y) ** 2, axis=-1)])
def test_other_losses(projected, loss):
    found = search.distill(
        forward,
        projected,
        cm.tsv(),
        INPUTS,
        params=PARAMS,
        loss=loss,
        validation=INPUTS,
        steps=20,
        per="layer",
    )
    first, *_, last = found.history
    assert last["validation"] < first["validation"]
    assert list(found.groups) == ["layers.0", "layers.1"]


def test_cosine():
    x = jnp.asarray([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    y = jnp.asarray([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(search.cosine(x, y), [0, 1, 1], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(search.cosine(x, y)))(x)).all()


def test_adapters_with_heads_need_teachers():
    """Merged heads are not their own."""
    rng = np.random.default_rng(0)
    adapters = [
        adapter.replace(extras={"score": rng.standard_normal((7, 4)).astype(np.float32)})
        for adapter in random_adapters(SHAPES, RANKS, dtype="float32")
    ]
    projected = cm.project(adapters, extras="mean")

    def with_head(adapter, batch):
        return forward(PARAMS, adapter, batch) @ adapter.extras["score"]

    with pytest.raises(cm.RecipeError, match=r"'score'.*teachers=\[\.\.\.\]"):
        search.distill(with_head, projected, cm.tsv(), INPUTS)
    found = search.distill(with_head, projected, cm.tsv(), INPUTS, teachers=adapters, steps=2)
    assert list(found.adapter.extras) == ["score"]


def test_plot(adapters, tmp_path):
    rows = ({"step": 0, "kl": 2.0, "agreement": 0.5}, {"step": 5, "loss": 1.0})
    rows = (*rows, {"step": 10, "loss": 0.5, "kl": 1.0, "agreement": 0.7})
    figure = search.Fit(adapters[0], {}, {}, 10, rows).plot(tmp_path / "x.svg")
    losses, metrics = figure.axes
    assert [line.get_label() for line in losses.lines] == ["loss", "kl", "kept"]
    assert list(losses.lines[0].get_xdata()) == [5, 10]
    assert [line.get_label() for line in metrics.lines] == ["agreement", "kept"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"forward": 3}, "forward: expected a function, got 3"),
        ({"forward": lambda *_: 3}, "forward gave 3; expected an array"),
        ({"forward": lambda *_: jnp.zeros(())}, r"forward gave shape \(\)"),
        ({"forward": lambda *_: jnp.full((2, 2), jnp.nan)}, "adapter 0 itself predicts NaN"),
        ({"inputs": 3}, "inputs: expected a list of batches for each task"),
        ({"inputs": INPUTS[:2]}, "inputs of 2 tasks for 3 adapters"),
        ({"inputs": [*INPUTS[:2], []]}, r"inputs\[2\]: no batches"),
        ({"inputs": [*INPUTS[:2], 3]}, r"inputs\[2\]: expected a list of batches, got 3"),
        ({"loss": "l2"}, "unknown loss 'l2'"),
        ({"loss": 3}, "loss: expected 'kl', 'cosine' or a function"),
        ({"loss": lambda x, _: jnp.sum(x)}, r"loss: gave shape \(\) for predictions \(8, 7\)"),
        ({"temperature": 0}, "temperature=0: expected a number above 0"),
        ({"temperature": 2, "loss": "cosine"}, "only loss='kl' has one"),
        ({"steps": 0}, "steps=0: expected a whole number"),
        ({"mask": 3}, "mask: expected a function"),
        ({"mask": lambda _: jnp.ones(3)}, r"mask: gave shape \(3,\) for predictions of \(8,\)"),
        ({"initial": [1.0]}, r"initial coefficients of shape \(1,\) for 3 adapters"),
        ({"per": "x*"}, r"pattern 'x\*' matches no module"),
        ({"rule": cm.ties()}, "is no sum of the adapters' shares"),
        ({"teachers": []}, "0 teachers for 3 adapters"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(projected, given, match):
    start = {"forward": forward, "rule": cm.tsv(), "inputs": INPUTS, "params": PARAMS}
    with pytest.raises(cm.CoreMergeError, match=match):
        search.distill(adapters=projected, **start | given)
