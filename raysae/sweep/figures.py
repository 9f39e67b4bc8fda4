"""The figures of a sweep's results.

A figure has a panel per hook point and architecture, and a line per width or sparsity. Its colours are fit for the
colour-blind. The SAEs of a line differ in learning rate and seed: the line goes through the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KNOBS = {  # Columns that tell SAEs apart, with their headings
    "architecture": "kind",
    "hook_point": "hook point",
    "width": "width",
    "k": "k",
    "sparsity": "sparsity",
    "learning_rate": "lr",
    "seed": "seed",
}
LABELS = {
    "fvu": "fraction of variance unexplained (FVU)",
    "l0": "active latents per token (L0)",
    "width": "latents (width)",
    "ce_recovered": "cross-entropy recovered (fraction)",
}
FIGURES = {  # File: (title, x, y, column that has a line per value)
    "frontier": ("Reconstruction against sparsity", "l0", "fvu", "width"),
    "fvu_width": ("Reconstruction against width", "width", "fvu", "level"),
    "ce_frontier": ("Recovered cross-entropy against sparsity", "l0", "ce_recovered", "width"),
}
MARKERS = "osD^vP*Xp<>h"
PANEL = (4.6, 3.7)  # Width and height in inches


def draw(results: pd.DataFrame, folder: Path, model: str) -> list[Path]:
    """Draw every figure that finished `results` have numbers for, as PNG (200 dpi) and PDF. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    files = []
    for name, (title, x, y, lines) in FIGURES.items():
        if y not in results:
            continue
        drawn = results[results[x].notna() & results[y].notna()]
        if drawn[x].nunique() < 2 or drawn[x].max() < 1.05 * drawn[x].min():  # The points would lie above each other
            continue
        figure = figure_of(drawn, title, x, y, lines, model)
        for suffix in ("png", "pdf"):
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1], dpi=200)
    return files


def figure_of(results: pd.DataFrame, title: str, x: str, y: str, lines: str, model: str) -> Figure:
    from matplotlib.figure import Figure

    results = results.assign(level=results.apply(_level, axis=1))
    panels = list(results.groupby(["hook_point", "architecture"], sort=True))
    architectures = results["architecture"].nunique()
    columns = (
        architectures if architectures > 1 else len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    )
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL[0] * columns + 1.2, PANEL[1] * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    facts = [
        model,
        *(results[column].iloc[0] for column in ("hook_point", "architecture") if results[column].nunique() == 1),
    ]
    several = [
        name
        for name, column in (("learning rates", "learning_rate"), ("seeds", "seed"))
        if results[column].nunique() > 1
    ]
    facts += [f"{short(results['tokens'].max())} tokens"] + (
        [f"lines through the best of the {' and '.join(several)}"] if several else []
    )
    figure.suptitle(f"{title}\n{' · '.join(facts)}", fontsize=11)

    styles = _styles(results, lines)
    for ax, ((hook, architecture), group) in zip(axes.flat, panels, strict=False):
        _panel(ax, group, x, y, lines, styles)
        named = [
            name
            for name, column in ((hook, "hook_point"), (architecture, "architecture"))
            if results[column].nunique() > 1
        ]
        ax.set_title(" · ".join(named), fontsize=10)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:  # The lowest panel of each column
        ax.tick_params(labelbottom=True)
    _scale(axes.flat[0].xaxis, results[x], sorted(results[x].round().unique()))
    if y == "fvu":
        _scale(axes.flat[0].yaxis, results[y])
    figure.supxlabel(LABELS[x], fontsize=10)
    figure.supylabel(LABELS[y], fontsize=10)
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    ordered = [label for label in styles if label in handles]
    figure.legend(
        [handles[label] for label in ordered],
        ordered,
        loc="outside right center",
        frameon=False,
        title="width" if lines == "width" else None,
    )
    return figure


def _panel(ax: Axes, group: pd.DataFrame, x: str, y: str, lines: str, styles: dict[str, dict]) -> None:
    """Draw one line per width or sparsity through its best SAEs. The others are faint points."""
    along = "width" if lines == "level" else "level"
    for value, members in group.groupby(lines, sort=False):
        best = members.loc[members.groupby(along)[y].agg("idxmax" if y == "ce_recovered" else "idxmin")].sort_values(x)
        others = members.drop(best.index)
        style = styles[_label(value)]
        ax.plot(
            others[x],
            others[y],
            linestyle="",
            alpha=0.3,
            markersize=4,
            markeredgewidth=0,
            color=style["color"],
            marker=style["marker"],
        )
        ax.plot(
            best[x],
            best[y],
            label=_label(value),
            linewidth=1.6,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.6,
            **style,
        )
    ax.grid(True, color="0.9", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


def _styles(results: pd.DataFrame, lines: str) -> dict[str, dict]:
    """Label → colour and marker, the same in all panels. Colours go from dark (least) to light (most)."""
    from matplotlib import colormaps

    order = ["width"] if lines == "width" else ["k", "sparsity"]
    values = results.sort_values([column for column in order if column in results])[lines].unique()
    shades = colormaps["viridis"]
    return {
        _label(value): {"color": shades(0.88 * i / max(1, len(values) - 1)), "marker": MARKERS[i % len(MARKERS)]}
        for i, value in enumerate(values)
    }


def _level(row: pd.Series) -> str:
    return (
        f"k = {row['k']:g}"
        if row.get("k") == row.get("k") and row.get("k") is not None
        else f"coefficient {row['sparsity']:g}"
    )


def _label(value: object) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _scale(axis: Axis, values: pd.Series, ticks: Sequence[float] = ()) -> None:
    """Make the axis logarithmic where the values span at least a factor of two.

    Its labels are plain numbers, at the `ticks` if these are few.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    if values.min() <= 0 or values.max() < 2 * values.min():
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    decades = math.log10(values.max() / values.min())
    subs = (
        (1, 1.5, 2, 3, 4, 5, 6, 8)
        if decades < 0.7
        else (1, 2, 3, 5)
        if decades < 1.5
        else (1, 3)
        if decades < 3
        else (1,)
    )
    axis.set_major_locator(FixedLocator(ticks) if 0 < len(ticks) <= 8 else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))


def short(number: float) -> str:
    """`950`, `40k`, `1M`, `2.5B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
