"""Merges on eight devices are those on one."""

import jax
import numpy as np
import pytest
from helpers import (
    KEY,
    assert_same,
    dense,
    distance,
    narrow,
    plain_merge,
    plain_stream,
    random_adapters,
)
from jax.sharding import AxisType
from many_devices import CASES, RANKS, SHAPES, mesh

import coremerge_jax as cm
from coremerge_jax.merging import program
from coremerge_jax.merging.cost import cost
from coremerge_jax.merging.groups import group_modules

pytestmark = [pytest.mark.wide, pytest.mark.usefixtures("all_devices")]

DAILY = {"mean", "tsv", "cart", "ties", "dare|ties|isotropize", "ties of the model"}
HEAD = {"head": (7, 10)}  # R > m


MESHES = {"8": mesh(8), "4x2": mesh(4, 2)}
every_mesh = pytest.mark.parametrize("there", MESHES.values(), ids=MESHES)


@pytest.fixture
def adapters():
    return random_adapters(SHAPES, RANKS, dtype="float32")


@pytest.fixture
def small():
    return random_adapters(HEAD, RANKS, dtype="float32")


@pytest.mark.parametrize("name", narrow(CASES, CASES, night=CASES.keys() - DAILY))
def test_same_as_one_device(adapters, name):
    expected = plain_merge(adapters, CASES[name], key=KEY)
    for there in MESHES.values():
        merged = plain_merge(adapters, CASES[name], key=KEY, mesh=there)
        assert_same(merged, expected, 1e-6)
        for path, lora in merged.items():
            assert isinstance(lora.a, np.ndarray)
            assert lora.shape == SHAPES[path]
            assert lora.rank == expected[path].rank


@pytest.mark.parametrize("name", ["tsv", pytest.param("ties", marks=pytest.mark.nightly)])
def test_all_modules_of_a_device_at_once(adapters, monkeypatch, name):
    """As on accelerators."""
    expected = plain_merge(adapters, CASES[name])
    jax.clear_caches()
    monkeypatch.setattr(program, "over_modules", lambda fn, arrays: jax.vmap(fn)(arrays))
    for there in MESHES.values():
        assert_same(plain_merge(adapters, CASES[name], mesh=there), expected, 1e-6)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["mean", "ties", "tsv"])
@every_mesh
def test_more_ranks_than_rows(small, name, there):
    expected = plain_merge(small, CASES[name])["head"]
    lora = plain_merge(small, CASES[name], mesh=there)["head"]
    assert distance(dense(lora), dense(expected)) < 1e-6
    assert lora.rank == 7


@every_mesh
def test_masks_are_the_same(adapters, there):
    rule = cm.dare(drop=0.5)
    one, many = (plain_merge(adapters[:1], rule, key=KEY, mesh=m) for m in (None, there))
    shares = []
    for path, lora in adapters[0].items():
        u, v = (np.linalg.svd(x)[0][:, :2] for x in (lora.b, lora.a.T))
        cores = [u.T @ dense(x[path]) @ v for x in (one, many)]
        kept = [np.abs(core) > 1e-3 * np.abs(cores[0]).max() for core in cores]
        np.testing.assert_array_equal(*kept)
        shares.append(kept[0].mean())
    assert 0 < np.mean(shares) < 1


@pytest.mark.parametrize(
    "space",
    [
        cm.tucker(rank=4),
        pytest.param(cm.core(gauge="balanced"), marks=pytest.mark.nightly),
        pytest.param(cm.knots(), marks=pytest.mark.nightly),
    ],
)
@every_mesh
def test_spaces(adapters, there, space):
    rule = cm.tsv() if isinstance(space, cm.knots) else cm.ties()
    expected = plain_merge(adapters, rule, space=space)
    assert_same(plain_merge(adapters, rule, space=space, mesh=there), expected, 1e-6)


@pytest.mark.parametrize("space", [cm.full(), cm.knots()])
def test_spaces_as_large_as_a_module(adapters, space):
    expected = plain_merge(adapters, cm.ties(), space=space)
    assert_same(plain_merge(adapters, cm.ties(), space=space, mesh=mesh(8)), expected, 1e-6)
    with pytest.raises(cm.UnsupportedError, match="merge in core space, or spread modules alone"):
        plain_merge(adapters, cm.ties(), space=space, mesh=mesh(4, 2))


@every_mesh
def test_batches_change_nothing(there):
    adapters = random_adapters({f"q.{i}": (7, 10) for i in range(19)}, RANKS, dtype="float32")
    whole = plain_merge(adapters, cm.tsv(), mesh=there)
    with pytest.raises(MemoryError, match="are allowed"):
        plain_stream(adapters, cm.tsv(), mesh=there, max_memory=1)
    rows, workers = len(there.devices), plain_stream(adapters, cm.tsv(), mesh=there).workers
    one = cost(group_modules(adapters)[0], cm.chain(cm.tsv()), cm.core())
    room = one.memory(workers, rows, rows)
    stream = plain_stream(adapters, cm.tsv(), mesh=there, max_memory=room)
    assert len(stream) == -(-19 // rows)
    assert stream.memory <= room
    assert_same(stream.collect(), whole, 1e-12)
    assert stream.outline.keys() == whole.keys()


def test_meshes_that_are_refused(adapters):
    three = jax.make_mesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(cm.UnsupportedError, match=r"'a', 'b', 'c'.*expected one, for modules"):
        plain_merge(adapters, cm.tsv(), mesh=three)
