"""The benchmark of more devices runs, and its estimates make sense. Nothing is timed here."""

import dataclasses
import json
import math

import pytest
import scaling
from common.machine import cores
from common.peers import RULES

import coremerge_jax as cm
from coremerge_jax.merging.cost import cost

EVERY = [(shape, cluster) for shape in scaling.CASES for cluster in scaling.CLUSTERS]


@pytest.mark.nightly
def test_one_and_two_devices_are_measured(tmp_path):
    options = ["--tiny", "--devices", "1", "2", "--rules", "ties", "--repeat", "1"]
    assert scaling.main([*options, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "scaling.json").read_text())
    meshes = [(row["devices"], tuple(row["mesh"])) for row in result["measured"]]
    shared = [(2, (2,)), (2, (1, 2))]
    assert meshes == [(1, ()), *[(2, ())] * (cores() > 1), *shared]
    for row in result["measured"]:
        assert min(row["seconds"], row["rate"], row["over_one"]) > 0
        assert row["over_one"] == 1 or row["devices"] > 1
    assert len(result["model"]) == len(EVERY)
    assert result["assumed"].keys() == scaling.ASSUMED.keys()
    table = (tmp_path / "scaling.md").read_text()
    assert "| TIES | (1, 2) | 2 |" in table
    assert "Nothing here is measured" in table
    assert all(f"| {name} | {what} |" in table for name, (_, what) in scaling.ASSUMED.items())


def test_only_the_model(tmp_path):
    assert scaling.main(["--only", "model", "--output", str(tmp_path)]) == 0
    assert "measured" not in json.loads((tmp_path / "scaling.json").read_text())


@pytest.mark.parametrize("options", [["--devices", "3"], ["--devices", "0"], ["--repeat", "0"]])
def test_what_cannot_be_measured(options):
    with pytest.raises(SystemExit):
        scaling.parse(options)


@pytest.mark.parametrize("shape", scaling.CASES, ids=lambda shape: shape.name)
def test_one_gpu_takes_what_the_cost_model_says(shape):
    gpu = scaling.Cluster("", scaling.H100, 1)
    rule = cm.chain(RULES[scaling.MODELLED])
    groups = [scaling.group_of(shape, kind, shape.modules(kind)) for kind in shape.kinds]
    costs = [cost(group, rule, cm.core()) for group in groups]
    expected = sum(
        x.products / gpu.accelerator.products
        + x.core / gpu.accelerator.decompositions
        + 2 * (x.read + x.written) / gpu.accelerator.bandwidth
        for x in costs
    )
    found = scaling.estimate(shape, gpu)
    assert math.isclose(found["seconds"]["compute"], expected)
    assert found["read_per_host"] == sum(x.read for x in costs)
    assert found["busiest"] == sum(x.modules for x in costs)


@pytest.mark.parametrize("accelerator", [scaling.V5E, scaling.H100], ids=lambda x: x.name)
@pytest.mark.parametrize("shape", scaling.CASES, ids=lambda shape: shape.name)
def test_twice_the_rows_never_take_longer(shape, accelerator):
    rows = [
        scaling.estimate(shape, scaling.Cluster("", accelerator, 2**i), (2**i, 1)) for i in range(8)
    ]
    for stage in ("compute", "read", "write", "total"):
        seconds = [row["seconds"][stage] for row in rows]
        assert seconds == sorted(seconds, reverse=True)
    memory = [row["memory"] for row in rows]
    assert memory == sorted(memory, reverse=True)


@pytest.mark.parametrize("shape", scaling.CASES, ids=lambda shape: shape.name)
def test_twice_the_gpus_never_take_longer(shape):
    clusters = [scaling.Cluster("", scaling.H100, 2**i) for i in range(8)]
    seconds = [scaling.estimate(shape, cluster)["seconds"]["total"] for cluster in clusters]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("accelerator", [scaling.V5E, scaling.H100], ids=lambda x: x.name)
def test_columns_share_bytes_and_products(accelerator):
    shape = scaling.CASES[-1]
    whole, *parts = (
        scaling.cost_of_part(shape, shape.kinds[0], columns, accelerator.double)
        for columns in (1, 2, 4, 8)
    )
    for columns, part in zip((2, 4, 8), parts, strict=True):
        assert (columns * part.read, columns * part.written) == (whole.read, whole.written)
        assert part.held + part.work < whole.held + whole.work
    products = [part.products for part in parts]
    assert products == sorted(products, reverse=True)
    assert len({part.core for part in parts}) == 1


@pytest.mark.parametrize(("shape", "cluster"), EVERY, ids=lambda x: x.name)
def test_estimates_are_of_what_can_be_run(shape, cluster):
    row = scaling.estimate(shape, cluster)
    rows, columns = row["mesh"]
    assert rows * columns == cluster.devices
    assert cluster.per_host % columns == 0
    assert row["seconds"]["total"] == max(row["seconds"].values())
    assert row["memory"] < cluster.accelerator.memory
    modules = sum(map(shape.modules, shape.kinds))
    assert row["busiest"] * rows >= modules
    assert math.isclose(row["rate"] * row["seconds"]["total"], modules)


def test_faster_devices_take_less_time():
    shape, cluster = scaling.CASES[0], scaling.CLUSTERS[-1]
    rates = ("products", "decompositions", "bandwidth", "host_link", "storage")
    twice = {rate: 2 * getattr(cluster.accelerator, rate) for rate in rates}
    faster = cluster._replace(accelerator=dataclasses.replace(cluster.accelerator, **twice))
    slow, fast = (scaling.estimate(shape, x)["seconds"] for x in (cluster, faster))
    assert slow == pytest.approx({stage: 2 * seconds for stage, seconds in fast.items()})
