"""Laws that hold for every space and every rule to which they apply."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    CUTTING,
    ELEMENTWISE,
    LINEAR,
    RANDOM,
    SINGULAR,
    SPACES,
    SPECTRAL,
)
from helpers import (
    KEY,
    assert_same,
    dense,
    distance,
    map_factors,
    modules,
    orthogonal,
    plain_merge,
    random_adapters,
    sensitivity,
)

import coremerge_jax as cm

# Few shapes and ranks, as each signature is compiled anew; R > min(m, n) in the last ranks. They
# read the same backwards, so that reversed adapters need no other program.
SHAPES = modules((16, 12))
RANKS = [(2, 4, 2), (6, 5, 6)]
EQUAL = (3, 3, 3)
PLACES = {name: place.space for name, place in SPACES.items() if place.laws}
# Where the singular values belong to the coordinates, as definitions on updates have it.
SCALED = {"knots, scaled": cm.knots(scaled=True)}
# Relative error of a merge in float32 where rounding errors of the factors do not grow.
FLOAT32 = 5e-6


def merge(adapters, rule, **options):
    """Merges with weights, of 1 where none are given: one program for all laws of a case."""
    return plain_merge(adapters, rule, **{"weights": [1.0] * len(adapters), "key": KEY} | options)


class Law(NamedTuple):
    """A check, and where it holds.

    Attributes:
        check: takes a case, a space, the ranks of the adapters and a seed.
        holds: whether it does for a case in a space.
        spaces: names of spaces.
        ranks: lists of ranks.
        narrow: false if tests with one version of JAX are enough.
    """

    check: Callable
    holds: Callable
    spaces: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    narrow: bool


LAWS: list[Law] = []
CORE = ("core",)


def law(*kinds, to=lambda *_: True, spaces=tuple(PLACES), ranks=tuple(RANKS), narrow=True):
    """Registers a law of rules of these kinds, or of any if there is none."""

    def register(check):
        def holds(case, space):
            if kinds and (case.kind not in kinds or (case.kind == SINGULAR and space != "core")):
                return False
            return to(case, space)

        LAWS.append(Law(check, holds, spaces, ranks, narrow))
        return check

    return register


def laws_of(case):
    """Yields the laws of a case, each with a space and ranks."""
    for space, ranks in itertools.product([*PLACES, *SCALED], [*RANKS, EQUAL]):
        for law in LAWS:
            if space in law.spaces and ranks in law.ranks and law.holds(case, space):
                yield law, space, ranks


def every_law():
    """Yields laws by rule and space: those that share compiled programs follow each other."""
    for case in CASES.values():
        for law, space, ranks in laws_of(case):
            core, first = space == "core", ranks == RANKS[0]
            marks = [] if law.narrow and case.narrow and core and first else [pytest.mark.wide]
            if (not core and ranks == RANKS[1]) or space in SCALED:
                marks.append(pytest.mark.nightly)
            yield pytest.param(
                law,
                case,
                space,
                ranks,
                id=f"{law.check.__name__}-{case.name}-{space}-{ranks}",
                marks=marks,
            )


EVERY = LINEAR, SPECTRAL, CUTTING, ELEMENTWISE


@law(*EVERY, SINGULAR)
def order_of_adapters_is_irrelevant(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = merge(adapters, case.rule, space=space)
    assert_same(merge(adapters[::-1], case.rule, space=space), merged, 1e-8)


@law(*EVERY, RANDOM, SINGULAR)
def scaling_an_adapter_equals_its_weight(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    weights = np.random.default_rng(seed).uniform(0.5, 2, len(ranks))
    scaled = [
        map_factors([adapter], lambda a, b, w=w: (a, w * b))[0]
        for adapter, w in zip(adapters, weights, strict=True)
    ]
    weighted = merge(adapters, case.rule, space=space, weights=weights)
    assert_same(weighted, merge(scaled, case.rule, space=space), 1e-9)


@law(*EVERY, RANDOM, SINGULAR, spaces=CORE)
def weight_zero_equals_absence(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = merge(adapters, case.rule, space=space)
    # RANDOM rules draw by the place in the list.
    for place in (3,) if case.kind == RANDOM else (3, 0):
        more, weights = list(adapters), [1.0] * len(ranks)
        more.insert(place, adapters[0])
        weights.insert(place, 0.0)
        assert_same(merge(more, case.rule, space=space, weights=weights), merged, 0)


@law(*EVERY, RANDOM, SINGULAR, spaces=CORE, ranks=RANKS[:1], narrow=False)
def weights_of_one_equal_none(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    expected = merge(adapters, case.rule, space=space)
    assert_same(merge(adapters, case.rule, space=space, weights=None), expected, 1e-9)


@law(*EVERY, to=lambda case, _: case.zero_is_absent, spaces=CORE, ranks=RANKS[:1])
def an_adapter_of_zero_update_equals_absence(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    (zero,) = map_factors(adapters[:1], lambda a, b: (0 * a, 0 * b))
    expected = merge(adapters, case.rule, space=space)
    assert_same(merge([*adapters, zero], case.rule, space=space), expected, 1e-9)


@law(LINEAR, SPECTRAL, CUTTING, spaces=CORE)
def only_the_update_matters(case, space, ranks, seed):
    """A → G A, B → B G⁻¹ changes nothing."""
    adapters = random_adapters(SHAPES, ranks, seed)
    rng = np.random.default_rng(seed)

    def regauge(a, b):
        gauge = orthogonal(rng, len(a)) * rng.uniform(0.5, 2, (len(a), 1))
        return gauge @ a, b @ np.linalg.inv(gauge)

    merged = merge(adapters, case.rule, space=space)
    assert_same(merge(map_factors(adapters, regauge), case.rule, space=space), merged, 1e-8)


@law(*EVERY, SINGULAR)
def commutes_with_permutations_and_rotations(case, space, ranks, seed):
    rng = np.random.default_rng(seed)
    adapters = random_adapters(SHAPES, ranks, seed)
    if case.kind == ELEMENTWISE:
        left, right = (np.eye(16)[rng.permutation(16)], np.eye(12)[rng.permutation(12)])
    else:
        left, right = orthogonal(rng, 16), orthogonal(rng, 12)
    turned = map_factors(adapters, lambda a, b: (a @ right.T, left @ b))
    merged = merge(adapters, case.rule, space=space)
    rotated = {path: left @ dense(lora) @ right.T for path, lora in merged.items()}
    assert_same(merge(turned, case.rule, space=space), rotated, 1e-8)


@law(SPECTRAL, CUTTING, SINGULAR, spaces=CORE)
def core_and_full_space_are_the_same(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    full = merge(adapters, case.rule, space=cm.full())
    assert_same(merge(adapters, case.rule, space=space), full, 1e-8)


@law(*EVERY, spaces=CORE)
def rank_is_bounded(case, space, ranks, seed):
    merged = merge(random_adapters(SHAPES, ranks, seed), case.rule, space=space)
    for (m, n), lora in zip(SHAPES.values(), merged.values(), strict=True):
        assert lora.rank <= min(m, n, sum(ranks))
        assert lora.shape == (m, n)


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


@law(*EVERY, RANDOM, SINGULAR)
def degenerate_adapters_give_finite_results(case, space, ranks, seed):
    some, nothing = degenerate(ranks, seed)
    for adapters in some:
        merged = merge(adapters, case.rule, space=space)
        assert all(np.isfinite(dense(lora)).all() for lora in merged.values())
    merged = merge(nothing, case.rule, space=space)
    assert not any(np.any(dense(lora)) for lora in merged.values())


@law(LINEAR, to=lambda case, _: case.name == "task_arithmetic")
def task_arithmetic_is_the_dense_sum(case, space, ranks, seed):
    adapters = random_adapters(SHAPES, ranks, seed)
    expected = {path: sum(dense(adapter[path]) for adapter in adapters) for path in SHAPES}
    assert_same(merge(adapters, case.rule, space=space), expected, 1e-12)


def is_defined(case, space):
    return case.definition is not None and space.removesuffix(", scaled") in case.defined_in


DEFINED = ("core", "full", *SCALED)


@law(to=is_defined, spaces=DEFINED, ranks=RANKS[:1], narrow=False)
@law(
    to=lambda case, _: case.name.startswith("dc_merge"),
    spaces=DEFINED,
    ranks=(EQUAL,),
    narrow=False,
)
def equals_its_definition(case, space, ranks, seed):
    """Padding of ranks is not counted, nor what a space has beyond the adapters' directions."""
    adapters = random_adapters(SHAPES, ranks, seed)
    merged = merge(adapters, case.rule, space=space)
    expected = {path: case.definition([x[path] for x in adapters]) for path in SHAPES}
    assert_same(merged, expected, 1e-9)


