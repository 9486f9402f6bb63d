"""What each of two processes does, with two devices: started by `test_two_processes.py`.

Both run these tests at the same time, in the same order.
"""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    KEY,
    assert_same,
    plain_merge,
    plain_stream,
    random_adapters,
    random_inputs,
    statistics_of,
)
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from many_devices import CASES, RANKS, SHAPES, mesh, put

import coremerge_jax as cm
from coremerge_jax.merging.processes import exchange, failing_together

pytestmark = pytest.mark.usefixtures("all_devices")

FOLDER = Path(os.environ["COREMERGE_TEST_FOLDER"])
MINE = jax.process_index()


@pytest.fixture
def adapters():
    return random_adapters(SHAPES, RANKS, dtype="float32")


@pytest.fixture
def folders(adapters):
    """The same adapters in files, written by one process."""
    paths = [FOLDER / f"{adapter.metadata.name}" for adapter in adapters]
    if MINE == 0:
        for adapter, path in zip(adapters, paths, strict=True):
            cm.save_peft(adapter, path, force=True)
    exchange()
    return paths


def near(merged):
    """The whole of what is spread over devices."""
    return {
        path: multihost_utils.process_allgather(lora, tiled=True) for path, lora in merged.items()
    }


# All rules on modules that are spread are in `test_mesh_rules.py`. Here are those without a space,
# with one, and those that look beyond their module: at its name, and at all others.
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("mean", "ties of the model")),
        *("tsv", "dare|ties|isotropize"),
    ],
)
def test_shares_of_what_is_on_the_host(adapters, name):
    merged = plain_merge(adapters, CASES[name], key=KEY, mesh=mesh(4))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(merged))
    if MINE == 0:
        assert_same(merged, plain_merge(adapters, CASES[name], key=KEY), 1e-6)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [
        pytest.param((4,), AxisType.Auto, marks=pytest.mark.nightly),
        ((2, 2), AxisType.Explicit),
        pytest.param((1, 4), AxisType.Auto, marks=pytest.mark.nightly),
    ],
)
def test_arrays_of_all_processes(adapters, shape, mode):
    there = mesh(*shape, mode=mode)
    sharded = put(adapters, there)
    merged = plain_merge(sharded, cm.tsv(), mesh=there)
    x, like = (adapter["layers.0.q"].a for adapter in (merged, sharded[0]))
    assert x.sharding.is_equivalent_to(like.sharding, 2)
    assert_same(near(merged), plain_merge(adapters, cm.tsv()), 1e-6)


def test_statistics_of_what_is_on_the_host_and_in_files(adapters, folders):
    statistics = statistics_of(adapters, random_inputs(adapters))
    expected = cm.merge(adapters, cm.regmean(), statistics=statistics)
    merged = cm.merge(adapters, cm.regmean(), statistics=statistics, mesh=mesh(4))
    assert_same(merged, expected, 1e-6)
    opened = [cm.open_peft(folder) for folder in folders]
    for place, devices in ((FOLDER / "both", mesh(4)), (FOLDER / f"alone{MINE}", None)):
        stream = cm.merge_stream(opened, cm.regmean(), statistics=statistics, mesh=devices)
        cm.save_peft(stream, place, budget=3, statistics=statistics, sources=opened, force=True)
    both, alone = (cm.load_peft(FOLDER / name) for name in ("both", f"alone{MINE}"))
    assert {path: x.rank for path, x in both.items()} == {p: x.rank for p, x in alone.items()}
    assert_same(both, alone, 1e-5)


@pytest.mark.parametrize(
    "shape", [(2, 2), *(pytest.param(x, marks=pytest.mark.nightly) for x in ((4,), (1, 4)))]
)
def test_statistics_of_arrays_of_all_processes(adapters, shape):
    statistics = statistics_of(adapters, random_inputs(adapters))
    there = mesh(*shape)
    merged = cm.merge(put(adapters, there), cm.regmean(), statistics=statistics, mesh=there)
    assert_same(near(merged), cm.merge(adapters, cm.regmean(), statistics=statistics), 1e-6)


@pytest.mark.parametrize(
    "mode", [pytest.param(AxisType.Auto, marks=pytest.mark.nightly), AxisType.Explicit]
)
def test_factors_of_a_model_stay_where_they_are(mode):
    """Also if what takes their place is on the host of each process."""
    there, rng = mesh(1, 4, mode=mode), np.random.default_rng(0)
    host = {"lora_a": rng.standard_normal((2, 8, 4)), "lora_b": rng.standard_normal((2, 4, 12))}
    host = {"layers": {"q": {key: x.astype("f4") for key, x in host.items()}}}

    def place(x):
        axis = 1 if x.shape[1] == 8 else 2
        spec = P(*(there.axis_names[-1] if i == axis else None for i in range(3)))
        return jax.make_array_from_callback(x.shape, NamedSharding(there, spec), lambda i: x[i])

    tree = jax.tree.map(place, host)
    adapter, expected = cm.from_tree(tree), cm.from_tree(host)
    assert adapter["layers.1.q"].a.addressable_shards[0].data.shape == (4, 2)
    assert_same(near(adapter), expected, 1e-7)
    for source in (adapter, expected):
        back = cm.to_tree(source, tree)
        for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, 3)
            for one, two in zip(x.addressable_shards, y.addressable_shards, strict=True):
                np.testing.assert_array_equal(one.data, two.data)


