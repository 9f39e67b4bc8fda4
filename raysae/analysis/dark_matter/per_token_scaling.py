"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.per_token import write_per_token
from raysae.analysis.dark_matter.measures.per_token_scaling import per_token_scaling, token_lines
from raysae.analysis.dark_matter.probes import described, shown
from raysae.analysis.instruments.plots import PAPER_WIDTH, heat_map, short, styled, titled, visible
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.lm.tokenizer import load_tokenizer

LINE_TOKENS = 100  # of the per-token line plot


# ---------------------------------------------------------------- 3


def run(lab: Lab) -> Findings:
    """Analysis 3: error norms of SAEs of one width from those of another, norms along a context, and the per-token tables."""
    chosen = shown(lab)
    recorded = lab.record([chosen.hook_point])
    saes = list(chosen.saes.values())
    key = lab.key(*saes)
    parts = [Task("per_token_scaling", key, _scaling, (recorded, chosen.hook_point, saes, chosen.probes, lab.replicates, lab.seed))]
    folder = lab.folder / "per_token"
    for sae in saes:
        path = folder / f"{sae.name}-{sae.content[:8]}.parquet"
        parts.append(Task("per_token_tables", lab.key(sae), _table, (recorded, sae, chosen.probes[sae.name], path)))
    (pairs, lines), *tables = lab.run(parts)
    findings = Findings("per_token_scaling", key, pd.DataFrame({"sae": list(chosen.saes)}), tables={"pairs": pairs, "lines": lines}, files=tables)
    if len(pairs):
        numbers = pairs[["r2", "squared_correlation", "r2_with_nonlinear", "gain"]]
        findings.numbers = {f"mean/{name}": float(value) for name, value in numbers.mean().items()}
        findings.figures["pairs"] = pair_maps(pairs, described(lab, chosen))
    else:
        findings.notes.append("pairs need SAEs of at least two widths")
    tokenizer = load_tokenizer(lab.plan.config.model)
    first = lines[lines["sae"] == lines["sae"].iloc[0]]
    texts = [tokenizer.decode([token]) for token in first["token"]]
    findings.figures["lines"] = token_lines_figure(lines, texts, title=described(lab, chosen))
    return findings


def _scaling(
    recorded: Recorded, hook_point: str, saes: Sequence[Subject], probes: Mapping[str, Linear], replicates: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    activations, loaded = recorded.open(), {sae.name: sae.load() for sae in saes}
    pairs = per_token_scaling(activations, hook_point, loaded, probes, replicates, seed) if len(saes) > 1 else pd.DataFrame()
    return pairs, token_lines(activations, hook_point, loaded, probes, LINE_TOKENS)


def _table(recorded: Recorded, sae: Subject, probe: Linear, path: Path) -> Path:
    return write_per_token(recorded.open(), sae.hook_point, sae.load(), probe, path)


# ---------------------------------------------------------------- analysis 3


@styled
def token_lines_figure(lines: pd.DataFrame, texts: Sequence[str] | None = None, magnified: tuple[int, int] = (20, 45), title: str = "") -> Figure:
    """‖e‖, ‖ê‖ and ‖ε‖ along a context, a line per SAE (`per_token_scaling.token_lines`), and a part of ‖e‖ magnified with its tokens on the axis.

    `texts` are the tokens' texts in the order of the lines' positions; their ids are shown where it is None.
    """
    groups = [part.reset_index(drop=True) for _, part in lines.groupby(["width", "sae"], sort=True)]
    count = len(groups[0])
    texts = [str(token) for token in groups[0]["token"]] if texts is None else [visible(text) for text in texts]
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
    titled(figure, "Error per token", title)
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


@styled
def pair_maps(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Upper-triangle heat maps of `per_token_scaling`: R² of ‖e_large‖ from ‖e_small‖, and the relative gain when ‖ε_small‖ is added."""
    order = {name: width for row in pairs.itertuples() for name, width in ((row.small, row.small_width), (row.large, row.large_width))}
    names = sorted(order, key=order.__getitem__)
    unique = len(set(order.values())) == len(order)
    labels = [short(order[name]) if unique else name for name in names]
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
        heat_map(figure, ax, grid, labels[1:], labels[:-1], label, limits)
        ax.set(xlabel="larger SAE (width)", ylabel="smaller SAE (width)")
        ax.tick_params(length=0)
    titled(figure, "Errors of small SAEs predict those of large ones", title)
    return figure