@pytest.mark.parametrize(("law", "case", "space", "ranks"), list(every_law()))
def test_law(law, case, space, ranks, seed):
    law.check(case, (PLACES | SCALED)[space], ranks, seed)


ALONE = [
    pytest.param(case, id=case.name, marks=[] if case.narrow else [pytest.mark.wide])
    for case in CASES.values()
    if case.alone
]


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize(
    "space",
    [pytest.param(x, marks=[] if x == "core" else [pytest.mark.wide]) for x in PLACES],
)
@pytest.mark.parametrize("case", ALONE)
def test_one_adapter_comes_back(case, space, seed, rank):
    (adapter,) = random_adapters(SHAPES, [rank], seed)
    assert_same(merge([adapter], case.alone, space=PLACES[space]), adapter, 1e-12)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_the_halves_of_an_adapter_sum_to_it(seed, ranks):
    (adapter,) = random_adapters(SHAPES, [sum(ranks)], seed)
    cuts = np.cumsum((0, *ranks))
    parts = [
        map_factors([adapter], lambda a, b, i=i, j=j: (a[i:j], b[:, i:j]))[0]
        for i, j in itertools.pairwise(cuts)
    ]
    assert_same(merge(parts, cm.task_arithmetic()), adapter, 1e-12)


def of_kinds(*kinds):
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.name, marks=[] if case.narrow else [pytest.mark.wide])
            for case in CASES.values()
            if case.kind in kinds
        ],
        scope="module",
    )


