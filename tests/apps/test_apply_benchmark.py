"""The benchmark of `coremerge apply` runs, and notices what is wrong. Nothing is timed here."""

import json

import apply_memory
import pytest


@pytest.mark.nightly
def test_apply_memory(tmp_path):
    options = ["--tiny", "--layers", "4", "--repeat", "1", "--output", str(tmp_path)]
    assert apply_memory.main([*options, "--folder", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "apply.json").read_text())
    assert result["modules"] == 4 * 7
    assert result["killed"]["written"] > 0
    assert result["killed"]["base_untouched"]
    assert not (result["killed"]["killed"] and result["killed"]["output"])
    assert result["base_bytes"] > result["largest_tensor_bytes"] > 0
    assert result["peak_bytes"] > 0
    assert "Into a base model" in (tmp_path / "apply.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"apply.json", "apply.md"}


def test_what_is_missed():
    killed = {"killed": True, "written": 5, "output": False, "base_untouched": True}
    found = {"peak_bytes": 2, "bound_bytes": 3, "killed": killed}
    assert apply_memory.misses(found) == []
    assert len(apply_memory.misses(found | {"bound_bytes": 1})) == 1
    assert apply_memory.misses(found | {"bound_bytes": 1}, tiny=True) == []
    for change in ({"killed": False}, {"output": True}, {"base_untouched": False}):
        assert len(apply_memory.misses(found | {"killed": killed | change})) == 1
