"""Measures each rule and space on the demo, at the scale that is best for it.

    python benchmarks/demo_rules.py [--only TEXT]

This is an example, not a benchmark: six small tasks, one seed. The scale is chosen on validation
images, all other parameters have their defaults, and nothing is chosen on test images.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from common import machine
from common.normalized import Normalized
from common.publish import Sheet, publish, script

import coremerge_jax as cm
from coremerge_jax import demo, search
from coremerge_jax.demo.evaluation import parse_chain
from coremerge_jax.recipe import parse_space

SCALES = np.arange(0.1, 4.01, 0.05)
CASES = (
    *((rule, "core") for rule in ("mean", "task_arithmetic", "ties", "sce", "tsv", "cart")),
    *((rule, "core") for rule in ("iso_cts", "dc_merge", "dare", "prune", "isotropize")),
    *((rule, "core") for rule in ("flatten", "svc", "pico")),
    *((rule, "core") for rule in ("regmean", "regmean:orthogonalize=false,ridge=0.01")),
    *((f"flatten:power={power} + tsv", "core") for power in (0.0, 0.25, 0.5, 0.75)),
    ("tsv + isotropize", "core"),
    ("tsv + flatten", "core"),
    ("tsv + svc", "core"),
    ("pico + tsv", "core"),
    ("ties + isotropize", "core"),
    ("cart + isotropize", "core"),
    ("dare + ties", "core"),
    ("ties", "core:gauge=balanced"),
    ("sce", "core:gauge=balanced"),
    ("ties + isotropize", "core:gauge=balanced"),
    ("ties", "full"),
    ("ties", "knots"),
    ("ties", "knots:scaled=true"),
    ("task_arithmetic", "tucker:rank=8"),
    ("ties", "tucker:rank=8"),
    ("tsv", "tucker:rank=8"),
    ("ties + isotropize", "tucker:rank=8"),
)
NOTES = """\
Accuracy relative to each task's own adapter, mean over tasks, in %: on the 297 validation images,
on which the scale is chosen (of 0.1, 0.15, …, 4), and on the 500 test images of each task.
`regmean` has statistics of 64 validation images of each task."""


def measure(rules: str, space: str, normalized: Normalized) -> dict[str, Any]:
    """Returns one row of the table."""
    rule = parse_chain(rules)
    inputs = demo.statistics() if rule.needs_inputs else None
    projected = cm.project(normalized.adapters, space=parse_space(space), statistics=inputs)
    key = jax.random.key(0)
    swept = search.sweep(projected, rule, normalized, {"scale": SCALES}, key=key)
    merged = projected.merge(rule, scale=swept.best.scale, key=key)
    return {
        "rule": rules,
        "space": space,
        "scale": swept.best.scale,
        "rank": max(lora.rank for lora in merged.values()),
        "validation": normalized(merged),
        "test": normalized(merged, "test"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    parser = script(__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="run only rules with this text")
    options = parser.parse_args(argv)
    watch, normalized = machine.Watch(), Normalized()
    rows = [measure(*case, normalized) for case in CASES if options.only in case[0]]
    lines = [
        [
            *(row["rule"], row["space"], f"{row['scale']:.2f}", f"{row['rank']}"),
            *(f"{100 * row[split]:.1f}" for split in ("validation", "test")),
        ]
        for row in rows
    ]
    sheet = Sheet(["rule", "space", "scale", "rank", "validation", "test"], lines)
    result = {"machine": machine.describe(watch), "rows": rows}
    publish(options.output / "demo_rules", "Rules on the demo", result, [sheet], NOTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
