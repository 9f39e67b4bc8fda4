"""Error regression and norm prediction (analyses 1 and 2): the experiment and its figures. Its tasks are in `probes`.

It asks how well linear maps of the activation predict the error and its norm. Its control for undertraining trains the
SAEs of the figures anew, on half the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raysae.analysis.dark_matter.measures.error_regression import BASELINES, FEWEST_ACTIVE, NORMS, ErrorRegression
from raysae.analysis.dark_matter.probes import (
    Shown,
    largest_group,
    model_name,
    per_hook_point,
    regression_table,
    regressions,
    shown,
)
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import (
    BLUE,
    GREEN,
    L0_LABEL,
    ORANGE,
    PAPER_WIDTH,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH_LABEL,
    short,
    styled,
    titled,
)
from raysae.analysis.instruments.regression import save_linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.config import SAEConfig, UserError

HEADLINES = (
    col.R2_ERROR, col.R2_ERROR_WEIGHTED, col.R2_ERROR_NORM, col.R2_NORM_NONLINEAR, col.NONLINEAR_FVU, col.FVU, col.L0,
)  # fmt: skip
COMPARED = (  # Numbers of SAEs trained on half the tokens, to compare with those of the whole ones.
    col.FVU, col.L0, col.NONLINEAR_FVU, col.R2_ERROR, col.R2_ERROR_WEIGHTED, col.R2_ERROR_NORM,
    col.R2_ERROR + col.RESCALED, col.R2_ERROR_NORM + col.RESCALED,
)  # fmt: skip
RUNNING = 20  # A running mean is over one in so many latents, and over five at least.
OFF_LINE = 0.1  # SAEs span a plane when one lies this far off a common line, in doublings of width or L0.


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """R² of e and of squared norms for every SAE, and the control for undertraining."""
    results = {hook: regressions(lab, hook, lab.of(hook)) for hook in lab.hook_points}
    table = pd.concat([regression_table(lab, lab.saes, found) for found in results.values()], ignore_index=True)
    chosen = shown(lab)
    key = lab.key(*lab.saes.values())
    findings = Findings("error_regression", key, table, tables={"regressions": table})
    findings.numbers = {f"median/{column}": float(table[column].median()) for column in HEADLINES}
    trained = _half_trained(lab, chosen, findings) if lab.config.half_trained else None
    if trained is not None:
        findings.tables["half_trained"] = trained
    for hook, found in results.items():
        here = table[table["hook_point"] == hook]
        where = f"{model_name(lab)} · {hook}"
        alike = largest_group(here)
        of = f"{where} · {len(alike)} SAEs · {alike[col.ALIKE].iloc[0]}".removesuffix(" · ")
        findings.draw(per_hook_point("contours", hook, lab), contours, alike, of)
        findings.figures[per_hook_point("norms", hook, lab)] = norm_prediction(here, where)
        some = list(chosen.saes if hook == chosen.hook_point else found)
        some = some[:: max(1, (len(some) - 1) // 2)]  # The narrowest, the central and the widest.
        findings.draw(per_hook_point("loadings", hook, lab), loadings, {name: found[name] for name in some}, hook)
    if table["layer"].nunique() > 1:
        findings.figures["layers"] = r2_per_layer(table, model_name(lab))
        findings.figures["baselines"] = baselines_per_layer(table, model_name(lab))
    else:
        how = "train them with --hook_points resid_post.1,resid_post.3,…"
        findings.notes.append(f"R² per layer needs SAEs at several layers: {how}")
    _save_probes(lab, results)
    return findings


def _save_probes(lab: Lab, results: Mapping[str, Mapping[str, ErrorRegression]]) -> None:
    """Writes the map x → ê of every SAE, for whoever trains SAEs on its error."""
    folder = lab.folder / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    for found in results.values():
        for name, result in found.items():
            save_linear({"probe": result.probe}, folder / f"{name}.safetensors")


def _half_trained(lab: Lab, chosen: Shown, findings: Findings) -> pd.DataFrame | None:
    """The numbers of the figures' SAEs beside those of the same SAEs trained on half the tokens.

    None, and a note in `findings`, where an SAE cannot be trained like that.
    """
    whole_training = lab.sweep.train.tokens
    configs = [sae.config for sae in chosen.saes.values() if sae.metrics.get("tokens", 0) >= whole_training]
    if len(configs) < len(chosen.saes):
        findings.notes.append(
            "the control with half the training tokens was left out: it trains SAEs anew, and some of these are no "
            "sweep's, or were stopped early"
        )
        return None
    alike: dict[tuple, list[SAEConfig]] = {}  # SAEs that differ in width alone. One sweep trains them.
    for config in configs:
        alike.setdefault(tuple(config.model_dump(exclude={"width"}).values()), []).append(config)
    made: dict[str, Subject] = {}
    for group in alike.values():
        widths = [config.width for config in group]
        made |= lab.train("half", [chosen.hook_point], widths, group[0], whole_training // 2)
    half = regression_table(lab, made, regressions(lab, chosen.hook_point, made)).set_index("width")
    whole = chosen.table.set_index("width")
    ends = ("", col.LOW, col.HIGH, col.REPLICATES)
    of_half = {f"{column}{end}": f"{column}{col.HALF}{end}" for column, end in product(COMPARED, ends)}
    both = whole[[*of_half, col.GROUPS]].join(half[list(of_half)].rename(columns=of_half), how="inner").reset_index()
    findings.numbers["median/r2_error_half_trained"] = float(both[col.R2_ERROR + col.HALF].median())
    rescaled = col.R2_ERROR + col.RESCALED
    findings.numbers[f"median/{rescaled}"] = float(both[rescaled].median())
    return both


# ---------------------------------------------------------------- the figures


@styled
def contours(table: pd.DataFrame, title: str = "") -> Figure:
    """Nonlinear FVU and both R² over width × L0.

    `table` has a row per SAE, all of one kind. The figure leaves out SAEs that are never active or lack a number.

    Raises:
        UserError: there are fewer than three SAEs, or all lie on a line.
    """
    panels = {
        col.NONLINEAR_FVU: "nonlinear FVU",
        col.R2_ERROR: "R² of e (mean over dimensions)",
        col.R2_ERROR_NORM: "R² of ‖e‖²",
    }
    table = table[np.isfinite(table[[col.L0, *panels]]).all(axis=1) & (table[col.L0] > 0)]
    points = np.log2(table[["width", col.L0]].to_numpy(float))
    if len(points) < 3 or np.linalg.matrix_rank(points - points.mean(0), tol=OFF_LINE) < 2:
        raise UserError(
            "contours over width × L0 need three SAEs that do not lie on a line, of at least two widths and two "
            "levels of L0"
        )
    x, y = points.T
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    for i, (ax, (column, label)) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True)):
        filled = ax.tricontourf(x, y, table[column], levels=10, cmap="cividis")
        ax.tricontour(x, y, table[column], levels=filled.levels[1:-1], colors="white", linewidths=0.4)
        ax.plot(x, y, "o", color="white", markersize=2.5, markeredgecolor="black", markeredgewidth=0.5, clip_on=False)
        ticks = filled.levels[:: max(1, len(filled.levels) // 4)]
        bar = {"location": "top", "shrink": 0.9, "aspect": 22, "format": lambda v, _: f"{v:.3g}"}
        figure.colorbar(filled, ax=ax, label=label, ticks=ticks, **bar)
        ax.set_xlabel(WIDTH_LABEL)
        if i == 0:
            ax.set_ylabel(L0_LABEL)
        widths = np.unique(table["width"])
        ax.set_xticks(np.log2(widths), [short(w) for w in widths])
        levels = [level for level in 2.0 ** np.arange(-2, 14) if y.min() - 0.1 <= np.log2(level) <= y.max() + 0.1]
        ax.set_yticks(np.log2(levels), [f"{level:g}" for level in levels])
    titled(figure, "Error over width and sparsity", title)
    return figure


@styled
def r2_per_layer(table: pd.DataFrame, title: str = "") -> Figure:
    """Both R² against the layer: a point per SAE, its interval where `table` has it, and a line through the means."""
    figure = Figure(figsize=(PAPER_WIDTH * 0.62, 2.6))
    ax = figure.subplots()
    shown = {
        col.R2_ERROR_NORM: ("R² of ‖e‖² from x", BLUE, "o"),
        col.R2_ERROR: ("R² of e from x (mean over dimensions)", VERMILION, "s"),
    }
    for column, (label, color, marker) in shown.items():
        means = table.groupby("layer")[column].mean()
        ax.plot(means.index, means, color=color, marker=marker, label=label)
        ax.plot(table["layer"], table[column], marker, color=color, alpha=0.35, markersize=3, markeredgewidth=0)
        if col.low(column) in table:
            ends = table[col.low(column)], table[col.high(column)]
            ax.vlines(table["layer"], *ends, color=color, linewidth=1, alpha=0.6)
    ax.set(xlabel="layer", ylabel="R² on held-out tokens", ylim=(min(0, ax.get_ylim()[0]), 1))
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    titled(figure, "How much of the error is predicted from the activation", title)
    return figure


@styled
def baselines_per_layer(table: pd.DataFrame, title: str = "") -> Figure:
    """R² of ‖e‖² from each of BASELINES against the layer: a point per SAE, and a line through the medians."""
    figure = Figure(figsize=(PAPER_WIDTH * 0.62, 2.8))
    ax = figure.subplots()
    colors = (BLUE, GREEN, ORANGE, PURPLE, SKY)
    for (label, column), color, marker in zip(BASELINES.items(), colors, "osD^v", strict=True):
        if column not in table:
            continue
        medians = table.groupby("layer")[column].median()
        ax.plot(medians.index, medians, color=color, marker=marker, label=label)
        ax.plot(table["layer"], table[column], marker, color=color, alpha=0.35, markersize=3, markeredgewidth=0)
    ax.axhline(0, color="0.5", linewidth=0.6)
    ax.set(xlabel="layer", ylabel="R² on held-out tokens")
    ax.set_ylim(top=1)
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=5, title="predictor of ‖e‖²")
    titled(figure, "What predicts the error's norm", title)
    return figure


@styled
def norm_prediction(table: pd.DataFrame, title: str = "") -> Figure:
    """R² of ‖v‖² predicted from x for each v of NORMS, and of ‖e‖² predicted from each of BASELINES.

    A point is an SAE of `table`.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 2.8))
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, names, xlabel in ((left, NORMS, "vector v"), (right, BASELINES, "predictor of ‖e‖²")):
        known = {label: column for label, column in names.items() if column in table and table[column].notna().any()}
        shown = {label: table[column].dropna().to_numpy() for label, column in known.items()}
        colors = [BLUE, SKY, VERMILION, ORANGE, GREEN, PURPLE]
        for place, (values, color) in enumerate(zip(shown.values(), colors, strict=False)):
            _violin(ax, place, values, color)
        ax.set_xticks(range(len(shown)), shown)
        ax.set_xlabel(xlabel)
        ax.grid(axis="y")
        ax.axhline(0, color="0.5", linewidth=0.6)
    left.set(title="‖v‖² predicted from x", ylabel="R² on held-out tokens")
    right.set_title("‖e‖² predicted from …")
    left.set_ylim(top=1.02)
    titled(figure, f"Norm prediction over {len(table)} SAEs", title)
    return figure


