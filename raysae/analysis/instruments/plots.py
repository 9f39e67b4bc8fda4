"""What the figures of the analyses share: size, colours, style, names of axes and parts, and small drawing helpers.

Figures have paper width (6.75 inches) and colours fit for the colour-blind. `styled` decorates a function that draws
one, and `save` writes it. No analysis's own figure is here.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from raysae.analysis.instruments import columns as col

PAPER_WIDTH = 6.75  # Inches, the width of two columns
DPI = 200
# Okabe and Ito's palette
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#000000",
)
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}
WIDTH_LABEL = "latents (width)"
L0_LABEL = "active latents per token (L0)"
FVU_LABEL = "fraction of variance unexplained"
AXES = {"width": WIDTH_LABEL, col.L0: L0_LABEL}
ERROR_PARTS = {col.LINEAR: ("linear error ê", ORANGE), col.NONLINEAR: ("nonlinear error ε", VERMILION)}
SOURCE_PARTS = {
    "reconstruction": ("reconstruction", BLUE),
    "activation": ("activation", SKY),
    "error": ("error e", GREEN),
    "linear error": ("linear error ê", ORANGE),
    "nonlinear error": ("nonlinear error ε", VERMILION),
}


def save(figure: Figure, path: str | Path, pdf: bool = False) -> list[Path]:
    """Writes a PNG (200 dpi) and, on request, a PDF under the name of `path`. Returns the files."""
    files = [Path(path).with_suffix(suffix) for suffix in ([".png", ".pdf"] if pdf else [".png"])]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for file in files:
            figure.savefig(file, dpi=DPI)
    return files


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Makes a function that returns a Figure draw it in `STYLE`."""

    @functools.wraps(function)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


def heat_map(
    figure: Figure,
    ax: Axes,
    grid: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    label: str,
    limits: tuple[float, float],
) -> None:
    image = ax.imshow(grid, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="equal")
    digits = 2 if limits[1] > 0.2 else 3
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = (value - limits[0]) / max(1e-12, limits[1] - limits[0]) < 0.55
            ax.text(
                column,
                row,
                decimals(value, digits),
                ha="center",
                va="center",
                fontsize=6 if digits * len(columns) < 15 else 4.5,
                color="white" if dark else "black",
            )
    ax.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 5 else 0)
    ax.set_yticks(range(len(rows)), rows)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, location="top", shrink=0.9, aspect=22, label=label)


def log_widths(ax: Axes, widths: np.ndarray) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(widths))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(width: float) -> str:
    """A width with powers of two abbreviated: `512`, `4k`, `64k`, `1M`."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if width >= size and width % size == 0:
            return f"{width / size:g}{letter}"
    return f"{width:g}"


def number(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= value < 1e4 else f"{value:.1e}"


def decimals(value: float, digits: int) -> str:
    """`value` with `digits` decimals. A number that rounds to 0 has no minus."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def visible(text: str) -> str:
    """A token's text with visible white space, and nothing that matplotlib takes for mathematics."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$") or "∅"


def wrapped(text: str, width: int = 130) -> str:
    return "\n".join(textwrap.wrap(text, width))


def titled(figure: Figure, what: str, where: str) -> None:
    figure.suptitle(f"{what}\n{where}" if where else what)


def bars(
    ax: Axes,
    place: np.ndarray,
    table: pd.DataFrame,
    column: str,
    width: float,
    color: str,
    unit: float,
    label: str | None = None,
) -> None:
    """Bars of `column` times `unit`, with their intervals."""
    value, low, high = (unit * table[f"{column}{end}"].to_numpy(float) for end in ("", col.LOW, col.HIGH))
    ax.bar(place, value, width, color=color, label=label)
    ax.vlines(place, low, high, color="0.25", linewidth=1)


def ticks(ax: Axes, place: np.ndarray, values: pd.Series) -> None:
    labels = [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in values]
    ax.set_xticks(place, labels, rotation=30 if len(labels) > 5 else 0)


def headed(what: str, title: str) -> str:
    return f"{what}\n{title}" if title else what