LARGE = modules((48, 64))


@of_kinds(RANDOM)
def test_the_seed_alone_decides(case, seed):
    """Not the order of modules, how many are merged at once, nor the precision."""
    adapters = random_adapters(SHAPES, RANKS[0], seed)
    merged = merge(adapters, case.rule)
    turned = [a.replace(modules={path: a[path] for path in ("x2", "x0")}) for a in adapters]
    again = merge(turned, case.rule)
    for path in again:
        np.testing.assert_array_equal(dense(again[path]), dense(merged[path]))
    other = merge(adapters, case.rule, key=jax.random.key(1))
    assert any(distance(dense(other[path]), dense(merged[path])) > 1e-3 for path in merged)

    def growth(path):
        """Singular vectors of the stacked factors turn as their singular values are close."""
        stacks = [
            np.vstack([x[path].a for x in adapters]),
            np.hstack([x[path].b for x in adapters]),
        ]
        values = (np.linalg.svd(stack, compute_uv=False) for stack in stacks)
        return max(s[0] / np.min(-np.diff(s)) for s in values)

    coarse = merge(adapters, case.rule, key=KEY, precision="float32")
    assert_same(coarse, merged, FLOAT32, growth)


@of_kinds(SPECTRAL)
def test_rounding_noise_is_not_inflated(case, seed):
    """A copy that differs by float32 rounding adds no directions of its own."""
    adapter, other = random_adapters(LARGE, RANKS[0][:2], seed, dtype="float32")
    factor = np.float32(1.7)
    (copy,) = map_factors([adapter], lambda a, b: (a * factor, b / factor))
    exact = plain_merge([adapter, other, adapter], case.rule, precision="float64")

    def growth(path):
        return sensitivity(
            lambda loras: case.definition([*loras, loras[0]]), [adapter[path], other[path]]
        )

    merged = plain_merge([adapter, other, copy], case.rule, precision="float64")
    assert_same(merged, exact, FLOAT32, growth)


@of_kinds(LINEAR, SPECTRAL, CUTTING, SINGULAR)
def test_float32_agrees_with_float64(case, seed):
    adapters = random_adapters(LARGE, RANKS[0], seed, dtype="float32")
    exact = plain_merge(adapters, case.rule, precision="float64")

    def growth(path):
        return sensitivity(case.definition, [adapter[path] for adapter in adapters])

    assert_same(plain_merge(adapters, case.rule, precision="float32"), exact, FLOAT32, growth)


@of_kinds(LINEAR, SPECTRAL, CUTTING, ELEMENTWISE, RANDOM)
def test_gradients_are_finite_where_singular_values_coincide(case):
    """One adapter with equal singular values, one that repeats it, one of lower rank."""
    eye = np.eye(6, dtype=np.float32)
    loras = [(eye[:3], eye[:, :3]), (eye[:3], eye[:, :3]), (eye[2:4], eye[:, 2:4])]

    def loss(factors):
        adapters = [cm.Adapter({"q": cm.LoRA(a=a, b=b)}) for a, b in factors]
        return jnp.sum(plain_merge(adapters, case.rule, key=KEY)["q"].dense() ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(jax.tree.map(jnp.asarray, loras))
    assert np.isfinite(value)
    assert value > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_dc_merge_refuses_derivatives():
    (adapter, other) = random_adapters(SHAPES, (2, 3))

    def loss(scale):
        rule = cm.dc_merge(density=0.2)
        return jnp.sum(plain_merge([adapter, other], rule, weights=[scale, 1.0])["q"].b)

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
