"""What other hook points know of the error (analysis 8): the experiment, its task and its figure.

It needs SAEs at the hook points before that of the central SAE. Where the sweep has none there, it has them trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from raysae.analysis.dark_matter.error_regression import r2_per_layer
from raysae.analysis.dark_matter.measures.earlier_layers import (
    beyond_pursuit,
    depends,
    earlier_hook_points,
    earlier_layers,
)
from raysae.analysis.dark_matter.probes import Shown, model_name, regression_table, regressions, shown, topk_like
from raysae.analysis.dark_matter.pursuit import PURSUIT_ROWS, pursuit_tasks
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import PAPER_WIDTH, SOURCE_PARTS, STYLE, decimals, headed
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task, language_model
from raysae.config import ModelConfig
from raysae.lm.layout import KINDS
from raysae.text.contexts import Contexts

TARGET_TITLES = {"e": "error e", "ê": "linear error ê", "ε": "nonlinear error ε"}
TARGET_METRICS = {"e": col.ERROR, "ê": col.LINEAR, "ε": col.NONLINEAR}  # Names of metrics are plain ASCII.
GAP = 0.8  # Between the bars of two sources, in bars.


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """Predicts the central SAE's error from the same residual, the previous one, and this layer's MLP and attention.

    One pass of the language model trains the SAEs that the sweep lacks there. They are TopK SAEs with the central SAE's
    width and L0. R² is measured on the rows that pursuit is measured on, since a claim compares the two.
    """
    chosen = shown(lab)
    sae = chosen.central
    hooks = earlier_places(lab, chosen.hook_point)
    there = _saes_at(lab, chosen, hooks)
    recorded = lab.record([chosen.hook_point, *hooks])
    arguments = (recorded, chosen.hook_point, there, lab.replicates, lab.seed)
    key = lab.key(*there.values(), hooks=hooks, rows=PURSUIT_ROWS)
    (of_pursuit,) = pursuit_tasks(lab, replace(chosen, saes={sae.name: sae}))
    table, pursued = lab.run([Task("earlier_layers", key, _predict, arguments), of_pursuit])
    beyond = beyond_pursuit(table, chosen.hook_point, pursued)
    findings = Findings("earlier_layers", key, pd.DataFrame({"sae": [sae.name]}))
    free = table[~table[col.BY_DEFINITION]]
    for _, row in free[free[col.PART] == "reconstruction"].iterrows():
        metric = f"{col.R2}_{TARGET_METRICS[row[col.TARGET]]}_from_reconstruction/{row[col.SOURCE]}"
        findings.numbers[metric] = float(row[col.R2])
    if len(beyond):
        findings.numbers |= beyond[[col.EXPLAINED, col.ENCODER_SHARE, col.LEAD]].iloc[0].astype(float).to_dict()
    layers = _layers(lab, chosen, there)
    findings.tables = {"earlier_layers": table, "beyond_pursuit": beyond, "layers": layers}
    if layers["layer"].nunique() > 1:
        findings.figures["layers"] = r2_per_layer(layers, f"{model_name(lab)} · width {sae.width:,}")
    share = float(pursued[col.ENCODER_SHARE].iloc[0])
    where = f"{model_name(lab)} · {sae.name}"
    findings.figures["earlier_layers"] = earlier_layer_bars(table, title=where, pursued=share)
    return findings


def earlier_places(lab: Lab, hook_point: str) -> list[str]:
    """The hook points before `hook_point` that analysis 8 reads.

    Only at an MLP the model has to be asked: whether the block's attention comes first.
    """
    places = _present(lab, earlier_hook_points(hook_point, KINDS, attention_first=True))
    without = earlier_hook_points(hook_point, KINDS, attention_first=False)
    of_attention = [place for place in places if place not in without]
    if not of_attention:
        return places
    key = [lab.plan.facts.digest, hook_point, of_attention[0]]
    gpus = lab.config.resources.producer_gpus
    arguments = (lab.plan.config.model, hook_point, of_attention[0])
    task = Task("attention_first", key, _depends, arguments, gpus=gpus, contexts=True)
    return places if lab.run([task])[0] else [place for place in places if place not in of_attention]


def _present(lab: Lab, places: list[str]) -> list[str]:
    """Those of the hook points that their layer has. Blocks of a model may differ."""
    having = {kind: lab.plan.facts.layers_with(kind) for kind in lab.plan.facts.kinds}
    split = {place: place.split(".") for place in places}
    return [place for place, (kind, layer) in split.items() if int(layer) in having.get(kind, ())]


def _depends(contexts: Contexts, model: ModelConfig, target: str, source: str) -> bool:
    lm = language_model(model)
    return depends(lm, torch.from_numpy(contexts[np.arange(1)]).to(lm.device), target, source)


def _saes_at(lab: Lab, chosen: Shown, hooks: list[str]) -> dict[str, Subject]:
    """The central SAE and one SAE per hook point of `hooks`, by hook point. Trains those that the sweep lacks."""
    sae = chosen.central
    there = {chosen.hook_point: sae} | {hook: _alike(lab, hook, sae) for hook in hooks if lab.of(hook)}
    lacking = [hook for hook in hooks if hook not in there]
    if lacking:
        made = lab.train("earlier", lacking, [sae.width], topk_like(lab, chosen, sae), lab.train_tokens)
        there |= {subject.hook_point: subject for subject in made.values()}
    return there


def _alike(lab: Lab, hook_point: str, sae: Subject) -> Subject:
    """The study's SAE at `hook_point` that is most like `sae` in width, then in L0."""

    def l0(of: Subject) -> float:
        return float(of.metrics.get(col.L0, 1))

    def distance(other: Subject) -> tuple[float, float]:
        return abs(np.log(other.width / sae.width)), abs(l0(other) - l0(sae))

    return min(lab.of(hook_point).values(), key=distance)


