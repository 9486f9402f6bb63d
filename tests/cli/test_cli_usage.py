"""Usage errors, help, versions, and the commands that only list things."""

import json
import os
import subprocess
import sys

import pytest

from coremerge_jax.demo import run
from coremerge_jax.rules import RULES
from coremerge_jax.spaces import SPACES


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["merg"], "No such command 'merg'. Did you mean 'merge'?"),
        (["merge", "a", "--spase", "core"], "No such option: --spase (Possible options: "),
        (["merge", "a", "-o", "x", "--rank", "two"], "'--rank'"),
        (["merge", "a", "-o"], "'-o' requires an argument"),
        (["inspect"], "Missing argument 'ADAPTER...'"),
        (["merge"], "no adapters"),
        (["merge", "-o", "x", "--seed", "1"], "no adapters"),
        (["merge", "a", "b"], "no output: give -o OUT"),
        (["merge", "a", "-o", "x", "--rank", "0"], "rank must be a whole number above 0"),
        (["merge", "a", "-o", "x", "--energy", "2"], "energy must be a number above 0"),
        (["merge", "a", "-o", "x", "--dtype", "float23"], "did you mean 'float32'?"),
        (["merge", "a", "-o", "x", "--precision", "float46"], "did you mean 'float64'?"),
        (["merge", "a", "-o", "x", "--extras", "frist"], "did you mean 'first'?"),
        (
            ["merge", "a", "-o", "x", "--scale", "big"],
            "scale must be a number, auto, or PATTERN=NUMBER",
        ),
        (["merge", "a", "-o", "x", "--weights", "1,b"], "weights must be numbers"),
        (["merge", "a", "b", "-o", "x", "--weights", "1"], "weights: got 1 for 2 adapters"),
        (["merge", "a", "-o", "x", "--rule", "tvs"], "did you mean 'tsv'?"),
        (["merge", "a", "-o", "x", "--rule", "ties:densty=1"], "did you mean 'density'?"),
        (["merge", "a", "-o", "x", "--space", "croe"], "did you mean 'core'?"),
    ],
)
def test_usage_error_is_one_line_and_exit_code_2(coremerge, args, message):
    result = coremerge(*args)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_chain_merges_once(coremerge, adapters):
    result = coremerge("merge", *adapters, "-o", "x", "--rule", "tsv", "--rule", "ties")
    assert result.code == 2
    assert "a chain merges once" in result.err


def test_no_arguments_show_help(coremerge):
    result = coremerge()
    assert (result.code, result.err) == (2, "")
    assert "merge" in result.out


def test_bad_recipe_file_is_named(coremerge, tmp_path):
    (tmp_path / "r.yaml").write_text("adaptors: [a]")
    result = coremerge("merge", "--recipe", tmp_path / "r.yaml", "-o", "x")
    assert result.code == 2
    assert f"{tmp_path / 'r.yaml'}: unknown key 'adaptors'; did you mean 'adapters'?" in result.err
    result = coremerge("merge", "--recipe", tmp_path / "none.yaml", "-o", "x")
    assert result.code == 1
    assert result.err == f"error: {tmp_path / 'none.yaml'}: No such file or directory\n"


def test_rules_lists_every_rule_space_and_parameter(coremerge):
    table = coremerge("rules").out
    listed = json.loads(coremerge("rules", "--json").out)
    assert {what: list(found) for what, found in listed.items()} == {
        "rules": list(RULES),
        "spaces": list(SPACES),
    }
    assert listed["rules"]["ties"]["parameters"]["density"] == 0.2
    assert listed["spaces"]["core"]["parameters"]["gauge"] == "given"
    for name, found in (listed["rules"] | listed["spaces"]).items():
        assert name in table
        assert found["description"] in table
        assert all(f"{key}=" in table for key in found["parameters"])


@pytest.mark.parametrize(
    "args", [["--help"], ["merge", "-h"], ["sweep", "-h"], ["inspect", "--help"], ["rules", "-h"]]
)
def test_help(coremerge, args):
    result = coremerge(*args)
    assert result.code == 0
    assert "Usage: " in result.out
    assert result.err == ""


@pytest.mark.nightly  # `.ci/run` runs the demo itself
def test_demo(coremerge, monkeypatch):
    methods = (("mean", "core"), ("tsv + isotropize", "core"))
    records = run(methods)
    monkeypatch.setattr("coremerge_jax.demo.METHODS", methods)

    def known(progress, with_inputs):
        progress("")
        assert "tsv, distilled" in with_inputs
        return records

    monkeypatch.setattr("coremerge_jax.demo.run", known)
    shown = coremerge("demo").out
    assert "tsv + isotropize" in shown
    listed = json.loads(coremerge("demo", "--json").out)
    assert [record["name"] for record in listed] == [record.name for record in records]
    assert listed[-1]["average"] == records[-1].average


def test_version(coremerge):
    assert coremerge("--version").out.startswith("coremerge ")


def test_debug_shows_the_traceback(coremerge, monkeypatch):
    monkeypatch.setenv("COREMERGE_DEBUG", "1")
    with pytest.raises(Exception, match="no output"):
        coremerge("merge", "a")


def test_bug_is_not_hidden(coremerge, monkeypatch):
    monkeypatch.setattr("coremerge_jax.io.formats.open_adapter", lambda source: len(source) / 0)
    result = coremerge("inspect", "a")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "unexpected ZeroDivisionError (division by zero)" in result.err
    monkeypatch.setenv("COREMERGE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        coremerge("inspect", "a")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "coremerge ",
            {"merge", "sweep", "pack", "collect", "apply", "verify", "inspect", "convert"}
            | {"report", "rules", "demo"},
        ),
        ("coremerge merge --sp", {"--space"}),
        ("coremerge merge --space ", set(SPACES)),
        ("coremerge merge --rule t", {"task_arithmetic", "ties", "tsv"}),
        ("coremerge merge --dtype b", {"bfloat16"}),
    ],
)
def test_completion(line, expected):
    environment = {"_COREMERGE_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(line.count(" "))
    code = "import sys; sys.argv[0] = 'coremerge'; from coremerge_jax.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert set(found) == expected


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["sweep", "-h"], ["collect", "-h"], ["merge", "a", "--rank", "0"]],
)
def test_help_and_usage_errors_do_not_wait_for_jax(args):
    code = (
        "import atexit, sys; from coremerge_jax.cli import main; "
        "atexit.register(lambda: print({'jax', 'numpy', 'flax'} & set(sys.modules))); main()"
    )
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set()"
