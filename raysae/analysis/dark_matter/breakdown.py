"""What the error consists of, over widths (analysis 1): the experiment and its figure.

It stands on two others. The regressions give FVU and nonlinear FVU, pursuit the encoder's share of the latter. It asks
for the tasks of both, so it may run before them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.breakdown import Level, PowerLaw, breakdown, fit_power_law, nonlinear_level
from raysae.analysis.dark_matter.probes import described, main_hook_point, shown
from raysae.analysis.dark_matter.pursuit import PURSUIT_ROWS, pursuit_tasks
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
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.results import Findings

FEWEST_WIDTHS = 3  # A fit against width has three parameters.
BARS = {  # Column: label and colour, from bottom to top.
    col.ENCODER: ("encoder error", PURPLE),
    col.NONLINEAR: ("nonlinear error", VERMILION),
    col.LINEAR: ("linear error", ORANGE),
    col.ABSENT: ("absent features", SKY),
}


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """The fit of FVU against width, the level of the nonlinear FVU, and the error of each width taken apart."""
    there = len({sae.width for sae in lab.of(main_hook_point(lab)).values()})
    if there < FEWEST_WIDTHS:  # Known before any work
        note = f"a fit against width needs {FEWEST_WIDTHS} widths, there are {there}"
        return Findings("breakdown", lab.key(*lab.saes.values()), pd.DataFrame({"sae": list(lab.saes)}), notes=[note])
    chosen = shown(lab)
    key = lab.key(*chosen.saes.values(), rows=PURSUIT_ROWS)
    findings = Findings("breakdown", key, pd.DataFrame({"sae": list(chosen.saes)}))
    table, widths = chosen.table.copy(), chosen.table["width"].nunique()
    if widths < FEWEST_WIDTHS:
        findings.notes.append(f"a fit against width needs {FEWEST_WIDTHS} widths, there are {widths}")
        return findings
    pursued = pd.concat(lab.run(pursuit_tasks(lab, chosen))).set_index("sae")[col.NONLINEAR_FVU_PURSUIT]
    table[col.PURSUIT_NONLINEAR_FVU] = pursued.reindex(table["sae"]).to_numpy()
    law = fit_power_law(table["width"], table[col.FVU])
    level = nonlinear_level(table["width"], table[col.NONLINEAR_FVU], table[col.FVU])
    parts = breakdown(table, law)
    of_level = {f"{col.LEVEL}{name}": value for name, value in vars(level).items()}
    findings.tables = {"breakdown": parts, "fit": pd.DataFrame([vars(law) | of_level])}
    findings.numbers = {"fit/c": law.c, "fit/m": law.m, "fit/c_low": law.c_low, "fit/c_high": law.c_high}
    findings.numbers |= {"level/value": level.value, "level/slope": level.slope}
    findings.numbers["level/share_of_fall"] = level.share_of_fall
    findings.figures["breakdown"] = breakdown_figure(parts, law, level, described(lab, chosen))
    return findings


# ---------------------------------------------------------------- the figure


@styled
def breakdown_figure(parts: pd.DataFrame, law: PowerLaw, level: Level, title: str = "") -> Figure:
    """FVU and nonlinear FVU against width with their fits, and what the error consists of.

    `parts` is the table of `measures.breakdown.breakdown`. Where c lies below the nonlinear FVU, nothing is stacked.
    The bar then shows the nonlinear error, and hatched the gap FVU − nonlinear FVU. That gap needs no fit.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 2.9))
    left, right = figure.subplots(1, 2)
    _fits(left, parts, law, level)
    _stacks(right, parts)
    if law.warning:
        figure.supxlabel(wrapped(f"Note: {law.warning}."), fontsize=7, color=VERMILION)
    titled(figure, "What the error consists of", title)
    return figure


def _fits(ax: Axes, parts: pd.DataFrame, law: PowerLaw, level: Level) -> None:
    """FVU with its power law, and nonlinear FVU with its mean, against width."""
    widths, fvu = parts["width"].to_numpy(), parts[col.FVU]
    along = np.geomspace(widths.min(), widths.max(), 100)
    ax.plot(widths, fvu, "o", color=BLUE, label="FVU")
    formula = f"{number(law.c)} + {number(law.a)} · width$^{{-{law.m:.2f}}}$"
    ax.plot(along, law(along), color=BLUE, label=formula)
    ax.axhspan(law.c_low, min(law.c_high, 1.3 * fvu.max()), color=BLUE, alpha=0.12, linewidth=0)
    interval = f"c = {law.c:.3f}, 95 % interval {law.c_low:.3f} to {law.c_high:.3f}"
    ax.axhline(law.c, color=BLUE, linewidth=0.8, linestyle=":", label=interval)
    ax.plot(widths, parts[col.NONLINEAR_FVU], "s", color=VERMILION, label="nonlinear FVU")
    mean = f"its mean {level.value:.3f} ({100 * level.slope:+.1f} % per doubling)"
    ax.axhline(level.value, color=VERMILION, linewidth=1, linestyle="--", label=mean)
    ax.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 2 * fvu.max()))
    log_widths(ax, widths)
    ax.legend(loc="upper right", handlelength=1.6)
    ax.grid(axis="y")


def _stacks(ax: Axes, parts: pd.DataFrame) -> None:
    """A bar per width, stacked from the parts of its error."""
    place = np.arange(len(parts))
    bottom = np.zeros(len(parts))
    stacks = parts[col.STACKS].to_numpy()
    pursued = col.ENCODER in parts
    encoder = parts[col.ENCODER].to_numpy() if pursued else np.zeros(len(parts))
    heights = {col.ENCODER: encoder, col.NONLINEAR: parts[col.NONLINEAR].to_numpy() - encoder}
    heights |= {name: np.where(stacks, parts[name], 0) for name in (col.LINEAR, col.ABSENT)}
    for name, (label, color) in BARS.items():
        if name == col.ENCODER and not pursued:
            continue
        height = np.maximum(heights[name], 0)
        if name == col.NONLINEAR and pursued:
            label = "other nonlinear error"
        label = label if height.any() else None
        ax.bar(place, height, 0.75, bottom, color=color, label=label, edgecolor="white", linewidth=0.4)
        bottom += height
    if not stacks.all():
        gap, label = np.where(stacks, 0, parts[col.LINEAR_GAP]), "linear or absent (not told apart)"
        hatched = {"color": "white", "edgecolor": "0.4", "hatch": "////", "linewidth": 0.5}
        ax.bar(place, gap, 0.75, bottom, label=label, **hatched)
    for x, total in zip(place, parts[col.FVU], strict=True):
        ax.text(x, total, f"{total:.3f}", ha="center", va="bottom", fontsize=6)
    ax.set_xticks(place, [short(width) for width in parts["width"]], rotation=30 if len(parts) > 9 else 0)
    ax.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 1.35 * parts[col.FVU].max()))
    ax.legend(loc="upper right", reverse=True)
