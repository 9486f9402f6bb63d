"""The style of all figures: of sweeps, of fits and of reports. Needs matplotlib."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coremerge_jax.errors import UnsupportedError

try:
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise UnsupportedError("plots need matplotlib: pip install 'coremerge-jax[plot]'") from error

__all__ = ["BLUE", "COLORS", "INK", "MUTED", "ORANGE", "Axes", "Figure", "style"]

# Easy to tell apart on light and dark pages, and with color blindness (after Okabe and Ito).
BLUE, ORANGE, *_ = COLORS = (
    "#3f83c4", "#dd7a1c", "#1f9a76", "#c9699f", "#b8921f", "#3fa7d6", "#d1495b", "#8a72c9",
)  # fmt: skip

INK, MUTED = "#1b1f27", "#667080"  # of text, and of axes


@contextmanager
def style(size: float = 10, ink: str = INK, muted: str = MUTED) -> Iterator[None]:
    """Sets the style; matplotlib needs it for making texts, and again for writing a file.

    Args:
        size: of letters, in points.
        ink: color of texts.
        muted: color of axes.
    """
    sheet: Any = {  # not a dict[str, ...]: matplotlib types its keys one by one
        "axes.edgecolor": muted,
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.labelsize": size,
        "axes.prop_cycle": cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": size,
        "font.size": size,
        "grid.alpha": 0.25,
        "grid.color": muted,
        "legend.fontsize": size - 0.5,
        "legend.frameon": False,
        "lines.linewidth": size / 6,
        "path.simplify_threshold": 0.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "coremerge",
        "text.color": ink,
        "text.parse_math": False,
        "xtick.color": muted,
        "xtick.labelcolor": ink,
        "xtick.labelsize": size - 0.5,
        "ytick.color": muted,
        "ytick.labelcolor": ink,
        "ytick.labelsize": size - 0.5,
    }
    with mpl.rc_context(sheet), warnings.catch_warnings():
        # Names may have letters that matplotlib's fonts lack: SVG leaves fonts to the viewer.
        warnings.filterwarnings("ignore", "Glyph|.*[Ff]ont family")
        yield
