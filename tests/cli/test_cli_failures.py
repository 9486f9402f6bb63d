"""Bad input and broken surroundings: one line that names the culprit, and nothing half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

KEY = "base_model.model.layer.0.query.lora_{}.weight"


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder, **changes):
    """Replaces factors of the module `query`: ``A=array``, or ``A=None`` to drop it."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {KEY.format(k): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def duplicate(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for letter in "AB":
        key = KEY.format(letter)
        tensors[key.replace(".weight", ".default.weight")] = tensors[key]
    save_file(tensors, file)


def full(value, *shape):
    return np.full(shape, value, np.float32)


BAD = {
    "missing folder": (shutil.rmtree, ["bad"]),
    "missing config": (lambda bad: (bad / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "config is no JSON": (lambda bad: (bad / "adapter_config.json").write_text("{"), ["config"]),
    "missing weights": (
        lambda bad: (bad / "adapter_model.safetensors").unlink(),
        ["bad", "adapter_model.safetensors"],
    ),
    "truncated weights": (truncate, ["bad", "adapter_model.safetensors"]),
    "A without B": (lambda bad: edit_tensors(bad, B=None), ["query"]),
    "A and B do not fit": (lambda bad: edit_tensors(bad, B=full(1, 6, 3)), ["query"]),
    "r of config and file differ": (lambda bad: edit_config(bad, r=7), ["bad", "7"]),
    "NaN": (lambda bad: edit_tensors(bad, A=full(np.nan, 2, 8)), ["query", "NaN"]),
    "infinite": (lambda bad: edit_tensors(bad, A=full(np.inf, 2, 8)), ["query"]),
    "missing alpha": (lambda bad: edit_config(bad, lora_alpha=...), ["lora_alpha"]),
    "unknown peft_type": (lambda bad: edit_config(bad, peft_type="FANCY"), ["FANCY"]),
    "DoRA": (lambda bad: edit_config(bad, use_dora=True), ["use_dora"]),
    "duplicate paths": (duplicate, ["query"]),
    "other base model": (
        lambda bad: edit_config(bad, base_model_name_or_path="org/other"),
        ["org/other", "org/base"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter(coremerge, save, tmp_path, case):
    spoil, culprits = BAD[case]
    good, bad = save("good"), save("bad")
    spoil(bad)
    before = sorted(tmp_path.rglob("*"))
    result = coremerge("merge", good, bad, "-o", tmp_path / "new" / "out")
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert all(culprit in result.err for culprit in culprits), result.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: out.mkdir(), "already exists"),
        (lambda out: out.write_text("mine"), "is not a folder"),
    ],
)
def test_existing_output(coremerge, save, tmp_path, make, message):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    result = coremerge("merge", save("good"), "-o", tmp_path / "out")
    assert result.code == 1
    assert f"{tmp_path / 'out'}: " in result.err
    assert message in result.err
    assert sorted(set(tmp_path.rglob("*")) - set((tmp_path / "good").rglob("*"))) == [
        tmp_path / "good",
        *before,
    ]


def test_force_spares_folders_that_are_no_adapters(coremerge, save, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    result = coremerge("merge", save("good"), "-o", tmp_path / "out", "--force")
    assert result.code == 1
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_output_may_not_be_a_source(coremerge, adapters):
    before = (adapters[0] / "adapter_model.safetensors").read_bytes()
    result = coremerge("merge", *adapters, "-o", adapters[0], "--force")
    assert result.code == 1
    assert "is the input" in result.err
    assert (adapters[0] / "adapter_model.safetensors").read_bytes() == before


def test_output_below_a_file(coremerge, save, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = coremerge("merge", save("good"), "-o", tmp_path / "file" / "out")
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert str(tmp_path / "file") in result.err
    assert result.err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_overflow_of_the_dtype(coremerge, adapters, tmp_path):
    args = ["--scale", "1e9", "--dtype", "float16"]
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", *args)
    assert result.code == 1
    assert "overflows float16" in result.err
    assert not (tmp_path / "out").exists()


def test_weights_of_a_rule(coremerge, adapters, tmp_path):
    args = ["--rule", "task_arithmetic:weights=[1,2]"]
    result = coremerge("merge", *adapters, "-o", tmp_path / "out", *args)
    assert result.code == 1
    assert "2 weights for 3 adapters" in result.err


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(coremerge, save, tiny_disk):
    result = coremerge("merge", save("big", modules={"q": (100, 2000)}), "-o", tiny_disk / "out")
    assert result.code == 0
    before = {file: file.read_bytes() for file in (tiny_disk / "out").iterdir()}
    bigger = save("bigger", rank=20, modules={"q": (100, 2000)})
    for output, force in (("out", ["--force"]), ("new", [])):
        result = coremerge("merge", bigger, "-o", tiny_disk / output, *force)
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert str(tiny_disk) in result.err
        assert "No space left" in result.err
        assert result.err.count("\n") == 1
    assert {file: file.read_bytes() for file in tiny_disk.rglob("*") if file.is_file()} == before


# --- As real processes ------------------------------------------------------------------------


def start(*args, before="", **kwargs):
    """The command line in a process of its own, after some more Python."""
    # A shell that runs the tests in the background has them, and so this process, ignore SIGINT.
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{default}\nfrom coremerge_jax.cli import main\n{before}\nmain()"
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **kwargs)


# Tells the test where the process is, and waits there for a signal.
PAUSE = """
import importlib, time
module = importlib.import_module("coremerge_jax.{module}")
real = module.{name}
def paused(*args, **kwargs):
    result = real(*args, **kwargs)
    print("here", flush=True)
    for _ in range(600):  # a signal just before one sleep does not shorten it
        time.sleep(0.1)
    return result
module.{name} = paused
"""
STAGES = {
    "reading": PAUSE.format(module="io.formats", name="open_adapter"),
    "merging": PAUSE.format(module="merging.truncation", name="group_modules"),
    "writing": PAUSE.format(module="io.adapter_writer", name="model_card"),
}


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("stage", "number", "replaces"),
    [
        pytest.param("reading", signal.SIGINT, False, marks=pytest.mark.nightly),
        pytest.param("merging", signal.SIGINT, True, marks=pytest.mark.nightly),
        pytest.param("writing", signal.SIGINT, False, marks=pytest.mark.nightly),
        pytest.param("writing", signal.SIGINT, True, marks=pytest.mark.nightly),
        ("writing", signal.SIGTERM, True),
    ],
)
def test_interrupted_half_way(coremerge, adapters, tmp_path, stage, number, replaces):
    out = tmp_path / "out"
    if replaces:
        assert coremerge("merge", adapters[0], "-o", out, "--rule", "mean").code == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    args = ["merge", *adapters, "-o", out, "--rule", "mean", "--rank", "2", "--force"]
    with start(*args, before=STAGES[stage]) as process:
        try:
            assert process.stdout.readline() == "here\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    interrupted = number == signal.SIGINT
    assert (process.returncode, err) == ((130, "interrupted\n") if interrupted else (143, ""))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert out.exists() == replaces
