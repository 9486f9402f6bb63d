"""The plot of `speed.py`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.paper import RULE_TITLES

mpl.rcParams.update({"svg.hashsalt": "coremerge", "font.size": 10})

Row = Mapping[str, Any]

STYLES = {
    "floor": ("#1a1a1a", "|"),
    "ours": ("#9c2f6f", "o"),
    "torch": ("#3b6ea5", "s"),
    "jax": ("#3a9c6e", "^"),
    "peft": ("#d9822b", "D"),
    "full": ("#8a8a8a", "v"),
    "knots": ("#b3a125", "P"),
}
LINES = {"tsv+iso-c": "-", "ties": ":"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draws the results: one panel for each model, and one for each sweep."""
    rows = result["rows"]
    models = [name for name in ("vit-b32", "llama-3-8b") if _of(rows, name)]
    sweeps: list[tuple[str, str, list[Row]]] = [
        ("adapters T", "tasks", [row for row in rows if row["shape"].startswith("tasks-")]),
        (
            "rank r of each adapter",
            "rank",
            [row for row in rows if row["shape"].startswith("rank-") or row["shape"] == "tasks-8"],
        ),
    ]
    sweeps = [sweep for sweep in sweeps if len({row["shape"] for row in sweep[2]}) > 1]
    panels: list[Callable[[Axes], None]] = []
    for name in models:
        panels.append(partial(_model, rows=_of(rows, name)))
    for label, field, found in sweeps:
        panels.append(partial(_sweep, label=label, field=field, rows=found))
    if not panels:
        return
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 3.9 * lines + 0.9), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, panel in zip(grid, panels, strict=False):
        panel(ax)
    for ax in grid[len(panels) :]:
        ax.remove()
    titles = {"floor": "floor: the minimal products", **result["contenders"]}
    used = {name for row in rows for name in row["times"]}
    figure.legend(
        handles=[
            Line2D([], [], color=color, marker=marker, ls="", label=titles[name])
            for name, (color, marker) in STYLES.items()
            if name in used
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, metadata={"Date": None})


def _of(rows: Sequence[Row], shape: str) -> list[Row]:
    return [row for row in rows if row["shape"] == shape]


def _model(ax: Axes, rows: Sequence[Row]) -> None:
    """Draws seconds of every contender, a line for each rule; hollow if scaled."""
    for y, row in enumerate(reversed(rows)):
        ax.axhline(y, color="#e4e4e4", lw=0.8, zorder=0)
        for name, entry in row["times"].items():
            if name in STYLES:
                _mark(ax, entry["seconds"], y, name, entry, size=16 if name == "floor" else 7)
    ax.set_yticks(range(len(rows)), [RULE_TITLES[row["rule"]] for row in reversed(rows)])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xscale("log")
    ax.set_xlabel("seconds (hollow: scaled from a few modules)")
    ax.set_title(rows[0]["title"])
    ax.grid(axis="x", color="#e4e4e4", lw=0.8)


def _mark(ax: Axes, x: float, y: float, name: str, entry: Mapping[str, Any], size: int) -> None:
    color, marker = STYLES[name]
    fill = "white" if "scaled_by" in entry else color
    ax.plot(x, y, marker, color=color, mfc=fill, ms=size, mew=1.6)


def _sweep(ax: Axes, label: str, field: str, rows: Sequence[Row]) -> None:
    """Draws seconds by T or r, for two rules."""
    for name in STYLES:
        for rule, line in LINES.items():
            found = sorted(
                (row for row in rows if row["rule"] == rule and name in row["times"]),
                key=lambda row: row[field],
            )
            xs = [row[field] for row in found]
            entries = [row["times"][name] for row in found]
            ax.plot(xs, [entry["seconds"] for entry in entries], line, color=STYLES[name][0])
            for x, entry in zip(xs, entries, strict=True):
                _mark(ax, x, entry["seconds"], name, entry, size=5)
    ticks = sorted({row[field] for row in rows})
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel(f"{label} (solid: TSV + Iso-C, dotted: TIES)")
    ax.set_ylabel("seconds")
    first = rows[0]
    other = "r 16" if field == "tasks" else "T 8"
    kind = first["kinds"][0]
    ax.set_title(f"{kind['modules']} modules of {kind['m']} × {kind['n']}, {other}")
    ax.grid(color="#e4e4e4", lw=0.8)
