"""Measures how long one waits for the command line, beside the time that importing JAX takes.

    python benchmarks/startup.py [--check]

Writes synthetic PEFT adapters of a ViT-S (48 modules of 384 × 384, rank 16), then runs commands in
fresh processes, in turns with ``python -c "import jax"``: merges and reports with an empty cache of
compiled programs (cold), and again with what the first run has left there (again). Writes a table
and JSON to ``benchmarks/results/jax-VERSION``. For POSIX systems.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine
from common.publish import Sheet, digits, publish, script
from common.shapes import Kind, Shape

import coremerge_jax as cm

SHAPE = Shape(
    "vit-s",
    "ViT-S, T 8, r 16",
    12,
    (Kind(384, 384, ("q_proj", "k_proj", "v_proj", "o_proj")),),
    8,
    16,
)
JAX = "import jax"


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that is timed.

    Attributes:
        arguments: of ``coremerge``; ``PAIR``, ``ONE`` and ``ALL`` stand for adapters.
        code: the exit code that it should have.
        bound: the largest time, in times of importing JAX; None if there is no target.
        cold: True if it starts with an empty cache of compiled programs.
    """

    arguments: str
    code: int = 0
    bound: float | None = None
    cold: bool = False


QUICK = 0.5 / 0.8  # what takes half a second where importing JAX takes 0.8 s

COMMANDS = {
    "--help": Command("--help", bound=QUICK),
    "--version": Command("--version", bound=QUICK),
    "rules": Command("rules", bound=QUICK),
    "inspect": Command("inspect ONE", bound=QUICK),
    "an option that does not exist": Command("merge PAIR -o out --ruel tsv", 2, QUICK),
    "a rule that does not exist": Command("merge PAIR -o out --rule tvs", 2, QUICK),
    "a folder that does not exist": Command("merge nowhere -o out", 1, QUICK),
    "merge, cold": Command("merge PAIR -o out --force", bound=3.0 / 0.8, cold=True),
    "merge, again": Command("merge PAIR -o out --force", bound=1.4 / 0.8),
    "merge by TIES, cold": Command("merge PAIR -o out --force --rule ties", cold=True),
    "merge by TIES, again": Command("merge PAIR -o out --force --rule ties"),
    "report, cold": Command("report ALL -o out.html --force", cold=True),
    "report, again": Command("report ALL -o out.html --force", bound=4.0 / 0.8),
}
NOTES = """\
Medians of the rounds. *seconds*: by the clock; *CPU*: of all threads, less disturbed by other
processes. *ratio* and *CPU ratio*: divided by those of `python -c "import jax"` in this run.
*cold*: with an empty cache of compiled programs; *again*: with what the one before has left there.
Merges are of two adapters, reports of eight. Targets are of the ratio by the clock."""


def timed(command: Sequence[str], folder: Path, cache: Path, code: int) -> tuple[float, float]:
    """Runs a command in a folder; returns its seconds by the clock, and of all processors."""
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    # Bytecode is kept, as where pip has installed the package.
    environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    return seconds, usage.ru_utime + usage.ru_stime


def measure(
    commands: Mapping[str, Command], adapters: Sequence[str], folder: Path, repeat: int
) -> dict[str, list[tuple[float, float]]]:
    """Runs all commands in turns; returns the times of each."""
    words = {"ONE": adapters[:1], "PAIR": adapters[:2], "ALL": adapters}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (JAX, *commands)}
    for _ in range(repeat + 1):
        cache = folder
        for name, command in commands.items():
            if command.cold:
                cache = Path(tempfile.mkdtemp(dir=folder))
            listed = [y for x in command.arguments.split() for y in words.get(x, [x])]
            line = [sys.executable, "-m", "coremerge_jax", *listed]
            found[name].append(timed(line, folder, cache, command.code))
        found[JAX].append(timed([sys.executable, "-c", JAX], folder, folder, 0))
    return {name: times[1:] for name, times in found.items()}  # the first reads from the disk


def summarize(
    commands: Mapping[str, Command], found: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, dict[str, Any]]:
    """Returns the medians and ratios of each command, and whether its target is met."""
    middle = {
        name: [statistics.median(column) for column in zip(*times, strict=True)]
        for name, times in found.items()
    }
    rows = {}
    for name, (seconds, cpu) in middle.items():
        bound = commands[name].bound if name in commands else None
        ratio = seconds / middle[JAX][0]
        rows[name] = {
            "seconds": seconds,
            "cpu": cpu,
            "ratio": ratio,
            "cpu_ratio": cpu / middle[JAX][1],
            "bound": bound,
            "met": None if bound is None else ratio <= bound,
        }
    return rows


def sheet(rows: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Returns the table."""
    verdicts = {None: "", True: "met", False: "missed"}
    lines = [
        [
            name,
            digits(row["seconds"]),
            digits(row["cpu"]),
            f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            "" if row["bound"] is None else f"{row['bound']:.2f}",
            verdicts[row["met"]],
        ]
        for name, row in rows.items()
    ]
    header = ["command", "seconds", "CPU", "ratio", "CPU ratio", "target", ""]
    return Sheet(header, lines, texts=1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="only try it, on tiny modules")
    parser.add_argument("--only", action="append", help="command to time, by name; repeatable")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    watch = machine.Watch()
    shape = SHAPE.tiny() if options.tiny else SHAPE
    commands = {k: v for k, v in COMMANDS.items() if not options.only or k in options.only}
    with tempfile.TemporaryDirectory(prefix="coremerge-benchmark-") as scratch:
        for adapter in shape.adapters():
            cm.save_peft(adapter, Path(scratch) / str(adapter.metadata.name))
        names = [f"task{t}" for t in range(shape.tasks)]
        rows = summarize(commands, measure(commands, names, Path(scratch), options.repeat))
    described = machine.describe(watch)
    result = {"machine": described, "rounds": options.repeat, "commands": rows}
    stem = options.output / "startup"
    publish(stem, "Waiting for the command line", result, [sheet(rows)], NOTES)
    missed = [name for name, row in rows.items() if row["met"] is False]
    print(f"missed: {', '.join(missed)}" if missed else "all targets met")
    met = not machine.is_busy(described) and not missed
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
