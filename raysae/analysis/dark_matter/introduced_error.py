"""Errors put in on purpose (analysis 4): the experiment, its tasks and its figure.

It asks whether the estimates tell them apart. One task adds errors to a real SAE's reconstructions. The other adds them
to a synthetic model, where every error is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from raysae.analysis.dark_matter.measures.introduced_error import (
    ABLATED,
    LEVELS,
    IntroducedError,
    SyntheticModel,
    correlation_table,
    introduced_error,
    noise_grid,
    noise_unit,
)
from raysae.analysis.dark_matter.probes import model_name, shown
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import PAPER_WIDTH, decimals, heat_map, styled, titled
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task

# The synthetic model. Its estimates are fitted on so many rows, and measured on as many others.
SYNTHETIC = {"d": 32, "features": 96, "rows": 400_000}
SYMBOLS = {col.SIGMA_X: r"$\sigma_x$", col.SIGMA_R: r"$\sigma_r$"}


ESTIMATES = {  # Column: label, line and marker of an estimate.
    col.LINEAR: ("estimated linear error", "-", "o"),
    col.NONLINEAR: ("estimated nonlinear error", "--", "s"),
}


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """What the regression makes of errors put in on purpose, on the central SAE and on the synthetic model."""
    chosen = shown(lab)
    recorded, sae = lab.record([chosen.hook_point]), chosen.central
    tasks = [
        Task("introduced_error", lab.key(sae), _introduce, (recorded, sae, lab.replicates, lab.seed)),
        Task("introduced_error", [SYNTHETIC, lab.replicates, lab.seed], _synthetic, (lab.replicates, lab.seed)),
    ]
    found, (grid, table, compared, unit) = lab.run(tasks)
    findings = Findings("introduced_error", lab.key(sae), pd.DataFrame({"sae": [sae.name]}))
    findings.tables = {
        "grid": found.grid,
        "correlations": _with_index(found.table),
        "closed_form": found.closed_form,
        "judged": found.judged,
        "synthetic_grid": grid,
        "synthetic_correlations": _with_index(table),
        "synthetic_closed_form": compared,
    }
    for prefix, correlations in (("", found.table), ("synthetic/", table)):
        for sigma in correlations.index:
            for estimate in correlations.columns:
                findings.numbers[f"{prefix}correlation_{sigma}_{estimate}"] = float(correlations.loc[sigma, estimate])
    for column in (col.DEVIATION, col.REENCODING_FVU):
        findings.numbers[column] = float(found.judged[column].iloc[0])
    findings.numbers["synthetic/largest_deviation"] = float(compared[col.DEVIATION].max())
    where, known = f"{model_name(lab)} · {sae.name}", "fully synthetic model: known dictionary and dense part"
    findings.figures["grid"] = introduced_error_figure(found.grid, found.table, found.closed_form, found.unit, where)
    whole = compared[compared[col.ABLATED] == 0]
    findings.figures["synthetic"] = introduced_error_figure(grid, table, whole, unit, known)
    return findings


def _introduce(recorded: Recorded, sae: Subject, replicates: int, seed: int) -> IntroducedError:
    return introduced_error(recorded.open(), sae.hook_point, sae.load(), replicates=replicates, seed=seed)


def _synthetic(replicates: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, float]:
    """The synthetic model's grid, its correlations, its estimates beside their closed forms, and the unit of noise."""
    model = SyntheticModel.random(SYNTHETIC["d"], SYNTHETIC["features"], seed)
    rows = SYNTHETIC["rows"]
    unit = noise_unit(model.covariance())
    fit, evaluate = (model.sample(rows, ABLATED, seed + i) for i in range(2))
    grid = noise_grid(fit, evaluate, ABLATED, LEVELS, unit, replicates, seed).table()
    return grid, correlation_table(grid), model.compare(grid, unit), unit


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename_axis(col.NOISE).reset_index()


# ---------------------------------------------------------------- the figure


