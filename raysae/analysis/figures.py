"""The figures of analyses 1 to 4, from their tables: at paper width (6.75 inches), in colours fit for the colour-blind, axes and units named.

Every function returns a Figure; `save` writes it.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from raysae.analysis.error_regression import BASELINES, NORMS, ErrorRegression
from raysae.analysis.fits import Level, PowerLaw
from raysae.config import UserError

PAPER_WIDTH = 6.75  # inches, of two columns
DPI = 200
# Okabe and Ito's palette
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"
PARTS = {  # of the breakdown, bottom to top
    "encoder": ("encoder error", PURPLE),
    "nonlinear": ("nonlinear error", VERMILION),
    "linear": ("linear error", ORANGE),
    "absent": ("absent features", SKY),
}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.use": True,
}
WIDTH_LABEL = "latents (width)"
L0_LABEL = "active latents per token (L0)"
FVU_LABEL = "fraction of variance unexplained"
OFF_LINE = 0.1  # doublings of width or L0 off a common line from which on SAEs span a plane
SIGMA_X, SIGMA_R = r"$\sigma_x$", r"$\sigma_r$"


def save(figure: Figure, path: str | Path, pdf: bool = False) -> list[Path]:
    """Writes PNG (200 dpi), on request PDF too, under the name of `path`; returns the files."""
    files = [Path(path).with_suffix(suffix) for suffix in ([".png", ".pdf"] if pdf else [".png"])]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for file in files:
            figure.savefig(file, dpi=DPI)
    return files


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(function)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


# ---------------------------------------------------------------- analysis 1


@_styled
def breakdown(parts: pd.DataFrame, law: PowerLaw, level: Level, title: str = "") -> Figure:
    """FVU and nonlinear FVU against width with their fits, and what the error consists of.

    `parts` is `fits.breakdown`'s table. Widths at which c lies below the nonlinear FVU are not stacked: their bar shows the nonlinear part and the
    fit-free gap FVU − nonlinear FVU, hatched.
    """
    figure = Figure(figsize=(PAPER_WIDTH, 2.9))
    left, right = figure.subplots(1, 2)
    widths = parts["width"].to_numpy()
    along = np.geomspace(widths.min(), widths.max(), 100)
    left.plot(widths, parts["fvu"], "o", color=BLUE, label="FVU")
    left.plot(along, law(along), color=BLUE, label=f"{_number(law.c)} + {_number(law.a)} · width$^{{-{law.m:.2f}}}$")
    left.axhspan(law.c_low, min(law.c_high, 1.3 * parts["fvu"].max()), color=BLUE, alpha=0.12, linewidth=0)
    left.axhline(law.c, color=BLUE, linewidth=0.8, linestyle=":", label=f"c = {law.c:.3f}, 95 % interval {law.c_low:.3f} to {law.c_high:.3f}")
    left.plot(widths, parts["nonlinear_fvu"], "s", color=VERMILION, label="nonlinear FVU")
    slope = f"{100 * level.slope:+.1f} % per doubling"
    left.axhline(level.value, color=VERMILION, linewidth=1, linestyle="--", label=f"its mean {level.value:.3f} ({slope})")
    left.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 2 * parts["fvu"].max()))
    _log_widths(left, widths)
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
    right.set_xticks(place, [_short(w) for w in widths], rotation=30 if len(widths) > 9 else 0)
    right.set(xlabel=WIDTH_LABEL, ylabel=FVU_LABEL, ylim=(0, 1.35 * parts["fvu"].max()))
    right.legend(loc="upper right", reverse=True)
    if law.warning:
        figure.supxlabel(_wrapped(f"Note: {law.warning}."), fontsize=7, color=VERMILION)
    _title(figure, "What the error consists of", title)
    return figure


@_styled
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
        ax.set_xticks(np.log2(widths), [_short(w) for w in widths])
        levels = [level for level in 2.0 ** np.arange(-2, 14) if y.min() - 0.1 <= np.log2(level) <= y.max() + 0.1]
        ax.set_yticks(np.log2(levels), [f"{level:g}" for level in levels])
    _title(figure, "Error over width and sparsity", title)
    return figure


@_styled
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
    _title(figure, "How much of the error is predicted from the activation", title)
    return figure


# ---------------------------------------------------------------- analysis 2


@_styled
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
    _title(figure, f"Norm prediction over {len(table)} SAEs", title)
    return figure


def _violin(ax: Axes, place: int, values: np.ndarray, color: str) -> None:
    """Points spread sideways, a violin behind them where there are enough to have a shape, and the median."""
    if len(values) >= 5 and np.ptp(values) > 1e-9:
        body = ax.violinplot(values, [place], widths=0.8, showextrema=False)["bodies"][0]
        body.set(facecolor=color, alpha=0.3, edgecolor=color)
    spread = np.random.default_rng(0).uniform(-0.13, 0.13, len(values))
    ax.plot(place + spread, values, "o", color=color, markersize=3, markeredgecolor="white", markeredgewidth=0.3)
    ax.hlines(np.median(values), place - 0.28, place + 0.28, color="black", linewidth=1.2, zorder=3)


@_styled
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
    _title(figure, "The norm probe along each latent (area: how often it is active)", title)
    return figure


# ---------------------------------------------------------------- analysis 3


@_styled
def token_lines(lines: pd.DataFrame, texts: Sequence[str] | None = None, magnified: tuple[int, int] = (20, 45), title: str = "") -> Figure:
    """‖e‖, ‖ê‖ and ‖ε‖ along a context, a line per SAE (`per_token_scaling.token_lines`), and a part of ‖e‖ magnified with its tokens on the axis.

    `texts` are the tokens' texts in the order of the lines' positions; their ids are shown where it is None.
    """
    groups = [part.reset_index(drop=True) for _, part in lines.groupby(["width", "sae"], sort=True)]
    count = len(groups[0])
    texts = [str(token) for token in groups[0]["token"]] if texts is None else [_visible(text) for text in texts]
    start, stop = max(0, min(magnified[0], count - 2)), min(magnified[1], count)
    figure = Figure(figsize=(PAPER_WIDTH, 6.2))
    axes = figure.subplots(4, 1, gridspec_kw={"height_ratios": [1, 1, 1, 1.5]})
    labels = {"error": "‖e‖", "linear": "‖ê‖", "nonlinear": "‖ε‖"}
    for ax, (column, label) in zip(axes, labels.items(), strict=False):
        _token_panel(ax, groups, column, slice(0, count))
        ax.set_ylabel(label)
        ax.axvspan(groups[0]["position"][start] - 0.5, groups[0]["position"][stop - 1] + 0.5, color="0.93", zorder=0, linewidth=0)
        ax.margins(x=0.01)
    axes[0].sharex(axes[2])
    axes[1].sharex(axes[2])
    for ax in axes[:2]:
        ax.tick_params(labelbottom=False)
    axes[2].set_xlabel("position in the context (shaded: the part below)")
    part = axes[3]
    _token_panel(part, groups, "error", slice(start, stop))
    part.set_xticks(groups[0]["position"][start:stop], texts[start:stop], rotation=90, fontsize=7)
    part.set(ylabel="‖e‖", xlabel="token")
    figure.supylabel("norm (activation units)", fontsize=8)
    part.margins(x=0.01)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", title="width")
    _title(figure, "Error per token", title)
    return figure


def _token_panel(ax: Axes, groups: list[pd.DataFrame], column: str, rows: slice) -> None:
    names = _names(groups)
    for i, (group, name) in enumerate(zip(groups, names, strict=True)):
        color = colormaps["viridis"](0.9 * i / max(1, len(groups) - 1))
        whole = rows.stop - rows.start == len(group)
        ax.plot(group["position"][rows], group[column][rows], color=color, label=name, linewidth=1, marker=None if whole else "o", markersize=2.5)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")


def _names(groups: list[pd.DataFrame]) -> list[str]:
    """Widths, or the SAEs' own names where two have the same width."""
    widths = [int(group["width"].iloc[0]) for group in groups]
    return [f"{w:,}" for w in widths] if len(set(widths)) == len(widths) else [str(group["sae"].iloc[0]) for group in groups]