def _violin(ax: Axes, place: int, values: np.ndarray, color: str) -> None:
    """Points spread sideways and their median. Behind five or more stands a violin."""
    if len(values) >= 5 and np.ptp(values) > 1e-9:
        body = ax.violinplot(values, [place], widths=0.8, showextrema=False)["bodies"][0]
        body.set(facecolor=color, alpha=0.3, edgecolor=color)
    spread = np.random.default_rng(0).uniform(-0.13, 0.13, len(values))
    ax.plot(place + spread, values, "o", color=color, markersize=3, markeredgecolor="white", markeredgewidth=0.3)
    ax.hlines(np.median(values), place - 0.28, place + 0.28, color="black", linewidth=1.2, zorder=3)


@styled
def loadings(results: Mapping[str, ErrorRegression], title: str = "") -> Figure:
    """a*·decoder row beside the latent's mean value when active, for up to three SAEs that have active latents.

    Latents come by ascending mean value, with the running mean of a*·decoder row. a* is the probe z → ‖z‖² without
    intercept, for z = Sae(x) − b_dec. Latents active on fewer than FEWEST_ACTIVE rows are left out.

    Raises:
        UserError: no SAE has such a latent.
    """
    often = {name: (result.active_rows >= FEWEST_ACTIVE).numpy() for name, result in results.items()}
    shown = [name for name in results if often[name].any()][:3]
    if not shown:
        raise UserError(
            f"the norm probe along latents needs latents that are active on {FEWEST_ACTIVE} rows, no SAE has one"
        )
    figure = Figure(figsize=(PAPER_WIDTH, 2.8))
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, name in zip(axes, shown, strict=True):
        result = results[name]
        value, loading = result.mean_active.numpy()[often[name]], result.loading.numpy()[often[name]]
        order = np.argsort(value)
        place, value, loading = np.arange(len(order)), value[order], loading[order]
        ax.scatter(place, loading, s=4, color=BLUE, alpha=0.3, linewidth=0, label="a*·decoder row")
        window = max(5, len(order) // RUNNING)
        smooth = pd.Series(loading).rolling(window, center=True, min_periods=1).mean()
        ax.plot(place, smooth, color=VERMILION, linewidth=1.2, label="its running mean")
        ax.plot(place, value, color="black", linewidth=1, linestyle="--", label="mean value when active")
        ax.set_ylim(*_without_outliers(loading, value))
        ax.set_title(f"{name}\ncorrelation {result.loading_correlation:.2f}", fontsize=6)
        ax.set_xlabel("latent, by mean value")
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.grid(axis="y")
    axes[0].set_ylabel("activation units")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=2)
    titled(figure, "The norm probe along each latent", title)
    return figure


def _without_outliers(loading: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """Limits of an axis that leaves out the most extreme hundredth of the loadings."""
    low, high = np.percentile(loading, [0.5, 99.5])
    low, high = min(low, 0.0), max(high, value.max())
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