def _layers(lab: Lab, chosen: Shown, there: Mapping[str, Subject]) -> pd.DataFrame:
    """The regressions of the central SAE and of those at other residuals, a row each."""
    central = chosen.central.name
    residuals = {chosen.hook_point: {central: chosen.results[central]}}
    for hook, other in there.items():
        if hook.startswith("resid_") and hook != chosen.hook_point:
            residuals[hook] = regressions(lab, hook, {other.name: other})
    subjects = {subject.name: subject for subject in there.values()}
    return pd.concat([regression_table(lab, subjects, found) for found in residuals.values()], ignore_index=True)


def _predict(recorded: Recorded, target: str, saes: Mapping[str, Subject], replicates: int, seed: int) -> pd.DataFrame:
    loaded = {hook: sae.load() for hook, sae in saes.items()}
    return earlier_layers(recorded.open(), target, loaded, replicates, seed, PURSUIT_ROWS)


# ---------------------------------------------------------------- the figure


def earlier_layer_bars(
    table: pd.DataFrame, column: str = col.R2, title: str = "", pursued: float | None = None
) -> Figure:
    """Bars of R² per source and what of it is read, a panel per target.

    Args:
        table: that of `measures.earlier_layers`.
        column: "r2" or "r2_weighted".
        title: the second line of the title.
        pursued: the share of ε that pursuit removes, a line in its panel.
    """
    sources = list(dict.fromkeys(table[col.SOURCE]))
    parts = [part for part in SOURCE_PARTS if part in set(table[col.PART])]
    there = set(zip(table[col.SOURCE], table[col.PART], strict=True))
    rows = [(source, part) for source in sources for part in parts if (source, part) in there]
    place = np.arange(len(rows)) + GAP * np.array([sources.index(source) for source, _ in rows])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 0.9 + 0.16 * place.max()))
        panels = figure.subplots(1, len(TARGET_TITLES), sharey=True, sharex=True)
        for ax, (target, label) in zip(panels, TARGET_TITLES.items(), strict=True):
            of_target = table[table[col.TARGET] == target].set_index([col.SOURCE, col.PART])
            for y, row in zip(place, rows, strict=True):
                _bar(ax, y, of_target.loc[row], column, SOURCE_PARTS[row[1]][1])
            ax.set_title(f"predicting the {label}")
            ax.set_xlabel("R² (mean over dimensions)" if column == col.R2 else "R² (variance-weighted)")
            ax.grid(True, axis="x")
            ax.grid(False, axis="y")
            ax.tick_params(axis="y", length=0)
        panels[0].set_xlim(0, 1.12)
        panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        centres = [np.mean([y for y, row in zip(place, rows, strict=True) if row[0] == source]) for source in sources]
        panels[0].set_yticks(centres, sources)
        panels[0].set_ylim(place.max() + GAP, -GAP)
        handles: list[Artist] = [
            Patch(facecolor=color, label=label) for part, (label, color) in SOURCE_PARTS.items() if part in parts
        ]
        if table[col.BY_DEFINITION].any():
            hatched = {"facecolor": "white", "edgecolor": "0.4", "hatch": "/////", "linewidth": 0.6}
            handles.append(Patch(label="1 by definition", **hatched))
        if pursued is not None:
            handles.append(panels[-1].axvline(pursued, color="black", linestyle=":", linewidth=1, label="pursuit"))
        below = {"loc": "outside lower center", "ncols": len(handles), "columnspacing": 1, "handlelength": 1.2}
        figure.legend(handles=handles, title="predicted from", title_fontsize=7, **below)
        figure.suptitle(headed("What other hook points know of the error", title))
    return figure


def _bar(ax: Axes, y: float, row: pd.Series, column: str, color: str) -> None:
    """One bar with its interval and its number. A hatched one stands for what is so by definition."""
    known = bool(row[col.BY_DEFINITION])
    look = {"color": color, "edgecolor": "none", "hatch": ""}
    if known:
        look = {"color": "white", "edgecolor": color, "hatch": "/////"}
    ax.barh(y, max(row[column], 0), 0.85, linewidth=0.6, **look)
    if not known and np.isfinite(row[column]):
        low, high = row[col.low(column)], row[col.high(column)]
        ax.plot([low, high], [y, y], color="black", linewidth=0.8)
        ax.text(np.nanmax([high, row[column], 0]) + 0.015, y, decimals(row[column], 2), va="center", fontsize=5.5)
