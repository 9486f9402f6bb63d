"""Derivatives of every rule against central differences, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, SPACES, WITHOUT_INPUTS
from helpers import KEY, distance, orthogonal, plain_merge, random_adapters

import coremerge_jax as cm
from coremerge_jax.linalg import polar
from coremerge_jax.rules import RULES, Equivariance

SHAPE, RANKS = (9, 8), (2, 2, 2)
STEP = 1e-6
SLOPES = {name: case.slope for name, case in CASES.items() if case.slope}
NOT_DIFFERENTIABLE = {"dc_merge"}
CHAINS = ("flatten|tsv", "pico|tsv")
"""Each of their rules is there by itself."""
PLACES = [
    pytest.param(
        (name, space),
        id=f"{name}-{space}",
        marks=[pytest.mark.wide] * (not slope.narrow)
        + [pytest.mark.nightly] * (space != "core" or name in CHAINS),
    )
    for name, slope in SLOPES.items()
    for space in ("core", *slope.spaces)
]


@pytest.fixture(scope="module", params=PLACES)
def place(request):
    """A rule and a space; all tests of one follow each other, with the same compiled programs."""
    return request.param


def merging(name, space, ranks=RANKS):
    """The merged dense update, as a function of everything that can be differentiated by."""

    def merge(point):
        rule = cm.chain(SLOPES[name].rule(point["parameter"]))
        elementwise = rule.equivariance == Equivariance.ELEMENTWISE
        b = point["b"] * jnp.repeat(point["weights"], np.asarray(ranks))[None, :]
        projection = SPACES[space].space.project(point["a"], b, ranks, elementwise=elementwise)
        return projection.merge(rule, key=KEY).dense()

    return merge


@functools.lru_cache(maxsize=1)
def programs(name, space, ranks):
    """Merged updates of some points; derivatives at one along some tangents, and backwards."""
    merge = merging(name, space, ranks)

    def derivatives(point, tangents, cotangent):
        forward = jax.vmap(lambda tangent: jax.jvp(merge, (point,), (tangent,))[1])(tangents)
        return forward, jax.vjp(merge, point)[1](cotangent)[0]

    return jax.jit(jax.vmap(merge)), jax.jit(derivatives)


def a_point(name, a, b):
    parameter = SLOPES[name].at
    return {
        "a": a,
        "b": b,
        "weights": np.array([1.0, 0.7, 1.3]),
        "parameter": None if parameter is None else np.asarray(parameter),
    }


def random_point(name, ranks=RANKS, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((sum(ranks), SHAPE[1])), rng.standard_normal((SHAPE[0], sum(ranks)))
    return a_point(name, a, b)


def ways_from(point):
    """Changes of the weights, of the factors, of the parameters, and of all together."""
    rng = np.random.default_rng(1)
    change = jax.tree.map(lambda x: rng.standard_normal(x.shape), point)
    return [
        {key: x if key in keys else jax.tree.map(np.zeros_like, x) for key, x in change.items()}
        for keys in (["weights"], ["a", "b"], ["parameter"], list(point))
    ]


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def check(name, space, point, tie=lambda point: point, ranks=RANKS):
    """Forward and reverse derivatives are right, along what ``tie`` makes of straight lines."""
    values, derivatives = programs(name, space, ranks)
    ways = ways_from(point)
    ends = [
        stacked([tie(jax.tree.map(lambda x, d, h=h: x + h * d, point, way)) for way in ways])
        for h in (STEP, -STEP)
    ]
    tangents = jax.tree.map(lambda x, y: (x - y) / (2 * STEP), *ends)
    with jax.enable_x64(True):
        ahead, back = (np.asarray(values(end)) for end in ends)
        cotangent = np.random.default_rng(2).standard_normal(SHAPE)
        forward, reverse = jax.device_get(derivatives(tie(point), tangents, cotangent))
    for i, (found, expected) in enumerate(zip(forward, (ahead - back) / (2 * STEP), strict=True)):
        error = np.linalg.norm(found - expected)
        assert error <= 1e-6 * max(np.linalg.norm(expected), 1), f"way {i}: {error}"
        products = jax.tree.map(lambda x, d, i=i: np.vdot(x, d[i]), reverse, tangents)
        np.testing.assert_allclose(
            sum(jax.tree.leaves(products)), np.vdot(found, cotangent), rtol=1e-8, atol=1e-8
        )


def test_no_rule_is_left_out():
    assert set(WITHOUT_INPUTS) - set(SLOPES) == NOT_DIFFERENTIABLE


def test_at_random_points(place):
    """Also of rules that select something: what they select does not change nearby."""
    check(*place, random_point(place[0]))


@pytest.mark.wide
@pytest.mark.parametrize(
    "name", ["tsv", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("ties", "isotropize"))]
)
def test_of_more_directions_than_there_is_space_for(name):
    check(name, "core", random_point(name, (4, 4, 4)), ranks=(4, 4, 4))


# Points where stacks, or updates, are of lower rank, as functions of other points: along these, the
# rank stays the same.
def edited(edit):
    def tie(point):
        a, b = point["a"].copy(), point["b"].copy()
        edit(a, b)
        return {**point, "a": a, "b": b}

    return tie


@edited
def copies(a, b):
    a[2:4], b[:, 2:4] = a[:2], b[:, :2]


@edited
def nothing(a, b):
    del a
    b[:, 2:4] = 0


@edited
def nothing_at_all(a, b):
    a[2:4], b[:, 2:4] = 0, 0


@edited
def shared(a, b):
    a[4], b[:, 2] = a[1] - a[0], b[:, 0]


@edited
def low_rank(a, b):
    del a
    b[:, 3] = 2 * b[:, 2]


TIES = [copies, nothing, nothing_at_all, shared, low_rank]


def test_along_changes_that_keep_a_lower_rank(place):
    for tie in TIES:
        check(*place, random_point(place[0]), tie)


def orthogonal_updates(name, s=(3, 1, 2, 2, 1, 0.5)):
    """Singular values that coincide in one update and between updates."""
    rng = np.random.default_rng(0)
    left, right = (orthogonal(rng, size)[:, : sum(RANKS)] for size in SHAPE)
    return a_point(name, right.T, left * np.asarray(s)) | {"weights": np.ones(3)}


def isometries(name):
    """Singular values that coincide in each update."""
    rng = np.random.default_rng(0)
    left, right = ([orthogonal(rng, n)[:, :2] for _ in RANKS] for n in SHAPE)
    return a_point(name, np.hstack(right).T, np.hstack(left))


def orthogonal_isometries(name):
    """Of M_t − M̄, the first two coincide, and all others: away from a cut at two."""
    return orthogonal_updates(name, np.ones(6))


def test_where_singular_values_coincide(place):
    """Of rules that cannot tell their directions apart."""
    for make in (orthogonal_updates, isometries, orthogonal_isometries):
        if make.__name__ in SLOPES[place[0]].smooth:
            check(*place, make(place[0]))


def test_finite_in_every_direction(place):
    """Derivatives may not exist here, where rank or order change nearby."""
    name, _ = place
    _, derivatives = programs(*place, RANKS)
    random = random_point(name)
    zero = {**random, "a": 0 * random["a"], "b": 0 * random["b"]}
    for point in (*(tie(random) for tie in TIES), orthogonal_updates(name), isometries(name), zero):
        with jax.enable_x64(True):
            found = derivatives(point, stacked(ways_from(point)), np.ones(SHAPE))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.wide
@pytest.mark.parametrize("name", ["tsv-core", "tsv-knots", "iso_cts-core"])
def test_an_update_of_zero_has_no_directions(name):
    """Nor are those of rounding errors taken for its own."""
    rule, space = name.split("-")
    point = nothing(random_point(rule))
    kept = np.array([0, 1, 4, 5])
    rest = {"a": point["a"][kept], "b": point["b"][:, kept], "weights": point["weights"][[0, 2]]}
    with jax.enable_x64(True):
        found = jax.jit(merging(rule, space))(point)
        expected = jax.jit(merging(rule, space, (2, 2)))({**rest, "parameter": None})
    assert distance(np.asarray(found), np.asarray(expected)) < 1e-12


def test_nor_has_an_update_without_directions_of_its_own():
    """All of the first update is in common directions: its rest, by `iso_cts`, is null."""
    s = np.array([3.0, 2.5, 2.0, 0.5, 1.5, 0.4])
    point = orthogonal_updates("iso_cts", s)
    with jax.enable_x64(True):
        found = jax.jit(merging("iso_cts", "core"))(point)
    expected = np.mean(s[:5]) * (point["b"] / s)[:, :5] @ point["a"][:5]
    assert distance(np.asarray(found), expected) < 1e-12


def test_nor_are_directions_shared_by_rounding_errors():
    """Each is in one of three updates, and counts as `alpha` in the other two."""
    point = orthogonal_updates("svc", [3.0, 2.5, 2.0, 0.5, 1.5, 0.4])
    with jax.enable_x64(True):
        found = jax.jit(merging("svc", "core"))(point)
    gain = 3 / (1 + 2 * point["parameter"])
    assert distance(np.asarray(found), gain * point["b"] @ point["a"]) < 1e-12


def test_small_singular_values_are_not_taken_for_null_ones():
    """Where that is decided in float32, whose rounding errors are far below."""
    rng = np.random.default_rng(0)
    left, right = orthogonal(rng, 4)[:, :2], orthogonal(rng, 4)[:, :2]
    x, change = left * np.array([1, 1e-4]) @ right.T, rng.standard_normal((4, 4)) @ right @ right.T
    _, found = jax.jvp(polar, *((jnp.asarray(y, jnp.float32),) for y in (x, change)))
    with jax.enable_x64(True):
        _, expected = jax.jvp(polar, (jnp.asarray(x),), (jnp.asarray(change),))
    assert distance(np.asarray(found), np.asarray(expected)) < 1e-2


# What selects, and has no derivative, in [0, 1].
SELECTING = {
    "ties": lambda x: cm.ties(density=x),
    "sce": lambda x: cm.sce(density=x),
    "prune": lambda x: cm.prune(density=x),
    "cart": lambda x: cm.cart(rank=x),
    "iso_cts": lambda x: cm.iso_cts(common=x),
}


@pytest.mark.parametrize("name", SELECTING)
def test_what_selects_has_derivative_zero(name):
    cores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)), jnp.float32)
    merge = jax.jit(lambda x: jax.jvp(lambda x: SELECTING[name](x)(cores), (x,), (x,)))
    value, tangent = merge(jnp.asarray(0.5, jnp.float32))
    assert value.any()
    np.testing.assert_array_equal(tangent, 0)


@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_what_is_not_differentiable_says_so(name):
    cores = jnp.ones((2, 3, 3))
    for derivative in (jax.jacfwd, jax.jacrev):
        with pytest.raises(NotImplementedError, match=f"{name} has no derivative"):
            jax.jit(derivative(RULES[name]()))(cores)


@pytest.mark.parametrize("rule", [cm.mean(), cm.tsv(rank=1), cm.ties(density=0.5)], ids=str)
def test_subspaces_of_tucker_count_as_constants(rule):
    """In bases of the stacks that turn as little as these allow."""
    point = random_point("mean")
    a, b = point["a"], point["b"]
    rng = np.random.default_rng(1)
    change = {"a": rng.standard_normal(a.shape), "b": rng.standard_normal(b.shape)}
    space = cm.tucker(rank=3)

    @jax.jit
    def derivative(point, change):
        return jax.jvp(lambda a, b: space.project(a, b, RANKS).merge(rule).dense(), point, change)

    def carried(x, start, vectors):
        basis, before = np.linalg.qr(x)[0], np.linalg.qr(start)[0]
        turn = np.linalg.svd(basis.T @ before)
        return basis @ (turn[0] @ turn[2]) @ before.T @ vectors

    with jax.enable_x64(True):
        projection = jax.jit(lambda a, b: space.project(a, b, RANKS))(a, b)
        u, v = np.asarray(projection.u), np.asarray(projection.v)

        def frozen(h):
            x, y = a + h * change["a"], b + h * change["b"]
            left, right = carried(y, b, u), carried(x.T, a.T, v)
            updates = [y[:, i : i + 2] @ x[i : i + 2] for i in (0, 2, 4)]
            cores = np.stack([left.T @ update @ right for update in updates])
            return left @ np.asarray(jax.jit(rule)(jnp.asarray(cores))) @ right.T

        value, found = derivative((a, b), (change["a"], change["b"]))
        expected = (frozen(STEP) - frozen(-STEP)) / (2 * STEP)
        assert distance(frozen(0), np.asarray(value)) < 1e-12
        assert distance(np.asarray(found), expected) < 1e-6


@pytest.mark.wide
def test_second_derivatives_of_a_merge():
    """Also where singular vectors have none: ranks differ, so some of `tsv` coincide."""
    adapters = random_adapters({"q": SHAPE}, (3, 2, 4))
    probe = np.random.default_rng(1).standard_normal(SHAPE)
    weights, step = np.array([1.0, 0.8, 1.1]), 1e-6

    def loss(weights):
        merged = plain_merge(adapters, cm.tsv(), weights=weights)["q"].dense()
        return jnp.sum((merged - jnp.asarray(probe)) ** 2)

    with jax.enable_x64(True):
        found = np.asarray(jax.jit(jax.hessian(loss))(weights))
        slope = jax.jit(jax.grad(loss))
        ends = [[slope(weights + h * unit) for unit in np.eye(3)] for h in (step, -step)]
    np.testing.assert_allclose(
        found, (np.array(ends[0]) - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["ties", "cart", "svc"])
def test_of_a_batch_compiled_and_in_float32(name):
    points = [random_point(name, seed=seed) for seed in (0, 1)]
    cotangent = np.random.default_rng(2).standard_normal(SHAPE)
    _, derivatives = programs(name, "core", RANKS)
    with jax.enable_x64(True):
        exact = [derivatives(point, stacked(ways_from(point)), cotangent)[1] for point in points]

    def loss(point):
        return jnp.vdot(merging(name, "core")(point), jnp.asarray(cotangent, jnp.float32))

    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), stacked(points))
    found = jax.jit(jax.vmap(jax.grad(loss)))(batch)
    for key, expected in stacked(jax.device_get(exact)).items():
        if expected is not None:
            assert distance(np.asarray(found[key]), expected) < 1e-3
