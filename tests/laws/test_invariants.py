"""Laws that hold for every space and every rule to which they apply."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import cart, dc_merge, flatten, iso_cts, pico, svc, tsv
from helpers import (
    KEY,
    assert_same,
    dense,
    distance,
    map_factors,
    modules,
    orthogonal,
    random_adapters,
    sensitivity,
)

import coremerge_jax as cm

# Few shapes and ranks, as each signature is compiled anew; R > min(m, n) in the last ranks. They
# read the same backwards, so that reversed adapters need no other program.
SHAPES = modules((16, 12))
RANKS = [(2, 4, 2), (6, 5, 6)]


def merge(adapters, rule, **options):
    """Merges with weights, of 1 where none are given: one program for all laws of a case."""
    return cm.merge(adapters, rule, **{"weights": [1.0] * len(adapters), "key": KEY} | options)


LINEAR = {"mean": cm.mean(), "task_arithmetic": cm.task_arithmetic()}
SPECTRAL = {
    "tsv": cm.tsv(),
    "cart": cm.cart(rank=2, scale=0.7),
    "isotropize": cm.isotropize(),
    "flatten|tsv|flatten": cm.chain(cm.flatten(), cm.tsv(), cm.flatten(power=0.3)),
    "svc": cm.svc(),
}
# What is cut to a rank turns with rounding errors, and copies then span directions of their own.
CUTTING = {
    "tsv of a rank": cm.tsv(rank=2),
    "iso_cts": cm.iso_cts(common=3, specific=1),
}
ELEMENTWISE = {
    "ties": cm.ties(density=0.4),
    "sce": cm.sce(density=0.4),
    "prune": cm.prune(density=0.4),
    "ties of the model": cm.ties(density=0.4, elect="count", reduce="max", scope="model"),
}
RANDOM = {"dare": cm.dare(drop=0.3), "dare|ties": cm.chain(cm.dare(drop=0.3), cm.ties())}
# Pico looks at factors, which KnOTS space does not have; there, singular values coincide, for which
# DC-Merge is not defined.
SINGULAR = {
    "dc_merge": cm.dc_merge(density=0.2, rho=5.0),
    "pico|tsv": cm.chain(cm.pico(), cm.tsv()),
}
SPACES = {"core": cm.core(), "full": cm.full(), "knots": cm.knots()}


# With the scope of a module, all laws of a rule and a space follow each other, which use the same
# compiled programs.
def rules(*tables):
    table = {name: rule for part in tables for name, rule in part.items()}
    return pytest.mark.parametrize("rule", table.values(), ids=table.keys(), scope="module")


def choices(name, values):
    return pytest.mark.parametrize(name, values, ids=str, scope="module")


every_ranks = choices("ranks", [RANKS[0], pytest.param(RANKS[1], marks=pytest.mark.wide)])
every_space = pytest.mark.parametrize(
    "space",
    [
        pytest.param(space, id=name, marks=[] if name == "core" else [pytest.mark.wide])
        for name, space in SPACES.items()
    ],
    scope="module",
)


@every_space
@rules(
    LINEAR,
    {
        "tsv": cm.tsv(),
        "cart": cm.cart(rank=2),
        "ties": cm.ties(density=1.0),
        "dare": cm.dare(drop=0.0),
    },
)
@choices("rank", [4, 20])
def test_one_adapter_comes_back(rule, space, seed, rank):
    (adapter,) = random_adapters(SHAPES, [rank], seed)
    assert_same(merge([adapter], rule, space=space), adapter, 1e-12)


@every_space
@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE)
@every_ranks
def test_order_of_adapters_is_irrelevant(rule, space, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = merge(adapters, rule, space=space)
    assert_same(merge(adapters[::-1], rule, space=space), merged, 1e-8)


@every_space
@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM)
@every_ranks
def test_scaling_an_adapter_equals_its_weight(rule, space, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    weights = np.random.default_rng(seed).uniform(0.5, 2, len(ranks))
    scaled = [
        map_factors([adapter], lambda a, b, w=w: (a, w * b))[0]
        for adapter, w in zip(adapters, weights, strict=True)
    ]
    weighted = merge(adapters, rule, space=space, weights=weights)
    assert_same(weighted, merge(scaled, rule, space=space), 1e-9)


@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM)
@every_ranks
def test_weight_zero_equals_absence(rule, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    absent = [adapters[0], *adapters]
    weights = [1.0] * len(ranks) + [0.0]
    merged = merge(adapters, rule)
    assert_same(merge([*adapters, adapters[0]], rule, weights=weights), merged, 0)
    if rule not in RANDOM.values():  # which draw by the place in the list
        assert_same(merge(absent, rule, weights=weights[::-1]), merged, 0)


@pytest.mark.wide
@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM, SINGULAR)
def test_weights_of_one_equal_none(rule, seed):
    adapters = random_adapters(SHAPES, RANKS[0], seed)
    assert_same(merge(adapters, rule, weights=None), merge(adapters, rule), 1e-9)


@rules(
    {
        "task_arithmetic": cm.task_arithmetic(),
        "tsv": cm.tsv(),
        "isotropize": cm.isotropize(),
        "ties": cm.ties(density=0.4),
        "prune": cm.prune(density=0.4),
    },
)  # not those with a mean or a variance, which count every adapter that is there
def test_an_adapter_of_zero_update_equals_absence(rule, seed):
    adapters = random_adapters(SHAPES, (2, 4, 2), seed)
    (zero,) = map_factors(adapters[:1], lambda a, b: (0 * a, 0 * b))
    assert_same(merge([*adapters, zero], rule), merge(adapters, rule), 1e-9)


@every_ranks
def test_the_halves_of_an_adapter_sum_to_it(seed, ranks):
    (adapter,) = random_adapters(SHAPES, [sum(ranks)], seed)
    cuts = np.cumsum((0, *ranks))
    parts = [
        map_factors([adapter], lambda a, b, i=i, j=j: (a[i:j], b[:, i:j]))[0]
        for i, j in itertools.pairwise(cuts)
    ]
    assert_same(merge(parts, cm.task_arithmetic()), adapter, 1e-12)


@rules(LINEAR, SPECTRAL, CUTTING)
@every_ranks
def test_only_the_update_matters(rule, seed, ranks):
    """A → G A, B → B G⁻¹ changes nothing."""
    adapters = random_adapters(SHAPES, ranks, seed)
    rng = np.random.default_rng(seed)

    def regauge(a, b):
        gauge = orthogonal(rng, len(a)) * rng.uniform(0.5, 2, (len(a), 1))
        return gauge @ a, b @ np.linalg.inv(gauge)

    merged = merge(adapters, rule)
    assert_same(merge(map_factors(adapters, regauge), rule), merged, 1e-8)


@every_space
@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE)
@every_ranks
def test_commutes_with_permutations_and_rotations(rule, space, seed, ranks):
    rng = np.random.default_rng(seed)
    adapters = random_adapters(SHAPES, ranks, seed)
    if rule in ELEMENTWISE.values():
        left, right = (np.eye(16)[rng.permutation(16)], np.eye(12)[rng.permutation(12)])
    else:
        left, right = orthogonal(rng, 16), orthogonal(rng, 12)
    turned = map_factors(adapters, lambda a, b: (a @ right.T, left @ b))
    merged = merge(adapters, rule, space=space)
    rotated = {path: left @ dense(lora) @ right.T for path, lora in merged.items()}
    assert_same(merge(turned, rule, space=space), rotated, 1e-8)


@every_space
@every_ranks
def test_task_arithmetic_is_the_dense_sum(space, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    expected = {path: sum(dense(adapter[path]) for adapter in adapters) for path in SHAPES}
    assert_same(merge(adapters, cm.task_arithmetic(), space=space), expected, 1e-12)


@rules(SPECTRAL, CUTTING)
@every_ranks
def test_spectral_rules_are_the_same_in_core_and_full_space(rule, seed, ranks):
    adapters = random_adapters(SHAPES, ranks, seed)
    full = merge(adapters, rule, space=cm.full())
    assert_same(merge(adapters, rule, space=cm.core()), full, 1e-8)


@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE)
@every_ranks
def test_rank_is_bounded(rule, seed, ranks):
    for (m, n), lora in zip(
        SHAPES.values(), merge(random_adapters(SHAPES, ranks, seed), rule).values(), strict=True
    ):
        assert lora.rank <= min(m, n, sum(ranks))
        assert lora.shape == (m, n)


@rules(RANDOM)
def test_the_seed_alone_decides(rule, seed):
    """Not the order of modules, how many are merged at once, nor the precision."""
    adapters = random_adapters(modules((12, 16)), (2, 3), seed)
    merged = merge(adapters, rule)
    turned = [a.replace(modules={path: a[path] for path in ("x2", "x0")}) for a in adapters]
    again = merge(turned, rule)
    for path in again:
        np.testing.assert_array_equal(dense(again[path]), dense(merged[path]))
    other = merge(adapters, rule, key=jax.random.key(1))
    assert any(distance(dense(other[path]), dense(merged[path])) > 1e-3 for path in merged)

    def growth(path):
        """Singular vectors of the stacked factors turn as their singular values are close."""
        stacks = [
            np.vstack([x[path].a for x in adapters]),
            np.hstack([x[path].b for x in adapters]),
        ]
        values = (np.linalg.svd(stack, compute_uv=False) for stack in stacks)
        return max(s[0] / np.min(-np.diff(s)) for s in values)

    coarse = merge(adapters, rule, key=KEY, precision="float32")
    assert_same(coarse, merged, FLOAT32, growth)


def degenerate(ranks, seed):
    """Lists of adapters of given ranks: some are zero, of lower rank, or copies of each other."""
    rank = min(ranks)
    one, other = random_adapters(SHAPES, (rank, rank), seed)
    (zero,) = map_factors([one], lambda a, b: (0 * a, 0 * b))
    (copy,) = map_factors([one], lambda a, b: (a / 1.7, b * 1.7))

    def fill(adapter, size):
        def more(a, b):
            return np.pad(a, ((0, size - rank), (0, 0))), np.pad(b, ((0, 0), (0, size - rank)))

        return map_factors([adapter], more)[0]

    def of_ranks(*adapters):
        return [fill(*pair) for pair in zip(adapters, ranks, strict=True)]

    some = (one, one, other), (one, zero, other), (one, copy, other), (one, one, one)
    return [of_ranks(*adapters) for adapters in some], of_ranks(zero, zero, zero)


@every_space
@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM)
@every_ranks
def test_degenerate_adapters_give_finite_results(rule, space, seed, ranks):
    some, nothing = degenerate(ranks, seed)
    for adapters in some:
        merged = merge(adapters, rule, space=space)
        assert all(np.isfinite(dense(lora)).all() for lora in merged.values())
    merged = merge(nothing, rule, space=space)
    assert not any(np.any(dense(lora)) for lora in merged.values())


def of_updates(definition):
    return lambda loras: definition([dense(lora) for lora in loras])


# Their definitions tell how far rounding errors of the factors may grow.
DEFINITIONS = {
    "mean": of_updates(lambda x: np.mean(x, axis=0)),
    "task_arithmetic": of_updates(sum),
    "tsv": of_updates(tsv),
    "cart": of_updates(lambda x: cart(x, 2, 0.7)),
    "isotropize": of_updates(lambda x: flatten(sum(x), 0)),
    "flatten|tsv|flatten": of_updates(
        lambda x: flatten(tsv([flatten(y, 0.5) for y in x]), 0.3),
    ),
    "svc": of_updates(lambda x: svc(sum(x), x)),
    "tsv of a rank": of_updates(lambda x: tsv(x, 2)),
    "iso_cts": of_updates(lambda x: iso_cts(x, 3, 1)),
    "dc_merge": of_updates(lambda x: dc_merge(x, 0.2, 5.0)),
    "pico|tsv": lambda loras: pico(loras, tsv),
}
# Relative error of a merge in float32 where rounding errors of the factors do not grow.
FLOAT32 = 5e-6


def defined(*tables):
    table = {name: (rule, DEFINITIONS[name]) for part in tables for name, rule in part.items()}
    return pytest.mark.parametrize(
        ("rule", "definition"), table.values(), ids=table.keys(), scope="module"
    )


@defined(SPECTRAL)
def test_rounding_noise_is_not_inflated(rule, definition, seed):
    """A copy that differs by float32 rounding adds no directions of its own."""
    adapter, other = random_adapters(SHAPES, (3, 3), seed, dtype="float32")
    factor = np.float32(1.7)
    (copy,) = map_factors([adapter], lambda a, b: (a * factor, b / factor))
    exact = cm.merge([adapter, adapter, other], rule)

    def growth(path):
        return sensitivity(
            lambda loras: definition([loras[0], *loras]), [adapter[path], other[path]]
        )

    assert_same(cm.merge([adapter, copy, other], rule), exact, FLOAT32, growth)


@defined(LINEAR, SPECTRAL, CUTTING, SINGULAR)
def test_float32_agrees_with_float64(rule, definition, seed):
    adapters = random_adapters(modules((48, 64)), (2, 4, 2), seed, dtype="float32")
    exact = cm.merge(adapters, rule, precision="float64")

    def growth(path):
        return sensitivity(definition, [adapter[path] for adapter in adapters])

    assert_same(cm.merge(adapters, rule, precision="float32"), exact, FLOAT32, growth)


@rules(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM)
def test_gradients_are_finite_where_singular_values_coincide(rule):
    """One adapter with equal singular values, one that repeats it, one of lower rank."""
    eye = np.eye(6, dtype=np.float32)
    loras = [(eye[:3], eye[:, :3]), (eye[:3], eye[:, :3]), (eye[2:4], eye[:, 2:4])]

    def loss(factors):
        adapters = [cm.Adapter({"q": cm.LoRA(a=a, b=b)}) for a, b in factors]
        return jnp.sum(cm.merge(adapters, rule, key=KEY)["q"].dense() ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.asarray, loras))
    assert np.isfinite(value)
    assert value > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


@rules(SINGULAR)
@every_ranks
def test_rules_of_core_and_full_space(rule, seed, ranks):
    """Order, weights, rotations, absence and the space do not matter."""
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = merge(adapters, rule)
    assert_same(merge(adapters[::-1], rule), merged, 1e-8)
    assert_same(merge(adapters, rule, space=cm.full()), merged, 1e-8)
    assert_same(merge([*adapters, adapters[0]], rule, weights=[1, 1, 1, 0]), merged, 0)
    rng = np.random.default_rng(seed)
    left, right = orthogonal(rng, 16), orthogonal(rng, 12)
    turned = map_factors(adapters, lambda a, b: (a @ right.T, left @ b))
    rotated = {path: left @ dense(lora) @ right.T for path, lora in merged.items()}
    assert_same(merge(turned, rule), rotated, 1e-8)
    scaled = map_factors(adapters[:1], lambda a, b: (a, 2 * b)) + adapters[1:]
    assert_same(merge(adapters, rule, weights=[2, 1, 1]), merge(scaled, rule), 1e-9)


@rules(SINGULAR)
@every_ranks
def test_rules_of_core_space_are_finite(rule, seed, ranks):
    some, nothing = degenerate(ranks, seed)
    for adapters in some:
        assert all(np.isfinite(dense(x)).all() for x in merge(adapters, rule).values())
    assert not any(np.any(dense(x)) for x in merge(nothing, rule).values())


def test_dc_merge_refuses_derivatives():
    (adapter, other) = random_adapters(SHAPES, (2, 3))

    def loss(scale):
        rule = cm.dc_merge(density=0.2)
        return jnp.sum(cm.merge([adapter, other], rule, weights=[scale, 1.0])["q"].b)

    with pytest.raises(NotImplementedError, match="dc_merge has no derivative"):
        jax.grad(loss)(1.0)


def test_laws_of_tucker_space(seed):
    """Order, rotations and absence do not matter, and subspaces that hold all lose nothing."""
    adapters = random_adapters(SHAPES, (2, 4, 2), seed)
    space, rule = cm.tucker(rank=4, tolerance=0.0, iterations=30), cm.tsv(rank=2)
    merged = merge(adapters, rule, space=space)
    assert all(lora.rank == 4 for lora in merged.values())
    assert_same(merge(adapters[::-1], rule, space=space), merged, 1e-6)
    absent = [*adapters, adapters[0]]
    assert_same(merge(absent, rule, space=space, weights=[1, 1, 1, 0]), merged, 0)
    rng = np.random.default_rng(seed)
    left, right = orthogonal(rng, 16), orthogonal(rng, 12)
    turned = map_factors(adapters, lambda a, b: (a @ right.T, left @ b))
    rotated = {path: left @ dense(lora) @ right.T for path, lora in merged.items()}
    assert_same(merge(turned, rule, space=space), rotated, 1e-6)
    whole = merge(adapters, rule, space=cm.tucker(rank=8))
    assert_same(whole, merge(adapters, rule), 1e-8)
