"""The benchmarks run, and those who are compared give the same result. Nothing is timed here."""

import json
import subprocess
import sys
import warnings

import end_to_end
import pytest
import same_results
import speed
from common import machine, report


@pytest.fixture
def run_speed(tmp_path):
    """Runs tiny modules in one round; the rows of the table by shape and rule."""

    def run(*options):
        code = speed.main(["--quick", "--repeat", "1", "--output", str(tmp_path), *options])
        result = json.loads((tmp_path / "speed.json").read_text())
        assert code == (1 if "--check" in options else 0)
        assert result["machine"]["packages"]["jax"]
        assert len((tmp_path / "speed.json").read_bytes()) < 100_000
        return {(row["shape"], row["rule"]): row for row in result["rows"]}

    return run


@pytest.mark.parametrize(
    ("only", "rules"),
    [
        pytest.param(["vit-b32"], ["ties"], marks=pytest.mark.nightly),
        pytest.param(["vit-b32", "satur*"], ["ties", "tsv+iso-c"], marks=pytest.mark.nightly),
    ],
)
def test_speed_without_peers_that_are_not_installed(run_speed, tmp_path, capsys, only, rules):
    options = [option for shape in only for option in ("--only", shape)]
    rows = run_speed(*options, "--rules", ",".join(rules), "--peers", "jax", "--check")
    shapes = [shape.replace("satur*", "saturated") for shape in only]
    assert set(rows) == {(shape, rule) for shape in shapes for rule in rules}
    for row in rows.values():
        assert set(row["times"]) == {"ours", "jax", "floor", "read", "model"}
        assert row["times"]["jax"]["error"] < 1e-6
        assert row["times"]["ours"]["compile"] > 0
    table = (tmp_path / "speed.md").read_text()
    assert "ViT-B/32" in table
    assert "not measured" in capsys.readouterr().out


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("rules", "others"),
    [
        ("ta,tsv", ["llama-3-8b"]),
        pytest.param(",".join(speed.RULES), ["llama-3-8b", "saturated"], marks=pytest.mark.nightly),
    ],
)
def test_speed_with_all_peers(run_speed, rules, others):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        pytest.importorskip("peft")
    rows = run_speed("--only", "vit-b32", "--rules", rules)
    for shape in others:
        rows |= run_speed("--only", shape, "--rules", "ties")
    for (shape, rule), row in rows.items():
        times = row["times"]
        assert times["torch"]["error"] < 1e-6, (shape, rule)
        assert times["jax"]["error"] < 1e-6, (shape, rule)
    assert set(rows["vit-b32", "ta"]["times"]) >= {"peft", "full", "knots"}
    assert rows["vit-b32", "ta"]["times"]["peft"]["error"] < 1e-5
    assert rows["vit-b32", "tsv"]["times"]["full"]["error"] < 1e-5
    assert rows["llama-3-8b", "ties"]["times"]["peft"]["scaled_by"] == 2
    assert "scaled_by" not in rows["llama-3-8b", "ties"]["times"]["torch"]


@pytest.mark.nightly
def test_plot(run_speed, tmp_path):
    plot = pytest.importorskip("common.plot", exc_type=ImportError)
    run_speed("--only", "vit-b32", "--only", "tasks-[24]", "--rules", "ties", "--peers", "")
    result = json.loads((tmp_path / "speed.json").read_text())
    for name in ("one.svg", "two.svg"):
        plot.draw(result, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "speed.svg").exists()


@pytest.mark.parametrize(("ours", "met"), [(1.0, True), (1.3, False)])
def test_targets(ours, met):
    times = {"ours": ours, "torch": 8.5, "floor": 0.45}
    row = {"times": {name: {"seconds": seconds} for name, seconds in times.items()}}
    named = [("llama-3-8b", "ties"), ("llama-3-8b", "tsv+iso-c")]
    rows = [row | {"shape": shape, "rule": rule} for shape, rule in named]
    verdicts = report.targets(rows)
    assert [target["met"] for target in verdicts] == [met] * 4 + [False] * 4
    assert [target["value"] for target in verdicts[4:]] == [None] * 4


@pytest.mark.parametrize(("ours", "met"), [(9.0, True), (11.0, False)])
def test_growth_is_held_against_the_cost_model(ours, met):
    rows = [
        {
            "shape": shape,
            "rule": "ties",
            "times": {name: {"seconds": seconds} for name, seconds in times.items()},
        }
        for shape, times in (
            ("tasks-8", {"ours": 0.1, "model": 0.2}),
            ("tasks-100", {"ours": ours, "model": 20.0}),
        )
    ]
    verdict = report.targets(rows)[-1]
    assert verdict["met"] == met
    assert verdict["value"] == pytest.approx(ours / 10)


def test_unknown_rule_or_shape():
    for options in (["--rules", "sum"], ["--only", "gpt"], ["--peers", "mergekit"]):
        with pytest.raises(SystemExit):
            speed.main(options)


@pytest.mark.nightly
def test_end_to_end(tmp_path, monkeypatch):
    options = ["--tiny", "--layers", "1", "--tasks", "3", "--repeat", "1"]
    folders = ["--folder", str(tmp_path / "adapters"), "--output", str(tmp_path / "results")]
    assert end_to_end.main([*options, *folders]) == 0
    result = json.loads((tmp_path / "results" / "end_to_end-tasks-3.json").read_text())
    assert set(result["starts"]) == {"cold", "again"}
    for start in result["starts"].values():
        assert start["peak_bytes"] > 0
        assert start["stages"]

    def refuse(*_, **__):
        raise AssertionError("the adapters are there already")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(SystemExit, match="exit code 2"):
        end_to_end.main([*options, *folders, "--", "--no-such-option"])


def test_end_to_end_targets(tmp_path):
    options = end_to_end.parse(["--max-memory", "2GiB", "--output", str(tmp_path)])
    found = {
        "cold": {"seconds": 9.0, "peak_bytes": 1.0 * 2**30},
        "again": {"seconds": 7.0, "peak_bytes": 1.8 * 2**30},
    }
    assert len(end_to_end.misses(options, found)) == 2
    options.layers = 2
    assert end_to_end.misses(options, found) == []
    options.max_memory = "1GB"
    assert len(end_to_end.misses(options, found)) == 2


def test_what_differs_is_told(tmp_path, monkeypatch, capsys):
    cases = dict(same_results.cases())
    assert len(cases) > 250
    before, after = tmp_path / "before.npz", tmp_path / "after.npz"
    monkeypatch.setattr(same_results, "cases", lambda: [("a", cases["core/mean"])])
    same_results.record(before)
    same_results.compare(before, before)
    assert "1 merges, 8 arrays: 0 differ" in capsys.readouterr().out
    monkeypatch.setattr(same_results, "cases", lambda: [("a", cases["weights/task_arithmetic"])])
    same_results.record(after)
    same_results.compare(before, after)
    assert "1 merges, 8 arrays: 4 differ" in capsys.readouterr().out


def test_a_busy_machine_is_told(capsys):
    found = machine.describe(machine.Watch())
    assert found["others"] is None or 0 <= found["others"] <= 1
    assert not machine.is_busy(found | {"others": None})
    assert not machine.is_busy(found | {"others": 0.02})
    assert machine.is_busy(found | {"others": 0.5})
    assert "50%" in capsys.readouterr().err


def test_scripts_tell_what_they_do():
    for script in (speed, end_to_end):
        told = subprocess.run(
            [sys.executable, script.__file__, "--help"], capture_output=True, text=True, check=True
        )
        assert "--check" in told.stdout
