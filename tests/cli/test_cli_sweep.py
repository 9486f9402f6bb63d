"""`coremerge sweep`: what it tries, writes and refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_same

import coremerge_jax as cm
from coremerge_jax.cli.options import parse_values
from coremerge_jax.io.peft.reader import load_peft
from coremerge_jax.recipe import Recipe

TASK = """
import numpy as np

def judge(adapter):
    size = sum(np.linalg.norm(lora.dense()) for lora in adapter.values())
    return {"far": abs(size - 15), "size": size}
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A file with a function, in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judge_task.py").write_text(TASK)
    return "judge_task.py:judge"


def rows(out):
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


def test_writes_each_candidate_as_merge_does(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    options = ["--rule", "ties", "--rule", "isotropize", "--weights", "1,2,.5", "--space", "knots"]
    tried = ["--values", "ties.density=0.5,0.9", "--values", "scale=0.5:1:0.5"]
    result = coremerge("sweep", *adapters, "-o", out, *options, *tried, "--dtype", "bfloat16")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"wrote 4 candidates in {out}; all records are in {out / 'sweep.csv'}\n"
    assert [(row["scale"], row["ties.density"]) for row in rows(out)] == [
        ("0.5", "0.5"),
        ("1.0", "0.5"),
        ("0.5", "0.9"),
        ("1.0", "0.9"),
    ]
    for density in (0.5, 0.9):
        found = out / f"ties.density={density},scale=0.5"
        args = ["--rule", f"ties:density={density}", *options[2:], "--scale", 0.5]
        again = tmp_path / f"again{density}"
        assert coremerge("merge", *adapters, "-o", again, *args, "--dtype", "bfloat16").code == 0
        assert_same(load_peft(found), load_peft(again), 1e-2)
        records = [json.loads((x / "coremerge.json").read_text()) for x in (found, again)]
        assert records[0]["recipe"] == records[1]["recipe"]
        assert records[0]["sources"] == records[1]["sources"]


def test_finds_the_best(coremerge, adapters, tmp_path, task):
    out = tmp_path / "out"
    tried = ["--values", "scale=0.25:2:0.25", "--evaluate", task, "--minimize"]
    result = coremerge("sweep", *adapters, "-o", out, "--rule", "mean", *tried)
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith(f"wrote {out / 'best'}; ")
    records = rows(out)
    assert len(records) == 8
    best = min(records, key=lambda row: float(row["far"]))
    assert float(best["scale"]) not in (0.25, 2.0)
    recipe = Recipe.from_dict(json.loads((out / "best" / "coremerge.json").read_text())["recipe"])
    assert recipe.scale == float(best["scale"])
    expected = cm.merge([load_peft(x) for x in adapters], cm.mean(), scale=recipe.scale)
    assert_same(load_peft(out / "best"), expected, 1e-6)
    assert result.out.splitlines()[2].split()[0] == f"{recipe.scale:g}"  # on top of the table


def test_goes_on_where_it_was(coremerge, adapters, tmp_path, task):
    out = tmp_path / "out"
    args = ["sweep", *adapters, "-o", out, "--evaluate", task, "--method", "line:patience=1"]
    assert coremerge(*args, "--values", "scale=0.5").code == 0
    before = (out / "sweep.jsonl").read_text()
    assert coremerge(*args, "--values", "scale=0.5,1", "--json").code == 0
    after = (out / "sweep.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    refused = coremerge(*args, "--values", "scale=0.5,1", "--rule", "mean")
    assert (refused.code, refused.out) == (1, "")
    assert "sweep.jsonl: the log of a sweep with other rules" in refused.err
    more = [*args[:-2], "--values", "tsv.rank=1,2", "--values", "scale=0.5"]
    assert coremerge(*more).code == 0  # a parameter more, and so another table


def test_scores_of_other_functions_and_weights_are_not_reused(coremerge, adapters, tmp_path, task):
    args = ["sweep", *adapters, "-o", tmp_path / "out", "--values", "scale=0.5"]
    assert coremerge(*args, "--evaluate", task).code == 0
    assert coremerge(*args, "--evaluate", task, "--rank", 2).code == 0  # scores are before the cut
    assert "weights" in coremerge(*args, "--evaluate", task, "--weights", "1,-1,1").err
    file = Path(task.rpartition(":")[0])
    file.write_text(file.read_text() + "\n# changed\n")
    assert "with other evaluation" in coremerge(*args, "--evaluate", task).err
    assert "with other evaluation" in coremerge(*args).err


def test_candidates_are_those_of_the_options(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    args = ["sweep", *adapters, "-o", out, "--values", "scale=0.5,1"]
    assert coremerge(*args).code == 0
    refused = coremerge(*args, "--rank", 2)
    assert refused.code == 1
    assert "with other rank (None, now 2)" in refused.err
    before = load_peft(out / "scale=0.5")
    shutil.rmtree(out / "scale=0.5")
    assert coremerge(*args).code == 0
    assert_same(load_peft(out / "scale=0.5"), before, 1e-12)
    (out / "scale=0.5" / "mine").write_text("")
    refused = coremerge(*args)
    assert refused.code == 1
    assert "what coremerge did not write ('mine')" in refused.err


def test_json(coremerge, adapters, tmp_path):
    out = tmp_path / "out"
    args = ["--values", "scale=1,2", "--method", "random:trials=1,seed=3", "--json"]
    report = json.loads(coremerge("sweep", *adapters, "-o", out, *args).out)
    assert report["output"] == str(out)
    (candidate,) = report["candidates"]
    assert candidate["rule"] == "tsv"
    assert candidate["scale"] in (1, 2)


def test_scales_by_pattern_stay(coremerge, adapters, tmp_path):
    args = ["--scale", "*.query=0.5", "--rule", "ties", "--values", "ties.density=0.5"]
    assert coremerge("sweep", *adapters, "-o", tmp_path / "out", *args).code == 0
    loaded = [load_peft(x) for x in adapters]
    expected = cm.merge(loaded, cm.ties(density=0.5), scale={"*.query": 0.5})
    assert_same(load_peft(tmp_path / "out" / "ties.density=0.5"), expected, 1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to try: give --values"),
        (["--values", "scale"], "values must be like scale=0.5,1"),
        (["--values", "scale=1", "--values", "scale=2"], "'scale' are given twice"),
        (["--values", "scale=1:x:1"], "a range must be like 0.1:2:0.1, got 'scale=1:x:1'"),
        (["--values", "scale=1:2:0"], "a range must be like 0.1:2:0.1"),
        (["--values", "scale=2:1:1"], "a range must go from its first to its second number"),
        (["--values", "tsv.rnk=1"], "unknown parameter 'tsv.rnk'; did you mean 'tsv.rank'?"),
        (["--values", "tsv.rank=1,0"], "tsv.rank: rank=0: expected a whole number of at least 1"),
        (["--values", "scale=1,x"], "scale='x': expected a number"),
        (["--values", "tsv.rank=x"], "tsv.rank: rank='x': expected a whole number"),
        (["--values", "scale=1", "--method", "lin"], "unknown method 'lin'; did you mean 'line'?"),
        (["--values", "scale=1", "--method", "line"], "give --evaluate"),
        (["--values", "scale=1", "--evaluate", "task.py"], "expected FILE.py:FUNCTION"),
        (["--values", "scale=1", "--evaluate", "no.py:f"], "there is no file no.py"),
        (["--values", "scale=1", "--evaluate", "no_such:f"], "no module 'no_such'"),
        (["--values", "scale=1", "--evaluate", "judge_task.py:juge"], "did you mean 'judge'?"),
        (["--values", "scale=1", "--rule", "tvs"], "unknown rule 'tvs'; did you mean 'tsv'?"),
    ],
)
@pytest.mark.usefixtures("task")
def test_wrong_usage_writes_nothing(coremerge, adapters, tmp_path, args, message):
    result = coremerge("sweep", *adapters, "-o", tmp_path / "out", *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(coremerge, adapters):
    for out in (adapters[0], adapters[0] / "adapter_config.json"):
        before = sorted(x.read_bytes() for x in adapters[0].iterdir())
        result = coremerge("sweep", *adapters, "-o", out, "--values", "scale=1")
        assert result.code == 1
        assert "choose another output" in result.err
        assert sorted(x.read_bytes() for x in adapters[0].iterdir()) == before
    assert coremerge("sweep", *adapters, "--values", "scale=1").code == 2


def test_values():
    assert parse_values(["scale=0.1:0.3:0.1", "tsv.rank=1:3:1", "a.b=1e-3,none,sum,[1,2]"]) == {
        "scale": [0.1, 0.2, 0.3],
        "tsv.rank": [1, 2, 3],
        "a.b": [1e-3, "none", "sum", (1, 2)],
    }
    assert np.isclose(parse_values(["x=1:0:-0.25"])["x"], [1, 0.75, 0.5, 0.25, 0]).all()
