"""What each part of the error costs the language model (analysis 5): the experiment, its tasks and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from raysae.analysis.dark_matter.measures.downstream_loss import PARTS, Patched, downstream_loss
from raysae.analysis.dark_matter.probes import GROUP, alike, described, model_name, regressions, shown
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import AXES, ERROR_PARTS, PAPER_WIDTH, STYLE, bars, headed, ticks
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task, language_model
from raysae.config import ModelConfig
from raysae.text.contexts import Contexts

SHARES = (  # Column of a part's share, face of its points, their shift against the bars, label.
    (col.norm_share, "white", -0.12, "share of the error's norm"),
    (col.variance_share, "black", 0.12, "share of its variance"),
)


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """Cross-entropy with parts of the error put back, for every SAE."""
    tokens = lab.config.predicted_tokens
    tasks, key = [], lab.key(*lab.saes.values(), tokens=tokens)
    for hook_point in lab.hook_points:
        saes = lab.of(hook_point)
        recorded = lab.record([hook_point])
        found = regressions(lab, hook_point, saes)
        names = list(saes)
        for start in range(0, len(names), 2 * GROUP):  # The SAEs of a group share a clean pass.
            group = [saes[name] for name in names[start : start + 2 * GROUP]]
            probes = {sae.name: found[sae.name].probe for sae in group}
            arguments = (recorded, group, probes, lab.plan.config.model, tokens, lab.replicates, lab.seed)
            of_group, gpus = lab.key(*group, tokens=tokens), lab.config.resources.producer_gpus
            tasks.append(Task("downstream_loss", of_group, _downstream, arguments, gpus=gpus, contexts=True))
    table = pd.concat(lab.run(tasks), ignore_index=True)
    findings = Findings("downstream_loss", key, table, tables={"downstream": table})
    for part in PARTS:
        for column in (col.recovered(part), col.variance_share(part), col.norm_share(part)):
            findings.numbers[f"median/{column}"] = float(table[column].median())
    chosen = shown(lab)
    of_hook = table[table["sae"].isin(lab.of(chosen.hook_point))]
    of_figures = of_hook[of_hook["sae"].isin(chosen.saes)]
    findings.figures["widths"] = ce_recovered(of_figures, "width", described(lab, chosen))
    width, group = chosen.central.width, alike(chosen.central.params)
    in_group = [name for name, sae in lab.of(chosen.hook_point).items() if alike(sae.params) == group]
    of_width = of_hook[(of_hook["width"] == width) & of_hook["sae"].isin(in_group)]
    if len(of_width) > 1:
        where = f"{model_name(lab)} · {chosen.hook_point} · width {width:,}"
        findings.figures["sparsities"] = ce_recovered(of_width, col.L0, where)
    return findings


def _downstream(
    contexts: Contexts,
    recorded: Recorded,
    saes: Sequence[Subject],
    probes: Mapping[str, Linear],
    model: ModelConfig,
    predicted: int,
    replicates: int,
    seed: int,
) -> pd.DataFrame:
    """The table of `measures.downstream_loss` for SAEs of one hook point, over about `predicted` tokens of split C."""
    lm = language_model(model)
    indices = recorded.contexts("C")
    kept = contexts.before_no_padding(indices, np.pad(recorded.kept("C"), ((0, 0), (recorded.first_position, 0))))
    wanted = int(np.searchsorted(kept[:, :-1].sum(1).cumsum(), predicted)) + 1
    tokens, kept = (torch.from_numpy(array).to(lm.device) for array in (contexts[indices[:wanted]], kept[:wanted]))
    patched = Patched(tokens, torch.from_numpy(recorded.groups("C")[:wanted]), kept)
    loaded = {sae.name: sae.load() for sae in saes}
    return downstream_loss(lm, patched, saes[0].hook_point, loaded, probes, replicates, seed)


# ---------------------------------------------------------------- the figures


def ce_recovered(table: pd.DataFrame, along: str = "width", title: str = "") -> Figure:
    """Bars of the cross-entropy that each part of the error recovers, beside its shares of norm and variance.

    Args:
        table: that of `measures.downstream_loss`, a row per SAE.
        along: "width" or "l0", what the SAEs differ in.
        title: the second line of the title.
    """
    table = table.sort_values(along)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.7))
        panels = figure.subplots(1, 2, sharey=True)
        place = np.arange(len(table))
        for ax, (part, (label, color)) in zip(panels, ERROR_PARTS.items(), strict=True):
            bars(ax, place, table, col.recovered(part), 0.7, color, 100)
            for share, face, shift, _ in SHARES:
                values = 100 * table[share(part)]
                ax.plot(place + shift, values, "o", color="black", markerfacecolor=face, markersize=4)
            ax.axhline(0, color="0.3", linewidth=0.6)
            ax.set_title(f"with the {label} added to Sae(x)")
            ax.set_xlabel(AXES[along])
            ticks(ax, place, table[along])
            ax.grid(True, axis="y")
        panels[0].set_ylabel("%")
        dot = {"marker": "o", "linestyle": "", "color": "black", "markersize": 4}
        bar = tuple(Patch(facecolor=color) for _, color in ERROR_PARTS.values())
        points = {label: Line2D([], [], markerfacecolor=face, **dot) for _, face, _, label in SHARES}
        handles = {"cross-entropy recovered": bar} | points
        side_by_side = {tuple: HandlerTuple(ndivide=None, pad=0)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, handler_map=side_by_side)
        figure.suptitle(headed("What each part of the error costs the language model", title))
    return figure
