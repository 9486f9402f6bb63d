"""Merges with statistics of unlabelled inputs, and automatic scales, on the command line."""

import json
import shutil

import numpy as np
import pytest
import yaml
from helpers import assert_same, random_inputs, statistics_of

import coremerge_jax as cm

pytestmark = pytest.mark.wide


@pytest.fixture
def loaded(adapters):
    return [cm.load_peft(path) for path in adapters]


@pytest.fixture
def given(loaded, tmp_path):
    """Two folders of statistics, each of other inputs."""
    folders = [tmp_path / f"inputs{seed}" for seed in range(2)]
    for seed, folder in enumerate(folders):
        cm.save_statistics(statistics_of(loaded, random_inputs(loaded, seed)), folder)
    return folders


def test_a_merge_with_statistics(coremerge, adapters, loaded, given, tmp_path):
    """Several folders add up; a recipe does the same, with paths relative to its file."""
    options = ["--rule", "regmean", "--statistics", given[0], "--statistics", given[1]]
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert "the automatic scale of modules of 3 adapters is " in result.out
    statistics = sum(map(cm.load_statistics, given))
    expected = cm.merge(loaded, cm.regmean(), statistics=statistics)
    assert_same(cm.load_peft(tmp_path / "out"), expected, 1e-5)
    record = json.loads((tmp_path / "out" / "coremerge.json").read_text())
    assert [x["path"] for x in record["statistics"]] == list(map(str, given))
    assert list(record["auto_scale"]) == ["3 adapters"]
    recipe = {
        "adapters": [path.name for path in adapters],
        "rules": ["regmean"],
        "statistics": [path.name for path in given],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert coremerge("merge", "--recipe", file, "-o", tmp_path / "again").code == 0
    assert_same(cm.load_peft(tmp_path / "again"), expected, 1e-5)


def test_verify_knows_the_statistics(coremerge, adapters, loaded, given, tmp_path):
    options = ["--rule", "regmean", "--statistics", given[0]]
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", *options).code == 0
    good = coremerge("verify", tmp_path / "out")
    assert good.code == 0, good.out
    shutil.rmtree(given[0])
    cm.save_statistics(statistics_of(loaded, random_inputs(loaded, seed=5)), given[0])
    changed = coremerge("verify", tmp_path / "out")
    assert changed.code == 1
    assert "statistics.safetensors" in changed.out
    shutil.rmtree(given[0])
    missing = coremerge("verify", tmp_path / "out")
    assert missing.code == 1
    assert str(given[0]) in missing.err


def test_modules_without_statistics(coremerge, adapters, given, loaded, tmp_path):
    statistics = cm.load_statistics(given[0])
    some = {path: gram for path, gram in statistics.items() if "query" not in path}
    folder = tmp_path / "some"
    cm.save_statistics(cm.Statistics(some, statistics.adapters), folder)
    options = ["-o", tmp_path / "out", "--rule", "regmean", "--statistics", folder]
    refused = coremerge("merge", *adapters, *options)
    assert refused.code == 1
    assert "no statistics of module 'layer.0.query'" in refused.err
    assert not (tmp_path / "out").exists()
    result = coremerge("merge", *adapters, *options, "--missing-statistics", "tsv")
    assert result.code == 0
    expected = cm.merge(loaded, cm.tsv())
    merged, path = cm.load_peft(tmp_path / "out"), "layer.0.query"
    assert_same({path: merged[path]}, {path: expected[path]}, 1e-5)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--rule", "regmean"], 1, "needs inputs of each task: collect statistics"),
        (["--rule", "regmean", "--statistics", "math"], 1, "expected a folder that coremerge"),
        (["--rule", "regmean", "--statistics", "none"], 1, "none: no such folder"),
        (["--missing-statistics", "ties"], 2, "missing_statistics"),
        (["--scale", "automatic"], 2, "scale must be a number, auto, or PATTERN=NUMBER"),
    ],
)
def test_refusals_are_one_line(coremerge, adapters, monkeypatch, tmp_path, options, code, message):
    monkeypatch.chdir(tmp_path)
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", *options)
    assert (result.code, len(result.err.splitlines())) == (code, 1), result.err
    assert message in result.err


def test_the_automatic_scale_is_the_default_and_is_recorded(coremerge, adapters, loaded, tmp_path):
    for name, options in {
        "auto": [],
        "said": ["--scale", "auto"],
        "plain": ["--scale", "1"],
    }.items():
        assert coremerge("merge", *adapters, "-o", tmp_path / name, *options).code == 0
    auto, said, plain = (cm.load_peft(tmp_path / name) for name in ("auto", "said", "plain"))
    assert_same(auto, cm.merge(loaded, cm.tsv()), 1e-5)
    assert_same(said, dict(auto), 1e-12)
    assert_same(plain, cm.merge(loaded, cm.tsv(), scale=1.0), 1e-5)
    record = json.loads((tmp_path / "auto" / "coremerge.json").read_text())
    assert record["recipe"]["scale"] == "auto"
    np.testing.assert_allclose(record["auto_scale"]["3 adapters"], 1.4 / 3**0.5, rtol=1e-6)
    assert "auto_scale" not in json.loads((tmp_path / "plain" / "coremerge.json").read_text())
    report = json.loads(
        coremerge("merge", *adapters, "-o", tmp_path / "json", "--rule", "mean", "--json").out
    )
    assert set(report["auto_scale"]) == {"3 adapters"}
