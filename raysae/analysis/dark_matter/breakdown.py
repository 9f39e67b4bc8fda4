"""TODO docstring."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.breakdown import Level, PowerLaw
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

PARTS = {  # of the breakdown, bottom to top
    "encoder": ("encoder error", PURPLE),
    "nonlinear": ("nonlinear error", VERMILION),
    "linear": ("linear error", ORANGE),
    "absent": ("absent features", SKY),
}


# ---------------------------------------------------------------- analysis 1


@styled
def breakdown_figure(parts: pd.DataFrame, law: PowerLaw, level: Level, title: str = "") -> Figure:
    """FVU and nonlinear FVU against width with their fits, and what the error consists of.

    `parts` is `fits.breakdown`'s table. Widths at which c lies below the nonlinear FVU are not stacked: their bar shows the nonlinear part and the
    fit-free gap FVU − nonlinear FVU, hatched.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 2.9))
    left, right = figure.subplots(1, 2)
    widths = parts["width"].to_numpy()
    along = np.geomspace(widths.min(), widths.max(), 100)
    left.plot(widths, parts["fvu"], "o", color=BLUE, label="FVU")
    left.plot(along, law(along), color=BLUE, label=f"{number(law.c)} + {number(law.a)} · width$^{{-{law.m:.2f}}}$")
    left.axhspan(law.c_low, min(law.c_high, 1.3 * parts["fvu"].max()), color=BLUE, alpha=0.12, linewidth=0)
    left.axhline(law.c, color=BLUE, linewidth=0.8, linestyle=":", label=f"c = {law.c:.3f}, 95 % interval {law.c_low:.3f} to {law.c_high:.3f}")
    left.plot(widths, parts["nonlinear_fvu"], "s", color=VERMILION, label="nonlinear FVU")
    slope = f"{100 * level.slope:+.1f} % per doubling"
    left.axhline(level.value, color=VERMILION, linewidth=1, linestyle="--", label=f"its mean {level.value:.3f} ({slope})")
    left.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 2 * parts["fvu"].max()))
    log_widths(left, widths)
    left.legend(loc="upper right", handlelength=1.6)
    left.grid(axis="y")

    place = np.arange(len(parts))
    bottom = np.zeros(len(parts))
    stacks = parts["stacks"].to_numpy()
    encoder = parts["encoder"].to_numpy() if "encoder" in parts else np.zeros(len(parts))
    heights = {"encoder": encoder, "nonlinear": parts["nonlinear"].to_numpy() - encoder}
    heights |= {"linear": np.where(stacks, parts["linear"], 0), "absent": np.where(stacks, parts["absent"], 0)}
    for name, (label, color) in PARTS.items():
        if name == "encoder" and "encoder" not in parts:
            continue
        height = np.maximum(heights[name], 0)
        if name == "nonlinear" and "encoder" in parts:
            label = "other nonlinear error"
        right.bar(place, height, 0.75, bottom, color=color, label=label if height.any() else None, edgecolor="white", linewidth=0.4)
        bottom += height
    if not stacks.all():
        gap = np.where(stacks, 0, parts["linear_gap"])
        right.bar(place, gap, 0.75, bottom, color="white", edgecolor="0.4", hatch="////", linewidth=0.5, label="linear or absent (not told apart)")
    for x, total in zip(place, parts["fvu"], strict=True):
        right.text(x, total, f"{total:.3f}", ha="center", va="bottom", fontsize=6)
    right.set_xticks(place, [short(w) for w in widths], rotation=30 if len(widths) > 9 else 0)
    right.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 1.35 * parts["fvu"].max()))
    right.legend(loc="upper right", reverse=True)
    if law.warning:
        figure.supxlabel(wrapped(f"Note: {law.warning}."), fontsize=7, color=VERMILION)
    titled(figure, "What the error consists of", title)
    return figure
