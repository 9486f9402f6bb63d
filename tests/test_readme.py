"""The README's examples run, on the adapters of the demo."""

import re
import shlex
import shutil
import signal
from pathlib import Path

import jax
import pytest

from coremerge_jax import demo
from coremerge_jax.cli import main

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands():
    lines = "".join(blocks("sh")).splitlines()
    return [line for line in lines if line.startswith("coremerge ")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder as the README describes it."""
    for path in demo.adapters():
        shutil.copytree(path, tmp_path / "adapters" / path.name)
    for text in blocks("yaml"):
        name = text.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    """Runs a line as a shell would, in this process; returns the exit code."""
    words = []
    for word in shlex.split(command)[1:]:
        words.extend(sorted(map(str, Path().glob(word))) or [word])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit_:
            main(words)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return exit_.value.code or 0


def test_python_blocks(folder):
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks("python"):
            exec(compile(code, str(README), "exec"), namespace)
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert namespace["sweep"].shape == (10, 80, 80)
    assert namespace["gradient"].shape == (len(demo.TASKS),)


def test_command_lines(folder, capsys):
    assert len(commands()) > 5
    for command in commands():
        assert run(command) == 0, (command, capsys.readouterr().err)
    written = {re.search(r" -o (\S+)", command) for command in commands()} - {None}
    for found in written:
        there = {path.name for path in (folder / found[1]).iterdir()}
        assert there & {"adapter_config.json", "sweep.csv"}, found


def test_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    missing = [target for target in targets if not (README.parent / target).exists()]
    assert targets
    assert not missing
