"""Diagnoses: each measure is what a dense computation gives, and a function of the updates."""

import json

import jax
import numpy as np
import pytest
from helpers import dense, map_factors, orthogonal, random_adapters
from hypothesis import given
from hypothesis import strategies as st

import coremerge_jax as cm
from coremerge_jax.diagnosis.results import arrange
from coremerge_jax.io.peft.writer import save_peft

SHAPES = {"layers.0.q": (14, 12), "layers.1.q": (14, 12), "layers.1.v": (14, 12)}
RANKS = (2, 3, 2)
PAIRS = ("outputs", "inputs", "cosine", "conflict", "opposed")


def adapters(seed=0, ranks=RANKS, shapes=SHAPES):
    return random_adapters(shapes, ranks, seed)


def spaces(update, rank):
    u, s, vt = np.linalg.svd(update)
    return u[:, :rank], s, vt[:rank].T


def balanced(update, rank):
    u, s, v = spaces(update, rank)
    return u * np.sqrt(s[:rank]), v * np.sqrt(s[:rank])


def assert_equal(found, expected, tolerance=1e-8):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def assert_same_measures(x, y, tolerance=1e-8):
    for one, other in zip(x, y, strict=True):
        jax.tree.map(lambda a, b: assert_equal(a, b, tolerance), one.measures, other.measures)


@given(seed=st.integers(0, 2**31))
def test_against_dense_matrices(seed):
    given_ = adapters(seed, shapes={"x": (14, 12), "narrow": (5, 12)})
    merged = cm.merge(given_, cm.chain(cm.tsv(), cm.isotropize()))
    for module in cm.diagnose(given_, merged):
        updates = [dense(adapter[module.path]) for adapter in given_]
        total, target = sum(updates), dense(merged[module.path])
        found = module.measures
        parts = [spaces(*pair) for pair in zip(updates, RANKS, strict=True)]
        b, a = zip(*(balanced(*pair) for pair in zip(updates, RANKS, strict=True)), strict=True)
        for s, matrix in (
            (found.spectra.stack_b, np.hstack(b)),
            (found.spectra.stack_a, np.hstack(a)),
            (found.spectra.total, total),
            (found.spectra.merged, target),
        ):
            expected = np.linalg.svd(matrix, compute_uv=False)
            assert_equal(s, np.pad(expected, (0, len(s)))[: len(s)])
        u, v = (np.linalg.svd(np.hstack(x), full_matrices=False)[0] for x in (b, a))
        cores = [u.T @ update @ v for update in updates]
        elected = np.sign(sum(cores))
        for t, update in enumerate(updates):
            assert_equal(found.spectra.updates[t], np.resize(parts[t][1], 3), 1e-6)
            assert_equal(found.norms[t], np.linalg.norm(update))
            against = cores[t][np.sign(cores[t]) != elected]
            assert_equal(found.outvoted[t], np.sum(against**2) / np.sum(update**2))
            assert_equal(
                found.contribution.kept[t], np.sum(update * target) / np.sum(update**2), 1e-6
            )
            for r, other in enumerate(updates):
                pairs = {name: getattr(found.pairs, name)[t, r] for name in PAIRS}
                least = min(RANKS[t], RANKS[r])
                outputs = np.linalg.svd(parts[t][0].T @ parts[r][0], compute_uv=False)
                inputs = np.linalg.svd(parts[t][2].T @ parts[r][2], compute_uv=False)
                assert_equal(pairs["outputs"], np.sum(outputs**2) / least)
                assert_equal(pairs["inputs"], np.sum(inputs**2) / least)
                norms = np.linalg.norm(update) * np.linalg.norm(other)
                assert_equal(pairs["cosine"], np.sum(update * other) / norms)
                products = cores[t] * cores[r]
                lost = -products[products < 0].sum() / np.abs(products).sum()
                assert_equal(pairs["conflict"], lost)
                assert_equal(pairs["opposed"], np.mean(products < 0))


def test_only_the_updates_matter():
    given_, rng = adapters(), np.random.default_rng(1)
    merged = cm.merge(given_, cm.ties())

    def change(a, b):
        gauge = orthogonal(rng, len(a)) * rng.uniform(0.5, 2, (len(a), 1))
        return gauge @ a, b @ np.linalg.inv(gauge)

    changed = map_factors([*given_, merged], change)
    assert_same_measures(cm.diagnose(given_, merged), cm.diagnose(changed[:-1], changed[-1]))


