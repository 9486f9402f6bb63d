"""Measures merges with unlabelled inputs on the demo, cuts of them, and scales by agreement.

    python benchmarks/demo_inputs.py [--output DIR]

This is an example, not a benchmark: six small tasks, one seed. Inputs are validation images without
their labels; nothing is chosen on test images.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import machine
from common.normalized import Normalized
from common.publish import Sheet, publish, script

import coremerge_jax as cm
from coremerge_jax import demo, search
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.demo.unlabelled import REGMEAN, distill

RULES = ("task_arithmetic", "ties", "tsv", "cart", "isotropize", "tsv + isotropize")
SCALES = np.arange(0.4, 2.01, 0.1)
RANKS = (16, 8, 4)
TSV = 0.8  # the scale of the merge that is cut

NOTES = """\
Accuracy on test images relative to each task's own adapter, mean over tasks, in %. Statistics are
of 64 validation images a task, coefficients are learned from 80. Scales are chosen from 0.4, 0.5,
…, 2 on validation images: by labels, or by agreement with the adapters' own predictions on 64."""


def merges(normalized: Normalized) -> dict[str, float]:
    """Returns test accuracies of merges at the automatic scale, and of distilled ones."""
    given, inputs = normalized.adapters, {"statistics": demo.statistics()}
    found = {rule: cm.merge(given, parse_chain(rule)) for rule in RULES}
    found["regmean"] = cm.merge(given, cm.regmean(), **inputs)
    found["regmean, not orthogonalized, ridge 0.01"] = cm.merge(given, REGMEAN, **inputs)
    for name, rule in {
        "task_arithmetic": cm.task_arithmetic(),
        "tsv": cm.tsv(),
        "regmean": cm.regmean(),
        "regmean, not orthogonalized, ridge 0.01": REGMEAN,
    }.items():
        found[f"{name}, distilled"] = distill(rule)
    return {name: normalized(merged, "test") for name, merged in found.items()}


def choices(normalized: Normalized) -> list[dict[str, Any]]:
    """Returns the scales that labels and agreement choose, and their test accuracies."""
    projected, rows = cm.project(normalized.adapters), []
    agreement = search.agreement(demo.predict, projected, demo.inputs(), params=demo.base())
    for name in RULES:
        rule, row = parse_chain(name), {"rule": name}
        for judge, evaluate in {"labels": normalized, "agreement": agreement}.items():
            scale = search.sweep(projected, rule, evaluate, {"scale": SCALES}).best.scale
            row |= {
                judge: scale,
                f"by {judge}": normalized(projected.merge(rule, scale=scale), "test"),
            }
        rows.append(row)
    return rows


def cuts(normalized: Normalized) -> list[dict[str, Any]]:
    """Returns test accuracies of a merge that is cut, plainly and in the metric of inputs."""
    given = normalized.adapters
    merged = cm.merge(given, cm.tsv(), scale=TSV)
    metric = {"statistics": demo.statistics(), "sources": given}
    ways = [("rank", {}), ("rank", metric), ("budget", {}), ("budget", metric)]
    return [
        {
            "cut": limit + (", in the metric of inputs" if more else ""),
            **{
                f"{rank}": normalized(cm.truncate(merged, **{limit: rank}, **more)[0], "test")
                for rank in RANKS
            },
        }
        for limit, more in ways
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = script(__doc__).parse_args(argv)
    watch, normalized = machine.Watch(), Normalized()
    result = {
        "merges": merges(normalized),
        "choices": choices(normalized),
        "cuts": cuts(normalized),
    }

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    sheets = [
        Sheet(["merge", "test"], [[x, percent(y)] for x, y in result["merges"].items()], texts=1),
        Sheet(
            ["rule", "scale by labels", "test", "scale by agreement", "test"],
            [
                [
                    *(row["rule"], f"{row['labels']:.1f}", percent(row["by labels"])),
                    *(f"{row['agreement']:.1f}", percent(row["by agreement"])),
                ]
                for row in result["choices"]
            ],
            "Scales",
            texts=1,
        ),
        Sheet(
            [f"tsv at scale {TSV}, cut to", *map(str, RANKS)],
            [[row["cut"], *(percent(row[f"{rank}"]) for rank in RANKS)] for row in result["cuts"]],
            "Cuts",
            texts=1,
        ),
    ]
    found = {"machine": machine.describe(watch), **result}
    publish(options.output / "demo_inputs", "The demo with unlabelled inputs", found, sheets, NOTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
