"""The engine's automatic decisions: an object that can be asked, and what merges make of them."""

import numpy as np
import pytest
from helpers import dense, plain_merge, plain_stream, random_adapters
from many_devices import mesh

import coremerge_jax as cm
from coremerge_jax.merging.program import Decisions

pytestmark = pytest.mark.wide

WIDE, TALL = {"q": (16, 20)}, {"q": (20, 16)}


def decisions(adapters, rule, **options):
    (found,) = plain_stream(adapters, rule, **options).decisions().values()
    return found


@pytest.mark.parametrize("space", [cm.core(), cm.full(), cm.knots()])
def test_linear_rules_are_computed_on_the_factors(space):
    adapters = random_adapters(WIDE, (2, 3))
    found = decisions(adapters, cm.task_arithmetic(), space=space)
    assert found == Decisions(space=None, basis=None, keeps_a=True)
    stacked = np.concatenate([adapter["q"].a for adapter in adapters])
    np.testing.assert_array_equal(plain_merge(adapters, cm.task_arithmetic())["q"].a, stacked)


def test_the_factors_of_a_linear_merge_are_multiplied_where_their_ranks_exceed_the_module():
    adapters = random_adapters(TALL, (9, 9))
    assert decisions(adapters, cm.mean()) == Decisions(space=None, basis=None, keeps_a=False)
    assert plain_merge(adapters, cm.mean())["q"].rank == 16


@pytest.mark.parametrize(("rule", "basis"), [(cm.tsv(), "any"), (cm.ties(), "singular")])
def test_elementwise_rules_get_singular_vectors(rule, basis):
    found = decisions(random_adapters(WIDE, (2, 3)), rule)
    assert found == Decisions(space=cm.core(), basis=basis, keeps_a=None)


def test_a_is_computed_where_shapes_demand_it():
    assert decisions(random_adapters(WIDE, (2, 3)), cm.tsv(), space=cm.full()).keeps_a is False


def test_a_is_kept_where_it_is_well_conditioned():
    adapters = random_adapters(WIDE, (2, 3), dtype="float32")
    stacked = np.concatenate([adapter["q"].a for adapter in adapters])
    orthogonal, _ = np.linalg.qr(stacked.T.astype(np.float64))
    rows = np.split(orthogonal.T.astype(np.float32), [2])
    good = [x.replace({"q": cm.LoRA(a=a, b=x["q"].b)}) for x, a in zip(adapters, rows, strict=True)]
    kept = plain_merge(good, cm.tsv())["q"]
    np.testing.assert_array_equal(kept.a, np.concatenate(rows))

    # One row of A a hundred times as large, and its column of B so much smaller: the same updates.
    scales = np.asarray([[100], [1]], np.float32)
    first = cm.LoRA(a=good[0]["q"].a * scales, b=good[0]["q"].b / scales.T)
    skewed = plain_merge([good[0].replace({"q": first}), good[1]], cm.tsv())["q"]
    np.testing.assert_allclose(skewed.a @ skewed.a.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(dense(skewed), dense(kept), atol=1e-5)


def test_decisions_are_plain_data_too():
    found = decisions(random_adapters(WIDE, (2, 3)), cm.ties()).to_dict()
    assert found == {
        "space": "core",
        "basis": "singular",
        "keeps_a": None,
        "in_words": "in core space (singular vectors); A is kept if well-conditioned",
    }


@pytest.mark.usefixtures("all_devices")
def test_devices_change_no_decision():
    adapters = random_adapters(WIDE, (2, 3))
    for rule in (cm.mean(), cm.tsv(), cm.ties()):
        assert decisions(adapters, rule, mesh=mesh(8)) == decisions(adapters, rule)
