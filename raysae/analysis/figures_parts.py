"""The figures of analyses 5, 7 and 8, from their tables, in the style of `figures`: every function returns a Figure."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from raysae.analysis.figures import (
    BLUE,
    FVU_LABEL,
    GREEN,
    L0_LABEL,
    ORANGE,
    PAPER_WIDTH,
    SKY,
    STYLE,
    VERMILION,
    WIDTH_LABEL,
)

AXES = {"width": WIDTH_LABEL, "l0": L0_LABEL}
ERROR_PARTS = {"linear": ("linear error ê", ORANGE), "nonlinear": ("nonlinear error ε", VERMILION)}
SOURCE_PARTS = {
    "reconstruction": ("reconstruction", BLUE),
    "activation": ("activation", SKY),
    "error": ("error e", GREEN),
    "linear error": ("linear error ê", ORANGE),
    "nonlinear error": ("nonlinear error ε", VERMILION),
}
SHARES = {  # column, face of its points, their shift against the bars, label
    "norm_share": ("white", -0.12, "share of the error's norm"),
    "variance_share": ("black", 0.12, "share of its variance"),
}
BEFORE_AFTER = {"": ("codes of the encoder", SKY), "_pursuit": ("codes of pursuit", BLUE)}
TARGET_TITLES = {"e": "error e", "ê": "linear error ê", "ε": "nonlinear error ε"}


def ce_recovered(table: pd.DataFrame, along: str = "width", title: str = "") -> Figure:
    """Bars of the cross-entropy that each part of the error recovers, beside its share of the error's norm and variance.

    Args:
        table: of `downstream_loss`, a row per SAE.
        along: "width" or "l0", what the SAEs differ in.
    """
    table = table.sort_values(along)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.7))
        panels = figure.subplots(1, 2, sharey=True)
        place = np.arange(len(table))
        for ax, (part, (label, color)) in zip(panels, ERROR_PARTS.items(), strict=True):
            _bars(ax, place, table, f"recovered_{part}", 0.7, color, 100)
            for column, (face, shift, _) in SHARES.items():
                ax.plot(place + shift, 100 * table[f"{column}_{part}"], "o", color="black", markerfacecolor=face, markersize=4)
            ax.axhline(0, color="0.3", linewidth=0.6)
            ax.set_title(f"with the {label} added to Sae(x)")
            ax.set_xlabel(AXES[along])
            _ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel("%")
        dot = {"marker": "o", "linestyle": "", "color": "black", "markersize": 4}
        points = {label: Line2D([], [], markerfacecolor=face, **dot) for face, _, label in SHARES.values()}
        handles = {"cross-entropy recovered": tuple(Patch(facecolor=color) for _, color in ERROR_PARTS.values()), **points}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})
        figure.suptitle(_headed("What each part of the error costs the language model", title))
    return figure


def pursuit_bars(table: pd.DataFrame, along: str = "width", title: str = "") -> Figure:
    """FVU and nonlinear FVU with the encoder's codes and with as many steps of pursuit; `table` is that of `pursuit`, `along` "width" or "l0"."""
    table = table.sort_values(along)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.7))
        panels = figure.subplots(1, 2)
        place = np.arange(len(table))
        for ax, (column, heading) in zip(panels, {"fvu": "FVU", "nonlinear_fvu": "nonlinear FVU"}.items(), strict=True):
            for shift, (suffix, (label, color)) in zip((-0.2, 0.2), BEFORE_AFTER.items(), strict=True):
                _bars(ax, place + shift, table, f"{column}{suffix}", 0.38, color, 1, label)
            for x, (_, row) in zip(place, table.iterrows(), strict=True):
                change = 100 * (row[f"{column}_pursuit"] / row[column] - 1)
                ax.text(x, max(row[f"{column}_high"], row[f"{column}_pursuit_high"]), f"{change:+.0f} %", ha="center", va="bottom", fontsize=6.5)
            ax.set(xlabel=AXES[along], ylim=(0, 1.3 * max(table[f"{column}_high"].max(), table[f"{column}_pursuit_high"].max())))
            ax.set_title(heading)
            _ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel(FVU_LABEL)
        panels[0].legend(loc="upper right", ncols=2)
        figure.suptitle(_headed("Encoder error: what pursuit with the same decoder and L0 removes", title))
    return figure


def earlier_layer_bars(table: pd.DataFrame, column: str = "r2", title: str = "") -> Figure:
    """Bars of R² per source and part, a panel per target; `table` is that of `earlier_layers`, `column` "r2" or "r2_weighted"."""
    sources = list(dict.fromkeys(table["source"]))
    parts = [part for part in SOURCE_PARTS if part in set(table["part"])]
    rows = [(source, part) for source in sources for part in parts if ((table["source"] == source) & (table["part"] == part)).any()]
    place = np.arange(len(rows)) + 0.8 * np.array([sources.index(source) for source, _ in rows])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 0.9 + 0.16 * place.max()))
        panels = figure.subplots(1, len(TARGET_TITLES), sharey=True, sharex=True)
        for ax, (target, label) in zip(panels, TARGET_TITLES.items(), strict=True):
            of_target = table[table["target"] == target].set_index(["source", "part"])
            for y, (source, part) in zip(place, rows, strict=True):
                row = of_target.loc[(source, part)]
                color = SOURCE_PARTS[part][1]
                known = bool(row["by_definition"])
                ax.barh(
                    y,
                    max(row[column], 0),
                    0.85,
                    color="white" if known else color,
                    edgecolor=color if known else "none",
                    hatch="/////" * known,
                    linewidth=0.6,
                )
                if not known and np.isfinite(row[column]):
                    ax.plot([row[f"{column}_low"], row[f"{column}_high"]], [y, y], color="black", linewidth=0.8)
                    ax.text(max(row[f"{column}_high"], 0) + 0.015, y, f"{row[column]:.2f}", va="center", fontsize=5.5)
            ax.set_title(f"predicting the {label}")
            ax.set_xlabel("R² (mean over dimensions)" if column == "r2" else "R² (variance-weighted)")
            ax.grid(True, axis="x")
            ax.grid(False, axis="y")
        panels[0].set_xlim(0, 1.12)
        panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        centres = [np.mean([y for y, (s, _) in zip(place, rows, strict=True) if s == source]) for source in sources]
        panels[0].set_yticks(centres, sources)
        panels[0].set_ylim(place.max() + 0.8, -0.8)
        for ax in panels:
            ax.tick_params(axis="y", length=0)
        handles = [Patch(facecolor=color, label=label) for part, (label, color) in SOURCE_PARTS.items() if part in parts]
        if table["by_definition"].any():
            handles.append(Patch(facecolor="white", edgecolor="0.4", hatch="/////", linewidth=0.6, label="1 by definition"))
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            title="predicted from",
            title_fontsize=7,
            columnspacing=1,
            handlelength=1.2,
        )
        figure.suptitle(_headed("What other hook points know of the error", title))
    return figure


def _bars(ax: Axes, place: np.ndarray, table: pd.DataFrame, column: str, width: float, color: str, unit: float, label: str | None = None) -> None:
    """Bars of `column` times `unit`, with their intervals."""
    value, low, high = (unit * table[f"{column}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
    ax.bar(place, value, width, color=color, label=label)
    ax.vlines(place, low, high, color="0.25", linewidth=1)


def _ticks(ax: Axes, place: np.ndarray, values: pd.Series) -> None:
    labels = [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in values]
    ax.set_xticks(place, labels, rotation=30 if len(labels) > 5 else 0)


def _headed(what: str, title: str) -> str:
    return f"{what}\n{title}" if title else what
