"""Measures the time and memory of ``coremerge merge``, from files to files.

    python benchmarks/end_to_end.py [--check]
    python benchmarks/end_to_end.py --tasks 100 --layers 2 --max-memory 2GiB [--check]

Writes synthetic PEFT adapters in bfloat16, then runs ``coremerge merge`` in fresh processes: with
an empty compilation cache (cold), and again with the programs that the first run has cached
(again), and compares both with the estimates of ``--dry-run``. The adapters have just been written,
and are read out of the page cache. Writes tables and JSON to ``benchmarks/results/jax-VERSION``.
For POSIX systems.
"""

# Imports little: Linux counts the memory of the process that starts another one as the other's.
import argparse
import json
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import machine
from common.command import GIB, gib, run
from common.publish import Sheet, digits, publish, script

RULES = ("--rule", "tsv", "--rule", "isotropize")
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "Ki": 2**10, "Mi": 2**20, "Gi": GIB}

# Seconds and bytes, for this shape, number of adapters and layers.
WHOLE = ("llama-3-8b", 6, 32)
TARGETS = {"cold": (10.0, 1.5 * GIB), "again": (6.0, 1.5 * GIB)}
NOTES = """\
Wall seconds of the process, median, the fastest in brackets; peak memory is the largest of all
runs. *cold*: with an empty compilation cache; *again*: a second process with the cache of the
first. Stages are those that the command reports. *expected*: the estimates of `--dry-run`, from
rates that it measures in a second. Reading, merging and writing
overlap, so that they should take between the longest of them and all together."""


def write_adapters(options: argparse.Namespace, place: Path) -> list[Path]:
    """Writes the adapters unless they are there; returns their folders."""
    size = [f"{name}-{getattr(options, name)}" for name in ("tasks", "layers")]
    adapters = place / "-".join([options.shape, *size, *["tiny"] * options.tiny])
    paths = [adapters / f"task{t}" for t in range(options.tasks)]
    if not all(path.exists() for path in paths):
        script = Path(__file__).parent / "common" / "shapes.py"
        command = [sys.executable, script, options.shape, adapters]
        command += ["--tasks", str(options.tasks), "--layers", str(options.layers)]
        subprocess.run([*command, *["--tiny"] * options.tiny], check=True)
    return paths


def check_complete(output: Path, source: Path) -> None:
    """Exits unless a merged adapter has the tensors of one that was merged, to the last byte."""
    merged, size = _tensors(output)
    expected, _ = _tensors(source)
    end = max(entry["data_offsets"][1] for entry in merged.values())
    if merged.keys() != expected.keys() or size != end:
        sys.exit(f"{output} is not complete")


def _tensors(adapter: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file, and the size of the data after it."""
    path = adapter / "adapter_model.safetensors"
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, path.stat().st_size - 8 - length


def measure(
    options: argparse.Namespace, place: Path
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Runs the command cold and again, in turns; returns the runs and the expected cost."""
    adapters = write_adapters(options, place)
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "again": []}
    limit = ["--max-memory", options.max_memory] if options.max_memory else []
    arguments = ["merge", *adapters, *RULES, *limit, *options.extra]
    expected = run([*arguments, "--dry-run"], place / "cache")["cost"]
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            for sort in runs:
                output = Path(scratch) / sort
                runs[sort].append(run([*arguments, "-o", output], Path(scratch) / "cache"))
                check_complete(output, adapters[0])
    return runs, expected


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Returns medians, and the largest peak."""
    return {
        sort: {
            "seconds": statistics.median(entry["seconds"] for entry in entries),
            "min": min(entry["seconds"] for entry in entries),
            "runs": len(entries),
            "peak_bytes": max(entry["peak"] for entry in entries),
            "stages": {
                stage: statistics.median(entry["stages"][stage] for entry in entries)
                for stage in entries[0]["stages"]
            },
        }
        for sort, entries in runs.items()
    }


def misses(options: argparse.Namespace, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a line for each target that was missed."""
    missed = []
    whole = not options.tiny and (options.shape, options.tasks, options.layers) == WHOLE
    for sort, entry in found.items():
        seconds, peak = TARGETS[sort] if whole else (float("inf"), float("inf"))
        if options.max_memory:
            peak = min(peak, parse_size(options.max_memory))
        if entry["seconds"] > seconds:
            missed.append(f"{sort}: {digits(entry['seconds'])} s, target {seconds:g} s")
        if entry["peak_bytes"] > peak:
            missed.append(f"{sort}: {gib(entry['peak_bytes'])}, target {gib(peak)}")
    return missed


