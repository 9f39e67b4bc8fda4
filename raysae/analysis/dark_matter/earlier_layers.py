"""The figures of analyses 5, 7 and 8, from their tables, in the style of `figures`: every function returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from raysae.analysis.dark_matter.error_regression import r2_per_layer
from raysae.analysis.dark_matter.measures.earlier_layers import earlier_layers
from raysae.analysis.dark_matter.probes import model_name, regression_table, regressions, shown, topk_like
from raysae.analysis.instruments.plots import (
    PAPER_WIDTH,
    SOURCE_PARTS,
    STYLE,
    headed,
)
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task

TARGET_TITLES = {"e": "error e", "ê": "linear error ê", "ε": "nonlinear error ε"}


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
        figure.suptitle(headed("What other hook points know of the error", title))
    return figure


# ---------------------------------------------------------------- 8


def run(lab: Lab) -> Findings:
    """Analysis 8: the central SAE's error from what is known at the same residual, the previous one and this layer's MLP and attention.

    SAEs that the sweep lacks there are trained, TopK with the central SAE's width and L0, all on one pass of the language model.
    """
    chosen = shown(lab)
    sae = chosen.central
    hooks = earlier_hook_points(lab, chosen.hook_point)
    with_saes = [hook for hook in hooks if not hook.startswith("attn_z")]  # its activation alone: attn_out is a linear function of it
    there = {chosen.hook_point: sae} | {hook: _alike(lab, hook, sae) for hook in with_saes if lab.of(hook)}
    lacking = [hook for hook in with_saes if hook not in there]
    if lacking:
        made = lab.train("earlier", lacking, [sae.width], topk_like(lab, chosen, sae), lab.train_tokens)
        there |= {subject.hook_point: subject for subject in made.values()}
    recorded = lab.record([chosen.hook_point, *hooks])
    part = Task("earlier_layers", lab.key(*there.values(), hooks=hooks), _predict, (recorded, chosen.hook_point, there, lab.replicates, lab.seed))
    table = lab.run([part])[0].assign(hook_point=chosen.hook_point)
    findings = Findings("earlier_layers", part.key, pd.DataFrame({"sae": [sae.name]}), tables={"earlier_layers": table})
    free = table[~table["by_definition"]]
    for row in free[free["part"] == "reconstruction"].itertuples():
        findings.numbers[f"r2_{_ascii(row.target)}_from_reconstruction/{row.source}"] = row.r2
    residuals = {chosen.hook_point: {sae.name: chosen.results[sae.name]}}
    for hook, other in there.items():
        if hook.startswith("resid_post") and hook != chosen.hook_point:
            residuals[hook] = regressions(lab, hook, {other.name: other})
    subjects = {subject.name: subject for subject in there.values()}
    findings.tables["layers"] = pd.concat([regression_table(lab, subjects, found) for found in residuals.values()], ignore_index=True)
    if findings.tables["layers"]["layer"].nunique() > 1:
        findings.figures["layers"] = r2_per_layer(findings.tables["layers"], f"{model_name(lab)} · width {sae.width:,}")
    findings.figures["earlier_layers"] = earlier_layer_bars(table, title=f"{model_name(lab)} · {sae.name}")
    return findings


def earlier_hook_points(lab: Lab, hook_point: str) -> list[str]:
    """The previous residual, and this layer's MLP and attention output and the attention's own, as far as the model has them."""
    kinds, layer = lab.plan.facts.kinds, int(hook_point.split(".")[1])
    previous = f"resid_post.{layer - 1}" if layer else "resid_pre.0"
    hooks = [previous] + [f"{kind}.{layer}" for kind in ("mlp_out", "attn_out", "attn_z") if kind in kinds]
    return [hook for hook in hooks if hook != hook_point]


def _alike(lab: Lab, hook_point: str, sae: Subject) -> Subject:
    """The study's SAE at `hook_point` that is most like `sae` in width, then in L0."""
    l0 = float(sae.metrics.get("l0", 1))
    return min(lab.of(hook_point).values(), key=lambda other: (abs(np.log(other.width / sae.width)), abs(float(other.metrics.get("l0", 1)) - l0)))


def _predict(recorded: Recorded, target: str, saes: Mapping[str, Subject], replicates: int, seed: int) -> pd.DataFrame:
    return earlier_layers(recorded.open(), target, {hook: sae.load() for hook, sae in saes.items()}, None, replicates, seed)


# ---------------------------------------------------------------- small parts


def _ascii(target: str) -> str:
    return {"e": "error", "ê": "linear", "ε": "nonlinear"}[target]
