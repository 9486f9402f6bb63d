"""The figures of a report: small SVG images that fit a phone and follow the page's colors.

One unit is one pixel on a screen 400 pixels wide, so that text has its size. Needs matplotlib.
"""

import io
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple, ParamSpec

import numpy as np

from coremerge_jax.diagnosis.results import Results, RuleCost, arrange, mean_known
from coremerge_jax.figures import BLUE, COLORS, ORANGE, Axes, Figure, style
from coremerge_jax.lora import Array
from coremerge_jax.text import display

_INK, _MUTED = "#010203", "#040506"  # replaced by the colors of the page

# Of the largest number: numbers that differ by less, as by rounding, get similar colors.
_LEAST_SPAN = 0.05

_WIDTH = 5.0  # inches of 72 units

_BARS = 24  # of more, only the highest and the lowest are shown

_NOTHING = 1e-9  # bars of less are 0

_LABEL = 16  # letters

_TICKS = 14  # names along a map

_PANELS = 6  # kinds of modules with a panel of their own

Draw = ParamSpec("Draw")


class Scale(NamedTuple):
    """Scale that maps numbers to colors.

    Attributes:
        colors: a color map of matplotlib.
        low: the number of the first color; None for the least number shown.
        high: the number of the last color; None for the largest number shown.
        form: format of the numbers in the cells.
    """

    colors: str
    low: float | None = None
    high: float | None = None
    form: str = ".2f"


_SHARE = Scale("viridis", 0.0)


def _drawn(draw: Callable[Draw, Figure]) -> Callable[Draw, str]:
    """Turns a function that draws a figure into one that returns its SVG element."""

    @wraps(draw)
    def run(*args: Draw.args, **options: Draw.kwargs) -> str:
        with style(12, _INK, _MUTED):
            return _svg(draw(*args, **options))

    return run


def _svg(figure: Figure) -> str:
    """Returns an SVG element that scales with the page and has no ids of its own."""
    text = io.StringIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups, the same in every figure
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    return svg.replace(_INK, "currentColor").replace(_MUTED, "var(--muted)")


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def clip(name: object, length: int = _LABEL) -> str:
    """Returns a name that fits next to an axis, with both of its ends."""
    shown = display(str(name), length)
    return f" {shown}" if shown.startswith("_") else shown  # else legends leave it out


# --- Curves --------------------------------------------------------------------------------
def _curves(rows: Sequence[Array]) -> np.ndarray:
    """Returns spectra as rows of a table, each relative to its first value; NaN in place of 0."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for out, row in zip(table, rows, strict=True):
        live = np.asarray(row)[np.asarray(row) > 0]
        out[: len(live)] = live / live[0] if len(live) else live
    return table


def _known(table: np.ndarray) -> np.ndarray:
    """Drops the columns without any number."""
    return table[:, ~np.isnan(table).all(axis=0)]


def _band(panel: Axes, table: np.ndarray, color: str, label: str, ls: str = "-") -> None:
    """Draws the median of curves, and the band that holds 8 of 10."""
    shown = _known(table)
    if not shown.size:
        return
    low, middle, high = np.nanquantile(shown, (0.1, 0.5, 0.9), axis=0)
    places = np.arange(1, len(middle) + 1)
    marker = "o" if len(places) == 1 else None
    panel.plot(places, middle, marker=marker, color=color, label=label, ls=ls)
    if len(table) > 1:
        panel.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def _logarithmic(panel: Axes) -> None:
    """Shows orders of magnitude, or a note where there is nothing to show."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if not panel.lines:
        panel.text(0.5, 0.5, "all are 0", ha="center", va="center", transform=panel.transAxes)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    panel.set_yscale("log")
    panel.set_ylim(max(panel.get_ylim()[0], 1e-7), 1.6)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def _spectrum(panel: Axes) -> None:
    panel.set_xlabel("direction")
    panel.set_ylabel("relative singular value")
    _logarithmic(panel)


