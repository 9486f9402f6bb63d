"""Adapters projected once merge as `merge` merges them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import WITHOUT_INPUTS
from helpers import (
    KEY,
    assert_same,
    dense,
    distance,
    narrow,
    plain_merge,
    random_adapters,
    random_inputs,
    statistics_of,
)

import coremerge_jax as cm

SHAPES = {"a.q": (16, 12), "b.q": (16, 12)}
RANKS = (2, 4, 3)
RULES = {name: make() for name, make in WITHOUT_INPUTS.items()} | {
    "ties|isotropize": cm.chain(cm.ties(), cm.isotropize()),
    "dare|tsv": cm.chain(cm.dare(), cm.tsv()),
}
DAILY = {"mean", "cart", "ties", "tsv", "svc", "dare|tsv"}
SPACES = {
    "core": cm.core(),
    "balanced": cm.core(gauge="balanced"),
    "full": cm.full(),
    "knots": cm.knots(),
    "tucker": cm.tucker(rank=3),
}


@pytest.fixture
def adapters():
    """The second lacks a module, so that modules of one shape have two signatures."""
    first, second, third = random_adapters(SHAPES, RANKS)
    some = {path: lora for path, lora in second.items() if path != "b.q"}
    return [first, second.replace(modules=some), third]


@pytest.mark.parametrize("name", narrow(RULES, DAILY, night=RULES.keys() - DAILY))
def test_every_rule_as_merge(name):
    adapters = random_adapters(SHAPES, RANKS)  # of one signature, as that is compiled for each rule
    projected = cm.project(adapters)
    scale = {"a.*": 0.5, "*": 2.0}
    merged = projected.merge(RULES[name], scale=scale, key=KEY)
    expected = plain_merge(adapters, RULES[name], scale=scale, key=KEY)
    assert list(merged) == list(expected)
    assert_same(merged, expected, 1e-12)


@pytest.mark.parametrize("space", narrow(SPACES, ["core"], night=["balanced", "full"]))
def test_every_space_as_merge(adapters, space):
    rule = cm.chain(cm.dare(), cm.ties(density=0.5))
    merged = cm.project(adapters, space=SPACES[space]).merge(rule, key=KEY, scale=1.0)
    assert_same(merged, plain_merge(adapters, rule, space=SPACES[space], key=KEY), 1e-12)


@pytest.mark.wide
def test_weights_of_the_projection_are_those_of_merge(adapters):
    for weights in ([1.0, 0.5, 2.0], [0.0, 1.0, 2.0]):
        rule = cm.chain(cm.dare(), cm.ties(density=0.5))
        merged = cm.project(adapters, weights=weights).merge(rule, key=KEY, scale=1.0)
        assert_same(merged, plain_merge(adapters, rule, weights=weights, key=KEY), 1e-12)


@pytest.mark.wide
def test_weights_of_a_merge_multiply_the_cores(adapters):
    weights = np.array([1.0, 0.5, 2.0])
    projected = cm.project(adapters)
    merged = projected.merge(cm.tsv(), weights=weights, scale=1.0)
    assert_same(merged, plain_merge(adapters, cm.tsv(), weights=weights), 1e-9)
    some = projected.merge(cm.tsv(), weights={"a.q": weights}, scale=1.0)
    mixed = {
        path: (merged if path == "a.q" else projected.merge(cm.tsv(), scale=1.0))[path]
        for path in some
    }
    assert_same(some, mixed, 1e-12)


def test_factors_keep_their_dtypes_and_origin():
    adapters = random_adapters(SHAPES, RANKS, dtype="float32")
    for lora in cm.project(adapters).merge(cm.tsv(), scale=1.0).values():
        assert isinstance(lora.a, np.ndarray)
        assert lora.a.dtype == lora.b.dtype == np.float32


def test_single_precision_inside_a_users_program(adapters):
    projected = cm.project(adapters).astype("float32")
    assert projected.dtype == np.float32

    @jax.jit
    def merged(projected, density):
        return projected.merge(cm.ties(density=density), scale=1.0)["a.q"].dense()

    expected = plain_merge(adapters, cm.ties(density=0.5))["a.q"].dense()
    assert distance(np.asarray(merged(projected, 0.5)), expected) < 1e-5


def test_a_grid_of_parameters_is_one_program(adapters):
    projected = cm.project(adapters)
    densities = jnp.asarray([0.2, 0.5, 0.9])
    grid = jax.vmap(lambda density: projected.merge(cm.ties(density=density), scale=1.0))(densities)
    for i, density in enumerate(densities):
        one = jax.tree.map(lambda x, i=i: x[i], grid)
        assert_same(one, projected.merge(cm.ties(density=density), scale=1.0), 1e-6)


@pytest.mark.wide
def test_a_grid_of_ranks_and_scales_is_one_program(adapters):
    projected = cm.project(adapters)
    ranks, scales = jnp.asarray([1, 2, 9]), jnp.asarray([0.5, 1.0, 2.0])

    def merged(rank, scale):
        return projected.merge(cm.chain(cm.tsv(rank=rank), cm.isotropize()), scale=scale)

    grid = jax.vmap(merged)(ranks, scales)
    for i, (rank, scale) in enumerate(zip([1, 2, 9], scales, strict=True)):
        one = jax.tree.map(lambda x, i=i: x[i], grid)
        assert_same(one, merged(rank, scale), 1e-6)


RULES_OF_WEIGHTS = {"sum": cm.task_arithmetic(), "tsv": cm.tsv()}


@pytest.mark.parametrize("rule", narrow(RULES_OF_WEIGHTS, ["sum"], night=["tsv"]))
def test_gradients_of_weights_by_module(adapters, rule):
    """Outside of x64 mode, whatever precision the adapters have."""
    projected = cm.project(adapters)
    assert projected.dtype == np.float64

    def norm(weights):
        merged = projected.merge(RULES_OF_WEIGHTS[rule], weights=weights, scale=1.0)
        return sum(jnp.sum(lora.dense() ** 2) for lora in merged.values())

    ones = {path: jnp.ones(3) for path in SHAPES}
    gradient = jax.jit(jax.grad(norm))(ones)
    step = 1e-2
    for path in SHAPES:
        up, down = (norm(ones | {path: ones[path].at[0].add(x)}) for x in (step, -step))
        assert float(gradient[path][0]) == pytest.approx(float(up - down) / (2 * step), rel=1e-2)
    assert gradient["b.q"][1] == 0  # the second adapter has no such module


def test_traits_are_those_of_the_updates(adapters):
    inputs = random_inputs(adapters)
    expected = np.zeros((3, len(adapters)))
    for path in SHAPES:
        total = sum(dense(adapter[path]) for adapter in adapters if path in adapter)
        for t, adapter in enumerate(adapters):
            if path in adapter:
                update = dense(adapter[path])
                outputs = update @ inputs[t][path].T
                pairs = (update, update), (update, total), (outputs, outputs)
                expected[:, t] += [np.vdot(x, y) for x, y in pairs]
    statistics = statistics_of(adapters, inputs, full=True)
    for name in ("core", "full", "knots"):
        traits = cm.project(adapters, space=SPACES[name]).traits()
        np.testing.assert_allclose(traits[:2], expected[:2], rtol=1e-12)
        assert not traits[2].any()
    for name in ("core", "full"):
        traits = cm.project(adapters, space=SPACES[name], statistics=statistics).traits()
        np.testing.assert_allclose(traits, expected, rtol=1e-5)  # statistics are in float32


def test_what_is_refused(adapters):
    projected = cm.project(adapters)
    with pytest.raises(cm.MismatchError, match="no adapters to merge"):
        cm.project([])
    with pytest.raises(ValueError, match="over all modules at once; use merge"):
        projected.merge(cm.ties(scope="model"))
    with pytest.raises(ValueError, match=r"pass key=jax\.random\.key"):
        projected.merge(cm.dare())
    with pytest.raises(cm.MismatchError, match="2 weights for 3 adapters"):
        projected.merge(cm.task_arithmetic(weights=(1.0, 2.0)))
    with pytest.raises(cm.MismatchError, match="2 weights for 3 adapters"):
        projected.merge(cm.tsv(), weights=[1.0, 2.0])
    with pytest.raises(cm.MismatchError, match=r"weights of 'c\.q': there is no such module"):
        projected.merge(cm.tsv(), weights={"c.q": [1.0, 1.0, 1.0]})
    with pytest.raises(cm.MismatchError, match="scale pattern 'z' matches no module"):
        projected.merge(cm.tsv(), scale={"z": 2.0})


def test_one_nan_in_large_factors_is_refused():
    """JAX's maximum of large arrays loses NaN on CPU."""
    adapters = random_adapters({"q": (400, 1000)}, (8, 100), dtype="float32")
    for side in "ab":
        factors = {x: np.array(getattr(adapters[1]["q"], x)) for x in "ab"}
        factors[side][3, 5] = np.nan
        given = [adapters[0], adapters[1].replace(modules={"q": cm.LoRA(**factors)})]
        for merge in (
            cm.project,
            lambda x: cm.merge(x, cm.mean()),
            lambda x: cm.merge(x, cm.tsv()),
        ):
            with pytest.raises(cm.FormatError, match="NaN"):
                merge(given)
