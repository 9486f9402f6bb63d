import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import cut_by_outputs, weighed
from helpers import (
    assert_same,
    dense,
    distance,
    map_factors,
    orthogonal,
    random_adapters,
    random_inputs,
    statistics_of,
)
from hypothesis import given
from hypothesis import strategies as st

import coremerge_jax as cm
from coremerge_jax.merging.metric import RIDGE

SHAPES = {"q": (12, 9), "v": (6, 9)}


@pytest.mark.parametrize("rank", [1, 3, 50])
@given(seed=st.integers(0, 2**31))
def test_is_the_best_approximation(seed, rank):
    """Equal to a cut of the dense update's own decomposition, and its energy is what is left."""
    (adapter,) = random_adapters(SHAPES, [8], seed)
    cut, kept = cm.truncate(adapter, rank=rank)
    for path, lora in cut.items():
        u, s, vt = np.linalg.svd(dense(adapter[path]), full_matrices=False)
        assert lora.rank == min(rank, 8, *lora.shape)
        assert distance(dense(lora), (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-10
        np.testing.assert_allclose(kept[path], np.sum(s[:rank] ** 2) / np.sum(s**2))
        np.testing.assert_allclose(lora.b.T @ lora.b, lora.a @ lora.a.T, atol=1e-9)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@given(seed=st.integers(0, 2**31))
def test_keeps_the_energy_with_the_fewest_directions(seed, energy):
    (adapter,) = random_adapters(SHAPES, [5], seed)
    cut, kept = cm.truncate(adapter, energy=energy)
    for path, lora in cut.items():
        s = np.linalg.svd(dense(adapter[path]), compute_uv=False)
        assert kept[path] >= energy * (1 - 1e-12)
        assert np.sum(s[: lora.rank - 1] ** 2) < energy * np.sum(s**2)


def test_a_zero_update_keeps_one_direction():
    adapter = cm.Adapter({"q": cm.LoRA(a=np.zeros((3, 4)), b=np.zeros((5, 3)))})
    cut, kept = cm.truncate(adapter, energy=0.9)
    assert (cut["q"].rank, kept["q"]) == (1, 1.0)


def test_keeps_what_is_not_a_module():
    (adapter,) = random_adapters(SHAPES, [5])
    adapter = adapter.replace(extras={"head": np.ones(2)})
    cut, _ = cm.truncate(adapter, rank=2)
    assert list(cut) == list(adapter)
    assert cut.metadata == adapter.metadata
    assert list(cut.extras) == ["head"]


@pytest.mark.parametrize("budget", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_refuses_an_impossible_budget(budget):
    (adapter,) = random_adapters(SHAPES, [5])
    with pytest.raises(ValueError, match=r"expected|needs"):
        cm.truncate(adapter, **budget)


def test_traced_factors_are_cut_to_a_rank_alike():
    (adapter,) = random_adapters(SHAPES, [5], dtype="float32")
    expected, shares = cm.truncate(adapter, rank=2)
    cut, kept = jax.jit(lambda adapter: cm.truncate(adapter, rank=2))(adapter)
    for path, lora in expected.items():
        assert cut[path].rank == 2
        assert distance(dense(cut[path]), dense(lora)) < 1e-5
        np.testing.assert_allclose(
            cut[path].b.T @ cut[path].b, cut[path].a @ cut[path].a.T, atol=1e-4
        )
        np.testing.assert_allclose(kept[path], shares[path], rtol=1e-5)
    zero, kept = jax.jit(lambda adapter: cm.truncate(adapter, rank=9))(
        jax.tree.map(np.zeros_like, adapter)
    )
    assert not dense(zero["q"]).any()
    assert kept["q"] == 1


def test_the_energy_of_traced_factors_is_refused():
    (adapter,) = random_adapters(SHAPES, [5], dtype="float32")
    with pytest.raises(cm.UnsupportedError, match=r"energy=0.9 with traced factors: .* give rank="):
        jax.jit(lambda adapter: cm.truncate(adapter, energy=0.9))(adapter)


def test_derivatives_of_a_cut_are_those_of_the_update():
    (adapter,), (way,) = (random_adapters({"q": (6, 5)}, [4], seed) for seed in (0, 1))
    probe = np.random.default_rng(2).standard_normal((6, 5))

    def loss(adapter):
        cut, kept = cm.truncate(adapter, rank=2)
        return jnp.vdot(cut["q"].dense(), jnp.asarray(probe)) + kept["q"]

    def dense_loss(x):
        u, s, vt = np.linalg.svd(x)
        kept = np.sum(s[:2] ** 2) / np.sum(s**2)
        return np.vdot((u[:, :2] * s[:2]) @ vt[:2], probe) + kept

    with jax.enable_x64(True):
        slope, gradient = jax.jit(lambda x, d: (jax.jvp(loss, (x,), (d,))[1], jax.grad(loss)(x)))(
            adapter, way
        )
    step = 1e-6
    ends = [
        dense_loss(dense(jax.tree.map(lambda x, d, h=h: x + h * d, adapter, way)["q"]))
        for h in (step, -step)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)
    products = jax.tree.map(np.vdot, gradient, way)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-9)


# --- By the outputs on inputs -----------------------------------------------------------------

RANKS = (2, 4, 3)
OUTER = {"a.q": (16, 24), "b.q": (16, 24)}
FEW = {"wide": (7, 12), "tall": (12, 7)}  # fewer rows or columns than ranks


def skewed_inputs(adapters, seed=0):
    """Inputs of different size by direction, so that cuts by them differ from others."""
    rng = np.random.default_rng([seed, 2])
    return [
        {path: x @ np.diag(np.exp(rng.standard_normal(x.shape[1]))) for path, x in each.items()}
        for each in random_inputs(adapters, seed)
    ]


def having(inputs, path):
    return [each[path] for each in inputs if path in each]


@pytest.fixture(scope="module")
def outer():
    """Adapters, the second of which lacks a module; and their inputs."""
    first, second, third = random_adapters(OUTER, RANKS)
    some = {path: lora for path, lora in second.items() if path != "b.q"}
    adapters = [first, second.replace(modules=some), third]
    return adapters, skewed_inputs(adapters)


def by_definition(merged, inputs, rank):
    return {
        path: cut_by_outputs(dense(lora), having(inputs, path), rank, RIDGE)
        for path, lora in merged.items()
    }


@pytest.mark.wide
@pytest.mark.parametrize("space", [cm.core(), cm.tucker(rank=6)], ids=["kept A", "computed A"])
def test_is_reduced_rank_regression(outer, space):
    """Also of inputs themselves, and where the merge does not have the adapters' A."""
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), space=space, scale=1.0)
    expected = by_definition(merged, inputs, 3)
    for full in (None, True):
        statistics = statistics_of(adapters, inputs, full)
        cut, kept = cm.truncate(merged, rank=3, statistics=statistics, sources=adapters)
        assert_same(cut, expected, 1e-9)
        for path, lora in cut.items():
            s = np.linalg.svd(weighed(dense(merged[path]), having(inputs, path), RIDGE))[1]
            assert lora.rank == 3
            np.testing.assert_allclose(kept[path], np.sum(s[:3] ** 2) / np.sum(s**2))
            norms = np.linalg.norm(lora.b, axis=0), np.linalg.norm(lora.a, axis=1)
            np.testing.assert_allclose(*norms)