def test_a_weighted_sum_is_explained_by_its_weights():
    given_ = adapters()
    weights = np.asarray([0.5, 1.0, -2.0])
    merged = cm.merge(given_, cm.task_arithmetic(weights=weights), scale=1.0)
    diagnosis = cm.diagnose(given_, merged)
    assert_equal(diagnosis.totals()["unexplained"], 0)
    for module in diagnosis:
        updates = [dense(adapter[module.path]) for adapter in given_]
        target = dense(merged[module.path])
        energy = np.sum(target**2)
        shares = [w * np.sum(x * target) / energy for w, x in zip(weights, updates, strict=True)]
        assert_equal(module.measures.contribution.share, shares)
        assert_equal(module.measures.contribution.norm, energy**0.5)


def test_an_adapter_alone_is_kept_in_full():
    given_ = adapters()
    totals = cm.diagnose(given_, given_[1]).totals()
    assert_equal(totals["kept"][1], 1)
    assert_equal(totals["share"], [0, 1, 0])
    assert_equal(totals["alignment"][1], 1, 3e-3)  # the directions left out have 5 % of the norm
    assert_equal(cm.diagnose(given_[:1], given_[0]).totals()["kept"], [1])


def test_duplicates_share_alike():
    one = adapters()[0]
    diagnosis = cm.diagnose([one, one], one)
    assert diagnosis.adapters == ("task0", "task0 (2)")
    assert_equal(diagnosis.pairs("outputs"), np.ones((2, 2)))
    assert_equal(diagnosis.pairs("conflict"), np.zeros((2, 2)))
    assert_equal(diagnosis.totals()["share"], [0.5, 0.5])
    assert_equal(diagnosis.totals()["kept"], [1, 1])
    opposite = map_factors([one], lambda a, b: (a, -b))
    assert_equal(cm.diagnose([one, *opposite]).pairs("conflict"), 1 - np.eye(2))
    assert_equal(cm.diagnose([one, *opposite]).pairs("inputs"), np.ones((2, 2)))


def test_orthogonal_adapters_do_not_overlap():
    basis = np.eye(8, dtype=np.float32)
    pair = [
        cm.Adapter({"x": cm.LoRA(a=basis[:2], b=basis[:, :2])}),
        cm.Adapter({"x": cm.LoRA(a=basis[1:4], b=basis[:, 2:5])}),
    ]
    (module,) = cm.diagnose(pair)
    found = module.measures.pairs
    assert_equal(found.outputs, np.eye(2))
    assert_equal(found.inputs[0, 1], 0.5)  # one of the two directions of the smaller
    for name in ("cosine", "conflict", "opposed"):
        assert_equal(getattr(found, name)[0, 1], 0)
    assert_equal(module.measures.outvoted, [0, 0])


def test_energy_within_a_rank():
    given_ = adapters()
    merged = cm.merge(given_, cm.mean())
    diagnosis = cm.diagnose(given_, merged)
    kept = diagnosis.energy_kept()
    assert (np.diff(kept) >= 0).all()
    assert kept[-1] == 1
    assert_equal(kept, diagnosis.energy_kept("total"))
    cut, _ = cm.truncate(merged, rank=4)
    energies = [sum(np.sum(dense(x) ** 2) for x in adapter.values()) for adapter in (cut, merged)]
    assert_equal(kept[3], energies[0] / energies[1])
    assert diagnosis.rank_for(kept[3]) == 4
    assert diagnosis.rank_for(1) <= sum(RANKS)
    for share in (0, 1.5):
        with pytest.raises(cm.errors.RecipeError, match="expected a number in"):
            diagnosis.rank_for(share)
    with pytest.raises(cm.errors.RecipeError, match="there is no merged update"):
        cm.diagnose(given_).rank_for(0.9)


def test_order_and_scale_of_adapters():
    given_ = adapters(seed=3)
    order = [2, 0, 1]
    names = ("outputs", "inputs", "cosine", "conflict")
    before = cm.diagnose(given_)
    after = cm.diagnose([given_[t] for t in order])
    doubled = cm.diagnose(map_factors(given_, lambda a, b: (a, 2 * b)))
    for name in names:
        assert_equal(after.pairs(name), before.pairs(name)[np.ix_(order, order)])
        assert_equal(doubled.pairs(name), before.pairs(name))
    assert_equal(after.by_adapter("outvoted"), before.by_adapter("outvoted")[:, order])