@pytest.mark.parametrize(
    "name",
    ["ties of the model", pytest.param("dare|ties|isotropize", marks=pytest.mark.nightly)],
)
def test_modules_across_processes(adapters, name):
    there = mesh(1, 4)
    merged = plain_merge(put(adapters, there), CASES[name], key=KEY, mesh=there)
    assert_same(near(merged), plain_merge(adapters, CASES[name], key=KEY), 1e-6)


def test_modules_across_processes_are_not_read_by_any(adapters):
    with pytest.raises(cm.UnsupportedError, match="from one process to another"):
        plain_merge(adapters, cm.tsv(), mesh=mesh(1, 4))


def test_meshes_have_devices_of_one_process_or_of_all(adapters):
    alone = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("modules",))
    assert_same(
        plain_merge(adapters, cm.mean(), mesh=alone), plain_merge(adapters, cm.mean()), 1e-6
    )
    other = [device for device in jax.devices() if device.process_index != MINE]
    with pytest.raises(cm.UnsupportedError, match="expected devices of this process, or of all"):
        plain_merge(adapters, cm.mean(), mesh=jax.sharding.Mesh(np.asarray(other), ("modules",)))


@pytest.mark.parametrize(
    "rule",
    [pytest.param(cm.tsv(), marks=pytest.mark.nightly), cm.ties(scope="model")],
    ids=str,
)
def test_each_process_reads_and_writes_its_part(folders, monkeypatch, rule):
    opened = [cm.open_peft(folder) for folder in folders]
    kind, read = type(opened[0]), set()
    original = kind.read

    def recorded(file, paths):
        read.update(paths := list(paths))
        return original(file, paths)

    monkeypatch.setattr(kind, "read", recorded)
    stream = plain_stream(opened, rule, mesh=mesh(4))
    kept = cm.save_peft(stream, FOLDER / "merged", rank=5, force=True)
    one, other = map(set, exchange(sorted(read)))
    assert one | other == set(SHAPES)
    assert not one & other
    assert abs(len(one) - len(other)) == 1

    whole = FOLDER / f"whole{MINE}"
    assert cm.save_peft(plain_stream(opened, rule), whole, rank=5, force=True) == kept
    files = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in (FOLDER / "merged").iterdir()) == files
    for name in files:
        assert (FOLDER / "merged" / name).read_bytes() == (whole / name).read_bytes()


def test_more_processes_than_modules(adapters):
    single = [adapter.replace(modules={"q": adapter["layers.0.q"]}) for adapter in adapters]
    for rule in (cm.tsv(), cm.ties(scope="model")):
        merged = plain_merge(single, rule, mesh=mesh(4))
        assert_same(merged, plain_merge(single, rule), 1e-6)
        cm.save_peft(plain_stream(single, rule, mesh=mesh(4)), FOLDER / "single", force=True)
        assert_same(cm.load_peft(FOLDER / "single"), merged, 1e-7)


def test_checkpoints(adapters):
    expected = plain_merge(adapters, cm.tsv())
    there = mesh(2, 2)
    for merged in (
        plain_merge(adapters, cm.tsv(), mesh=there),
        plain_merge(put(adapters, there), cm.tsv(), mesh=there),
    ):
        cm.save_orbax(merged, FOLDER / "orbax", force=True)
        opened = cm.open_orbax(FOLDER / "orbax")
        # Each reads what it wants, when it wants.
        part = opened.read(list(SHAPES)[:2] if MINE == 0 else list(SHAPES)[4:])
        assert_same(part, {path: expected[path] for path in part}, 1e-6)
        exchange()


def test_what_is_spread_is_written_as_peft(adapters):
    there = mesh(2, 2)
    expected = cm.truncate(plain_merge(adapters, cm.tsv()), rank=3)[0]
    stream = plain_stream(put(adapters, there), cm.tsv(), mesh=there)
    for source in (stream, stream.collect()):
        kept = cm.save_peft(source, FOLDER / "spread", rank=3, force=True)
        assert set(kept) == set(SHAPES)
        assert_same(cm.load_peft(FOLDER / "spread"), expected, 1e-6)
        exchange()
    whole = cm.truncate(plain_merge(adapters, cm.tsv()), budget=3)[0]
    cm.save_peft(stream, FOLDER / "spread", budget=3, force=True)
    assert_same(cm.load_peft(FOLDER / "spread"), whole, 1e-6)
    exchange()


def test_one_fails_and_all_do(folders):
    """A file that one process alone finds broken, when the work is well under way."""
    bad = FOLDER / "bad"
    if MINE == 0:
        shutil.copytree(folders[0], bad)
        file = bad / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-75 * 4 :] = np.full(75, np.nan, np.float32).tobytes()
        file.write_bytes(content)
    exchange()
    stream = plain_stream([cm.open_peft(bad), cm.open_peft(folders[1])], cm.tsv(), mesh=mesh(4))
    with pytest.raises(cm.CoreMergeError) as error:
        cm.save_peft(stream, FOLDER / "never")
    failed = exchange(isinstance(error.value, cm.FormatError))
    assert sorted(failed) == [False, True]
    assert "has NaN" in str(error.value)
    assert failed[MINE] or f"process {failed.index(True)} of 2 failed" in str(error.value)
    assert not list(FOLDER.glob("*never*"))


def fail_in_one():
    with failing_together():
        if MINE == 1:
            raise cm.FormatError("here")
    exchange()


def test_after_a_failure_they_can_go_on():
    with pytest.raises(cm.CoreMergeError, match="here" if MINE else "process 1 of 2 failed: here"):
        fail_in_one()
    assert exchange(MINE) == [0, 1]
