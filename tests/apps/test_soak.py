"""No merge hangs, whatever the number of cores. `benchmarks/soak.py` does the same for longer."""

import json

import accuracy
import pytest
import soak


def run(tmp_path, *options):
    code = soak.main(["--quick", "--output", str(tmp_path), *options])
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    return code, row


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("cores", "merges"),
    [pytest.param(n, 300, marks=pytest.mark.nightly) for n in (1, 2, 4)],
)
def test_nothing_hangs(tmp_path, cores, merges):
    code, row = run(tmp_path, "--cores", str(cores), "--merges", str(merges), "--patience", "100")
    assert "error" not in row, f"{row['step']}: {row['error']}"
    assert code == row["hangs"] == 0
    assert row["merges"] >= merges


def test_a_step_that_takes_too_long_is_named(tmp_path, capsys):
    code, row = run(tmp_path, "--cores", "1", "--merges", "1", "--patience", "0.01")
    assert code == row["hangs"] == 1
    assert row["step"].startswith("at once: ")
    assert "most recent call first" in row["error"]
    assert row["step"] in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.timeout(120)
def test_accuracy_of_what_is_ill_conditioned():
    which = [case for case in accuracy.cases() if case.title in ("nearly equal B", "duplicates")]
    rows = accuracy.measure(which, "float64")
    assert len(rows) == 5
    assert accuracy.misses(rows) == []
    assert len(rows[0]["rules"]) == 6
    rows[0]["rules"]["tsv"]["error"] = float("nan")
    assert len(accuracy.misses(rows)) == 1
