"""The figures of a report: small SVG images that fit a phone and follow the page's colors.

One unit is one pixel on a screen 400 pixels wide, so that text has its size. Needs matplotlib.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from coremerge_jax.diagnosis.results import Arrangement, Results, RuleCost, arrange
from coremerge_jax.errors import UnsupportedError
from coremerge_jax.lora import Array
from coremerge_jax.text import printable, shortened

try:
    import matplotlib as mpl
    import matplotlib.ticker
    from matplotlib.figure import Figure
except ImportError as error:
    raise UnsupportedError("plots need matplotlib: pip install 'coremerge-jax[plot]'") from error

# Told apart in light and dark, and by those who see fewer colors (after Okabe and Ito).
BLUE, ORANGE, GREEN, PINK, GOLD, SKY, RED, VIOLET = COLORS = (
    "#3f83c4", "#dd7a1c", "#1f9a76", "#c9699f", "#b8921f", "#3fa7d6", "#d1495b", "#8a72c9",
)  # fmt: skip

_INK, _MUTED = "#010203", "#040506"  # replaced by the colors of the page

_STYLE: Any = {
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 12,
    "grid.alpha": 0.25,
    "grid.color": _MUTED,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "path.simplify_threshold": 0.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "coremerge",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "xtick.labelsize": 11.5,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "ytick.labelsize": 11.5,
}

# Of the largest number: colors of numbers that differ by less, as by rounding, are alike.
_LEAST_SPAN = 0.05

_WIDTH = 5.0  # inches of 72 units

_BARS = 24  # more than these are cut to the highest and the lowest

_LABEL = 16  # letters

_TICKS = 14  # names along a map

_PANELS = 6  # kinds of modules with a panel of their own


class Scale(NamedTuple):
    """Scale that maps numbers to colors."""

    colors: str
    low: float | None = None
    high: float | None = None
    form: str = ".2f"


_SHARE = Scale("viridis", 0.0)


def _drawn(draw: Callable[..., tuple[Any, ...]]) -> Callable[..., str]:
    """Returns a function that makes a figure, as one that gives its SVG."""

    def run(*args: Any, **options: Any) -> str:
        with mpl.rc_context(_STYLE):
            return _svg(draw(*args, **options)[0])

    run.__doc__ = draw.__doc__
    return run


def _svg(figure: Figure) -> str:
    """Returns an SVG element for a page: it scales, and its names are in no other."""
    import io

    text = io.StringIO()
    with warnings.catch_warnings():
        # The page's fonts show the names; matplotlib's are asked for sizes alone.
        warnings.filterwarnings("ignore", "Glyph|.*[Ff]ont family")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # of groups, in every figure the same
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    return svg.replace(_INK, "currentColor").replace(_MUTED, "var(--muted)")


def _panel(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def clip(name: str, length: int = _LABEL) -> str:
    """Returns a name that fits next to an axis, with both of its ends."""
    shown = shortened(printable(name), length)
    return f" {shown}" if shown.startswith("_") else shown  # else legends leave it out


# --- Curves --------------------------------------------------------------------------------
def _curves(rows: Sequence[Array]) -> np.ndarray:
    """Returns rows of different lengths below each other, each relative to its first; NaN for 0."""
    size = max(map(len, rows))
    table = np.full((len(rows), size), np.nan)
    for out, row in zip(table, rows, strict=True):
        live = np.asarray(row)[np.asarray(row) > 0]
        out[: len(live)] = live / live[0] if len(live) else live
    return table


def _band(panel: Any, table: np.ndarray, **style: Any) -> None:
    """Draws the median of some curves, and the band that holds 8 of 10."""
    shown = table[:, ~np.isnan(table).all(axis=0)]
    if not shown.size:
        return
    low, middle, high = np.nanquantile(shown, (0.1, 0.5, 0.9), axis=0)
    places = np.arange(1, len(middle) + 1)
    panel.plot(places, middle, marker="o" if len(places) == 1 else None, **style)
    if len(table) > 1:
        panel.fill_between(places, low, high, color=style.get("color"), alpha=0.2, linewidth=0)


def _logarithmic(panel: Any) -> None:
    """Shows orders of magnitude; says so where there is nothing to show."""
    if panel.lines:
        panel.set_yscale("log")
        panel.set_ylim(max(panel.get_ylim()[0], 1e-7), 1.6)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5), numticks=7))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    else:
        _say(panel, "all are 0")


def _say(panel: Any, text: str) -> None:
    panel.text(0.5, 0.5, text, ha="center", va="center", transform=panel.transAxes)
    panel.set_xticks([])
    panel.set_yticks([])


@_drawn
def stacks(diagnosis: Results) -> tuple[Figure]:
    """Draws singular values of the stacks, a panel for each kind of module."""
    kinds = _by_kind(diagnosis)
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(_WIDTH, 1.0 + 1.7 * rows + 0.9 * (rows == 1)), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (kind, places) in zip(panels, kinds.items(), strict=False):
        spectra = [diagnosis.modules[i].measures.spectra for i in places]
        _band(panel, _curves([x.stack_b for x in spectra]), color=BLUE, label="B, outputs")
        _band(
            panel, _curves([x.stack_a for x in spectra]), color=ORANGE, ls="--", label="A, inputs"
        )
        panel.set_title(clip(kind, 24))
    for panel in panels[: len(kinds)]:
        _logarithmic(panel)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    figure.supxlabel("direction", fontsize=12)
    figure.supylabel("relative singular value", fontsize=12)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return (figure,)


def _by_kind(diagnosis: Results) -> dict[str, list[int]]:
    """Places of modules by kind, those of many kinds together."""
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
def updates(diagnosis: Results) -> tuple[Figure]:
    """Draws singular values of the adapters' updates."""
    figure, panel = _panel(3.6)
    rows: list[list[Array]] = [[] for _ in diagnosis.adapters]
    for module in diagnosis:
        for t, s in zip(module.adapters, module.measures.spectra.updates, strict=True):
            rows[t].append(s)
    curves = [np.nanmedian(_solid(_curves(own)), axis=0) for own in rows]
    if len(rows) <= len(COLORS):
        for t, (name, curve) in enumerate(zip(diagnosis.adapters, curves, strict=True)):
            _band(panel, curve[None], color=COLORS[t], ls=("-", "--")[t // 4], label=clip(name, 12))
        _legend(figure, panel, 4)
    else:
        size = max(map(len, curves))
        padded = [np.pad(x, (0, size - len(x)), constant_values=np.nan) for x in curves]
        _band(panel, np.stack(padded), color=BLUE)
    panel.set_xlabel("direction")
    panel.set_ylabel("relative singular value")
    _logarithmic(panel)
    return (figure,)


def _solid(table: np.ndarray) -> np.ndarray:
    """Drops the columns without any number, which have no median."""
    return table[:, ~np.isnan(table).all(axis=0)]


@_drawn
def results(diagnosis: Results) -> tuple[Figure]:
    """Draws singular values of the sum and of the merged update."""
    figure, panel = _panel(3.6)
    for name, label, style in _kept_updates(diagnosis):
        found = [getattr(module.measures.spectra, name) for module in diagnosis]
        _band(panel, _curves([s for s in found if s is not None]), label=label, **style)
    panel.set_xlabel("direction")
    panel.set_ylabel("relative singular value")
    _logarithmic(panel)
    _legend(figure, panel, 2)
    return (figure,)


@_drawn
def energy(diagnosis: Results) -> tuple[Figure]:
    """Returns the share of the energy that a rank budget keeps."""
    figure, panel = _panel(3.6)
    for name, label, style in _kept_updates(diagnosis):
        kept = diagnosis.energy_kept(name)
        panel.plot(np.arange(len(kept) + 1), [0, *kept], label=label, **style)
        for share in (0.9, 0.99):
            rank = diagnosis.rank_for(share, name)
            panel.plot(rank, kept[rank - 1], "o", color=style["color"])
            panel.annotate(f"{rank}", (rank, kept[rank - 1]), (4, -14), textcoords="offset points")
    panel.set_xlabel("rank of every module")
    panel.set_ylabel("share of energy kept")
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.05)
    _legend(figure, panel, 2)
    return (figure,)


def _kept_updates(diagnosis: Results) -> list[tuple[str, str, dict[str, Any]]]:
    total = ("total", "sum of all", {"color": ORANGE, "ls": "--"})
    merged = ("merged", "merged", {"color": BLUE})
    return [merged, total] if diagnosis.merged else [total]


def _legend(figure: Figure, panel: Any, columns: int) -> None:
    handles = panel.get_legend_handles_labels()
    if handles[0]:
        figure.legend(*handles, loc="outside upper center", ncols=columns, columnspacing=1.2)


# --- Maps ----------------------------------------------------------------------------------
@_drawn
def pairs(names: Sequence[str], values: np.ndarray, scale: Scale = _SHARE) -> tuple[Figure]:
    """Returns a color for every two adapters; not for each with itself."""
    shown = values.copy()
    np.fill_diagonal(shown, np.nan)
    figure, panel = _panel(4.4)
    _map(figure, panel, shown, names, names, scale)
    return (figure,)


@_drawn
def modules(diagnosis: Results, values: np.ndarray, scale: Scale = _SHARE) -> tuple[Figure]:
    """Draws a number of each module: layers down and kinds across, or a list of bars."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return _draw_bars([module.path for module in diagnosis], values)
    cells = _cells(grid, values)
    figure, panel = _panel(_map_height(len(grid.layers)))
    _map(figure, panel, cells, grid.layers, grid.kinds, scale)
    panel.set_ylabel("layer")
    return (figure,)


@_drawn
def depth(diagnosis: Results, values: np.ndarray, scale: Scale) -> tuple[Figure]:
    """Draws a number of each module and adapter: layers down, adapters across."""
    grid = arrange([module.path for module in diagnosis])
    if grid is None:
        return _draw_bars([module.path for module in diagnosis], mean_known(values, 1))
    rows = np.asarray([layer for layer, _ in grid.cells])
    cells = np.stack([mean_known(values[rows == i], 0) for i in range(len(grid.layers))])
    figure, panel = _panel(_map_height(len(cells)))
    _map(figure, panel, cells, grid.layers, diagnosis.adapters, scale)
    panel.set_ylabel("layer")
    return (figure,)


def _map_height(rows: int) -> float:
    return 1.6 + min(4.0, 0.42 * rows)


def _cells(grid: Arrangement, values: np.ndarray) -> np.ndarray:
    """Means of the modules in each cell, NaN where there is none."""
    members: dict[tuple[int, int], list[float]] = {}
    for cell, value in zip(grid.cells, values, strict=True):
        members.setdefault(cell, []).append(value)
    cells = np.full((len(grid.layers), len(grid.kinds)), np.nan)
    for cell, found in members.items():
        cells[cell] = mean_known(np.asarray(found), 0)
    return cells


def mean_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Returns the mean of what is not NaN; NaN where all is."""
    count = np.sum(~np.isnan(values), axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def _map(
    figure: Figure,
    panel: Any,
    values: np.ndarray,
    rows: Sequence[Any],
    columns: Sequence[Any],
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
        axis.set_ticks(range(0, len(names), step), [clip(str(x), 14) for x in names[::step]])
    if any(len(str(name)) > 3 for name in columns) or len(columns) > _TICKS:
        panel.tick_params(axis="x", rotation=90 if len(columns) > 10 else 50)
        for label in panel.get_xticklabels() if len(columns) <= 10 else ():
            label.set(ha="right", rotation_mode="anchor")
    if len(columns) <= 8 and len(rows) <= 12:
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                _number(panel, image, (j, i), value, scale.form)
    bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02, aspect=40)
    bar.outline.set_visible(False)


def _number(panel: Any, image: Any, place: tuple[int, int], value: float, form: str) -> None:
    red, green, blue, _ = image.cmap(image.norm(value))
    bright = 0.21 * red**2.2 + 0.72 * green**2.2 + 0.07 * blue**2.2 > 0.18
    color = "#111111" if bright else "#ffffff"
    panel.text(*place, short(value, form), ha="center", va="center", color=color, fontsize=11)


def short(value: float, form: str = ".2f") -> str:
    """Returns a number in few letters: .42, −.1, 0, 1.3."""
    text = format(value, form)
    if float(text) == 0:
        return "0"
    return re.sub(r"^(-?)0\.", r"\1.", text).rstrip(".").replace("-", "−")


def _limits(values: np.ndarray, scale: Scale) -> tuple[float, float]:
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


def around(middle: float, values: np.ndarray, least: float = 0.05, form: str = ".2f") -> Scale:
    """Returns two colors, for above and below ``middle``."""
    found = values[np.isfinite(values)]
    reach = max(least, float(np.abs(found - middle).max(initial=0.0)))
    return Scale("PuOr_r", middle - reach, middle + reach, form)


# --- Bars ----------------------------------------------------------------------------------
@_drawn
def bars(names: Sequence[str], values: np.ndarray, mark: float | None = None) -> tuple[Figure]:
    """Returns a bar for each name, and a line at what to compare with."""
    return _draw_bars(names, values, mark)


def _draw_bars(
    names: Sequence[str], values: np.ndarray, mark: float | None = None
) -> tuple[Figure]:
    names, values = _ends(names, values)
    figure, panel = _panel(0.9 + 0.28 * max(4, len(names)))
    places = np.arange(len(names))
    panel.barh(places, np.where(np.isfinite(values), values, np.nan), color=BLUE, height=0.7)
    for place, value in zip(places, values, strict=True):
        if np.isfinite(value):
            panel.annotate(
                f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}",
                (max(value, 0), place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
            )
    panel.set_yticks(places, [clip(name, 22) for name in names])
    panel.invert_yaxis()
    panel.margins(x=0.16, y=0.02)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    panel.axvline(0, color=_MUTED, lw=1)
    if mark is not None:
        panel.axvline(mark, color=ORANGE, ls="--")
    return (figure,)


def _ends(names: Sequence[str], values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Returns the highest and the lowest, if there are too many to see."""
    if len(names) <= _BARS:
        return list(names), values
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    half = _BARS // 2
    shown = [*order[:half], *order[-half:]]
    found = [*(names[i] for i in shown)]
    found.insert(half, f"… {len(names) - 2 * half} between …")
    return found, np.insert(values[shown], half, np.nan)


@_drawn
def costs(found: Sequence[RuleCost]) -> tuple[Figure]:
    """Operations of each rule, in products and in the rest."""
    figure, panel = _panel(0.9 + 0.28 * len(found))
    places = np.arange(len(found))
    products = np.asarray([one.products for one in found]) / 1e9
    rest = np.asarray([one.core for one in found]) / 1e9
    panel.barh(places, products, color=BLUE, height=0.7, label="matrix products")
    panel.barh(places, rest, left=products, color=ORANGE, height=0.7, label="decompositions, other")
    panel.set_yticks(places, [one.rule for one in found])
    panel.invert_yaxis()
    panel.set_xlabel("billion operations")
    panel.margins(y=0.02)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    _legend(figure, panel, 2)
    return (figure,)
