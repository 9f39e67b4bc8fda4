"""Whether SAEs of different widths fail on the same tokens (analysis 3): the experiment, its tasks and its figures.

It also writes the per-token table of every SAE that the figures show.
"""

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
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import PAPER_WIDTH, heat_map, short, styled, titled, visible
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.lm.tokenizer import load_tokenizer

LINE_TOKENS = 100  # Tokens along which the figure draws norms.


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """Error norms of SAEs of one width from those of another, norms along a context, and the per-token tables."""
    chosen = shown(lab)
    recorded = lab.record([chosen.hook_point])
    saes = list(chosen.saes.values())
    key = lab.key(*saes)
    arguments = (recorded, chosen.hook_point, saes, chosen.probes, lab.replicates, lab.seed)
    tasks = [Task("per_token_scaling", key, _scaling, arguments)]
    folder = lab.folder / "per_token"
    for sae in saes:
        path = folder / f"{sae.name}-{sae.content[:8]}.parquet"
        tasks.append(Task("per_token_tables", lab.key(sae), _table, (recorded, sae, chosen.probes[sae.name], path)))
    (pairs, lines), *files = lab.run(tasks)
    findings = Findings("per_token_scaling", key, pd.DataFrame({"sae": list(chosen.saes)}), files=files)
    findings.tables = {"pairs": pairs, "lines": lines}
    if len(pairs):
        numbers = pairs[[col.R2, col.SQUARED_CORRELATION, col.R2_BEYOND_X_NORM, col.R2_WITH_NONLINEAR, col.GAIN]]
        findings.numbers = {f"mean/{name}": float(value) for name, value in numbers.mean().items()}
        findings.figures["pairs"] = pair_maps(pairs, described(lab, chosen))
    else:
        findings.notes.append("pairs need SAEs of at least two widths")
    tokenizer = load_tokenizer(lab.plan.config.model)
    first = lines[lines["sae"] == lines["sae"].iloc[0]]
    texts = [tokenizer.decode([token]) for token in first[col.TOKEN]]
    findings.figures["lines"] = token_lines_figure(lines, texts, title=described(lab, chosen))
    return findings


