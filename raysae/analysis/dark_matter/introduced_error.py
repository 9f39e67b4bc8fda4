"""TODO docstring."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.introduced_error import (
    ABLATED,
    LEVELS,
    SyntheticModel,
    correlation_table,
    introduced_error,
    noise_grid,
    noise_unit,
)
from raysae.analysis.dark_matter.probes import model_name, shown
from raysae.analysis.instruments.plots import PAPER_WIDTH, decimals, heat_map, styled, titled
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task

SYNTHETIC = {"d": 32, "features": 96, "rows": 400_000}  # the fully synthetic model of introduced_error; rows to fit, and as many to measure
SIGMA_X, SIGMA_R = r"$\sigma_x$", r"$\sigma_r$"


# ---------------------------------------------------------------- 4


def run(lab: Lab) -> Findings:
    """Analysis 4: what the regression makes of errors put in on purpose, on the central SAE and on the fully synthetic model."""
    chosen = shown(lab)
    recorded, sae = lab.record([chosen.hook_point]), chosen.central
    parts = [
        Task("introduced_error", lab.key(sae), _introduce, (recorded, sae, lab.seed)),
        Task("introduced_error", [SYNTHETIC, lab.seed], _synthetic, (lab.seed,)),
    ]
    found, (grid, table, compared, unit) = lab.run(parts)
    findings = Findings("introduced_error", lab.key(sae), pd.DataFrame({"sae": [sae.name]}))
    findings.tables = {"grid": found.grid, "correlations": _with_index(found.table), "closed_form": found.closed_form}
    findings.tables |= {"synthetic_grid": grid, "synthetic_correlations": _with_index(table), "synthetic_closed_form": compared}
    for prefix, correlations in (("", found.table), ("synthetic/", table)):
        for sigma in correlations.index:
            for estimate in correlations.columns:
                findings.numbers[f"{prefix}correlation_{sigma}_{estimate}"] = float(correlations.loc[sigma, estimate])
    findings.numbers["reencoding_fvu"] = found.reencoding_fvu
    findings.numbers["synthetic/largest_deviation"] = float(compared["deviation"].max())
    findings.figures["grid"] = introduced_error_figure(found.grid, found.table, found.unit, f"{model_name(lab)} · {sae.name}")
    findings.figures["synthetic"] = introduced_error_figure(grid, table, unit, "fully synthetic model: known dictionary and dense part")
    return findings


def _introduce(recorded: Recorded, sae: Subject, seed: int):
    return introduced_error(recorded.open(), sae.hook_point, sae.load(), seed=seed)


def _synthetic(seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, float]:
    """Of the synthetic model: grid, correlations, estimates beside their closed forms, and the unit of noise."""
    model = SyntheticModel.random(SYNTHETIC["d"], SYNTHETIC["features"], seed)
    rows = SYNTHETIC["rows"]
    unit = noise_unit(model.covariance())
    grid = noise_grid(model.sample(rows, ABLATED, seed), model.sample(rows, ABLATED, seed + 1), ABLATED, LEVELS, unit)
    return grid, correlation_table(grid), model.compare(grid, unit), unit


def _with_index(table: pd.DataFrame) -> pd.DataFrame:
    return table.rename_axis("noise").reset_index()


# ---------------------------------------------------------------- analysis 4


@styled
def introduced_error_figure(grid: pd.DataFrame, table: pd.DataFrame, unit: float, title: str = "") -> Figure:
    """Estimates over ablated latents; heat maps over (σ_x, σ_r) at no ablation; the correlation table. Arguments: see `introduced_error`."""
    figure = Figure(figsize=(PAPER_WIDTH, 5.0))
    axes = figure.subplots(2, 3, gridspec_kw={"width_ratios": [1, 1, 0.75], "height_ratios": [1.35, 1]})
    names = {"linear": "estimated linear error", "nonlinear": "estimated nonlinear error"}
    levels = sorted(grid["sigma_x"].unique())
    none = grid[grid["ablated"] == 0]
    most = none[list(names)].max().max()
    for ax, (column, label) in zip(axes[0], names.items(), strict=False):
        values = none.pivot(index="sigma_r", columns="sigma_x", values=column)
        heat_map(figure, ax, values.to_numpy(), [f"{v:g}" for v in values.columns], [f"{v:g}" for v in values.index], f"{label} (FVU)", (0, most))
        ax.invert_yaxis()
        ax.set(xlabel=f"{SIGMA_X}, noise in x (× {unit:.3g})", ylabel=f"{SIGMA_R}, noise in Sae(x) (× {unit:.3g})")
    _correlations(axes[0, 2], table)
    for ax, (fixed, moving) in zip(axes[1], (("sigma_r", "sigma_x"), ("sigma_x", "sigma_r")), strict=False):
        part = grid[grid[fixed] == 0]
        for i, value in enumerate(levels):
            one = part[part[moving] == value].sort_values("ablated")
            color = colormaps["viridis"](0.9 * i / max(1, len(levels) - 1))
            ax.plot(100 * one["ablated"], one["linear"], color=color, marker="o", markersize=3, label=f"{value:g}")
            ax.plot(100 * one["ablated"], one["nonlinear"], color=color, linestyle="--", marker="s", markersize=3)
        symbol = {"sigma_x": SIGMA_X, "sigma_r": SIGMA_R}
        ax.set(xlabel="ablated latents (%)", ylabel="estimate (FVU)", ylim=(0, None))
        ax.legend(title=symbol[moving], loc="upper left", ncols=2, columnspacing=0.8, handlelength=1.2)
        ax.set_title(f"{symbol[moving]} varies, {symbol[fixed]} = 0")
        ax.set_ylim(0, 1.75 * ax.get_ylim()[1])
        ax.grid(axis="y")
    axes[1, 2].axis("off")
    solid, dashed = (
        matplotlib.lines.Line2D([], [], color="0.2", linestyle=style, marker=marker, markersize=3) for style, marker in (("-", "o"), ("--", "s"))
    )
    axes[1, 2].legend([solid, dashed], ["estimated linear error", "estimated nonlinear error"], loc="center left")
    titled(figure, "What the estimates make of errors put in on purpose", title)
    return figure


def _correlations(ax: Axes, table: pd.DataFrame) -> None:
    ax.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        ax.text(column, row, decimals(value, 2), ha="center", va="center", fontsize=9, color="white" if abs(value) > 0.6 else "black")
    ax.set_xticks(range(2), table.columns)
    ax.set_yticks(range(2), [SIGMA_X, SIGMA_R])
    ax.set_title("correlation\n(no ablation)")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
