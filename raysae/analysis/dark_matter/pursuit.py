"""How much of the nonlinear error is the encoder's (analysis 7): the experiment, its tasks and figures.

The slowest analysis by far, so it reads a part of the recorded rows. Its intervals are narrow all the same.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.error_parts import FEWEST_WIDTHS, breakdown_figure, taken_apart
from raysae.analysis.dark_matter.measures.pursuit import pursuit
from raysae.analysis.dark_matter.probes import Shown, described, shown
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import AXES, BLUE, FVU_LABEL, PAPER_WIDTH, SKY, STYLE, bars, headed, ticks
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task

PURSUIT_ROWS = 32_768  # Rows to fit, and as many to measure.
BEFORE_AFTER = {"": ("codes of the encoder", SKY), col.PURSUIT: ("codes of pursuit", BLUE)}


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """How much of the nonlinear error a better choice of latents removes, for the SAEs of the figures."""
    chosen = shown(lab)
    table = pd.concat(lab.run(pursuit_tasks(lab, chosen))).sort_values("width", ignore_index=True)
    findings = Findings("pursuit", lab.key(*chosen.saes.values()), table, tables={"pursuit": table})
    for column in (col.ENCODER_ERROR, col.ENCODER_SHARE):
        findings.numbers[f"median/{column}"] = float(table[column].median())
    findings.figures["pursuit"] = pursuit_bars(table, title=described(lab, chosen))
    if table["width"].nunique() >= FEWEST_WIDTHS:
        parts, law, level = taken_apart(pursued(table))
        findings.tables["pursuit_breakdown"] = parts
        what = "What the error consists of after pursuit"
        findings.figures["pursuit_breakdown"] = breakdown_figure(parts, law, level, described(lab, chosen), what)
    return findings


def pursued(table: pd.DataFrame) -> pd.DataFrame:
    """FVU and nonlinear FVU after pursuit, with their intervals, under the names that they have before it."""
    renamed = {
        f"{column}{col.PURSUIT}{end}": f"{column}{end}"
        for column in (col.FVU, col.NONLINEAR_FVU)
        for end in ("", col.LOW, col.HIGH, col.REPLICATES)
    }
    return table[["width", col.GROUPS, *renamed]].rename(columns=renamed)


def pursuit_tasks(lab: Lab, chosen: Shown) -> list[Task]:
    """A task per SAE that the figures show, the longest first. Each gives a row of `measures.pursuit.pursuit`."""
    recorded = lab.record([chosen.hook_point])
    saes = sorted(chosen.saes.values(), key=lambda sae: -sae.width)
    return [
        Task("pursuit", lab.key(sae, rows=PURSUIT_ROWS), _pursue, (recorded, sae, lab.replicates, lab.seed))
        for sae in saes
    ]


def _pursue(recorded: Recorded, sae: Subject, replicates: int, seed: int) -> pd.DataFrame:
    return pursuit(recorded.open(), sae.hook_point, {sae.name: sae.load()}, replicates, seed, PURSUIT_ROWS)


# ---------------------------------------------------------------- the figure


def pursuit_bars(table: pd.DataFrame, along: str = "width", title: str = "") -> Figure:
    """FVU and nonlinear FVU, with the encoder's codes and with as many steps of pursuit.

    Args:
        table: that of `measures.pursuit.pursuit`.
        along: "width" or "l0", what the SAEs differ in.
        title: the second line of the title.
    """
    table = table.sort_values(along)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.7))
        panels = figure.subplots(1, 2)
        place = np.arange(len(table))
        headings = {col.FVU: "FVU", col.NONLINEAR_FVU: "nonlinear FVU"}
        for ax, (column, heading) in zip(panels, headings.items(), strict=True):
            pursued = column + col.PURSUIT
            for shift, (suffix, (label, color)) in zip((-0.2, 0.2), BEFORE_AFTER.items(), strict=True):
                bars(ax, place + shift, table, f"{column}{suffix}", 0.38, color, 1, label)
            tops = table[[column, pursued, col.high(column), col.high(pursued)]].max(axis=1)  # Ends may be missing
            changes = 100 * (table[pursued] / table[column] - 1)
            for x, top, change in zip(place, tops, changes, strict=True):
                ax.text(x, top, f"{change:+.0f} %", ha="center", va="bottom", fontsize=6.5)
            ax.set(xlabel=AXES[along], ylim=(0, 1.3 * tops.max()))
            ax.set_title(heading)
            ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel(FVU_LABEL)
        panels[0].legend(loc="upper right", ncols=2)
        figure.suptitle(headed("Encoder error: what pursuit with the same decoder and L0 removes", title))
    return figure
