"""Times folding an adapter into a model on disk, against copying its files and the arithmetic.

    python benchmarks/apply_speed.py [--modules N] [--dtypes DTYPE ...] [--repeat N] [--quick]

Writes a base model with 32 weights of 4096 × 4096 (1 GiB in float16) and an adapter of rank 16. In
turns: copying the file and waiting until it is on disk; the sums alone, in memory on all cores; and
`coremerge_jax.apply_adapter`, which does both. Files are read out of the page cache. Writes a table
and JSON to ``benchmarks/results/jax-VERSION``.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives NumPy bfloat16
import numpy as np
from common import machine
from common.publish import Sheet, digits, publish, script
from common.timing import Runner
from threadpoolctl import threadpool_limits

import coremerge_jax as cm
from coremerge_jax.io.tensors import TensorWriter
from coremerge_jax.trees.fold import add_update

RANK = 16
NOTES = """\
Seconds, median of the rounds, the fastest in brackets. *copy*: copying the file, until it is on
disk. *sums*: the updates, the sums and the share that rounding takes, in memory, by as many threads
as there are cores. *apply / both* is the time of `apply_adapter` over the sum of these two."""


def write_files(folder: Path, modules: int, size: int, dtype: str) -> cm.Adapter:
    """Writes a base model; returns an adapter for it, in a file too."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((size, size), np.float32) * 0.02).astype(np.dtype(dtype))
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(modules)]
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    names = [f"{path}.weight" for path in paths]
    with TensorWriter(folder / "base/model.safetensors", names, {"format": "pt"}) as writer:
        for name in names:
            writer.write(name, weight)

    def factor(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(size)

    loras = {path: cm.LoRA(a=factor(RANK, size), b=factor(size, RANK)) for path in paths}
    cm.save_peft(cm.Adapter(loras), folder / "adapter")
    return cm.open_peft(folder / "adapter")


def measure(folder: Path, adapter: cm.Adapter, dtype: str, repeat: int) -> dict[str, Any]:
    """Returns the times of copying, of sums in memory, and of `apply_adapter`, by name."""
    file, copy, out = (folder / x for x in ("base/model.safetensors", "copy", "out"))
    loras = list(adapter.read(adapter).values())
    weight = np.zeros(loras[0].shape, np.dtype(dtype))

    def write(start: int, rows: np.ndarray) -> None:
        weight[start : start + len(rows)] = rows

    def copied() -> None:
        shutil.copyfile(file, copy)
        with copy.open("r+b") as stream:
            os.fsync(stream.fileno())

    def summed() -> None:
        with threadpool_limits(1, user_api="blas"):
            for lora in loras:
                add_update("weight", lora, lambda start, stop: weight[start:stop], write)

    calls = {
        "copy": copied,
        "sums": summed,
        "apply": lambda: cm.apply_adapter(adapter, folder / "base", out),
    }
    runners = [Runner(name, call) for name, call in calls.items()]

    def each(run: Callable[[Runner], None]) -> None:
        for runner in runners:
            run(runner)
        copy.unlink()
        shutil.rmtree(out)

    each(Runner.warm_up)
    for _ in range(repeat):
        each(Runner.round)
    return {runner.name: runner.record() for runner in runners}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument("--modules", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="only try it, on tiny weights")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    size, modules = (64, 2) if options.quick else (4096, options.modules)
    watch, rows = machine.Watch(), []
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as name:
            adapter = write_files(Path(name), modules, size, dtype)
            rows.append(
                {"dtype": dtype, "times": measure(Path(name), adapter, dtype, options.repeat)}
            )
    described = machine.describe(watch)
    machine.is_busy(described)
    lines = []
    for row in rows:
        times = row["times"]
        both = times["copy"]["seconds"] + times["sums"]["seconds"]
        shown = [f"{digits(x['seconds'])} ({digits(x['min'])})" for x in times.values()]
        lines.append([row["dtype"], *shown, f"{times['apply']['seconds'] / both:.2f}×"])
    header = ["dtype", *rows[0]["times"], "apply / both"]
    result = {"machine": described, "modules": modules, "size": size, "rows": rows}
    title = f"Folding into {modules} weights of {size} × {size}"
    publish(options.output / "apply-speed", title, result, [Sheet(header, lines, texts=1)], NOTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
