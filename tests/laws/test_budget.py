"""Budgets over the whole model, in memory and in files, and cuts of files by statistics."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_same, dense, random_adapters, random_inputs, statistics_of

import coremerge_jax as cm
from coremerge_jax.cli.options import parse_count
from coremerge_jax.errors import CoreMergeWarning
from coremerge_jax.merging.limits import Limit
from coremerge_jax.recipe import Recipe
from coremerge_jax.run import MergePlan, run_merge, run_sweep

pytestmark = pytest.mark.wide

SHAPES = {"a.q": (16, 12), "b.q": (16, 12), "c.v": (8, 14)}
RANKS = (2, 3, 3)
SIZE = {"a.q": 1.0, "b.q": 0.2, "c.v": 1.0}


@pytest.fixture(scope="module")
def adapters():
    """Adapters of modules of unlike norms."""
    return [
        x.replace(modules={p: y.replace(b=SIZE[p] * y.b) for p, y in x.items()})
        for x in random_adapters(SHAPES, RANKS, dtype="float32")
    ]


@pytest.fixture(scope="module")
def statistics(adapters):
    return statistics_of(adapters, random_inputs(adapters))


@pytest.fixture(scope="module")
def merged(adapters):
    return cm.merge(adapters, cm.tsv(), scale=1.0)


@pytest.fixture(scope="module")
def files(adapters, statistics, tmp_path_factory):
    """Folders of the adapters, and of the statistics."""
    folder = tmp_path_factory.mktemp("files")
    for adapter in adapters:
        cm.save_peft(adapter, folder / adapter.metadata.name)
    cm.save_statistics(statistics, folder / "statistics")
    return [str(folder / x.metadata.name) for x in adapters], str(folder / "statistics")


def energies(merged):
    return {p: np.linalg.svd(dense(x), compute_uv=False)[: x.rank] ** 2 for p, x in merged.items()}


def ranks_of(adapter):
    return {path: lora.rank for path, lora in adapter.items()}


@pytest.mark.parametrize("budget", [1, 2, 3.4, 5])
def test_keeps_the_most_energy_of_all_ways(merged, budget):
    found = energies(merged)
    cut, kept = cm.truncate(merged, budget=budget)
    ways = itertools.product(*(range(1, len(x) + 1) for x in found.values()))
    total = int(budget * len(found))
    best = max(
        sum(x[:r].sum() for x, r in zip(found.values(), way, strict=True))
        for way in ways
        if sum(way) <= total
    )
    ranks = ranks_of(cut)
    assert sum(ranks.values()) == total
    reached = sum(x[: ranks[path]].sum() for path, x in found.items())
    np.testing.assert_allclose(reached, best, rtol=1e-6)
    for path, x in found.items():
        assert kept[path] == pytest.approx(x[: ranks[path]].sum() / x.sum(), rel=1e-5)
        expected, _ = cm.truncate(merged, rank=ranks[path])
        assert_same({path: cut[path]}, {path: expected[path]}, 1e-6)


@pytest.mark.parametrize("by_inputs", [False, True])
def test_keeps_more_than_one_rank_for_all(merged, statistics, by_inputs):
    options = {"statistics": statistics} if by_inputs else {}
    _, whole = cm.truncate(merged, rank=8, **options)
    assert min(whole.values()) == pytest.approx(1)
    sizes = {path: x.sum() for path, x in energies(merged).items()}
    if by_inputs:  # the energy of outputs, of which shares are known
        from coremerge_jax.merging.metric import metric_or_none
        from coremerge_jax.merging.truncation import Cut

        cut = Cut(Limit(rank=1), metric_or_none(statistics, None, merged.outline))
        sizes = {path: x.sum() for path, x in cut.energies([merged]).items()}
    for budget in (2, 4):
        (cut, kept), (_, uniform) = (
            cm.truncate(merged, **limit, **options)
            for limit in ({"budget": budget}, {"rank": budget})
        )
        assert len(set(ranks_of(cut).values())) > 1
        assert sum(kept[p] * sizes[p] for p in sizes) > sum(uniform[p] * sizes[p] for p in sizes)


def test_parameters_are_not_exceeded(merged):
    widths = {path: sum(lora.shape) for path, lora in merged.items()}
    for parameters in (sum(widths.values()), 200, 333, 10**9):
        cut, _ = cm.truncate(merged, parameters=parameters)
        used = sum(rank * widths[path] for path, rank in ranks_of(cut).items())
        assert used <= parameters
        left = [widths[path] for path, lora in cut.items() if lora.rank < merged[path].rank]
        assert all(used + width > parameters for width in left)


def test_narrow_modules_count_for_more_in_parameters():
    """Two narrow directions are better than one wide one of equal energy."""
    limit = Limit(parameters=2 + 20 + 4)
    shapes = {"wide": (10, 10), "narrow": (1, 1)}
    squares = {"wide": np.array([3.0, 2.0]), "narrow": np.array([3.0, 1.0, 1.0, 1.0])}
    assert limit.ranks(squares, shapes) == {"wide": 1, "narrow": 3}
    assert Limit(budget=2).ranks(squares, shapes) == {"wide": 2, "narrow": 2}


def test_what_is_nothing_is_not_kept(merged):
    """Nor does a larger budget change what there is."""
    more = merged.replace(
        modules={
            p: cm.LoRA(a=np.vstack([x.a, x.a]), b=np.hstack([x.b, 0 * x.b]))
            for p, x in merged.items()
        }
    )
    for budget in (8, 100):
        cut, kept = cm.truncate(more, budget=budget)
        assert ranks_of(cut) == {"a.q": 8, "b.q": 8, "c.v": 8}
        assert_same(cut, dict(merged), 1e-6)
    zero = jax.tree.map(np.zeros_like, merged)
    cut, kept = cm.truncate(zero, budget=2)
    assert set(ranks_of(cut).values()) == {1}
    assert set(kept.values()) == {1.0}


def test_the_order_of_modules_does_not_matter(merged):
    turned = merged.replace(modules={path: merged[path] for path in reversed([*merged])})
    found = [ranks_of(cm.truncate(x, budget=3)[0]) for x in (merged, turned)]
    assert found[0] == found[1]
    alike = {path: np.array([2.0, 1.0, 1.0]) for path in "ba"}
    shapes = dict.fromkeys("ba", (3, 3))
    assert Limit(budget=2.5).ranks(alike, shapes) == {"a": 3, "b": 2}


def test_impossible_budgets_are_refused(merged):
    for limits, message in (
        ({"rank": 2, "budget": 2}, "rank=2 and budget=2: rank and energy limit each module"),
        ({"energy": 0.9, "parameters": 99}, "energy=0.9 and parameters=99"),
        ({"budget": 2, "parameters": 99}, "or one of the others"),
        ({"budget": 0}, "budget=0: expected a mean rank of at least 1"),
        ({"budget": 0.5}, "budget=0.5: expected a mean rank of at least 1"),
        ({"parameters": 0}, "parameters=0: expected a whole number of at least 1"),
        ({"parameters": 50}, "parameters=50: 3 modules have 78 at rank 1; give at least as many"),
        ({}, "needs rank=, energy=, budget= or parameters="),
    ):
        with pytest.raises(cm.RecipeError, match=message):
            cm.truncate(merged, **limits)
    with pytest.raises(cm.UnsupportedError, match="budget=2 with traced factors"):
        jax.jit(lambda x: cm.truncate(x, budget=2))(merged)
    with pytest.raises(cm.RecipeError, match="rank=2 and budget=3"):
        Recipe(rank=2, budget=3)


# --- Files ------------------------------------------------------------------------------------

CUTS = [
    ({"budget": 3.0}, False),
    ({"parameters": 250}, False),
    ({"budget": 3.0}, True),
    ({"parameters": 250}, True),
    ({"rank": 3}, True),
    ({"energy": 0.8}, True),
]


@pytest.mark.filterwarnings("ignore:the modules have ranks")
@pytest.mark.parametrize(("limit", "by_inputs"), CUTS)
def test_streams_are_cut_as_in_memory(files, adapters, statistics, tmp_path, limit, by_inputs):
    """And `verify` accepts the result, and no other."""
    sources, folder = files
    recipe = Recipe(
        adapters=tuple(sources),
        scale=1.0,
        uniform_rank=False,
        statistics=(folder,) if by_inputs else None,
        **limit,
    )
    result = run_merge(recipe.resolve(), tmp_path / "out")
    merged = cm.merge(adapters, cm.tsv(), scale=1.0)
    options = {"statistics": statistics, "sources": adapters} if by_inputs else {}
    expected, kept = cm.truncate(merged, **limit, **options)
    found = cm.load_peft(tmp_path / "out")
    assert ranks_of(found) == ranks_of(expected)
    assert_same(found, dict(expected), 1e-5)
    assert result.energy_kept == pytest.approx(kept, rel=1e-5)
    assert ("outputs" in result.cut_by) == by_inputs
    assert cm.verify(tmp_path / "out").ok
    plan = run_merge(recipe.resolve())
    assert isinstance(plan, MergePlan)
    assert plan.decisions["cut_by"] == result.cut_by
    written = sum(4 * x.rank * sum(x.shape) for x in found.values())
    assert written <= plan.bytes <= 4 * sum(x.rank * sum(x.shape) for x in merged.values())
    other = cm.truncate(merged, **limit)[0] if by_inputs else cm.truncate(merged, rank=2)[0]
    cm.save_peft(other, tmp_path / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "out" / name)
    assert not cm.verify(tmp_path / "out").ok


def test_library_streams_are_cut_by_outputs(adapters, statistics, merged, tmp_path):
    stream = cm.merge_stream(adapters, cm.tsv(), scale=1.0)
    options = {"budget": 3, "statistics": statistics, "sources": adapters}
    kept = cm.save_peft(stream, tmp_path / "out", **options)
    expected, shares = cm.truncate(merged, **options)
    assert_same(cm.load_peft(tmp_path / "out"), dict(expected), 1e-5)
    assert kept == pytest.approx(shares)


@pytest.mark.filterwarnings("ignore:the modules have ranks")
def test_ranks_in_files(files, tmp_path):
    """Their own by default; or one, filled up with zeros."""
    recipe = Recipe(adapters=tuple(files[0]), budget=3)
    mixed = run_merge(recipe.resolve(), tmp_path / "mixed")
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) > 0
    one = Recipe(adapters=tuple(files[0]), budget=3, uniform_rank=True)
    filled = run_merge(one.resolve(), tmp_path / "filled")
    found = [cm.load_peft(tmp_path / name) for name in ("mixed", "filled")]
    assert set(ranks_of(found[1]).values()) == {max(ranks_of(found[0]).values())}
    assert_same(found[1], dict(found[0]), 1e-6)
    assert filled.energy_kept == mixed.energy_kept
    assert cm.verify(tmp_path / "filled").ok


def test_one_rank_is_the_default_but_of_a_budget():
    """Also of a budget that is added to a recipe that was written down."""
    for fields, one_rank in (
        ({}, True),
        ({"budget": 3}, False),
        ({"parameters": 9}, False),
        ({"budget": 3, "uniform_rank": True}, True),
        ({"rank": 3, "uniform_rank": False}, False),
    ):
        recipe = Recipe(**fields)
        assert recipe.to_dict()["uniform_rank"] is one_rank
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    written = Recipe.from_dict(Recipe().to_dict())
    assert dataclasses.replace(written, budget=3).to_dict()["uniform_rank"] is False


def test_weight_0_and_modules_without_statistics(files, adapters, statistics, tmp_path):
    """An adapter that is not merged does not count."""
    sources, _ = files
    some = cm.Statistics({p: statistics[p] for p in ("a.q", "c.v")}, statistics.adapters)
    cm.save_statistics(some, tmp_path / "statistics")
    recipe = Recipe(
        adapters=tuple(sources),
        weights=(1, 0, 1),
        rank=2,
        scale=1.0,
        statistics=(str(tmp_path / "statistics"),),
    )
    with pytest.warns(CoreMergeWarning, match=r"no statistics of module 'b\.q', so cut"):
        result = run_merge(recipe.resolve(), tmp_path / "out")
    assert "in 2 of 3 modules" in result.cut_by
    two = [adapters[0], adapters[2]]
    merged = cm.merge(two, cm.tsv(), scale=1.0)
    with pytest.warns(CoreMergeWarning, match="no statistics"):
        expected, _ = cm.truncate(merged, rank=2, statistics=some, sources=two)
    assert_same(cm.load_peft(tmp_path / "out"), dict(expected), 1e-5)


def test_words_for_numbers_of_parameters():
    found = [parse_count(text) for text in ("2.5M", "800k", "1_000_000", "3b", "12")]
    assert found == [2_500_000, 800_000, 1_000_000, 3_000_000_000, 12]
    for text in ("", "2.5G", "-1", "many"):
        with pytest.raises(cm.RecipeError, match=r"like 2\.5M or 800k"):
            parse_count(text)


@pytest.mark.filterwarnings("ignore:the modules have ranks")
def test_candidates_of_a_sweep_are_cut_by_outputs(files, adapters, statistics, tmp_path):
    sources, folder = files
    recipe = Recipe(adapters=tuple(sources), budget=3, statistics=(folder,))
    run_sweep(recipe.resolve(), tmp_path / "out", {"scale": [0.5, 1.0]})
    for scale in (0.5, 1.0):
        merged = cm.merge(adapters, cm.tsv(), scale=scale)
        expected, _ = cm.truncate(merged, budget=3, statistics=statistics, sources=adapters)
        assert_same(cm.load_peft(tmp_path / "out" / f"scale={scale}"), dict(expected), 1e-5)
