"""The figure of analysis 6: SAEs trained on the parts of an error, side by side."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.figures import ORANGE, PAPER_WIDTH, PURPLE, STYLE, VERMILION

KINDS = {"error": ("e", PURPLE), "linear": ("ê (linear)", ORANGE), "nonlinear": ("ε (nonlinear)", VERMILION)}


def error_sae_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """FVU, L0 and dead latents of the SAEs of `error_saes.error_saes`."""
    table = table.set_index("kind").loc[[kind for kind in KINDS if kind in set(table["kind"])]]
    labels, colors = zip(*(KINDS[kind] for kind in table.index), strict=True)
    place = np.arange(len(table))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.3))
        panels = figure.subplots(1, 3)
        shown = {
            "fvu": ("FVU", 1, "{:.3f}"),
            "l0": ("active latents per token (L0)", 1, "{:.3g}"),
            "dead_fraction": ("dead latents (%)", 100, "{:.1f}"),
        }
        for ax, (column, (label, unit, form)) in zip(panels, shown.items(), strict=True):
            values = unit * table[column].to_numpy(float)
            tops = values
            ax.bar(place, values, 0.7, color=colors)
            if f"{column}_low" in table:
                tops = unit * table[f"{column}_high"].to_numpy(float)
                ax.vlines(place, unit * table[f"{column}_low"], tops, color="0.25", linewidth=1)
            for x, value, top in zip(place, values, tops, strict=True):
                ax.text(x, top, form.format(value), ha="center", va="bottom", fontsize=7)
            ax.set_xticks(place, labels)
            ax.set(ylabel=label, xlabel="trained on", ylim=(0, 1.15 * tops.max() if tops.max() > 0 else 1))
            ax.grid(True, axis="y")
        figure.suptitle(f"SAEs on the parts of an error\n{title}" if title else "SAEs on the parts of an error")
    return figure
