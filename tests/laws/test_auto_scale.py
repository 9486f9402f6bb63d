"""The automatic scale: norms of merges, one adapter, several numbers of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_same,
    dense,
    map_factors,
    plain_merge,
    random_adapters,
    random_inputs,
    statistics_of,
)
from many_devices import mesh

import coremerge_jax as cm

pytestmark = pytest.mark.wide

SHAPES = {"a.q": (16, 24), "b.q": (16, 24)}
RANKS = (2, 4, 3)
BY_NORM = {
    "ties": cm.ties(),
    "mean": cm.mean(),
    "isotropize": cm.isotropize(),
    "tsv, isotropize": cm.chain(cm.tsv(), cm.isotropize()),
    "ties of the model": cm.ties(scope="model"),
    "regmean, isotropize": cm.chain(cm.regmean(), cm.isotropize()),
}


@pytest.fixture
def adapters():
    """The second lacks a module."""
    first, second, third = random_adapters(SHAPES, RANKS)
    some = {path: lora for path, lora in second.items() if path != "b.q"}
    return [first, second.replace(modules=some), third]


def norm(adapter, paths):
    return np.sqrt(sum(np.sum(dense(adapter[path]) ** 2) for path in paths if path in adapter))


@pytest.mark.parametrize("name", BY_NORM)
def test_a_merge_has_the_norm_that_it_should_have(adapters, name):
    """By number of adapters; and apart from that, it is the plain merge."""
    rule = BY_NORM[name]
    inputs = {"statistics": statistics_of(adapters, random_inputs(adapters))}
    merged, plain = cm.merge(adapters, rule, **inputs), plain_merge(adapters, rule, **inputs)
    for path, tasks in (("a.q", 3), ("b.q", 2)):
        updates = np.linalg.norm([norm(adapter, [path]) for adapter in adapters])
        expected = cm.chain(rule).auto_norm(tasks) * updates
        np.testing.assert_allclose(norm(merged, [path]), expected, rtol=1e-9)
        factor = norm(merged, [path]) / norm(plain, [path])
        assert_same({path: merged[path]}, {path: factor * dense(plain[path])}, 1e-9)


@pytest.mark.parametrize("rule", [cm.regmean(), cm.regmean(orthogonalize=False)], ids=str)
def test_of_regmean_it_is_about_outputs_on_the_inputs(adapters, rule):
    """It lies between two: outputs as large as the adapters' own, or as far along these."""
    inputs = random_inputs(adapters)
    statistics = statistics_of(adapters, inputs)
    merged = cm.merge(adapters, rule, statistics=statistics)
    plain = plain_merge(adapters, rule, statistics=statistics)
    for path in ("a.q", "b.q"):
        ours = mine = common = 0.0
        for adapter, x in zip(adapters, inputs, strict=True):
            if path in adapter:
                own, y = (x[path] @ dense(of[path]).T for of in (adapter, plain))
                weight = (norm(adapter, [path]) / np.linalg.norm(own)) ** 2
                ours += weight * np.sum(own**2)
                mine += weight * np.sum(y**2)
                common += weight * np.sum(own * y)
        expected = np.sqrt(np.sqrt(ours / mine) * ours / common)
        assert_same({path: merged[path]}, {path: expected * dense(plain[path])}, 1e-9)
    projected = cm.project(adapters, statistics=statistics)
    assert_same(projected.merge(rule), dict(merged), 1e-9)


def test_modules_have_one_scale():
    """Not one each: small merged updates stay small."""
    adapters = random_adapters(SHAPES, RANKS)
    small = [
        adapter.replace(
            modules={**adapter, "b.q": adapter["b.q"].replace(b=0.1 * adapter["b.q"].b)}
        )
        for adapter in adapters
    ]
    merged, plain = cm.merge(small, cm.ties()), plain_merge(small, cm.ties())
    factors = [norm(merged, [path]) / norm(plain, [path]) for path in SHAPES]
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-12)


