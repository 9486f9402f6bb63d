"""The benchmarks of packs and of folding into files run. Nothing is timed here."""

import json

import apply_speed
import packs
import pytest


@pytest.mark.nightly
def test_packs(tmp_path):
    assert packs.main(["--quick", "--repeat", "1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "packs.json").read_text())
    assert {row["rule"] for row in result["merging"]} == set(packs.RULES)
    for row in result["merging"]:
        assert row["bytes"]["matrices"] < row["bytes"]["adapters"] == row["bytes"]["pack"]
    for row in result["serving"]:
        assert set(row["times"]) == {"base", "one adapter", "merges", "written adapters"}
    text = (tmp_path / "packs.md").read_text()
    assert "64 requests of 1 token\n" in text


@pytest.mark.nightly
def test_folding(tmp_path):
    assert apply_speed.main(["--quick", "--repeat", "1", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "apply-speed.json").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float16", "bfloat16"]
    assert all(set(row["times"]) == {"copy", "sums", "apply"} for row in rows)
    assert "apply / both" in (tmp_path / "apply-speed.md").read_text()
