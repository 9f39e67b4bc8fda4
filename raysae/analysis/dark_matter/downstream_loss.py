"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from raysae.analysis.dark_matter.measures.downstream_loss import PARTS, downstream_loss
from raysae.analysis.dark_matter.probes import GROUP, described, model_name, regressions, shown
from raysae.analysis.instruments.plots import (
    AXES,
    ERROR_PARTS,
    PAPER_WIDTH,
    STYLE,
    bars,
    headed,
    ticks,
)
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task, language_model
from raysae.config import ModelConfig
from raysae.text.contexts import Contexts

SHARES = {  # column, face of its points, their shift against the bars, label
    "norm_share": ("white", -0.12, "share of the error's norm"),
    "variance_share": ("black", 0.12, "share of its variance"),
}


# ---------------------------------------------------------------- 5


def run(lab: Lab) -> Findings:
    """Analysis 5: cross-entropy with parts of the error put back, for every SAE."""
    lm = lab.plan.config.model
    parts, key = [], lab.key(*lab.saes.values(), tokens=lab.config.predicted_tokens)
    for hook_point in lab.hook_points:
        saes = lab.of(hook_point)
        recorded = lab.record([hook_point])
        found = regressions(lab, hook_point, saes)
        names = list(saes)
        for start in range(0, len(names), 2 * GROUP):  # a clean pass per group
            group = [saes[name] for name in names[start : start + 2 * GROUP]]
            probes = {sae.name: found[sae.name].probe for sae in group}
            arguments = (recorded, hook_point, group, probes, lm, lab.config.predicted_tokens, lab.replicates, lab.seed)
            part_key = lab.key(*group, tokens=lab.config.predicted_tokens)
            parts.append(Task("downstream_loss", part_key, _downstream, arguments, gpus=lab.config.resources.producer_gpus, contexts=True))
    table = pd.concat(lab.run(parts), ignore_index=True)
    findings = Findings("downstream_loss", key, table, tables={"downstream": table})
    for part in PARTS:
        for column in (f"recovered_{part}", f"variance_share_{part}", f"norm_share_{part}"):
            findings.numbers[f"median/{column}"] = float(table[column].median())
    chosen = shown(lab)
    of_hook = table[table["sae"].isin(lab.of(chosen.hook_point))]
    findings.figures["widths"] = ce_recovered(of_hook[of_hook["sae"].isin(chosen.saes)], "width", described(lab, chosen))
    of_width = of_hook[of_hook["width"] == chosen.central.width]
    if len(of_width) > 1:
        findings.figures["sparsities"] = ce_recovered(of_width, "l0", f"{model_name(lab)} · {chosen.hook_point} · width {chosen.central.width:,}")
    return findings


def _downstream(
    contexts: Contexts, recorded: Recorded, hook_point: str, saes: Sequence[Subject], probes: Mapping[str, Linear], model: ModelConfig,
    predicted: int, replicates: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    import torch

    lm = language_model(model)
    skip = recorded.first_position
    wanted = -(-predicted // (contexts.tokens.shape[1] - 1 - skip))
    tokens = torch.from_numpy(contexts[recorded.contexts("C")[:wanted]]).to(lm.device)
    loaded = {sae.name: sae.load() for sae in saes}
    return downstream_loss(lm, tokens, hook_point, loaded, probes, skip, replicates, seed)


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
            bars(ax, place, table, f"recovered_{part}", 0.7, color, 100)
            for column, (face, shift, _) in SHARES.items():
                ax.plot(place + shift, 100 * table[f"{column}_{part}"], "o", color="black", markerfacecolor=face, markersize=4)
            ax.axhline(0, color="0.3", linewidth=0.6)
            ax.set_title(f"with the {label} added to Sae(x)")
            ax.set_xlabel(AXES[along])
            ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel("%")
        dot = {"marker": "o", "linestyle": "", "color": "black", "markersize": 4}
        points = {label: Line2D([], [], markerfacecolor=face, **dot) for face, _, label in SHARES.values()}
        handles = {"cross-entropy recovered": tuple(Patch(facecolor=color) for _, color in ERROR_PARTS.values()), **points}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})
        figure.suptitle(headed("What each part of the error costs the language model", title))
    return figure
