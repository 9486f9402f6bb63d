"""The benchmarks of sweeps and of learned coefficients run. Nothing is timed here."""

import json

import demo_inputs
import demo_rules
import fit
import numpy as np
import pytest
import sweep

from coremerge_jax.rules import RULES
from coremerge_jax.spaces import SPACES


@pytest.mark.nightly
def test_a_sweep_compiles_as_much_as_one_merge(tmp_path):
    options = ["--scales", "3", "--densities", "2", "--rounds", "1", "--output", str(tmp_path)]
    assert sweep.main(options) == 0
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert result["candidates"] == 6
    assert result["programs"] == result["programs_of_one"] > 0
    assert result["error"] < 1e-6
    assert "| 6: tilt, shear" in (tmp_path / "sweep.md").read_text()


@pytest.mark.nightly
def test_learned_coefficients_beat_the_best_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "SCALES", np.arange(0.4, 0.9, 0.1))
    monkeypatch.setattr(fit, "KINDS", fit.KINDS[:2])
    options = ["--rules", "task_arithmetic", "--steps", "60", "--output", str(tmp_path)]
    assert fit.main([*options, "--check"]) == 0
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    test = {row["kind"]: row["test"] for row in rows}
    assert test["per module, labels"] > test["per adapter, labels"] > test["scale"]
    assert "| task_arithmetic | per module, labels |" in (tmp_path / "fit.md").read_text()


@pytest.mark.nightly
def test_inputs_on_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_inputs, "SCALES", (0.8, 1.2))
    assert demo_inputs.main(["--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "demo_inputs.json").read_text())
    assert result["merges"]["regmean, distilled"] > result["merges"]["tsv"] + 0.05
    assert all(row["8"] < row["16"] for row in result["cuts"])


@pytest.mark.nightly
@pytest.mark.parametrize("scales", [2, 5])
def test_rules_on_the_demo(tmp_path, monkeypatch, scales):
    monkeypatch.setattr(demo_rules, "SCALES", np.linspace(0.4, 0.8, scales))
    names = {part.split(":")[0] for rule, _ in demo_rules.CASES for part in rule.split(" + ")}
    assert names == set(RULES)
    assert {space.split(":")[0] for _, space in demo_rules.CASES} == set(SPACES)
    assert demo_rules.main(["--only", "tsv + svc", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "demo_rules.json").read_text())["rows"]
    assert 0.5 < row["test"] < 1
    assert "| tsv + svc | core |" in (tmp_path / "demo_rules.md").read_text()
