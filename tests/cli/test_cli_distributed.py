"""``coremerge merge --distributed``: two real processes, and what happens if one of them ends."""

import json
import os
import signal
import sys
import time

import pytest
from many_devices import start_job

import coremerge_jax as cm

# The process in PAUSED stops when it has made its folder, and before it has written anything.
CODE = """
import importlib, os, sys, time
from coremerge_jax.cli import main
writer = importlib.import_module("coremerge_jax.io.adapter_writer")
write = writer._write_groups
def paused(*args):
    if os.environ["PAUSED"] == os.environ["JAX_PROCESS_ID"]:
        print("here", flush=True)
        for _ in range(1200):  # a signal just before one sleep does not shorten it
            time.sleep(0.1)
    return write(*args)
writer._write_groups = paused
sys.argv[0] = "coremerge"
main()
"""
PATIENCE = 10


def start(*args, paused=""):
    command = [sys.executable, "-c", CODE, "merge", *map(str, args), "--distributed"]
    return start_job([*command, "--patience", str(PATIENCE)], 2, PAUSED=str(paused))


def finish(processes):
    """Exit codes, and what was printed."""
    told = [process.communicate(timeout=100) for process in processes]
    return [process.returncode for process in processes], told


@pytest.mark.parametrize(
    "limit", [["--energy", "0.99"], pytest.param(["--budget", "3"], marks=pytest.mark.nightly)]
)
def test_as_one_process_does(coremerge, adapters, tmp_path, limit):
    options = ["--rule", "dare:drop=0.3", "--rule", "ties:scope=model", *limit, "--uniform-rank"]
    assert coremerge("merge", *adapters, "-o", tmp_path / "one", *options).code == 0
    codes, told = finish(start(*adapters, "-o", tmp_path / "two", "--json", *options))
    assert codes == [0, 0], told
    report = json.loads(told[0][0])
    assert report["output"] == str(tmp_path / "two")
    assert told[1][0] == ""
    for name in ("adapter_model.safetensors", "adapter_config.json", "coremerge.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.fixture
def dead(adapters, tmp_path):
    """The folder of an adapter whose updates are zero."""
    adapter = cm.load_peft(adapters[0])
    modules = {path: cm.LoRA(a=x.a, b=0 * x.b) for path, x in adapter.items()}
    cm.save_peft(adapter.replace(modules=modules), tmp_path / "dead")
    return tmp_path / "dead"


@pytest.mark.nightly
def test_one_process_tells_of_an_adapter_without_an_effect(adapters, dead, tmp_path):
    codes, told = finish(start(dead, adapters[1], "-o", tmp_path / "out"))
    assert codes == [0, 0], told
    note = "adapter 'dead' has no effect: all its updates are zero"
    assert [err.count(note) for _, err in told] == [1, 0]


@pytest.mark.nightly
def test_nothing_is_written_where_no_adapter_has_an_effect(dead, tmp_path):
    codes, told = finish(start(dead, dead, "-o", tmp_path / "none"))
    assert codes == [1, 1], told
    assert all("error: all merged updates are zero, so nothing is written" in x for _, x in told)
    assert not (tmp_path / "none").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_is_killed(adapters, tmp_path, killed):
    out = tmp_path / "out"
    processes = start(*adapters, "-o", out, paused=killed)
    assert processes[killed].stdout.readline() == "here\n"
    processes[killed].kill()
    begin = time.monotonic()
    codes, told = finish(processes)
    assert time.monotonic() - begin < 3 * PATIENCE
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] in (1, -signal.SIGABRT)
    assert "another task died" in told[1 - killed][1] or "process" in told[1 - killed][1]
    assert not out.exists()

    # A rerun starts cleanly.
    assert finish(start(*adapters, "-o", out))[0] == [0, 0]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (out / "adapter_config.json").exists()


@pytest.mark.nightly
def test_a_process_is_asked_to_end(adapters, tmp_path):
    processes = start(*adapters, "-o", tmp_path / "out", paused=1)
    before = set(tmp_path.iterdir())
    assert processes[1].stdout.readline() == "here\n"
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, told = finish(processes)
    assert codes == [1, 143], told
    assert told[0][1] == "error: process 1 of 2 failed: interrupted\n"
    assert set(tmp_path.iterdir()) <= before


@pytest.mark.nightly
def test_one_finds_the_mistake_of_all(adapters, tmp_path):
    codes, told = finish(start(*adapters, tmp_path / "nothing", "-o", tmp_path / "out"))
    assert codes == [1, 1]
    assert all(f"{tmp_path / 'nothing'}: no such folder" in err for _, err in told)
    assert all(err.count("\n") == 1 for _, err in told)


def test_without_a_job(coremerge, adapters, monkeypatch, tmp_path):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", "--distributed")
    assert result.code == 2
    assert "JAX_COORDINATOR_ADDRESS" in result.err
    monkeypatch.setenv("JAX_PROCESS_ID", "first")
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", "--distributed")
    assert result.code == 2
    assert "JAX_PROCESS_ID must be a whole number, got 'first'" in result.err
    monkeypatch.delenv("JAX_PROCESS_ID")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost")
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", "--distributed")
    assert result.code == 2
    assert "must be host:port of process 0, got 'localhost'" in result.err


@pytest.mark.parametrize(
    ("mesh", "message"), [("2x", "mesh must be like 8 or 4x2"), ("2x4", "mesh 2x4 has 8 devices")]
)
def test_a_mesh_that_is_not_there(coremerge, adapters, tmp_path, mesh, message):
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", "--mesh", mesh)
    assert result.code == 2
    assert message in result.err


def test_a_mesh_of_what_is_there(coremerge, adapters, tmp_path):
    assert coremerge("merge", *adapters, "-o", tmp_path / "out", "--mesh", "1x1").code == 0