@styled
def introduced_error_figure(
    grid: pd.DataFrame, table: pd.DataFrame, closed_form: pd.DataFrame, unit: float, title: str = ""
) -> Figure:
    """Heat maps of both estimates over (σ_x, σ_r) at no ablation, and the correlation table.

    Below them stand both estimates over ablated latents. One noise is 0, and each value of the other has a line.

    Args:
        grid: the table of `measures.introduced_error.NoiseGrid`.
        table: that of `correlation_table` there.
        closed_form: the estimates' closed forms at no ablation.
        unit: the σ that is one unit of noise.
        title: the second line of the title.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 5.0))
    axes = figure.subplots(2, 3, gridspec_kw={"width_ratios": [1, 1, 0.75], "height_ratios": [1.35, 1]})
    none = grid[grid[col.ABLATED] == 0]
    most = none[list(ESTIMATES)].max().max()
    for ax, (column, (label, _, _)) in zip(axes[0], ESTIMATES.items(), strict=False):
        values = none.pivot(index=col.SIGMA_R, columns=col.SIGMA_X, values=column)
        labels = [f"{v:g}" for v in values.columns], [f"{v:g}" for v in values.index]
        heat_map(figure, ax, values.to_numpy(), *labels, f"{label} (FVU)", (0, most))
        ax.invert_yaxis()
        xlabel = f"{SYMBOLS[col.SIGMA_X]}, noise in x (× {unit:.3g})"
        ax.set(xlabel=xlabel, ylabel=f"{SYMBOLS[col.SIGMA_R]}, noise in Sae(x) (× {unit:.3g})")
    _correlations(axes[0, 2], table)
    for ax, (moving, fixed) in zip(axes[1], ((col.SIGMA_X, col.SIGMA_R), (col.SIGMA_R, col.SIGMA_X)), strict=False):
        _over_ablated(ax, grid, closed_form, moving, fixed)
    axes[1, 2].axis("off")
    look = {"color": "0.2", "markersize": 3}
    handles = [Line2D([], [], label=label, linestyle=s, marker=m, **look) for label, s, m in ESTIMATES.values()]
    handles.append(Line2D([], [], label="closed form", linestyle="", marker="x", color="black", markersize=4))
    levels = sorted(grid[col.SIGMA_X].unique())
    handles += [Patch(color=_color(i, levels), label=f"noise that varies: {v:g}") for i, v in enumerate(levels)]
    axes[1, 2].legend(handles=handles, loc="center left", borderpad=0)
    titled(figure, "What the estimates make of errors put in on purpose", title)
    return figure


def _color(i: int, levels: Sequence[float]) -> tuple[float, float, float, float]:
    """The colour of the noise level number `i`."""
    return colormaps["viridis"](0.9 * i / max(1, len(levels) - 1))


def _over_ablated(ax: Axes, grid: pd.DataFrame, closed_form: pd.DataFrame, moving: str, fixed: str) -> None:
    """Both estimates over ablated latents. The noise `fixed` is 0, each value of the noise `moving` has a line."""
    levels = sorted(grid[col.SIGMA_X].unique())
    here, expected = grid[grid[fixed] == 0], closed_form[closed_form[fixed] == 0].set_index(moving)
    for i, value in enumerate(levels):
        one = here[here[moving] == value].sort_values(col.ABLATED)
        for column, (_, line, marker) in ESTIMATES.items():
            look = {"color": _color(i, levels), "linestyle": line, "marker": marker, "markersize": 3}
            ax.plot(100 * one[col.ABLATED], one[column], **look)
            at = expected.loc[value, f"{column}{col.CLOSED_FORM}"]
            ax.plot(0, at, "x", color="black", markersize=4, zorder=3, clip_on=False)
    ax.set(xlabel="ablated latents (%)", ylabel="estimate (FVU)", ylim=(0, None))
    ax.set_title(f"{SYMBOLS[moving]} varies, {SYMBOLS[fixed]} = 0")
    ax.grid(axis="y")


def _correlations(ax: Axes, table: pd.DataFrame) -> None:
    """The correlation of each noise with each estimate."""
    ax.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        color = "white" if abs(value) > 0.6 else "black"
        ax.text(column, row, decimals(value, 2), ha="center", va="center", fontsize=9, color=color)
    ax.set_xticks(range(2), table.columns)
    ax.set_yticks(range(2), list(SYMBOLS.values()))
    ax.set_title("correlation\n(no ablation)")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
