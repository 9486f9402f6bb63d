"""The pure functions in a user's own transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, assert_same, dense, distance, narrow, plain_merge, random_adapters

import coremerge_jax as cm

RANKS = (3, 2)
RULES = {
    "mean": cm.mean(),
    "ties": cm.ties(density=0.5),
    "dare|ties": cm.chain(cm.dare(drop=0.2), cm.ties()),
    "tsv": cm.tsv(),
    "cart": cm.cart(rank=2),
    "isotropize": cm.isotropize(),
}
NAMES = narrow(RULES, ["dare|ties", "tsv"])
spaces = pytest.mark.parametrize(
    "space",
    [cm.core(), *(pytest.param(x, marks=pytest.mark.nightly) for x in (cm.full(), cm.knots()))],
    ids=str,
)


@pytest.fixture
def factors():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 10)), rng.standard_normal((8, 5))
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def test_projection_loses_nothing(factors):
    a, b = factors
    projection = cm.core().project(a, b, RANKS)
    chex.assert_shape(projection.cores, (2, 5, 5))
    chex.assert_shape([projection.u, projection.v], [(8, 5), (10, 5)])
    for core, update in zip(projection.cores, (b[:, :3] @ a[:3], b[:, 3:] @ a[3:]), strict=True):
        lifted = projection.lift(core)
        chex.assert_shape([lifted.a, lifted.b], [(5, 10), (8, 5)])
        np.testing.assert_allclose(lifted.dense(), update, atol=1e-5)
    np.testing.assert_allclose(projection.u.T @ projection.u, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(projection.v.T @ projection.v, np.eye(5), atol=1e-5)


def test_bases_are_cut_to_the_numerical_rank(factors):
    a, b = factors
    projection = cm.core().project(jnp.tile(a[:2], (2, 1)), jnp.tile(b[:, :2], (1, 2)), (2, 2))
    np.testing.assert_array_equal(projection.shape, [2, 2])
    np.testing.assert_array_equal(projection.u[:, 2:], 0)
    np.testing.assert_array_equal(projection.cores[:, 2:], 0)
    np.testing.assert_array_equal(projection.cores[:, :, 2:], 0)


@spaces
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_and_jit_changes_nothing(factors, name, space):
    a, b = factors
    batch = jnp.stack([a, 2 * a, a[:, ::-1]]), jnp.stack([b, b[::-1], -b])

    def merge(a, b):
        return space.project(a, b, RANKS).merge(RULES[name], key=KEY).dense()

    jitted = jax.jit(merge)
    looped = [jitted(a, b) for a, b in zip(*batch, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(merge))(*batch), jnp.stack(looped), atol=2e-5)
    if name in ("dare|ties", "tsv"):  # step by step takes long
        np.testing.assert_allclose(looped[0], merge(a, b), atol=2e-5)


def test_a_sweep_over_parameters_is_one_program(factors):
    a, b = factors
    projection = cm.core().project(a, b, RANKS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sweep(densities, ranks):
        ties = jax.vmap(lambda d: projection.merge(cm.ties(density=d)).dense())(densities)
        cart = jax.vmap(lambda r: projection.merge(cm.cart(rank=r)).dense())(ranks)
        return ties, cart

    densities, ranks = jnp.array([0.1, 0.5, 0.9]), jnp.array([1, 2, 3])
    sweep(densities[::-1], ranks)
    ties, cart = sweep(densities, ranks)
    for i in range(3):
        alone = projection.merge(cm.ties(density=float(densities[i]))).dense()
        np.testing.assert_allclose(ties[i], alone, atol=1e-5)
        alone = projection.merge(cm.cart(rank=int(ranks[i]))).dense()
        np.testing.assert_allclose(cart[i], alone, atol=1e-5)


def test_one_compilation_a_signature():
    adapters = random_adapters({"a": (8, 10), "b": (8, 10), "c": (10, 8)}, RANKS)
    traced = []

    def rule(cores):
        traced.append(cores.shape)
        return cores.sum(axis=0)

    for _ in range(2):
        plain_merge(adapters, rule)
    # By two programs, and once to count its operations, for both.
    assert sorted(traced) == [(2, 5, 5)] * 3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name):
    """Of the whole merge, by the factors of one adapter and by the weights."""
    adapters = random_adapters({"q": (7, 9)}, RANKS, seed=3)
    direction = random_adapters({"q": (7, 9)}, RANKS, seed=4)
    probe = np.random.default_rng(5).standard_normal((7, 9))

    def loss(adapters, weights):
        merged = plain_merge(adapters, RULES[name], weights=weights, key=KEY)
        return jnp.vdot(merged["q"].dense(), jnp.asarray(probe))

    with jax.enable_x64(True):
        point = jax.tree.map(jnp.asarray, (adapters, np.array([1.0, 0.7])))
        tangent = jax.tree.map(jnp.asarray, (direction, np.array([0.3, -0.4])))
        step = 1e-6
        value, slopes = jax.jit(loss), jax.jit(jax.grad(loss, argnums=(0, 1)))
        ends = [
            value(*jax.tree.map(lambda x, d, h=h: x + h * d, point, tangent)) for h in (-step, step)
        ]
        gradient = slopes(*point)
        products = jax.tree.map(jnp.vdot, gradient, tangent)
        slope = (ends[1] - ends[0]) / (2 * step)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-5)


def test_global_settings_are_left_alone():
    adapters = random_adapters({"q": (8, 10)}, RANKS, dtype="float32")
    merged = plain_merge(adapters, cm.tsv())
    assert not jax.config.jax_enable_x64
    assert merged["q"].dtype == np.float32
    assert jnp.ones(2).dtype == np.float32


@pytest.mark.wide
def test_result_has_the_widest_dtype_of_the_sources():
    wide, narrow = random_adapters({"q": (8, 10)}, RANKS, dtype="float32")
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), narrow)
    assert plain_merge([narrow, narrow], cm.tsv())["q"].dtype == jnp.bfloat16
    assert plain_merge([narrow, wide], cm.tsv())["q"].dtype == jnp.float32


def test_a_function_is_a_rule():
    adapters = random_adapters({"q": (8, 10)}, RANKS)
    merged = plain_merge(adapters, lambda cores: cores[0] - 2 * cores[1])
    expected = dense(adapters[0]["q"]) - 2 * dense(adapters[1]["q"])
    assert_same(merged, {"q": expected}, 1e-12)
    linear = cm.from_function(lambda cores: cores[0] - 2 * cores[1], "linear")
    assert_same(plain_merge(adapters, linear), {"q": expected}, 1e-12)


def test_merge_inside_a_jitted_function():
    adapters = random_adapters({"q": (8, 10), "v": (6, 10)}, RANKS, dtype="float32")

    @jax.jit
    def step(adapters, x):
        merged = plain_merge(adapters, cm.chain(cm.tsv(), cm.isotropize()))
        return x @ merged["q"].dense().T

    x = jnp.ones((2, 10))
    expected = (
        np.asarray(x) @ dense(plain_merge(adapters, cm.chain(cm.tsv(), cm.isotropize()))["q"]).T
    )
    assert distance(step(adapters, x), expected) < 1e-4


@pytest.mark.parametrize(
    "merge",
    [
        cm.merge,
        pytest.param(lambda x, rule: cm.project(x).merge(rule), marks=pytest.mark.wide),
    ],
)
def test_what_is_not_traced_is_merged_at_once_in_a_jitted_function(merge):
    """As in a step that closes over adapters."""
    adapters = random_adapters({"q": (9, 7), "v": (6, 8)}, RANKS)
    found = jax.jit(lambda: merge(adapters, cm.tsv()))()
    assert_same(found, merge(adapters, cm.tsv()), 1e-6)  # jit gives back float32


TRACED = {
    "weights": lambda x: {"weights": x},
    "scale": lambda x: {"scale": x[1]},
    "parameter": lambda x: {"rule": cm.chain(cm.ties(density=x[0]), cm.isotropize())},
    "key": lambda x: {"rule": cm.dare(), "key": jax.random.key(x[0].astype(int))},
}


@pytest.mark.parametrize("name", narrow(TRACED, ["weights"], night=["scale", "parameter"]))
def test_concrete_factors_of_several_signatures_in_traced_functions(name):
    """Each stack stays as it was: a traced function reads all of them after it was traced."""
    shapes = {"q": (40, 36), "v": (20, 18), "up": (36, 40)}
    adapters = random_adapters(shapes, (3, 2, 3), dtype=np.float32)
    point = jnp.asarray([0.5, 0.7, 2.0])

    def merged(x):
        options = {"rule": cm.tsv(), "scale": 0.7, **TRACED[name](x)}
        return cm.merge(adapters, **options)

    expected = merged(np.asarray(point))
    for _ in range(3):
        assert_same(jax.jit(merged)(point), dict(expected), 1e-4)
    several = jax.vmap(merged)(jnp.stack([point, point]))
    for path, lora in expected.items():
        for i in range(2):
            assert distance(several[path].b[i] @ several[path].a[i], dense(lora)) < 1e-4
