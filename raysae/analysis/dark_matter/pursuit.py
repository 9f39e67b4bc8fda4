"""TODO docstring."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.pursuit import pursuit
from raysae.analysis.dark_matter.probes import Shown, described, shown
from raysae.analysis.instruments.plots import (
    AXES,
    BLUE,
    FVU_LABEL,
    PAPER_WIDTH,
    SKY,
    STYLE,
    bars,
    headed,
    ticks,
)
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task

PURSUIT_ROWS = 32_768  # to fit, and as many to measure: by far the slowest analysis, and its intervals are narrow
BEFORE_AFTER = {"": ("codes of the encoder", SKY), "_pursuit": ("codes of pursuit", BLUE)}


# ---------------------------------------------------------------- 7


def pursuit_tasks(lab: Lab, chosen: Shown) -> list[Task]:
    recorded = lab.record([chosen.hook_point])
    saes = sorted(chosen.saes.values(), key=lambda sae: -sae.width)  # the longest first
    return [Task("pursuit", lab.key(sae, rows=PURSUIT_ROWS), _pursue, (recorded, sae, lab.replicates, lab.seed)) for sae in saes]


def run(lab: Lab) -> Findings:
    """Analysis 7: how much of the nonlinear error a better choice of latents removes, for the SAEs of the figure."""
    chosen = shown(lab)
    parts = pursuit_tasks(lab, chosen)
    table = pd.concat(lab.run(parts)).sort_values("width", ignore_index=True)
    findings = Findings("pursuit", lab.key(*chosen.saes.values()), table, tables={"pursuit": table})
    share = table["encoder_error"] / table["nonlinear_fvu"]
    findings.numbers = {"median/encoder_error": float(table["encoder_error"].median()), "median/encoder_share": float(share.median())}
    findings.figures["pursuit"] = pursuit_bars(table, title=described(lab, chosen))
    return findings


def _pursue(recorded: Recorded, sae: Subject, replicates: int, seed: int) -> pd.DataFrame:
    return pursuit(recorded.open(), sae.hook_point, {sae.name: sae.load()}, replicates, seed, PURSUIT_ROWS)


def pursuit_bars(table: pd.DataFrame, along: str = "width", title: str = "") -> Figure:
    """FVU and nonlinear FVU with the encoder's codes and with as many steps of pursuit; `table` is that of `pursuit`, `along` "width" or "l0"."""
    table = table.sort_values(along)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.7))
        panels = figure.subplots(1, 2)
        place = np.arange(len(table))
        for ax, (column, heading) in zip(panels, {"fvu": "FVU", "nonlinear_fvu": "nonlinear FVU"}.items(), strict=True):
            for shift, (suffix, (label, color)) in zip((-0.2, 0.2), BEFORE_AFTER.items(), strict=True):
                bars(ax, place + shift, table, f"{column}{suffix}", 0.38, color, 1, label)
            for x, (_, row) in zip(place, table.iterrows(), strict=True):
                change = 100 * (row[f"{column}_pursuit"] / row[column] - 1)
                ax.text(x, max(row[f"{column}_high"], row[f"{column}_pursuit_high"]), f"{change:+.0f} %", ha="center", va="bottom", fontsize=6.5)
            ax.set(xlabel=AXES[along], ylim=(0, 1.3 * max(table[f"{column}_high"].max(), table[f"{column}_pursuit_high"].max())))
            ax.set_title(heading)
            ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel(FVU_LABEL)
        panels[0].legend(loc="upper right", ncols=2)
        figure.suptitle(headed("Encoder error: what pursuit with the same decoder and L0 removes", title))
    return figure
