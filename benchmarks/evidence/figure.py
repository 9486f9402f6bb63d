"""The results as a picture."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coremerge_jax.figures import style
from coremerge_jax.search.plot import save
from evidence.results import Row

COLOURS = {
    "full": "#8a8a8a",
    "knots": "#b3a125",
    "core": "#9c2f6f",
    "learned": "#2f6f9c",
    "unlabelled": "#4a8f3f",
}
LABELS = {
    "full": "full",
    "knots": "KnOTS",
    "core": "core",
    "learned": "core, learned coefficients",
    "unlabelled": "core, no labels",
}


def draw(result: Mapping[str, list[Row]], path: Path) -> None:
    """Draws averages with their intervals, and how they fall with more tasks."""
    rows = []
    for row in [*result["paper"], *result["more"]]:
        space, _, option = row["space"].partition(":")
        rows.append((space, ", ".join(filter(None, (row["rule"], option))), row))
    rows += [
        ("learned", f"{row['rule']}, {row['space'].removeprefix('a coefficient ')}", row)
        for row in result["learned"]
    ]
    compared = result.get("unlabelled", [])[1:]  # the first is what they are compared with
    rows += [("unlabelled", row["merge"], row) for row in compared]
    with style():
        figure = Figure(figsize=(11, 2 + 0.2 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        _rules(left, sorted(rows, key=lambda x: x[-1]["test"]))
        if result["curve"]:
            _curve(right, result["curve"])
        else:
            right.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _rules(ax: Axes, rows: Sequence[tuple[str, str, Row]]) -> None:
    for place, (space, _, row) in enumerate(rows):
        colour, (low, high) = COLOURS[space], row["interval"]
        ax.plot([100 * low, 100 * high], [place, place], color=colour, alpha=0.5)
        ax.plot(100 * row["test"], place, "o", color=colour)
    ax.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    ax.margins(y=0.02)
    ax.set_xlabel("accuracy relative to each task's own adapter, mean, %")
    ax.set_title("All tasks", loc="left")
    for name in COLOURS:
        if any(space == name for space, *_ in rows):
            ax.plot([], [], "o", color=COLOURS[name], label=LABELS[name])
    ax.legend(frameon=False, title="space")


def _curve(ax: Axes, rows: Sequence[Row]) -> None:
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        table: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if row["rule"] == rule:
                table[row["count"]].append(100 * row["test"])
        xs, found = zip(*sorted(table.items()), strict=True)
        ax.plot(xs, list(map(np.mean, found)), "o-", color=f"C{i}", label=rule)
        ax.fill_between(xs, list(map(min, found)), list(map(max, found)), color=f"C{i}", alpha=0.15)
    ax.set_xticks(sorted({row["count"] for row in rows}))
    ax.set_xlabel("tasks merged")
    ax.set_ylabel("the same, and the range of random orders")
    ax.set_title("More and more tasks, in core space", loc="left")
    ax.legend(frameon=False)