def test_modules_of_some_adapters():
    one, two, three = adapters()
    two = two.replace(modules={path: two[path] for path in ("layers.0.q", "layers.1.q")})
    three = three.replace(modules={"layers.0.q": three["layers.0.q"]})
    merged = cm.Adapter({"layers.0.q": one["layers.0.q"]})
    diagnosis = cm.diagnose([one, two, three], merged)
    assert [module.adapters for module in diagnosis] == [(0, 1, 2), (0, 1), (0,)]
    assert np.isnan(diagnosis.by_adapter("norms")[2, 1:]).all()
    assert np.isnan(diagnosis.by_adapter("kept")[1:]).all()
    assert np.isnan(diagnosis.pair_means("outputs")[2])
    assert diagnosis.modules[1].measures.contribution is None
    apart = cm.diagnose([three, cm.Adapter({"y": one["layers.1.v"]})], allow_disjoint=True)
    assert np.isnan(apart.pairs("outputs")[0, 1])
    assert "No two adapters have a module in common." in apart.to_html()


def test_opened_adapters(tmp_path):
    given_ = random_adapters(SHAPES, RANKS, dtype="float32")
    for t, adapter in enumerate(given_):
        save_peft(adapter, tmp_path / f"task{t}")
    opened = [cm.open_peft(tmp_path / f"task{t}") for t in range(3)]
    assert_same_measures(cm.diagnose(opened[:2], opened[2]), cm.diagnose(given_[:2], given_[2]))


def test_json_has_all_of_it():
    given_ = adapters()
    given_[1] = given_[1].replace(modules={"layers.0.q": given_[1]["layers.0.q"]})
    diagnosis = cm.diagnose(given_, given_[0])
    found = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert found["adapters"] == ["task0", "task1", "task2"]
    assert [module["path"] for module in found["modules"]] == list(SHAPES)
    assert_equal(
        found["modules"][0]["measures"]["spectra"]["merged"],
        diagnosis.modules[0].measures.spectra.merged,
    )
    assert set(found["mean"]["pairs"]) == set(PAIRS)
    assert_equal(found["mean"]["pairs"]["cosine"], diagnosis.pairs("cosine"))
    assert_equal(found["mean"]["kept"], diagnosis.totals()["kept"])
    assert {cost["rule"] for cost in found["costs"]} == set(cm.rules.RULES)


def test_refuses_what_does_not_belong_together():
    one, two, three = adapters()
    with pytest.raises(cm.MismatchError, match="at least one"):
        cm.diagnose([])
    more = three.replace(modules={**three, "z": three["layers.1.v"]})
    with pytest.raises(cm.MismatchError, match="module 'z', which none of the adapters has"):
        cm.diagnose([one, two], more)
    wide = random_adapters({"layers.0.q": (14, 13)}, (2,))[0]
    with pytest.raises(cm.MismatchError, match="has shape"):
        cm.diagnose([one, two], wide)
    strange = [
        x.replace(metadata=cm.Metadata(base_model=name)) for x, name in ((one, "x"), (two, "y"))
    ]
    with pytest.raises(cm.MismatchError, match="base model"):
        cm.diagnose(strange)


def zero(adapter):
    return map_factors([adapter], lambda a, b: (a, 0 * b))[0]


def renamed(adapter):
    modules = {"dense": adapter["layers.1.v"]}
    return adapter.replace(modules=modules, metadata=cm.Metadata(name="<b>$x_1$ & co"))


CASES = {
    "one adapter": lambda x: (x[:1], None),
    "some zeros": lambda x: ([zero(x[0]), *x[1:]], cm.merge(x, cm.mean())),
    "one module of zeros, and names that mean something": lambda x: (
        [renamed(zero(y)) for y in x],
        renamed(zero(x[0])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_degenerate_input(case):
    given_, merged = CASES[case](adapters())
    diagnosis = cm.diagnose(given_, merged)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves([x.measures for x in diagnosis]))
    if case == "some zeros":
        assert_equal(diagnosis.totals()["kept"][0], 0)
        assert_equal(diagnosis.pairs("outputs")[0], 0)
        return
    page = diagnosis.to_html()
    assert page.count("<svg") == page.count("<figure") > 2
    assert ">nan<" not in page
    assert "<b>$x_1$" not in page


def test_layers_and_kinds():
    grid = arrange(["m.layers.1.attn.q", "m.layers.1.mlp.experts[3].up", "m.layers.10.attn.q"])
    assert grid.layers == (1, 10)
    assert grid.kinds == ("q", "up")
    assert grid.cells == ((0, 0), (0, 1), (1, 0))
    towers = arrange(["text.0.q", "vision.0.q", "text.1.q", "vision.1.q"])
    assert towers.kinds == ("text.*.q", "vision.*.q")
    assert arrange(["layers_0/q", "layers_1/q"]).layers == (0, 1)
    assert arrange(["a", "b.0"]) is None
    assert arrange(["b.0.x", "b.0.y"]) is None