def parse_size(text: str) -> float:
    """Returns the bytes of a size such as 2GiB or 500MB."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]i?)?B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 2GiB")
    return float(match[1]) * UNITS[match[2] or ""]


def sheet(options: argparse.Namespace, found: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Returns the table."""
    stages = list(next(iter(found.values()))["stages"])
    what = f"{options.shape}, {options.layers} layers, T {options.tasks}"
    rows = [
        [
            what,
            sort,
            f"{digits(entry['seconds'])} ({digits(entry['min'])})",
            gib(entry["peak_bytes"]),
            *(digits(entry["stages"][stage]) for stage in stages),
        ]
        for sort, entry in found.items()
    ]
    return Sheet(["adapters", "start", "seconds", "peak memory", *stages], rows)


def expectations(found: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any]) -> Sheet:
    """Returns the table of expected and measured costs."""
    seconds = dict(expected["seconds"])
    compiling, tracing = seconds.pop("compile"), seconds.pop("trace")
    stages, peak = found["again"]["stages"], found["cold"]["peak_bytes"]
    merging = stages["merge"] - stages["compile"]
    span = [digits(tracing + overlap(seconds.values())) for overlap in (max, sum)]
    rows = [
        ["compile, s", "cold", digits(compiling), digits(found["cold"]["stages"]["compile"])],
        ["trace, read, merge and write, s", "again", " to ".join(span), digits(merging)],
        ["peak memory", "cold", gib(expected["memory"]), gib(peak)],
    ]
    return Sheet(["what", "start", "expected", "measured"], rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument(
        "--shape", default="llama-3-8b", help="shape of the model; default: %(default)s"
    )
    parser.add_argument("--tasks", type=int, default=6, help="adapters; default: %(default)s")
    parser.add_argument(
        "--layers", type=int, default=32, help="layers of the model; default: %(default)s"
    )
    parser.add_argument("--tiny", action="store_true", help="only try it, on tiny modules")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; default: %(default)s")
    parser.add_argument("--max-memory", metavar="SIZE", help="limit to pass on; also a target")
    parser.add_argument("--folder", type=Path, help="keep the adapters here for later runs")
    parser.add_argument("--check", action="store_true", help="fail if a target is missed")
    parser.add_argument("extra", nargs="*", metavar="-- OPTION", help="options to pass on")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    watch = machine.Watch()
    with tempfile.TemporaryDirectory(prefix="coremerge-benchmark-") as scratch:
        runs, expected = measure(options, options.folder or Path(scratch))
    found = summarize(runs)
    missed = misses(options, found)
    described = machine.describe(watch)
    result = {
        "machine": described,
        "shape": options.shape,
        "tasks": options.tasks,
        "layers": options.layers,
        "options": [*RULES, *options.extra],
        "max_memory": options.max_memory,
        "starts": found,
        "expected": expected,
        "missed": missed,
    }
    stem = options.output / f"end_to_end-tasks-{options.tasks}"
    sheets = [sheet(options, found), expectations(found, expected)]
    publish(stem, "From files to files", result, sheets, NOTES)
    print("\n".join(missed) or "all targets met")
    met = not machine.is_busy(described) and not missed
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
