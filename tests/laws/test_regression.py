"""RegMean, and statistics of inputs: definitions, invariants, and what is refused."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import regmean
from helpers import (
    assert_same,
    dense,
    map_factors,
    orthogonal,
    plain_merge,
    plain_stream,
    random_adapters,
    random_inputs,
    statistics_of,
)
from many_devices import mesh

import coremerge_jax as cm

pytestmark = pytest.mark.wide

SHAPES = {"a.q": (16, 24), "b.q": (16, 24)}
FEW = {"wide": (7, 40), "tall": (40, 7)}  # fewer rows or columns than ranks
RANKS = (2, 4, 3)
PLAIN = cm.regmean(weighting="trace", orthogonalize=False)
WAYS = list(itertools.product(("trace", "iteris", "none"), (False, True)))


@pytest.fixture
def adapters():
    """The second lacks a module."""
    first, second, third = random_adapters(SHAPES, RANKS)
    some = {path: lora for path, lora in second.items() if path != "b.q"}
    return [first, second.replace(modules=some), third]


@pytest.fixture
def inputs(adapters):
    return random_inputs(adapters)


@pytest.fixture
def statistics(adapters, inputs):
    return statistics_of(adapters, inputs)


def by_definition(adapters, inputs, free=False, **options):
    """The merge in NumPy."""
    found = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        tasks = [t for t, adapter in enumerate(adapters) if path in adapter]
        loras, x = [adapters[t][path] for t in tasks], [inputs[t][path] for t in tasks]
        found[path] = regmean(loras, x, 0.03, free=free, **options)
    return found


@pytest.mark.parametrize(("weighting", "orthogonalize"), WAYS)
def test_definition(adapters, inputs, weighting, orthogonalize):
    options = {"weighting": weighting, "orthogonalize": orthogonalize}
    rule, expected = cm.regmean(**options), by_definition(adapters, inputs, **options)
    for full in (False, True):
        statistics = statistics_of(adapters, inputs, full)
        merged = plain_merge(adapters, rule, statistics=statistics)
        assert_same(merged, expected, 1e-9)
    projected = cm.project(adapters, statistics=statistics)
    assert_same(projected.merge(rule, scale=1.0), expected, 1e-9)


def test_definition_where_ranks_exceed_rows_or_columns():
    adapters = random_adapters(FEW, RANKS)
    inputs = random_inputs(adapters)
    merged = plain_merge(
        adapters,
        cm.regmean(orthogonalize=True),
        statistics=statistics_of(adapters, inputs, full=True),
        scale=1.0,
    )
    assert_same(merged, by_definition(adapters, inputs, orthogonalize=True), 1e-9)


@pytest.mark.parametrize("full", [False, True], ids=["coordinates", "inputs"])
def test_definition_where_ranks_equal_columns(full):
    """The Gram matrices of coordinates and of inputs are of one size then."""
    adapters = random_adapters({"q_proj": (9, sum(RANKS))}, RANKS)
    inputs = random_inputs(adapters)
    statistics = statistics_of(adapters, inputs, full)
    expected = by_definition(adapters, inputs, weighting="trace", orthogonalize=False)
    merge = partial(plain_merge, rule=PLAIN, statistics=statistics)
    for given in (adapters, cm.pack(adapters)):
        for space in (cm.core(), cm.knots()):
            assert_same(merge(given, space=space), expected, 1e-9)
    if full:
        for space in (cm.core(rows="free"), cm.full()):
            assert_same(merge(adapters, space=space), expected, 1e-9)


@pytest.mark.parametrize("space", [cm.core(), cm.knots(scaled=True)], ids=str)
def test_definition_where_updates_have_less_rank_than_their_factors(space):
    """Only columns of the updates count, not those of B that meet no rows of A."""
    rng = np.random.default_rng(0)
    shapes = {"zero.a": (16, 24), "same.a": (16, 24), "none": (16, 24), "thin": (9, 1)}
    adapters = random_adapters(shapes, RANKS)
    modules = dict(adapters[0])
    modules["zero.a"] = cm.LoRA(a=modules["zero.a"].a * [[1.0], [0.0]], b=modules["zero.a"].b)
    a, b = modules["same.a"].a, modules["same.a"].b
    modules["same.a"] = cm.LoRA(
        a=np.vstack([a, a[:1]]), b=np.hstack([b, rng.standard_normal((16, 1))])
    )
    modules["none"] = cm.LoRA(a=0 * modules["none"].a, b=modules["none"].b)
    adapters[0] = adapters[0].replace(modules=modules)
    inputs = random_inputs(adapters)
    merged = plain_merge(
        adapters, cm.regmean(), space=space, statistics=statistics_of(adapters, inputs)
    )
    assert_same(merged, by_definition(adapters, inputs), 1e-9)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_definition_of_free_rows(adapters, inputs, orthogonalize):
    """The result has no more rank than the adapters together."""
    rule = cm.regmean(orthogonalize=orthogonalize)
    expected = by_definition(adapters, inputs, free=True, orthogonalize=orthogonalize)
    statistics = statistics_of(adapters, inputs, full=True)
    for space in (cm.core(rows="free"), cm.full()):
        merged = plain_merge(adapters, rule, space=space, statistics=statistics)
        assert_same(merged, expected, 1e-9)
    merged = plain_merge(adapters, rule, space=cm.core(rows="free"), statistics=statistics)
    assert all(lora.rank <= sum(RANKS) for lora in merged.values())


def test_free_rows_change_nothing_for_rules_without_inputs(adapters):
    merged = plain_merge(adapters, cm.tsv(), space=cm.core(rows="free"))
    assert_same(merged, plain_merge(adapters, cm.tsv()), 1e-9)


def test_other_spaces(adapters, statistics):
    """KnOTS space has the same rows; Tucker space of as many dimensions as core space is that."""
    rule = PLAIN
    expected = plain_merge(adapters, rule, statistics=statistics)
    for space in (cm.knots(), cm.tucker(rank=sum(RANKS))):
        assert_same(plain_merge(adapters, rule, space=space, statistics=statistics), expected, 1e-8)


def test_its_outputs_are_nearest_to_the_adapters(adapters, inputs, statistics):
    """Every other update with these rows is farther on the inputs, as the ridge is small."""
    rule = cm.regmean(ridge=1e-9, weighting="none", orthogonalize=False)
    merged = plain_merge(adapters, rule, statistics=statistics)

    def error(updates, path):
        having = [t for t, adapter in enumerate(adapters) if path in adapter]
        outputs = [inputs[t][path] @ (updates[path] - dense(adapters[t][path])).T for t in having]
        return sum(np.sum(x**2) for x in outputs)

    best = {path: dense(lora) for path, lora in merged.items()}
    others = [plain_merge(adapters, x) for x in (cm.tsv(), cm.mean())]
    for path in SHAPES:
        least = error(best, path)
        assert all(least < error({p: dense(y) for p, y in x.items()}, path) for x in others)
        moved = dense(plain_merge(adapters, cm.task_arithmetic())[path])
        assert least <= error({path: best[path] + 1e-3 * moved}, path) * (1 + 1e-9)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_order_gauge_and_turns(adapters, inputs, statistics, orthogonalize, seed):
    rule = cm.regmean(orthogonalize=orthogonalize)
    merged = plain_merge(adapters, rule, statistics=statistics)
    turned = [adapters[i] for i in (2, 0, 1)]
    # By name: these are the statistics of the adapters in their first order.
    assert_same(plain_merge(turned, rule, statistics=statistics), merged, 1e-9)
    rng = np.random.default_rng(seed)

    def regauge(a, b):
        g = rng.standard_normal((len(a), len(a))) + 3 * np.eye(len(a))
        return np.linalg.solve(g, a), b @ g

    other = map_factors(adapters, regauge)
    assert_same(plain_merge(other, rule, statistics=statistics_of(other, inputs)), merged, 1e-9)
    q = {path: orthogonal(rng, n) for path, (_, n) in SHAPES.items()}
    rows = [
        adapter.replace(
            modules={p: dataclasses.replace(x, a=x.a @ q[p]) for p, x in adapter.items()}
        )
        for adapter in adapters
    ]
    moved = [{path: x @ q[path] for path, x in of_task.items()} for of_task in inputs]
    expected = {path: dense(lora) @ q[path] for path, lora in merged.items()}
    assert_same(plain_merge(rows, rule, statistics=statistics_of(rows, moved)), expected, 1e-9)


def test_more_of_the_same_inputs_change_nothing(adapters, inputs, statistics):
    """Also in parts that are added up."""
    halves = [
        statistics_of(adapters, [{p: x[part] for p, x in of_task.items()} for of_task in inputs])
        for part in (slice(None, 15), slice(15, None))
    ]
    merged = plain_merge(adapters, PLAIN, statistics=statistics)
    for more in (sum(halves), statistics + statistics):
        assert_same(plain_merge(adapters, PLAIN, statistics=more), merged, 1e-9)
    np.testing.assert_array_equal((statistics + statistics).counts, 2 * statistics.counts)


def test_sums_over_devices(adapters, inputs, statistics):
    """As each device has some of the inputs."""
    halves = [
        statistics_of(adapters, [{p: x[part] for p, x in of_task.items()} for of_task in inputs])
        for part in (slice(None, 20), slice(20, None))
    ]
    both = jax.tree.map(lambda *x: jnp.stack(x), *halves)
    found = jax.vmap(lambda x: x.psum("hosts"), axis_name="hosts")(both)
    for path, gram in statistics.items():
        for whole in found[path].matrices:
            np.testing.assert_allclose(whole, gram.matrices, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[path].counts[0], gram.counts)


def test_some_of_the_adapters(adapters, inputs, statistics):
    """Statistics of many adapters do for merges of a few of them."""
    rule, few = cm.regmean(orthogonalize=True), [0, 2]
    some = [adapters[t] for t in few]
    expected = plain_merge(some, rule, statistics=statistics_of(some, [inputs[t] for t in few]))
    assert_same(plain_merge(some, rule, statistics=statistics), expected, 1e-9)
    found = plain_merge(adapters, rule, statistics=statistics, weights=[1, 0, 1])
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("weighting", ["iteris", "trace", "none"])
def test_inputs_of_an_adapter_of_weight_0_do_not_count(adapters, inputs, statistics, weighting):
    """Also if the weight is known only as the program runs, so that its rows of A stay."""
    rule, weights = cm.regmean(weighting=weighting), np.array([1.0, 0.0, 1.0])
    others = [inputs[0], random_inputs(adapters, seed=5)[1], inputs[2]]
    statistics = [statistics, statistics_of(adapters, others)]
    found = [
        cm.project(adapters, statistics=x).merge(rule, weights=weights, scale=1.0)
        for x in statistics
    ]
    assert_same(found[0], found[1], 1e-9)
    for one in statistics:
        merge = jax.jit(lambda w, x=one: plain_merge(adapters, rule, statistics=x, weights=w))
        assert_same(merge(weights), found[0], 1e-5)  # traced, so in float32


def test_one_adapter_comes_back(adapters, inputs):
    one = adapters[:1]
    statistics = statistics_of(one, inputs[:1])
    for rule in (cm.regmean(), PLAIN):
        assert_same(plain_merge(one, rule, statistics=statistics), dict(one[0]), 1e-9)


def test_copies_of_one_adapter(adapters):
    """Their mean is exact on all inputs."""
    one = adapters[0]
    same = [one.replace(metadata=cm.Metadata(name=name)) for name in "xyz"]
    statistics = statistics_of(same, random_inputs(same, seed=3))
    merged = plain_merge(same, cm.regmean(ridge=1e-6, orthogonalize=False), statistics=statistics)
    assert_same(merged, dict(one), 1e-4)


def test_chains_and_float32(adapters, statistics):
    rule = cm.chain(cm.flatten(), PLAIN, cm.isotropize())
    merged = plain_merge(adapters, rule, statistics=statistics)
    coarse = plain_merge(adapters, rule, statistics=statistics, precision="float32")
    assert_same(coarse, {path: dense(lora) for path, lora in merged.items()}, 1e-3)


@pytest.mark.usefixtures("all_devices")
def test_on_several_devices(adapters, statistics):
    rule = cm.regmean(orthogonalize=True)
    expected = plain_merge(adapters, rule, statistics=statistics)
    for there in (mesh(8), mesh(4, 2)):
        assert_same(plain_merge(adapters, rule, statistics=statistics, mesh=there), expected, 1e-6)


@pytest.mark.usefixtures("all_devices")
def test_inputs_themselves_cannot_be_spread(adapters, inputs):
    statistics = statistics_of(adapters, inputs, full=True)
    with pytest.raises(cm.UnsupportedError, match="cannot be spread over devices"):
        plain_merge(adapters, cm.regmean(), statistics=statistics, mesh=mesh(4, 2))


def test_part_by_part(adapters, statistics):
    rule = cm.regmean()
    stream = plain_stream(adapters, rule, statistics=statistics)
    parts = {path: lora for part in stream for path, lora in part.items()}
    assert_same(parts, plain_merge(adapters, rule, statistics=statistics), 1e-12)


def _symmetric(x):
    """Gram matrices are symmetric, and so are their changes."""
    return (x + jnp.swapaxes(x, 1, 2)) / 2 if x.ndim == 3 else x


def test_derivatives(adapters, statistics):
    """Derivatives in the factors, the ridge and the Gram matrices are right inside jit."""
    some = {"a.q"}
    adapters = [x.replace(modules={p: y for p, y in x.items() if p in some}) for x in adapters]
    statistics = cm.Statistics({p: statistics[p] for p in some}, statistics.adapters)
    rng = np.random.default_rng(0)

    def loss(point):
        ridge, adapters, statistics = point
        rule = cm.regmean(ridge=ridge, weighting="iteris", orthogonalize=True)
        merged = plain_merge(adapters, rule, statistics=statistics)
        return sum(jnp.vdot(target[path], lora.dense()) for path, lora in merged.items())

    with jax.enable_x64(True):
        target = {path: rng.standard_normal(SHAPES[path]) for path in sorted(some)}
        point = jax.tree.map(jnp.asarray, (0.05, adapters, statistics))
        change = jax.tree.map(lambda x: 1e-6 * rng.standard_normal(x.shape) * jnp.abs(x), point)
        change = jax.tree.map(_symmetric, change)
        slope = jax.jit(jax.grad(loss))(point)
        expected = sum(
            float(jnp.vdot(x, y))
            for x, y in zip(*map(jax.tree.leaves, (slope, change)), strict=True)
        )
        ahead, back = (
            float(jax.jit(loss)(jax.tree.map(lambda x, d, s=s: x + s * d, point, change)))
            for s in (1, -1)
        )
    np.testing.assert_allclose((ahead - back) / 2, expected, rtol=1e-5)


@pytest.mark.parametrize("rule", [cm.tsv(), cm.mean(), cm.regmean(orthogonalize=True)], ids=str)
def test_a_merge_is_the_sum_of_its_pieces(adapters, statistics, rule):
    projected = cm.project(adapters, statistics=statistics)
    pieces, whole = projected.pieces(rule), projected.merge(rule, scale=1.0)
    assert_same(pieces.merge(cm.task_arithmetic(), scale=1.0), whole, 1e-9)
    alone = [pieces.merge(cm.task_arithmetic(), weights=np.eye(3)[t], scale=1.0) for t in range(3)]
    added = {path: sum(dense(x[path]) for x in alone) for path in SHAPES}
    assert_same(whole, added, 1e-9)


def test_rules_that_are_no_sums_have_no_pieces(adapters):
    projected = cm.project(adapters)
    for rule in (cm.ties(), cm.chain(cm.tsv(), cm.isotropize()), cm.chain(cm.pico(), cm.tsv())):
        with pytest.raises(cm.UnsupportedError, match="no sum of the adapters' shares"):
            projected.pieces(rule)


# --- Refusals ---------------------------------------------------------------------------------


def test_what_is_missing(adapters, statistics):
    with pytest.raises(cm.UnsupportedError, match="needs inputs of each task: collect statistics"):
        plain_merge(adapters, cm.regmean())
    some = cm.Statistics({p: x for p, x in statistics.items() if p != "b.q"}, statistics.adapters)
    with pytest.raises(cm.MismatchError, match=r"no statistics of module 'b\.q'"):
        plain_merge(adapters, cm.regmean(), statistics=some)
    merged = plain_merge(adapters, cm.regmean(), statistics=some, missing_statistics="tsv")
    assert_same({"b.q": merged["b.q"]}, {"b.q": plain_merge(adapters, cm.tsv())["b.q"]}, 1e-9)
    with pytest.raises(cm.RecipeError, match="missing_statistics 'ties'"):
        plain_merge(adapters, cm.regmean(), statistics=some, missing_statistics="ties")


def test_what_is_missing_of_projected_adapters(adapters, statistics):
    projected = cm.project(adapters)
    for merge in (projected.merge, projected.pieces):
        with pytest.raises(cm.UnsupportedError, match="needs inputs of each task: collect"):
            merge(cm.regmean())
    some = cm.Statistics({p: x for p, x in statistics.items() if p != "b.q"}, statistics.adapters)
    projected = cm.project(adapters, statistics=some)
    for merge in (projected.merge, projected.pieces):
        with pytest.raises(cm.MismatchError, match=r"no statistics of module 'b\.q'"):
            merge(cm.regmean())
    options = {"statistics": some, "missing_statistics": "tsv"}
    projected = cm.project(adapters, **options)
    for scale in ("auto", 0.7):
        expected = plain_merge(adapters, cm.regmean(), scale=scale, **options)
        assert_same(projected.merge(cm.regmean(), scale=scale), expected, 1e-9)
    whole = projected.merge(cm.regmean(), scale=1.0)
    pieces = projected.pieces(cm.regmean())
    assert_same(pieces.merge(cm.task_arithmetic(), scale=1.0), whole, 1e-9)


def test_a_module_that_no_input_has_reached(adapters, statistics):
    """Such as an expert."""
    gram = statistics["b.q"]
    empty = dataclasses.replace(gram, matrices=0 * gram.matrices, counts=0 * gram.counts)
    some = cm.Statistics({**statistics, "b.q": empty}, statistics.adapters)
    with pytest.raises(cm.MismatchError, match="no input has reached it"):
        plain_merge(adapters, cm.regmean(), statistics=some)


def test_statistics_of_other_adapters(adapters, statistics):
    renamed = [x.replace(metadata=cm.Metadata(name=f"new{t}")) for t, x in enumerate(adapters)]
    with pytest.raises(cm.MismatchError, match=r"no inputs of adapter 'new0'.*task0, task1"):
        plain_merge(renamed, cm.regmean(), statistics=statistics)
    changed = map_factors(adapters, lambda a, b: (a[::-1] * 1.1, b))
    with pytest.raises(cm.MismatchError, match=r"'a.q'.* other A factors than the adapters have"):
        plain_merge(changed, cm.regmean(), statistics=statistics)
    nameless = [x.replace(metadata=cm.Metadata()) for x in adapters]
    unknown = cm.Statistics(dict(statistics), [None] * 3)
    assert_same(
        plain_merge(nameless, cm.regmean(), statistics=unknown),
        plain_merge(adapters, cm.regmean(), statistics=statistics),
        1e-12,
    )
    with pytest.raises(cm.MismatchError, match="names do not say which are which"):
        plain_merge(nameless[:2], cm.regmean(), statistics=unknown)
    with pytest.raises(cm.MismatchError, match="expected those of the inputs themselves"):
        plain_merge(adapters, cm.regmean(), space=cm.full(), statistics=statistics)
    small = random_adapters({"q": (8, 6)}, RANKS)
    full = statistics_of(small, random_inputs(small), full=True)
    wide = dataclasses.replace(full["q"], matrices=np.ones((3, 9, 9)), squares=np.ones(9))
    with pytest.raises(cm.MismatchError, match=r"'q' are of 9 coordinates.* has 6 inputs"):
        plain_merge(small, PLAIN, statistics=cm.Statistics({"q": wide}, full.adapters))
    with pytest.raises(cm.RecipeError, match="expected Statistics, got dict"):
        plain_merge(adapters, cm.regmean(), statistics=dict(statistics))


def test_sums_of_different_statistics_are_refused(adapters, inputs, statistics):
    others = map_factors(adapters, lambda a, b: (2 * a, b))
    for other, message in (
        (statistics_of(others, inputs), "the adapters' A are not the same"),
        (statistics_of(adapters[:2], inputs[:2]), "with adapters"),
        (statistics_of(adapters, inputs, full=True), "not of the same adapters"),
        (cm.Statistics(dict(statistics), statistics.adapters, source="base"), "with source own"),
    ):
        with pytest.raises(cm.MismatchError, match=message):
            statistics + other
    with pytest.raises(cm.RecipeError, match="source='mine'"):
        cm.Statistics({}, [], source="mine")
