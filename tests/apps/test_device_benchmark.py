"""The benchmark of a device runs anywhere. Nothing is timed here."""

import json

import device
import packs
import pytest


@pytest.mark.nightly
@pytest.mark.parametrize("rule", ["tsv", "ties"])
def test_every_stage_is_measured(tmp_path, rule):
    options = ["--tiny", "--shapes", "vit-b32", "--rules", rule, "--precisions", "float64"]
    assert device.main([*options, "--repeat", "1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "device-cpu.json").read_text())
    assert set(result["ceilings"]) == {"float64"}
    stages = ["merge", "merge from host", "Grams", "decompositions", "bases", "rule", "lift"]
    assert [row["stage"] for row in result["rows"]] == stages
    for row in result["rows"]:
        assert row["seconds"] > 0
        assert row["flops"] > 0
        assert row["bandwidth"] > 0
    assert {row["rule"] for row in result["packs"]["merging"]} == set(packs.RULES)
    table = (tmp_path / "device-cpu.md").read_text()
    assert "ViT-B/32" in table
    assert "GB/s" in table
    assert "From weights to a merge" in table


def test_unknown_shape():
    with pytest.raises(SystemExit):
        device.parse(["--shapes", "gpt"])
