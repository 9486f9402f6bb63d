"""The benchmark of collecting runs. Nothing is timed here."""

import dataclasses
import json

import collecting
import jax
import pytest


@pytest.mark.nightly
def test_a_table_is_written(tmp_path, monkeypatch):
    small = dataclasses.replace(collecting.CONFIG, hidden_size=24, intermediate_size=48)
    monkeypatch.setattr(collecting, "CONFIG", small)
    monkeypatch.setattr(collecting, "TEXTS", 2)
    monkeypatch.setattr(collecting, "CASES", {"all": collecting.Case(2, 4, collecting.LINEAR)})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as flax does
        assert collecting.main(["--quick", "--repeat", "1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "collecting.json").read_text())
    assert result["rows"]["all"]["ratio"] > 0
    assert "| all |" in (tmp_path / "collecting.md").read_text()