@pytest.mark.wide
def test_sources_are_not_needed_for_kept_factors_or_whole_inputs(outer):
    adapters, inputs = outer
    for space, full in ((cm.core(), False), (cm.tucker(rank=6), True)):
        merged = cm.merge(adapters, cm.tsv(), space=space, scale=1.0)
        statistics = statistics_of(adapters, inputs, full)
        cut, _ = cm.truncate(merged, rank=3, statistics=statistics)
        assert_same(cut, by_definition(merged, inputs, 3), 1e-9)
    with pytest.raises(cm.MismatchError, match=r"'a.q': .* give the adapters .*sources="):
        cm.truncate(merged, rank=3, statistics=statistics_of(adapters, inputs))


@pytest.mark.wide
def test_rows_of_norm_1_do_not_show_whose_they_are(outer):
    adapters, inputs = outer
    same = map_factors(adapters, lambda a, b: (np.linalg.qr(a.T)[0].T, b))
    statistics = statistics_of(same, inputs)
    merged = cm.merge(same, cm.tsv(), scale=1.0)
    with pytest.raises(cm.MismatchError, match="give the adapters that were merged"):
        cm.truncate(merged, rank=3, statistics=statistics)


@pytest.mark.wide
def test_where_ranks_exceed_rows_or_columns():
    adapters = random_adapters(FEW, RANKS)
    inputs = skewed_inputs(adapters)
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    for full in (None, True):
        statistics = statistics_of(adapters, inputs, full)
        cut, _ = cm.truncate(merged, rank=2, statistics=statistics, sources=adapters)
        assert_same(cut, by_definition(merged, inputs, 2), 1e-8)


