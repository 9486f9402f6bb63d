"""Pages of the documentation: their code blocks, run in order as a reader would run them."""

import contextlib
import dataclasses
import io
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import jax
import pytest
import typer.main
import yaml
from markdown_it import MarkdownIt

from coremerge_jax import demo
from coremerge_jax.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Above a block that cannot run here. `.ci/run` finds the README's commands by their names.
NOT_RUN = re.compile(r"<!-- (not run: \S.*|demo command|test command) -->")
FILE_NAME = re.compile(r"# (\w+\.(?:py|yaml))\n")
NUMBER = re.compile(r"(?<![\w.])-?\d+\.(\d+)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder as the pages describe it."""
    for path in demo.adapters():
        shutil.copytree(path, tmp_path / "adapters" / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclasses.dataclass
class Block:
    """A fenced block; ``output`` is the text block directly below it."""

    language: str
    code: str
    line: int
    runs: bool
    output: str | None = None


def read(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    above = None
    for token in read(page):
        if token.type == "fence":
            if token.info == "text":
                if above and above.type == "fence":
                    found[-1].output = token.content
            else:
                runs = not (above and NOT_RUN.match(above.content))
                found.append(Block(token.info, token.content, token.map[0] + 1, runs))
        above = token
    return found


def run_page(page: Path, compare: bool = True) -> dict:
    """Runs all blocks in the working directory; returns the names that the Python has set."""
    namespace: dict = {}
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if not block.runs:
            check_syntax(block, where)
            continue
        if name := FILE_NAME.match(block.code):
            Path(name[1]).write_text(block.code, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            RUN[block.language](block.code, where, namespace)
        if compare and block.output is not None:
            assert_alike(stdout.getvalue(), block.output, where)
    return namespace


def run_python(code: str, where: str, namespace: dict) -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, where, "exec"), namespace)


def run_shell(code: str, where: str, _: dict) -> None:
    for line in lines(code):
        assert run(line) == 0, (where, line)
        written = re.search(r" -o (\S+)", line)
        assert not written or "--dry-run" in line or Path(written[1]).exists(), (where, line)


def lines(code: str) -> Iterator[str]:
    yield from filter(None, code.replace("\\\n", "").splitlines())


def run(command: str) -> int:
    """Runs a line as a shell would, mostly in this process; returns the exit code."""
    program, *words = shlex.split(command, comments=True)
    assert program == "coremerge", command
    words = [name for word in words for name in sorted(map(str, Path().glob(word))) or [word]]
    if "--max-memory" in words:  # of the process; this one holds what all tests have left
        return subprocess.run([sys.executable, "-m", "coremerge_jax", *words]).returncode
    return commands.run(*words)


def check_syntax(block: Block, where: str) -> None:
    """Of what cannot run here: it can be parsed, and options of `coremerge` are there."""
    if block.language == "python":
        compile(block.code, where, "exec")
        return
    assert block.language == "sh", where
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for command in re.findall(r"\bcoremerge ([^\n&#\"]+)", block.code):
        name, *words = shlex.split(command)
        typer.main.get_command(app).commands[name].make_context(name, words)


RUN: dict[str, Callable] = {
    "python": run_python,
    "sh": run_shell,
    "yaml": lambda code, *_: yaml.safe_load(code),
}


def assert_alike(found: str, expected: str, where: str = "") -> None:
    """The same words and whole numbers; others may differ by 2 %, or by two of the last digit."""
    pairs = [" ".join(NUMBER.sub("#", text).split()) for text in (found, expected)]
    assert pairs[0] == pairs[1], f"{where}:\n{found}"
    for x, y in zip(NUMBER.finditer(found), NUMBER.finditer(expected), strict=True):
        last = 2.01 * 10.0 ** -len(y[1])
        assert math.isclose(float(x[0]), float(y[0]), rel_tol=0.02, abs_tol=last), (
            f"{where}: {x[0]} for {y[0]} in\n{found}"
        )