def _scaling(
    recorded: Recorded,
    hook_point: str,
    saes: Sequence[Subject],
    probes: Mapping[str, Linear],
    replicates: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table of pairs, empty where there is one SAE, and the norms along a context."""
    activations, loaded = recorded.open(), {sae.name: sae.load() for sae in saes}
    pairs = pd.DataFrame()
    if len(saes) > 1:
        pairs = per_token_scaling(activations, hook_point, loaded, probes, replicates, seed)
    return pairs, token_lines(activations, hook_point, loaded, probes, LINE_TOKENS)


def _table(recorded: Recorded, sae: Subject, probe: Linear, path: Path) -> Path:
    return write_per_token(recorded.open(), sae.hook_point, sae.load(), probe, path)


# ---------------------------------------------------------------- the figures


@styled
def token_lines_figure(
    lines: pd.DataFrame, texts: Sequence[str] | None = None, magnified: tuple[int, int] = (20, 45), title: str = ""
) -> Figure:
    """‖e‖, ‖ê‖ and ‖ε‖ along a context, a line per SAE, and a stretch of ‖e‖ magnified.

    Args:
        lines: the table of `measures.per_token_scaling.token_lines`.
        texts: the tokens' texts in the order of the lines' positions. The axis has their ids where it is None.
        magnified: first token of the stretch, and the one after its last.
        title: the second line of the title.
    """
    groups = [group.reset_index(drop=True) for _, group in lines.groupby(["width", "sae"], sort=True)]
    first = groups[0]
    count = len(first)
    texts = [str(token) for token in first[col.TOKEN]] if texts is None else [visible(text) for text in texts]
    start, stop = max(0, min(magnified[0], count - 2)), min(magnified[1], count)
    figure = Figure(figsize=(PAPER_WIDTH, 6.2))
    axes = figure.subplots(4, 1, gridspec_kw={"height_ratios": [1, 1, 1, 1.5]})
    labels = {col.ERROR: "‖e‖", col.LINEAR: "‖ê‖", col.NONLINEAR: "‖ε‖"}
    shaded = first[col.POSITION][start] - 0.5, first[col.POSITION][stop - 1] + 0.5
    for ax, (column, label) in zip(axes, labels.items(), strict=False):
        _token_panel(ax, groups, column, slice(0, count))
        ax.set_ylabel(label)
        ax.axvspan(*shaded, color="0.93", zorder=0, linewidth=0)
        ax.margins(x=0.01)
    axes[0].sharex(axes[2])
    axes[1].sharex(axes[2])
    for ax in axes[:2]:
        ax.tick_params(labelbottom=False)
    axes[2].set_xlabel("position in the context (shaded: the part below)")
    stretch = axes[3]
    _token_panel(stretch, groups, col.ERROR, slice(start, stop))
    stretch.set_xticks(first[col.POSITION][start:stop], texts[start:stop], rotation=90, fontsize=7)
    stretch.set(ylabel="‖e‖", xlabel="token")
    figure.supylabel("norm (activation units)", fontsize=8)
    stretch.margins(x=0.01)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", title="width")
    titled(figure, "Error per token", title)
    return figure


def _token_panel(ax: Axes, groups: list[pd.DataFrame], column: str, rows: slice) -> None:
    """A line per SAE."""
    names = _names(groups)
    for i, (group, name) in enumerate(zip(groups, names, strict=True)):
        color = colormaps["viridis"](0.9 * i / max(1, len(groups) - 1))
        whole = rows.stop - rows.start == len(group)
        marks = {"marker": None if whole else "o", "markersize": 2.5}
        ax.plot(group[col.POSITION][rows], group[column][rows], color=color, label=name, linewidth=1, **marks)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")


def _names(groups: list[pd.DataFrame]) -> list[str]:
    """The SAEs' widths, or their names where two have the same width."""
    widths = [int(group["width"].iloc[0]) for group in groups]
    if len(set(widths)) == len(widths):
        return [f"{width:,}" for width in widths]
    return [str(group["sae"].iloc[0]) for group in groups]


@styled
def pair_maps(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Heat maps over pairs of SAEs: R² of ‖e_large‖ from ‖e_small‖, the same beyond ‖x‖, and what ‖ε_small‖ gains.

    `pairs` is the table of `measures.per_token_scaling.per_token_scaling`.
    """
    order = dict(zip(pairs[col.SMALL], pairs[col.SMALL_WIDTH], strict=True))
    order |= dict(zip(pairs[col.LARGE], pairs[col.LARGE_WIDTH], strict=True))
    names = sorted(order, key=order.__getitem__)
    unique = len(set(order.values())) == len(order)
    labels = [short(order[name]) if unique else name for name in names]
    figure = Figure(figsize=(PAPER_WIDTH, 2.6))
    panels = {
        col.R2: (r"R² of ‖e$_\mathrm{large}$‖ from ‖e$_\mathrm{small}$‖", (0, 1)),
        col.R2_BEYOND_X_NORM: ("the same, ‖x‖ partialled out", (0, 1)),
        col.GAIN: (r"relative gain of adding ‖ε$_\mathrm{small}$‖", None),
    }
    for ax, (column, (label, limits)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        grid = np.full((len(names) - 1, len(names) - 1), np.nan)
        for small, large, value in zip(pairs[col.SMALL], pairs[col.LARGE], pairs[column], strict=True):
            grid[names.index(small), names.index(large) - 1] = value
        limits = limits or (min(0, np.nanmin(grid)), max(np.nanmax(grid), 1e-3))
        heat_map(figure, ax, grid, labels[1:], labels[:-1], label, limits)
        ax.set_xlabel("larger SAE (width)")
        ax.tick_params(length=0)
    figure.axes[0].set_ylabel("smaller SAE (width)")
    titled(figure, "Errors of small SAEs predict those of large ones", title)
    return figure
