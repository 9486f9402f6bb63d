"""The results as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coremerge_jax.search.plotting import STYLE, save
from text8.results import Row

COLOURS = {"core": "#9c2f6f", "knots": "#b3a125", "full": "#8a8a8a"}


def draw(result: Mapping[str, list[Row]], path: Path) -> None:
    """Averages with their intervals, and how they fall with more tasks."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        _rules(left, result["paper"])
        _curve(right, result["curve"])
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _rules(ax: Axes, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row["test"])
    for place, row in enumerate(ordered):
        low, high = row["interval"]
        colour = COLOURS[row["space"]]
        ax.plot([100 * low, 100 * high], [place, place], color=colour, alpha=0.5)
        ax.plot(100 * row["test"], place, "o", color=colour)
    names = [
        row["rule"] if row["space"] == "core" else f"{row['rule']} ({row['space']})"
        for row in ordered
    ]
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("accuracy relative to each task's own adapter, mean, %")
    ax.set_title("Eight tasks", loc="left")


def _curve(ax: Axes, rows: Sequence[Row]) -> None:
    counts = sorted({row["count"] for row in rows})
    for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
        found = [
            [100 * x["test"] for x in rows if (x["rule"], x["count"]) == (rule, n)] for n in counts
        ]
        table = np.asarray(found)
        ax.plot(counts, table.mean(1), "o-", color=f"C{i}", label=rule)
        ax.fill_between(counts, table.min(1), table.max(1), color=f"C{i}", alpha=0.15)
    ax.set_xticks(counts)
    ax.set_xlabel("tasks merged")
    ax.set_title("More and more tasks", loc="left")
    ax.legend(frameon=False)