@pytest.mark.wide
def test_a_function_of_the_update_and_the_inputs(outer, seed):
    """Not of the factors, the adapters' factors, the size of inputs of a task or copies of A."""
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    expected, _ = cm.truncate(merged, rank=3, statistics=statistics, sources=adapters)
    rng = np.random.default_rng(seed)

    def regauge(a, b):
        g = rng.standard_normal((len(a), len(a))) + 3 * np.eye(len(a))
        return np.linalg.solve(g, a), b @ g

    other = map_factors(adapters, regauge)
    (factors,) = map_factors([merged], regauge)
    padded = map_factors([merged], lambda a, b: (np.vstack([a, a]), np.hstack([b, 0 * b])))[0]
    larger = [{p: (t + 1) * x for p, x in each.items()} for t, each in enumerate(inputs)]
    for update, sources, read in (
        (factors, other, inputs),
        (padded, adapters, larger),
        (merged, [adapters[i] for i in (2, 0, 1)], inputs),
    ):
        found = statistics_of(adapters if sources is not other else other, read)
        cut, _ = cm.truncate(update, rank=3, statistics=found, sources=sources)
        assert_same(cut, expected, 1e-8)


@pytest.mark.wide
def test_inputs_of_all_directions_alike_cut_as_none(outer):
    adapters, _ = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    alike = [{p: np.eye(lora.shape[1]) for p, lora in x.items()} for x in adapters]
    statistics = statistics_of(adapters, alike, full=True)
    cut, kept = cm.truncate(merged, rank=3, statistics=statistics)
    plain, shares = cm.truncate(merged, rank=3)
    assert_same(cut, dict(plain), 1e-9)
    assert kept == pytest.approx(shares, rel=1e-9)


@pytest.mark.wide
def test_its_outputs_are_the_nearest(outer):
    """Nearer than those of the plain cut, and than those of any changed one of this rank."""
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    cut, _ = cm.truncate(merged, rank=3, statistics=statistics)
    plain, _ = cm.truncate(merged, rank=3)
    rng = np.random.default_rng(0)
    for path, lora in cut.items():
        whole, read = dense(merged[path]), having(inputs, path)
        _, _, v = np.linalg.svd(whole)
        rows = v[: np.linalg.matrix_rank(whole)].T

        def error(update, whole=whole, read=read, rows=rows):
            off = (update - whole) @ rows
            outputs = [np.sum((x @ rows @ off.T) ** 2) / np.sum((x @ rows) ** 2) for x in read]
            return sum(outputs) / len(outputs) + RIDGE * np.sum(off**2) / rows.shape[1]

        least = error(dense(lora))
        assert least < 0.98 * error(dense(plain[path]))
        for size in (1e-3, 0.1):
            a, b = (x + size * rng.standard_normal(x.shape) for x in (lora.a @ rows, lora.b))
            assert least <= error(b @ a @ rows.T)


@pytest.mark.wide
def test_energy_is_that_of_outputs(outer):
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    cut, kept = cm.truncate(merged, energy=0.8, statistics=statistics)
    for path, lora in cut.items():
        s = np.linalg.svd(weighed(dense(merged[path]), having(inputs, path), RIDGE))[1]
        share = np.cumsum(s**2) / np.sum(s**2)
        assert lora.rank == np.searchsorted(share, 0.8) + 1
        assert kept[path] == pytest.approx(share[lora.rank - 1])


@pytest.mark.wide
def test_traced_factors_are_cut_by_outputs_alike(outer):
    """Derivatives are those of the cut, along changes that keep the row space."""
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    rng = np.random.default_rng(0)
    turn = {path: 1e-6 * rng.standard_normal(lora.b.shape) for path, lora in merged.items()}
    probe = {path: rng.standard_normal(OUTER[path]) for path in merged}

    def cut(adapter):
        return cm.truncate(adapter, rank=3, statistics=statistics, sources=adapters)

    def moved(size):
        return merged.replace(
            modules={
                path: cm.LoRA(a=lora.a, b=lora.b + size * turn[path])
                for path, lora in merged.items()
            }
        )

    def loss(size):
        found = cut(moved(size))[0]
        return sum(jnp.vdot(jnp.asarray(probe[p]), found[p].dense()) for p in found)

    with jax.enable_x64(True):
        found, kept = jax.jit(cut)(merged)
        slope = jax.jit(jax.grad(loss))(jnp.asarray(0.0))
    expected, shares = cut(merged)
    assert_same(found, dict(expected), 1e-9)
    assert jax.device_get(kept) == pytest.approx(shares)
    ends = [
        sum(np.vdot(probe[path], dense(lora)) for path, lora in cut(moved(size))[0].items())
        for size in (1.0, -1.0)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2, rtol=1e-4)


