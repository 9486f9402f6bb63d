"""Draws the figure of the README: ``python docs/figures/pipeline.py`` (extra ``docs``)."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

TASKS = ("#3b6ea5", "#d9822b", "#3a9c6e")
BASIS, MERGED, INK, FAINT = "#c9ced6", "#9c2f6f", "#1a1a1a", "#5a5a5a"
RANK, ROWS, COLUMNS = 0.28, 2.6, 2.1  # r, m and n on paper
STACK = RANK * len(TASKS)
GAP = 0.3
TOP = ROWS / 2


def matrix(
    ax: Axes, x: float, top: float, width: float, height: float, color: str, name: str = ""
) -> None:
    """Draws a rectangle with its upper left corner at a point."""
    ax.add_patch(Rectangle((x, top - height), width, height, fc=color, ec="white", lw=1.5))
    label(ax, x + width / 2, top - height / 2, name, color=INK if color == BASIS else "white")


def label(ax: Axes, x: float, y: float, text: str, *, size: float = 13, color: str = INK) -> None:
    """Writes text around a point."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=color, linespacing=1.6)


def stage(ax: Axes, x: float, name: str, shapes: str) -> None:
    """Writes the name of a stage above, and its shapes below."""
    ax.text(x, TOP + 0.5, name, ha="center", fontsize=14, color=INK)
    label(ax, x, -TOP - 0.9, shapes, size=12, color=FAINT)


def arrow(ax: Axes, x: float, name: str) -> None:
    """Draws an arrow from one stage to the next."""
    ax.annotate("", (x + 0.9, 0), (x, 0), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.5})
    label(ax, x + 0.43, 0.28, name, size=12)


def draw(ax: Axes) -> None:
    """Draws all stages from left to right."""
    for t, color in enumerate(TASKS, start=1):
        top = TOP - (t - 1) * 0.92
        matrix(ax, 0, top, RANK, 0.8, color)
        matrix(ax, RANK + 0.15, top, 0.7, RANK, color)
        label(ax, -0.25, top - 0.4, f"$B_{t}$")
        label(ax, RANK + 0.5, top - RANK - 0.25, f"$A_{t}$")
    stage(ax, 0.5, "adapters", "$\\Delta W_t = B_t A_t$\nrank $r_t$")

    arrow(ax, 1.65, "stack")
    x = 3.0
    for t, color in enumerate(TASKS):
        matrix(ax, x + RANK * t, TOP, RANK, ROWS, color)
        matrix(ax, x + STACK + GAP, TOP - RANK * t, COLUMNS, RANK, color)
    label(ax, x + STACK / 2, -TOP - 0.2, "$B$")
    label(ax, x + STACK + GAP + COLUMNS / 2, TOP - STACK - 0.22, "$A$")
    shapes = "$B: m \\times R$    $A: R \\times n$\n$R = r_1 + \\ldots + r_T$"
    stage(ax, x + (STACK + GAP + COLUMNS) / 2, "stacks", shapes)

    arrow(ax, 6.5, "SVD")
    x = 7.75
    matrix(ax, x, TOP, STACK, ROWS, BASIS, "$U$")
    matrix(ax, x + STACK + GAP, TOP, STACK, COLUMNS, BASIS, "$V$")
    shapes = "$U: m \\times p$    $V: n \\times q$\n$p, q \\leq R$"
    stage(ax, x + STACK + GAP / 2, "reference bases", shapes)

    arrow(ax, 10.1, "project")
    x = 11.35
    for t, color in reversed(list(enumerate(TASKS, start=1))):
        shift = 0.3 * (t - 1)
        matrix(ax, x + shift, STACK / 2 - 0.3 + shift, STACK, STACK, color, f"$M_{t}$" * (t == 1))
    shapes = "$M_t = (U^\\mathsf{T} B_t)(A_t V)$\n$p \\times q$"
    stage(ax, x + STACK / 2 + 0.3, "cores", shapes)

    arrow(ax, 13.2, "rule")
    x = 14.45
    matrix(ax, x, STACK / 2, STACK, STACK, MERGED, "$M$")
    stage(ax, x + STACK / 2, "merged core", "TIES, TSV, …\n$p \\times q$")

    arrow(ax, 15.7, "lift")
    x = 16.95
    matrix(ax, x, TOP, STACK, ROWS, MERGED, "$U M$")
    matrix(ax, x + STACK + GAP, TOP, COLUMNS, STACK, MERGED, "$V^\\mathsf{T}$")
    shapes = "$\\Delta W = U M V^\\mathsf{T}$\nrank at most $R$"
    stage(ax, x + (STACK + GAP + COLUMNS) / 2, "merged adapter", shapes)


def main(out: Path) -> None:
    """Draws and writes the figure."""
    mpl.rcParams.update({"mathtext.fontset": "cm", "svg.hashsalt": "coremerge"})
    figure, ax = plt.subplots(figsize=(14.5, 3.6))
    draw(ax)
    ax.set(xlim=(-0.7, 20.5), ylim=(-2.65, 2.2), aspect="equal")
    ax.axis("off")
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, bbox_inches="tight", facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main(Path(__file__).with_suffix(".svg"))