@_styled
def pair_maps(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Upper-triangle heat maps of `per_token_scaling`: R² of ‖e_large‖ from ‖e_small‖, and the relative gain when ‖ε_small‖ is added."""
    order = {name: width for row in pairs.itertuples() for name, width in ((row.small, row.small_width), (row.large, row.large_width))}
    names = sorted(order, key=order.__getitem__)
    unique = len(set(order.values())) == len(order)
    labels = [_short(order[name]) if unique else name for name in names]
    figure = Figure(figsize=(PAPER_WIDTH, 3.1))
    panels = {
        "r2": (r"R² of ‖e$_\mathrm{large}$‖ from ‖e$_\mathrm{small}$‖", (0, 1)),
        "gain": (r"relative gain of adding ‖ε$_\mathrm{small}$‖", None),
    }
    for ax, (column, (label, limits)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        grid = np.full((len(names) - 1, len(names) - 1), np.nan)
        for row in pairs.itertuples():
            grid[names.index(row.small), names.index(row.large) - 1] = getattr(row, column)
        limits = limits or (min(0, np.nanmin(grid)), max(np.nanmax(grid), 1e-3))
        _heat_map(figure, ax, grid, labels[1:], labels[:-1], label, limits)
        ax.set(xlabel="larger SAE (width)", ylabel="smaller SAE (width)")
        ax.tick_params(length=0)
    _title(figure, "Errors of small SAEs predict those of large ones", title)
    return figure


# ---------------------------------------------------------------- analysis 4


@_styled
def introduced_error(grid: pd.DataFrame, table: pd.DataFrame, unit: float, title: str = "") -> Figure:
    """Estimates over ablated latents; heat maps over (σ_x, σ_r) at no ablation; the correlation table. Arguments: see `introduced_error`."""
    figure = Figure(figsize=(PAPER_WIDTH, 5.0))
    axes = figure.subplots(2, 3, gridspec_kw={"width_ratios": [1, 1, 0.75], "height_ratios": [1.35, 1]})
    names = {"linear": "estimated linear error", "nonlinear": "estimated nonlinear error"}
    levels = sorted(grid["sigma_x"].unique())
    none = grid[grid["ablated"] == 0]
    most = none[list(names)].max().max()
    for ax, (column, label) in zip(axes[0], names.items(), strict=False):
        values = none.pivot(index="sigma_r", columns="sigma_x", values=column)
        _heat_map(figure, ax, values.to_numpy(), [f"{v:g}" for v in values.columns], [f"{v:g}" for v in values.index], f"{label} (FVU)", (0, most))
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
    _title(figure, "What the estimates make of errors put in on purpose", title)
    return figure


def _correlations(ax: Axes, table: pd.DataFrame) -> None:
    ax.imshow(table.to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal")
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        ax.text(column, row, _fixed(value, 2), ha="center", va="center", fontsize=9, color="white" if abs(value) > 0.6 else "black")
    ax.set_xticks(range(2), table.columns)
    ax.set_yticks(range(2), [SIGMA_X, SIGMA_R])
    ax.set_title("correlation\n(no ablation)")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


# ---------------------------------------------------------------- small parts


def _heat_map(
    figure: Figure, ax: Axes, grid: np.ndarray, columns: Sequence[str], rows: Sequence[str], label: str, limits: tuple[float, float]
) -> None:
    image = ax.imshow(grid, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="equal")
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            dark = (value - limits[0]) / max(1e-12, limits[1] - limits[0]) < 0.55
            ax.text(column, row, _fixed(value, 2 if limits[1] > 0.2 else 3), ha="center", va="center", fontsize=6, color="white" if dark else "black")
    ax.set_xticks(range(len(columns)), columns, rotation=30 if max(map(len, columns)) > 5 else 0)
    ax.set_yticks(range(len(rows)), rows)
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, location="top", shrink=0.9, aspect=22, label=label)


def _log_widths(ax: Axes, widths: np.ndarray) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(widths))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(width: float) -> str:
    """`512`, `4k`, `64k`, `1M`: powers of two as they are called."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if width >= size and width % size == 0:
            return f"{width / size:g}{letter}"
    return f"{width:g}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= value < 1e4 else f"{value:.1e}"


def _fixed(value: float, digits: int) -> str:
    """Without the minus of a number that rounds to 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _visible(text: str) -> str:
    """A token's text with its white space to be seen, and nothing that would be taken for mathematics."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$") or "∅"


def _wrapped(text: str, width: int = 130) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _title(figure: Figure, what: str, where: str) -> None:
    figure.suptitle(f"{what}\n{where}" if where else what)
