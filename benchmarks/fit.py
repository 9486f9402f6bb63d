"""Compares learned coefficients with the best scale, on held-out images of the demo.

    python benchmarks/fit.py [--steps N] [--check]

For each rule: one scale for the merged update, the best of a fine grid on all validation images;
and coefficients by `search.fit`, for each adapter or for each adapter and module, which start at
that scale. They minimize the cross-entropy on 200 of the validation images of each task (or the
entropy, without labels), and the other 97 decide when to stop. Nothing is chosen on test images.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import machine
from common.normalized import Normalized
from common.publish import Sheet, publish, script

import coremerge_jax as cm
from coremerge_jax import demo, search

RULES = {
    "task_arithmetic": cm.task_arithmetic(),
    "ties": cm.ties(),
    "tsv": cm.tsv(),
    "tsv + isotropize": cm.chain(cm.tsv(), cm.isotropize()),
}
SCALES = np.arange(0.1, 4.01, 0.05)
SHOWN, BATCH, RATE = 200, 32, 0.03
KINDS = (("labels", "adapter"), ("labels", "module"), ("no labels", "module"))
NOTES = """\
Accuracy relative to each task's own adapter, mean over tasks, in %: on the 297 validation images
and on the 500 test images of each task. *scale*: the best of 0.1, 0.15, …, 4 on the validation
images; the others start there. *steps*: after which the coefficients were kept."""


def loss_of(labelled: bool) -> Any:
    """Returns a loss of a merged adapter and a batch: images ``(T, N, 8, 8)``, labels ``(N,)``."""

    def loss(merged: cm.Adapter, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = demo.forward(demo.fold(demo.base(), merged), images.reshape(-1, 8, 8))
        if not labelled:
            return search.entropy(logits)
        return search.cross_entropy(logits, jnp.tile(labels, len(images)))

    return loss


def batches(count: int, seed: int = 0) -> tuple[Iterator[Any], list[Any]]:
    """Returns batches to learn from, and the one that decides when to stop."""
    images, labels = demo.questions("validation")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    learned, decides = order[:SHOWN], order[SHOWN:]

    def draw() -> Iterator[Any]:
        for _ in range(count):
            pick = rng.choice(learned, BATCH, replace=False)
            yield images[:, pick], labels[pick]

    return draw(), [(images[:, decides], labels[decides])]


def measure(name: str, steps: int, figure: Path | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of one rule."""
    rule, normalized = RULES[name], Normalized()

    def row(kind: str, merged: cm.Adapter, seconds: float, **more: Any) -> dict[str, Any]:
        splits = {split: normalized(merged, split) for split in ("validation", "test")}
        return {"rule": name, "kind": kind, "seconds": seconds, **splits, **more}

    projected = cm.project(normalized.adapters)
    start = time.perf_counter()
    swept = search.sweep(
        projected, rule, lambda merged: normalized(merged, "validation"), {"scale": SCALES}
    )
    seconds, scale = time.perf_counter() - start, swept.best.scale
    yield row("scale", projected.merge(rule, scale=scale), seconds, scale=scale)
    for labels, per in KINDS:
        learned, decides = batches(steps)
        start = time.perf_counter()
        found = search.fit(
            loss_of(labels == "labels"),
            projected,
            rule,
            learned,
            validation=decides,
            per=per,
            initial=scale,
            optimizer=optax.adam(RATE),
        )
        seconds = time.perf_counter() - start
        history = [dict(entry) for entry in found.history]
        kind = f"per {per}, {labels}"
        yield row(kind, found.adapter, seconds, steps=found.step, history=history)
        if figure and (name, kind) == ("task_arithmetic", "per module, labels"):
            found.plot(figure)


def table(rows: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the table, with one line for each rule and kind of coefficients."""
    lines = []
    for row in rows:
        shown = f"{row['scale']:.2f}" if "scale" in row else f"{row['steps']}"
        numbers = (f"{100 * row[split]:.1f}" for split in ("validation", "test"))
        lines.append([row["rule"], row["kind"], shown, *numbers, f"{row['seconds']:.0f}"])
    header = ["rule", "coefficients", "scale / steps", "validation", "test", "seconds"]
    return Sheet(header, lines)


def beaten(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Returns whether the best coefficients learned from labels beat the best scale."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["kind"]] = max(row["test"], best.get(row["kind"], 0.0))
    return best["per module, labels"] > best["scale"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = script(__doc__)
    parser.add_argument(
        "--rules", default=",".join(RULES), help="rules, with commas; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=300, help="most steps; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="fail if the best scale is not beaten")
    options = parser.parse_args(argv)
    options.rules = options.rules.split(",")
    if not set(options.rules) <= set(RULES):
        parser.error("no such rule")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit code."""
    options = parse(argv)
    watch = machine.Watch()
    options.output.mkdir(parents=True, exist_ok=True)
    figure = options.output / "fit.svg"
    rows = [row for name in options.rules for row in measure(name, options.steps, figure)]
    result = {"machine": machine.describe(watch), "rows": rows}
    title = "Learned coefficients against the best scale"
    publish(options.output / "fit", title, result, [table(rows)], NOTES)
    return 1 if options.check and not beaten(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