@_drawn
def stacks(diagnosis: Results) -> Figure:
    """Draws singular values of the stacks, a panel for each kind of module."""
    kinds = _by_kind(diagnosis)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(_WIDTH, 1.0 + 1.7 * rows + 0.9 * (rows == 1)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (kind, places) in zip(panels, kinds.items(), strict=False):
        spectra = [diagnosis.modules[i].measures.spectra for i in places]
        _band(panel, _curves([x.stack_b for x in spectra]), BLUE, "B, outputs")
        _band(panel, _curves([x.stack_a for x in spectra]), ORANGE, "A, inputs", "--")
        panel.set_title(clip(kind, 24))
    for panel in panels[: len(kinds)]:
        _logarithmic(panel)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    figure.supxlabel("direction", fontsize=12)
    figure.supylabel("relative singular value", fontsize=12)
    _legend(figure, panels[0])
    return figure


def _by_kind(diagnosis: Results) -> dict[str, list[int]]:
    """Returns the places of modules by kind; the last of many kinds share an entry."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return {"all modules": list(range(len(diagnosis)))}
    found: dict[str, list[int]] = {kind: [] for kind in grid.kinds}
    for place, (_, kind) in enumerate(grid.cells):
        found[grid.kinds[kind]].append(place)
    if len(found) > _PANELS:
        rest = list(found)[_PANELS - 1 :]
        found[f"{len(rest)} other kinds"] = sorted(i for kind in rest for i in found.pop(kind))
    return found


@_drawn
def updates(diagnosis: Results) -> Figure:
    """Draws singular values of the adapters' updates."""
    figure, panel = _panel(3.6)
    rows: list[list[Array]] = [[] for _ in diagnosis.adapters]
    for module in diagnosis:
        for t, s in zip(module.adapters, module.measures.spectra.updates, strict=True):
            rows[t].append(s)
    curves = [np.nanmedian(_known(_curves(own)), axis=0) for own in rows]
    if len(rows) <= len(COLORS):
        for t, (name, curve) in enumerate(zip(diagnosis.adapters, curves, strict=True)):
            _band(panel, curve[None], COLORS[t], clip(name, 12), ("-", "--")[t // 4])
        _legend(figure, panel, 4)
    else:
        size = max(map(len, curves))
        padded = [np.pad(x, (0, size - len(x)), constant_values=np.nan) for x in curves]
        _band(panel, np.stack(padded), BLUE, "")
    _spectrum(panel)
    return figure


@_drawn
def results(diagnosis: Results) -> Figure:
    """Draws singular values of the sum and of the merged update."""
    figure, panel = _panel(3.6)
    for name, label, color, ls in _compared(diagnosis):
        found = [getattr(module.measures.spectra, name) for module in diagnosis]
        _band(panel, _curves([s for s in found if s is not None]), color, label, ls)
    _spectrum(panel)
    _legend(figure, panel)
    return figure


@_drawn
def energy(diagnosis: Results) -> Figure:
    """Draws the share of the energy that a rank budget keeps."""
    figure, panel = _panel(3.6)
    for name, label, color, ls in _compared(diagnosis):
        kept = diagnosis.energy_kept(name)
        panel.plot(np.arange(len(kept) + 1), [0, *kept], label=label, color=color, ls=ls)
        for share in (0.9, 0.99):
            rank = diagnosis.rank_for(share, name)
            panel.plot(rank, kept[rank - 1], "o", color=color)
            panel.annotate(f"{rank}", (rank, kept[rank - 1]), (4, -14), textcoords="offset points")
    panel.set_xlabel("rank of every module")
    panel.set_ylabel("share of energy kept")
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.05)
    _legend(figure, panel)
    return figure


def _compared(diagnosis: Results) -> list[tuple[str, str, str, str]]:
    """Returns field, label, color and line of the updates that belong in one figure."""
    total, merged = ("total", "sum of all", ORANGE, "--"), ("merged", "merged", BLUE, "-")
    return [merged, total] if diagnosis.merged else [total]


def _legend(figure: Figure, panel: Axes, columns: int = 2) -> None:
    handles = panel.get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside upper center", ncols=columns, columnspacing=1.2)


# --- Maps ----------------------------------------------------------------------------------
@_drawn
def pairs(names: Sequence[str], values: np.ndarray, scale: Scale = _SHARE) -> Figure:
    """Draws a map of all pairs of different adapters."""
    shown = values.copy()
    np.fill_diagonal(shown, np.nan)
    figure, panel = _panel(4.4)
    _map(figure, panel, shown, names, names, scale)
    return figure


@_drawn
def modules(diagnosis: Results, values: np.ndarray, scale: Scale = _SHARE) -> Figure:
    """Draws a number of each module: layers down and kinds across, or a list of bars."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return _draw_bars([module.path for module in diagnosis], values)
    places, members = np.asarray(grid.cells), np.full((len(grid.layers), len(grid.kinds)), np.nan)
    for i, j in np.ndindex(members.shape):
        members[i, j] = mean_known(values[(places == (i, j)).all(axis=1)])
    return _draw_layers(members, grid.layers, grid.kinds, scale)


@_drawn
def depth(diagnosis: Results, values: np.ndarray, scale: Scale) -> Figure:
    """Draws a number of each module and adapter: layers down, adapters across."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return _draw_bars([module.path for module in diagnosis], mean_known(values, 1))
    rows = np.asarray(grid.cells)[:, 0]
    cells = np.stack([mean_known(values[rows == i]) for i in range(len(grid.layers))])
    return _draw_layers(cells, grid.layers, diagnosis.adapters, scale)


def _draw_layers(
    values: np.ndarray, layers: Sequence[int], columns: Sequence[str], scale: Scale
) -> Figure:
    figure, panel = _panel(1.6 + min(4.0, 0.42 * len(layers)))
    _map(figure, panel, values, layers, columns, scale)
    panel.set_ylabel("layer")
    return figure


def _map(
    figure: Figure,
    panel: Axes,
    values: np.ndarray,
    rows: Sequence[object],
    columns: Sequence[object],
    scale: Scale,
) -> None:
    low, high = _limits(values, scale)
    image = panel.imshow(
        values, cmap=scale.colors, vmin=low, vmax=high, aspect="auto", interpolation="none"
    )
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    for axis, names in ((panel.yaxis, rows), (panel.xaxis, columns)):
        step = -(-len(names) // _TICKS)
        axis.set_ticks(range(0, len(names), step), [clip(x, 14) for x in names[::step]])
    if any(len(str(name)) > 3 for name in columns) or len(columns) > _TICKS:
        panel.tick_params(axis="x", rotation=90 if len(columns) > 10 else 50)
        for label in panel.get_xticklabels() if len(columns) <= 10 else ():
            label.set(ha="right", rotation_mode="anchor")
    if len(columns) <= 8 and len(rows) <= 12:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = _readable_on(*image.to_rgba(value)[:3])
                text = short(value, scale.form)
                panel.text(j, i, text, ha="center", va="center", color=color, fontsize=11)
    bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02, aspect=40)
    bar.outline.set_visible(False)


def _readable_on(red: float, green: float, blue: float) -> str:
    bright = 0.21 * red**2.2 + 0.72 * green**2.2 + 0.07 * blue**2.2 > 0.18
    return "#111111" if bright else "#ffffff"


def short(value: float, form: str = ".2f") -> str:
    """Returns a number in few letters: .42, −.1, 0, 1.3."""
    text = format(value, form)
    if float(text) == 0:
        return "0"
    return re.sub(r"^(-?)0\.", r"\1.", text).rstrip(".").replace("-", "−")


def _limits(values: np.ndarray, scale: Scale) -> tuple[float, float]:
    """Returns the numbers of the first and the last color."""
    found = values[np.isfinite(values)]
    if not len(found):
        return 0.0, 1.0
    low = float(found.min()) if scale.low is None else scale.low
    high = float(found.max()) if scale.high is None else scale.high
    least = max(abs(low), abs(high), 1e-3) * _LEAST_SPAN
    if high - low >= least:
        return low, high
    if scale.low is not None:
        return low, low + least
    if scale.high is not None:
        return high - least, high
    middle = (low + high) / 2
    return middle - least / 2, middle + least / 2


def around(middle: float, values: np.ndarray, least: float = 0.05) -> Scale:
    """Returns a scale of two colors, for numbers above and below ``middle``."""
    found = values[np.isfinite(values)]
    reach = max(least, float(np.abs(found - middle).max(initial=0.0)))
    return Scale("PuOr_r", middle - reach, middle + reach)


# --- Bars ----------------------------------------------------------------------------------
@_drawn
def bars(names: Sequence[str], values: np.ndarray, mark: float | None = None) -> Figure:
    """Draws a bar for each name, and a line to compare with."""
    return _draw_bars(names, values, mark)


def _draw_bars(names: Sequence[str], values: np.ndarray, mark: float | None = None) -> Figure:
    names, values = _ends(names, values)
    figure, panel = _bar_panel([clip(name, 22) for name in names])
    shown = np.where(np.isfinite(values), values, np.nan)
    # Without a tiny number below 0, whose label would be left of the axis.
    shown = np.where(np.abs(shown) < _NOTHING, 0.0, shown)
    drawn = panel.barh(np.arange(len(names)), shown, color=BLUE, height=0.7)
    panel.bar_label(drawn, fmt=_bar_number, padding=4, fontsize=11)
    panel.margins(x=0.16)
    panel.axvline(0, color=_MUTED, lw=1)
    if mark is not None:
        panel.axvline(mark, color=ORANGE, ls="--")
    return figure


def _bar_number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _bar_panel(names: Sequence[str]) -> tuple[Figure, Axes]:
    """Returns a panel for bars from left to right, the first on top."""
    figure, panel = _panel(0.9 + 0.28 * max(4, len(names)))
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.margins(y=0.02)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    return figure, panel


def _ends(names: Sequence[str], values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Returns the highest and the lowest, if there are too many to see."""
    if len(names) <= _BARS:
        return list(names), values
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    half = _BARS // 2
    shown = [*order[:half], *order[-half:]]
    found = [names[i] for i in shown]
    found.insert(half, f"… {len(names) - 2 * half} between …")
    return found, np.insert(values[shown], half, np.nan)


@_drawn
def costs(found: Sequence[RuleCost]) -> Figure:
    """Draws the operations of each rule: those of products, and all others."""
    figure, panel = _bar_panel([one.rule for one in found])
    places = np.arange(len(found))
    products = np.asarray([one.products for one in found]) / 1e9
    rest = np.asarray([one.core for one in found]) / 1e9
    panel.barh(places, products, color=BLUE, height=0.7, label="matrix products")
    panel.barh(places, rest, left=products, color=ORANGE, height=0.7, label="decompositions, other")
    panel.set_xlabel("billion operations")
    _legend(figure, panel)
    return figure
