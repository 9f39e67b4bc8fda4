"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.breakdown import breakdown_figure
from raysae.analysis.dark_matter.measures import breakdown
from raysae.analysis.dark_matter.measures.error_regression import BASELINES, NORMS, ErrorRegression
from raysae.analysis.dark_matter.probes import (
    Shown,
    described,
    model_name,
    per_hook_point,
    regression_table,
    regressions,
    shown,
)
from raysae.analysis.dark_matter.pursuit import pursuit_tasks
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

FEWEST_WIDTHS = 3  # for a fit against width
OFF_LINE = 0.1  # doublings of width or L0 off a common line from which on SAEs span a plane


def run(lab: Lab) -> Findings:
    """Analyses 1 and 2: R² of e and of norms for every SAE, the breakdown of the error over widths, and the controls for undertraining."""
    results = {hook: regressions(lab, hook, lab.of(hook)) for hook in lab.hook_points}
    table = pd.concat([regression_table(lab, lab.saes, found) for found in results.values()], ignore_index=True)
    chosen = shown(lab)
    findings = Findings("error_regression", lab.key(*lab.saes.values()), table, tables={"regressions": table})
    where = described(lab, chosen)
    for column in ("r2_error", "r2_error_weighted", "r2_error_norm", "r2_norm_nonlinear", "nonlinear_fvu", "fvu", "l0"):
        findings.numbers[f"median/{column}"] = float(table[column].median())
    trained = _half_trained(lab, chosen, findings) if lab.config.half_trained else None
    if trained is not None:
        findings.tables["half_trained"] = trained

    against = chosen.table.copy()
    pursued = lab.kept(pursuit_tasks(lab, chosen))
    if pursued is not None:
        found = pd.concat(pursued).set_index("sae")["nonlinear_fvu_pursuit"]
        against["pursuit_nonlinear_fvu"] = found.reindex(against["sae"]).to_numpy()
    if against["width"].nunique() >= FEWEST_WIDTHS:
        law = breakdown.fit_power_law(against["width"], against["fvu"])
        level = breakdown.nonlinear_level(against["width"], against["nonlinear_fvu"], against["fvu"])
        parts = breakdown.breakdown(against, law)
        findings.tables |= {"breakdown": parts, "fit": pd.DataFrame([{**vars(law), **{f"level_{k}": v for k, v in vars(level).items()}}])}
        findings.numbers |= {"fit/c": law.c, "fit/m": law.m, "fit/c_low": law.c_low, "fit/c_high": law.c_high}
        findings.numbers |= {"level/value": level.value, "level/slope": level.slope, "level/share_of_fall": level.share_of_fall}
        findings.figures["breakdown"] = breakdown_figure(parts, law, level, where)
    else:
        findings.notes.append(f"a fit against width needs {FEWEST_WIDTHS} widths, there are {against['width'].nunique()}")
    for hook, found in results.items():
        part = table[table["hook_point"] == hook]
        findings.draw(per_hook_point("contours", hook, lab), contours, part, f"{model_name(lab)} · {hook} · {len(part)} SAEs")
        findings.figures[per_hook_point("norms", hook, lab)] = norm_prediction(part, f"{model_name(lab)} · {hook}")
        some = list(chosen.saes if hook == chosen.hook_point else found)
        some = some[:: max(1, (len(some) - 1) // 2)]  # the narrowest, the central and the widest
        findings.draw(per_hook_point("loadings", hook, lab), loadings, {name: found[name] for name in some}, hook)
    if table["layer"].nunique() > 1:
        findings.figures["layers"] = r2_per_layer(table, model_name(lab))
    else:
        findings.notes.append("R² per layer needs SAEs at several layers: train them with --hook_points resid_post.1,resid_post.3,…")
    folder = lab.folder / "probes"
    folder.mkdir(parents=True, exist_ok=True)
    for found in results.values():
        for name, result in found.items():
            save_linear({"probe": result.probe}, folder / f"{name}.safetensors")
    return findings


def _half_trained(lab: Lab, chosen: Shown, findings: Findings) -> pd.DataFrame | None:
    """The SAEs of the figure trained anew on half the tokens, with all else as it was, beside the whole ones."""
    configs = [sae.config for sae in chosen.saes.values() if sae.metrics.get("tokens", 0) >= lab.sweep.train.tokens]
    if len(configs) < len(chosen.saes):
        findings.notes.append(
            "the control with half the training tokens was left out: it trains SAEs anew, and some of these are no sweep's, or were stopped early"
        )
        return None
    alike: dict[tuple, list[SAEConfig]] = {}  # one sweep for all that differ in width alone
    for config in configs:
        alike.setdefault(tuple(config.model_dump(exclude={"width"}).values()), []).append(config)
    made: dict[str, Subject] = {}
    for group in alike.values():
        made |= lab.train("half", [chosen.hook_point], [config.width for config in group], group[0], lab.sweep.train.tokens // 2)
    table = regression_table(lab, made, regressions(lab, chosen.hook_point, made)).set_index("width")
    whole = chosen.table.set_index("width")
    columns = ["fvu", "l0", "nonlinear_fvu", "r2_error", "r2_error_weighted", "r2_error_norm", "r2_error_rescaled", "r2_error_norm_rescaled"]
    ends = {f"{column}{end}": f"{column}_half{end}" for column in columns for end in ("", "_low", "_high")}
    both = whole[columns].join(table[list(ends)].rename(columns=ends), how="inner").reset_index()
    findings.numbers["median/r2_error_half_trained"] = float(both["r2_error_half"].median())
    findings.numbers["median/r2_error_rescaled"] = float(both["r2_error_rescaled"].median())
    return both


@styled
def contours(table: pd.DataFrame, title: str = "") -> Figure:
    """Nonlinear FVU and both R² over width × L0; `table` has width, l0, nonlinear_fvu, r2_error and r2_error_norm, a row per SAE. SAEs that are never
    active, or lack one of the numbers, are left out.

    Raises:
        UserError: fewer than three SAEs, or all of them on a line.
    """
    panels = {"nonlinear_fvu": "nonlinear FVU", "r2_error": "R² of e (mean over dimensions)", "r2_error_norm": "R² of ‖e‖²"}
    table = table[np.isfinite(table[["l0", *panels]]).all(axis=1) & (table["l0"] > 0)]
    points = np.log2(table[["width", "l0"]].to_numpy(float))
    if len(points) < 3 or np.linalg.matrix_rank(points - points.mean(0), tol=OFF_LINE) < 2:
        raise UserError("contours over width × L0 need three SAEs, of at least two widths and two levels of L0, that do not lie on a line")
    x, y = points.T
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    for i, (ax, (column, label)) in enumerate(zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True)):
        filled = ax.tricontourf(x, y, table[column], levels=10, cmap="cividis")
        ax.tricontour(x, y, table[column], levels=filled.levels[1:-1], colors="white", linewidths=0.4)
        ax.plot(x, y, "o", color="white", markersize=2.5, markeredgecolor="black", markeredgewidth=0.5, clip_on=False)
        ticks = filled.levels[:: max(1, len(filled.levels) // 4)]
        figure.colorbar(filled, ax=ax, location="top", shrink=0.9, aspect=22, label=label, ticks=ticks, format=lambda v, _: f"{v:.3g}")
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
    """Both R² against the layer: every SAE a point, a line through the means; `table` has layer, r2_error, r2_error_norm (and their _low, _high)."""
    figure = Figure(figsize=(PAPER_WIDTH * 0.62, 2.6))
    ax = figure.subplots()
    shown = {"r2_error_norm": ("R² of ‖e‖² from x", BLUE, "o"), "r2_error": ("R² of e from x (mean over dimensions)", VERMILION, "s")}
    for column, (label, color, marker) in shown.items():
        means = table.groupby("layer")[column].mean()
        ax.plot(means.index, means, color=color, marker=marker, label=label)
        ax.plot(table["layer"], table[column], marker, color=color, alpha=0.35, markersize=3, markeredgewidth=0)
        if f"{column}_low" in table:
            ax.vlines(table["layer"], table[f"{column}_low"], table[f"{column}_high"], color=color, linewidth=1, alpha=0.6)
    ax.set(xlabel="layer", ylabel="R² on held-out tokens", ylim=(min(0, ax.get_ylim()[0]), 1))
    ax.set_xticks(sorted(table["layer"].unique()))
    ax.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=2)
    titled(figure, "How much of the error is predicted from the activation", title)
    return figure


# ---------------------------------------------------------------- analysis 2


@styled
def norm_prediction(table: pd.DataFrame, title: str = "") -> Figure:
    """R² of predicting ‖v‖² from x for each v, and ‖e‖² from other things, over all SAEs of `table` (columns of NORMS and BASELINES)."""
    figure = Figure(figsize=(PAPER_WIDTH, 2.8))
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, names, xlabel in ((left, NORMS, "vector v"), (right, BASELINES, "predictor of ‖e‖²")):
        shown = {label: table[column].dropna().to_numpy() for label, column in names.items() if column in table and table[column].notna().any()}
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
    """Points spread sideways, a violin behind them where there are enough to have a shape, and the median."""
    if len(values) >= 5 and np.ptp(values) > 1e-9:
        body = ax.violinplot(values, [place], widths=0.8, showextrema=False)["bodies"][0]
        body.set(facecolor=color, alpha=0.3, edgecolor=color)
    spread = np.random.default_rng(0).uniform(-0.13, 0.13, len(values))
    ax.plot(place + spread, values, "o", color=color, markersize=3, markeredgecolor="white", markeredgewidth=0.3)
    ax.hlines(np.median(values), place - 0.28, place + 0.28, color="black", linewidth=1.2, zorder=3)


@styled
def loadings(results: Mapping[str, ErrorRegression], title: str = "") -> Figure:
    """a*·decoder row against the mean value when active, a point per latent, for up to three SAEs that have active latents; a* is the probe
    x → ‖Sae(x) − b_dec‖².

    Raises:
        UserError: no SAE has an active latent.
    """
    shown = dict([(name, result) for name, result in results.items() if (result.active_rows > 0).any()][:3])
    if not shown:
        raise UserError("the norm probe along latents needs SAEs that are active, none of these ever is")
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    for i, (ax, (name, result)) in enumerate(zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True)):
        active = (result.active_rows > 0).numpy()
        x, y = result.mean_active.numpy()[active], result.loading.numpy()[active]
        ax.scatter(x, y, s=4 + 20 * np.sqrt(result.active_rows.numpy()[active] / result.fit.rows), color=BLUE, alpha=0.4, linewidth=0)
        line = np.array([0, x.max()])
        ax.plot(line, line, color="0.4", linewidth=0.8, linestyle="--", label="equal")
        ax.set_title(f"{name}\ncorrelation {result.loading_correlation:.2f}", fontsize=6)
        ax.set_xlabel("mean value when active")
        if i == 0:
            ax.set_ylabel("a*·decoder row")
            ax.legend(loc="upper left")
        ax.grid(axis="y")
    titled(figure, "The norm probe along each latent (area: how often it is active)", title)
    return figure
