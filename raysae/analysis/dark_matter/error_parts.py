"""What errors consist of, over widths: the table of parts and its figure, for the encoder's codes or pursuit's."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.breakdown import Level, PowerLaw, breakdown, fit_power_law, nonlinear_level
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import (
    BLUE,
    FVU_LABEL,
    ORANGE,
    PAPER_WIDTH,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH_LABEL,
    log_widths,
    number,
    short,
    styled,
    titled,
    wrapped,
)

FEWEST_WIDTHS = 3  # A fit against width has three parameters.
BEYOND = 10  # The fit is drawn on to so many times the widest SAE.
WHAT = "What the error consists of"
BARS = {  # Column: label and colour, from bottom to top.
    col.ENCODER: ("encoder error", PURPLE),
    col.NONLINEAR: ("nonlinear error", VERMILION),
    col.LINEAR: ("linear error", ORANGE),
    col.ABSENT: ("absent features", SKY),
}


def taken_apart(table: pd.DataFrame) -> tuple[pd.DataFrame, PowerLaw, Level]:
    """The parts of the errors of the SAEs of `table`, the fit of FVU against width, and the nonlinear FVU's level."""
    law = fit_power_law(table["width"], table[col.FVU])
    level = nonlinear_level(table["width"], table[col.NONLINEAR_FVU], table[col.FVU])
    return breakdown(table, law), law, level


@styled
def breakdown_figure(parts: pd.DataFrame, law: PowerLaw, level: Level, title: str = "", what: str = WHAT) -> Figure:
    """FVU and nonlinear FVU against width with their fits, and what the error consists of.

    `parts` is the table of `measures.breakdown.breakdown`. Where c does not lie between nonlinear FVU and FVU, linear
    error and absent features are not told apart. The bar then has the gap between the two hatched, which needs no fit.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 2.9))
    left, right = figure.subplots(1, 2)
    _fits(left, parts, law, level)
    _stacks(right, parts)
    if law.warning:
        figure.supxlabel(wrapped(f"Note: {law.warning}."), fontsize=7, color=VERMILION)
    titled(figure, what, title)
    return figure


def _fits(ax: Axes, parts: pd.DataFrame, law: PowerLaw, level: Level) -> None:
    """FVU with its power law, and what needs no fit, against width. The law runs on to ten times the widest SAE."""
    widths, fvu = parts["width"].to_numpy(), parts[col.FVU]
    measured, beyond = np.geomspace(widths.min(), widths.max(), 100), np.geomspace(widths.max(), BEYOND * widths.max())
    _points(ax, parts, col.FVU, {"marker": "o", "color": BLUE, "label": "FVU"})
    formula = f"{number(law.c)} + {number(law.a)} · width$^{{-{law.m:.2f}}}$"
    ax.plot(measured, law(measured), color=BLUE, label=formula)
    ax.plot(beyond, law(beyond), color=BLUE, linestyle="--")
    ax.axhspan(law.c_low, min(law.c_high, 1.3 * fvu.max()), color=BLUE, alpha=0.12, linewidth=0)
    interval = f"c = {law.c:.3f}, 95 % interval {law.c_low:.3f} to {law.c_high:.3f}"
    ax.axhline(law.c, color=BLUE, linewidth=0.8, linestyle=":", label=interval)
    _points(ax, parts, col.NONLINEAR_FVU, {"marker": "s", "color": VERMILION, "label": "nonlinear FVU"})
    mean = f"its mean {level.value:.3f} ({100 * level.slope:+.1f} % per doubling)"
    ax.axhline(level.value, color=VERMILION, linewidth=1, linestyle="--", label=mean)
    ax.plot(widths, parts[col.LINEAR_GAP], "^", color=ORANGE, label="FVU − nonlinear FVU (needs no fit)")
    ax.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(min(0, 1.1 * parts[col.LINEAR_GAP].min()), 2.1 * fvu.max()))
    log_widths(ax, np.append(widths, BEYOND * widths.max()))
    ax.tick_params(axis="x", rotation=30)
    ax.legend(loc="upper right", handlelength=1.6)
    ax.grid(axis="y")


def _points(ax: Axes, parts: pd.DataFrame, column: str, style: dict) -> None:
    """A number of each width, with its interval where it has one."""
    ax.plot(parts["width"], parts[column], linestyle="none", **style)
    if col.low(column) in parts:
        ax.vlines(parts["width"], parts[col.low(column)], parts[col.high(column)], color=style["color"], linewidth=1)


def _stacks(ax: Axes, parts: pd.DataFrame) -> None:
    """A bar per width, stacked from the parts of its error."""
    place = np.arange(len(parts))
    bottom = np.zeros(len(parts))
    heights = _heights(parts)
    for name, height in heights.items():
        label, color = BARS[name]
        label = f"other {label}" if name == col.NONLINEAR and col.ENCODER in heights else label
        ax.bar(place, height, 0.75, bottom, color=color, label=label, edgecolor="white", linewidth=0.4)
        bottom += height
    gap = parts[col.FVU].to_numpy() - bottom
    if not parts[col.STACKS].all():
        hatched = {"color": "white", "edgecolor": "0.4", "hatch": "////", "linewidth": 0.5}
        ax.bar(place, gap, 0.75, bottom, label="linear or absent (not told apart)", **hatched)
    for x, total in zip(place, parts[col.FVU], strict=True):
        ax.text(x, total, f"{total:.3f}", ha="center", va="bottom", fontsize=6)
    ax.set_xticks(place, [short(width) for width in parts["width"]], rotation=30 if len(parts) > 9 else 0)
    ax.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 1.7 * parts[col.FVU].max()))
    ax.legend(loc="upper right", reverse=True)


def _heights(parts: pd.DataFrame) -> dict[str, np.ndarray]:
    """The heights of the parts that some bar has, from bottom to top. No bar's sum exceeds its FVU."""
    stacks = parts[col.STACKS].to_numpy()
    nonlinear = parts[col.NONLINEAR].clip(upper=parts[col.FVU]).to_numpy()
    encoder = parts[col.ENCODER].clip(lower=0).to_numpy() if col.ENCODER in parts else np.zeros(len(parts))
    encoder = np.minimum(encoder, nonlinear)
    heights = {col.ENCODER: encoder, col.NONLINEAR: nonlinear - encoder}
    heights |= {name: np.where(stacks, parts[name], 0) for name in (col.LINEAR, col.ABSENT)}
    return {name: height for name, height in heights.items() if height.any()}