def test_of_tsv_it_is_a_number(adapters):
    merged, plain = cm.merge(adapters, cm.tsv()), plain_merge(adapters, cm.tsv())
    for path, tasks in (("a.q", 3), ("b.q", 2)):
        factor = min(1, 1.4 / tasks**0.5)
        assert_same({path: merged[path]}, {path: factor * dense(plain[path])}, 1e-12)


@pytest.mark.parametrize("rule", [cm.tsv(), cm.mean(), cm.regmean()], ids=str)
def test_one_adapter_comes_back(adapters, rule):
    one = adapters[:1]
    statistics = statistics_of(one, random_inputs(one))
    assert_same(cm.merge(one, rule, statistics=statistics), dict(one[0]), 1e-9)


def test_larger_updates_make_larger_merges(adapters):
    """Weights count as factors of the updates."""
    merged = cm.merge(adapters, cm.ties())
    doubled = {path: 2 * dense(lora) for path, lora in merged.items()}
    assert_same(cm.merge(map_factors(adapters, lambda a, b: (a, 2 * b)), cm.ties()), doubled, 1e-9)
    assert_same(cm.merge(adapters, cm.ties(), weights=[2, 2, 2]), doubled, 1e-9)


def test_part_by_part(adapters):
    """In two passes, where a merge in memory takes one."""
    for rule in (cm.ties(), cm.mean()):
        parts = {p: x for part in cm.merge_stream(adapters, rule) for p, x in part.items()}
        assert_same(parts, dict(cm.merge(adapters, rule)), 1e-12)


def test_a_merge_that_the_scale_makes_too_large_is_refused():
    huge = [
        cm.Adapter({"q": cm.LoRA(a=np.ones((1, 2), "float32"), b=np.full((2, 1), x, "float32"))})
        for x in (3e38, -2.9e38)
    ]
    with pytest.raises(cm.MismatchError, match="'q': the merged update overflows float32"):
        cm.merge([*huge, *huge], cm.mean())


def test_of_projected_adapters(adapters):
    projected = cm.project(adapters)
    for rule in (cm.ties(), cm.tsv(), cm.task_arithmetic()):
        assert_same(projected.merge(rule), cm.merge(adapters, rule), 1e-9)
        weighted = cm.merge(adapters, rule, weights=[1, 0.5, 2])
        if rule != cm.ties():
            assert_same(projected.merge(rule, weights=[1, 0.5, 2]), weighted, 1e-9)


def test_patterns(adapters):
    """Modules that no pattern matches have the automatic scale."""
    merged, plain = cm.merge(adapters, cm.mean()), plain_merge(adapters, cm.mean())
    mixed = cm.merge(adapters, cm.mean(), scale={"a.*": 2.0})
    assert_same({"a.q": mixed["a.q"]}, {"a.q": 2 * dense(plain["a.q"])}, 1e-12)
    assert_same({"b.q": mixed["b.q"]}, {"b.q": dense(merged["b.q"])}, 1e-12)
    assert_same(cm.merge(adapters, cm.mean(), scale={"a.*": "auto"}), dict(merged), 1e-12)
    for wrong in ("Auto", None, {"a.*": "all"}):
        with pytest.raises(cm.RecipeError, match=r"scale.*'auto'"):
            cm.merge(adapters, cm.mean(), scale=wrong)


def test_updates_that_cancel_stay_zero(adapters):
    one = adapters[0]
    (other,) = map_factors([one], lambda a, b: (a, -b))
    merged = cm.merge([one, other], cm.mean())
    assert norm(merged, SHAPES) < 1e-9 * norm(one, SHAPES)


def test_inside_jit(adapters):
    few = [x.replace(modules={"a.q": x["a.q"]}) for x in adapters]
    on_device = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), few)
    merged = jax.jit(lambda x: cm.merge(x, cm.isotropize()))(on_device)
    assert_same(merged, cm.merge(few, cm.isotropize()), 1e-4)


@pytest.mark.usefixtures("all_devices")
def test_on_several_devices(adapters):
    for rule in (cm.task_arithmetic(), cm.isotropize()):
        expected = cm.merge(adapters, rule)
        for there in (mesh(8), mesh(4, 2)):
            assert_same(cm.merge(adapters, rule, mesh=there), expected, 1e-6)