@pytest.mark.wide
def test_merges_are_cut_where_they_are_made(outer):
    """In one traced function, as outside of it."""
    adapters, inputs = outer
    statistics = statistics_of(adapters, inputs)

    def merge_and_cut(adapters):
        merged = cm.merge(adapters, cm.tsv(), scale=1.0)
        return cm.truncate(merged, rank=3, statistics=statistics, sources=adapters)[0]

    with jax.enable_x64(True):
        assert_same(jax.jit(merge_and_cut)(adapters), dict(merge_and_cut(adapters)), 1e-9)


@pytest.mark.wide
def test_rounding_errors_of_factors_are_no_rows(outer):
    """Factors of more rank than their update, which in float32 is not exactly of less."""
    adapters, inputs = outer
    rng = np.random.default_rng(0)
    modules = {
        path: cm.LoRA(a=lora.a, b=lora.b[:, :2] @ rng.standard_normal((2, lora.rank)))
        for path, lora in cm.merge(adapters, cm.tsv(), scale=1.0).items()
    }
    exact = cm.Adapter(modules)
    rounded = jax.tree.map(lambda x: x.astype(np.float32), exact)
    statistics = statistics_of(adapters, inputs)
    options = {"rank": 1, "statistics": statistics, "sources": adapters}
    expected, kept = cm.truncate(exact, **options)
    cut, also_kept = cm.truncate(rounded, **options)
    assert_same(cut, dict(expected), 1e-5)
    assert also_kept == pytest.approx(kept, rel=1e-5)


@pytest.mark.wide
def test_modules_without_statistics_are_cut_plainly(outer):
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    some = cm.Statistics({"a.q": statistics["a.q"]}, statistics.adapters)
    with pytest.warns(cm.errors.CoreMergeWarning, match=r"no statistics of module 'b\.q', so cut"):
        cut, _ = cm.truncate(merged, rank=3, statistics=some, sources=adapters)
    plain, _ = cm.truncate(merged, rank=3)
    assert_same({"b.q": cut["b.q"]}, {"b.q": plain["b.q"]}, 1e-12)
    assert_same({"a.q": cut["a.q"]}, {"a.q": by_definition(merged, inputs, 3)["a.q"]}, 1e-9)
    none = cm.Statistics({"c.q": statistics["a.q"]}, statistics.adapters)
    with pytest.raises(cm.MismatchError, match="statistics of no module that is to be cut"):
        cm.truncate(merged, rank=3, statistics=none, sources=adapters)


@pytest.mark.wide
def test_wrong_statistics_are_refused(outer):
    adapters, inputs = outer
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    statistics = statistics_of(adapters, inputs)
    changed = map_factors(adapters, lambda a, b: (a[::-1] * 1.1, b))
    with pytest.raises(cm.MismatchError, match="are of other A factors than the adapters have"):
        cm.truncate(merged, rank=3, statistics=statistics, sources=changed)
    with pytest.raises(cm.RecipeError, match="sources are for cuts by statistics"):
        cm.truncate(merged, rank=3, sources=adapters)
    with pytest.raises(cm.RecipeError, match="expected Statistics, got dict"):
        cm.truncate(merged, rank=3, statistics=dict(statistics))
    gram = statistics["a.q"]
    broken = cm.Statistics(
        {"a.q": cm.Gram(np.nan * gram.matrices, gram.counts, gram.squares, gram.tasks, gram.ranks)},
        statistics.adapters,
    )
    only = merged.replace(modules={"a.q": merged["a.q"]})
    with pytest.raises(cm.MismatchError, match="the statistics have NaN or infinite values"):
        cm.truncate(only, rank=3, statistics=broken, sources=adapters)


@pytest.mark.wide
def test_a_turn_of_the_inputs_turns_the_cut(outer, seed):
    adapters, inputs = outer
    statistics = statistics_of(adapters, inputs)
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    q = orthogonal(np.random.default_rng(seed), 24)
    turned = map_factors(adapters, lambda a, b: (a @ q, b))
    moved = statistics_of(turned, [{p: x @ q for p, x in each.items()} for each in inputs])
    cut, _ = cm.truncate(merged, rank=3, statistics=statistics)
    other, _ = cm.truncate(
        map_factors([merged], lambda a, b: (a @ q, b))[0], rank=3, statistics=moved
    )
    assert_same(other, {path: dense(lora) @ q for path, lora in cut.items()}, 1e-9)
