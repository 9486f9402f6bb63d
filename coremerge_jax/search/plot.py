"""Figures of sweeps and fits. Needs matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from coremerge_jax.figures import MUTED, Axes, Figure, style  # refuses where there is no matplotlib
from coremerge_jax.io.atomic import atomic_file
from coremerge_jax.search.parameters import Parameters
from coremerge_jax.text import display

_LEAST_SPAN = 1e-4  # of the largest number

_LOSSES = ("loss", "validation", "kl")  # of the history of a fit; all in one panel

# Marks a file as a figure of ours, which may be replaced. No date: equal figures are equal files.
_CREATOR = "coremerge-jax"

_METADATA: dict[str, dict[str, str | None]] = {
    "svg": {"Date": None, "Creator": _CREATOR},
    "png": {"Software": _CREATOR},
}


class Candidate(Protocol):
    """A candidate of a sweep, as far as a figure shows it."""

    @property
    def name(self) -> str:
        """The name of the rule."""

    @property
    def parameters(self) -> Parameters:
        """The values of its parameters."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Its scores."""


def save(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure, if there is a path for it, and returns it."""
    if path is not None:
        path = Path(path) if Path(path).suffix else Path(path).with_suffix(".png")
        form = path.suffix.removeprefix(".").lower()
        metadata = _METADATA.get(form)
        with atomic_file(path, mark=_CREATOR.encode(), force=True) as file, style():
            figure.savefig(file, format=form, bbox_inches="tight", dpi=150, metadata=metadata)
    return figure


@style()
def draw_sweep(sweep: Sequence[Candidate], objective: str, maximize: bool) -> Figure:
    """Draws the objective against each parameter that varies, a panel for each."""
    rules = list(dict.fromkeys(record.name for record in sweep))
    names = list(dict.fromkeys(name for record in sweep for name in record.parameters))
    varied = [name for name in names if len(_values(sweep, name)) > 1]
    figure, panels = _panels(max(1, len(varied)))
    for panel, name in zip(panels, varied, strict=False):
        numbers = all(isinstance(x, int | float) for x in _values(sweep, name))
        for i, rule in enumerate(rules):
            points = [
                (x.parameters[name] if numbers else str(x.parameters[name]), x.metrics[objective])
                for x in sweep
                if x.name == rule and name in x.parameters
            ]
            if points:
                _draw_rule(panel, points, maximize, numbers, f"C{i}", _label(rule))
        panel.set_xlabel(_label(name))
    panels[0].set_ylabel(_label(objective))
    _widen(panels[0], [x.metrics[objective] for x in sweep if objective in x.metrics])
    if len(rules) > 1 and varied:
        panels[0].legend()
    return figure


def _draw_rule(
    panel: Axes,
    points: list[tuple[Any, float]],
    maximize: bool,
    numbers: bool,
    color: str,
    label: str,
) -> None:
    """Draws all points, and a line through the best at each place."""
    shown = [point for point in points if math.isfinite(point[1])]
    if not shown:
        return
    panel.plot(*zip(*shown, strict=True), ".", color=color, alpha=0.25)
    best: dict[Any, float] = {}
    for x, y in shown:
        best[x] = (max if maximize else min)(best.get(x, y), y)
    order = sorted(best) if numbers else list(best)
    panel.plot(order, [best[x] for x in order], color=color, label=label)


@style()
def draw_fit(history: Sequence[Mapping[str, float]], kept: int) -> Figure:
    """Draws losses by step, other numbers beside them, and the step that was kept."""
    names = list(dict.fromkeys(name for row in history for name in row if name != "step"))
    losses = [name for name in _LOSSES if name in names]
    others = [name for name in names if name not in _LOSSES]
    shown = {name: group for name, group in (("loss", losses), ("metric", others)) if group}
    figure, panels = _panels(len(shown), sharey=False)
    for panel, (label, group) in zip(panels, shown.items(), strict=True):
        for name in group:
            points = [(row["step"], row[name]) for row in history if name in row]
            panel.plot(*zip(*points, strict=True), label=_label(name))
        panel.axvline(kept, color=MUTED, linestyle=":", label="kept")
        panel.set_xlabel("step")
        panel.set_ylabel(label)
        panel.legend()
    return figure


def _panels(count: int, sharey: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * count, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _label(name: str) -> str:
    return display(name, 60)


def _widen(panel: Axes, values: Sequence[float]) -> None:
    """Gives the axis a least span, on which numbers that differ by rounding form a flat line."""
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return
    low, high = min(found), max(found)
    least = _LEAST_SPAN * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        panel.set_ylim(middle - least / 2, middle + least / 2)


def _values(sweep: Sequence[Candidate], name: str) -> list[Any]:
    return list(dict.fromkeys(x.parameters[name] for x in sweep if name in x.parameters))
