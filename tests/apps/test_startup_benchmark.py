"""The benchmark of waiting times runs, and compares with its targets. Nothing is timed here."""

import json

import pytest
import startup


@pytest.mark.nightly
def test_startup(tmp_path):
    only = [x for name in ("rules", "merge, cold", "merge, again") for x in ("--only", name)]
    assert startup.main(["--tiny", "--repeat", "1", "--output", str(tmp_path), *only]) == 0
    rows = json.loads((tmp_path / "startup.json").read_text())["commands"]
    assert list(rows) == ["import jax", "rules", "merge, cold", "merge, again"]
    assert rows["import jax"]["ratio"] == 1
    assert all(row["cpu"] > 0 for row in rows.values())
    assert "Waiting for the command line" in (tmp_path / "startup.md").read_text()


def test_ratios_are_of_medians_and_compared_with_the_target():
    commands = {"fast": startup.Command("x", bound=0.5), "slow": startup.Command("y", bound=0.5)}
    times = {"import jax": [(2, 1), (9, 9), (1, 1)], "fast": [(1, 4)], "slow": [(1.1, 0.1)]}
    rows = startup.summarize(commands, times)
    assert (rows["fast"]["ratio"], rows["fast"]["cpu_ratio"], rows["fast"]["met"]) == (0.5, 4, True)
    assert rows["slow"]["met"] is False
    assert rows["import jax"]["met"] is None
