"""SAEs on the parts of an error (analysis 6): the experiment, its task and its figure.

It asks whether SAEs of equal size decompose e, ê and ε equally well. An ordinary sweep trains the three, which is what
this analysis costs.
"""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.error_saes import error_saes
from raysae.analysis.dark_matter.probes import model_name, shown, topk_like
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import ORANGE, PAPER_WIDTH, PURPLE, STYLE, VERMILION, headed
from raysae.analysis.instruments.regression import Linear, save_linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.config import ERROR_KINDS, ErrorsConfig

KINDS = {
    col.ERROR: ("e", PURPLE),
    col.LINEAR: ("ê (linear)", ORANGE),
    col.NONLINEAR: ("ε (nonlinear)", VERMILION),
}


# ---------------------------------------------------------------- the experiment


def run(lab: Lab) -> Findings:
    """TopK SAEs of the central SAE's width and L0, trained on e, ê and ε of it and compared."""
    chosen = shown(lab)
    sae = chosen.central
    recorded = lab.record([chosen.hook_point])
    like = topk_like(lab, chosen, sae)
    probe = lab.folder / "probes" / f"{sae.name}.safetensors"
    probe.parent.mkdir(parents=True, exist_ok=True)
    save_linear({"probe": chosen.probes[sae.name]}, probe)
    hooks = [f"{chosen.hook_point}.{kind}" for kind in ERROR_KINDS]
    errors = ErrorsConfig(sae=sae.where, probe=str(probe))
    made = lab.train("errors", hooks, [sae.width], like, lab.train_tokens, errors)
    trained = {subject.hook_point.rpartition(".")[2]: subject for subject in made.values()}
    arguments = (recorded, sae, chosen.probes[sae.name], trained, lab.replicates, lab.seed)
    task = Task("error_saes", lab.key(sae, *trained.values()), _compare_errors, arguments)
    table = lab.run([task])[0]
    findings = Findings("error_saes", task.key, pd.DataFrame({"sae": [sae.name]}), tables={"error_saes": table})
    for kind, row in table.set_index(col.KIND).iterrows():
        for column in (col.FVU, col.L0, col.DEAD_FRACTION):
            findings.numbers[f"{kind}/{column}"] = float(row[column])
    where = f"{model_name(lab)} · {sae.name} · {lab.train_tokens:,} tokens"
    findings.figures["error_saes"] = error_sae_bars(table, where)
    return findings


def _compare_errors(
    recorded: Recorded, sae: Subject, probe: Linear, trained: Mapping[str, Subject], replicates: int, seed: int
) -> pd.DataFrame:
    loaded = {kind: subject.load() for kind, subject in trained.items()}
    return error_saes(recorded.open(), sae.hook_point, sae.load(), probe, loaded, replicates, seed)


# ---------------------------------------------------------------- the figure


def error_sae_bars(table: pd.DataFrame, title: str = "") -> Figure:
    """FVU, L0 and dead latents of SAEs on the parts of an error. `table` is that of `measures.error_saes`."""
    table = table.set_index(col.KIND).loc[[kind for kind in KINDS if kind in set(table[col.KIND])]]
    labels, colors = zip(*(KINDS[kind] for kind in table.index), strict=True)
    place = np.arange(len(table))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PAPER_WIDTH, 2.3))
        panels = figure.subplots(1, 3)
        shown = {
            col.FVU: ("FVU", 1, "{:.3f}"),
            col.L0: ("active latents per token (L0)", 1, "{:.3g}"),
            col.DEAD_FRACTION: ("dead latents (%)", 100, "{:.1f}"),
        }
        for ax, (column, (label, unit, form)) in zip(panels, shown.items(), strict=True):
            values = unit * table[column].to_numpy(float)
            tops = values
            ax.bar(place, values, 0.7, color=colors)
            if col.low(column) in table:
                tops = unit * table[col.high(column)].to_numpy(float)
                ax.vlines(place, unit * table[col.low(column)], tops, color="0.25", linewidth=1)
            for x, value, top in zip(place, values, tops, strict=True):
                ax.text(x, top, form.format(value), ha="center", va="bottom", fontsize=7)
            ax.set_xticks(place, labels)
            ax.set(ylabel=label, xlabel="trained on", ylim=(0, 1.15 * tops.max() if tops.max() > 0 else 1))
            ax.grid(True, axis="y")
        figure.suptitle(headed("SAEs on the parts of an error", title))
    return figure
