"""SAEs on the parts of an error (analysis 6): the experiment, its task and its figure.

It asks whether SAEs of equal size decompose e, ê and ε equally well. An ordinary sweep trains them with several seeds,
which is what this analysis costs. The SAEs of a kind are one bank, and all read one pass of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from raysae.analysis.dark_matter.measures.error_saes import error_saes
from raysae.analysis.dark_matter.probes import model_name, shown, topk_like
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import L0_LABEL, ORANGE, PAPER_WIDTH, PURPLE, VERMILION, styled, titled
from raysae.analysis.instruments.regression import Linear, save_linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.config import ERROR_KINDS, ErrorsConfig, error_kind

SEEDS = 3  # SAEs per part of the error. Fewer give no honest interval.
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
    made = lab.train("errors", hooks, [sae.width], like, lab.train_tokens, errors, SEEDS)
    trained: dict[str, list[Subject]] = {kind: [] for kind in ERROR_KINDS}
    for subject in made.values():
        trained[error_kind(subject.hook_point)[0]].append(subject)
    arguments = (recorded, sae, chosen.probes[sae.name], trained, lab.replicates, lab.seed)
    task = Task("error_saes", lab.key(sae, *made.values()), _compare_errors, arguments)
    table, of_saes = lab.run([task])[0]
    findings = Findings("error_saes", task.key, pd.DataFrame({"sae": [sae.name]}))
    findings.tables = {"error_saes": table, "seeds": of_saes}
    for kind, row in table.set_index(col.KIND).iterrows():
        for column in (col.FVU, col.FVU_EQUAL_L0, col.L0, col.DEAD_FRACTION):
            findings.numbers[f"{kind}/{column}"] = float(row[column])
    where = f"{model_name(lab)} · {sae.name} · {lab.train_tokens:,} tokens"
    findings.figures["error_saes"] = error_sae_bars(table, of_saes, where)
    return findings


def _compare_errors(
    recorded: Recorded,
    sae: Subject,
    probe: Linear,
    trained: Mapping[str, Sequence[Subject]],
    replicates: int,
    seed: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    loaded = {kind: [subject.load() for subject in subjects] for kind, subjects in trained.items()}
    return error_saes(recorded.open(), sae.hook_point, sae.load(), probe, loaded, replicates, seed)


# ---------------------------------------------------------------- the figure


@styled
def error_sae_bars(table: pd.DataFrame, of_saes: pd.DataFrame, title: str = "") -> Figure:
    """FVU at equal L0, L0 and dead latents of SAEs on the parts of an error. A circle is one seed.

    `table` and `of_saes` are those of `measures.error_saes`.
    """
    table = table.set_index(col.KIND).loc[[kind for kind in KINDS if kind in set(table[col.KIND])]]
    labels, colors = zip(*(KINDS[kind] for kind in table.index), strict=True)
    place = np.arange(len(table))
    figure = Figure(figsize=(PAPER_WIDTH, 2.4))
    shown = {
        col.FVU_EQUAL_L0: (f"FVU at L0 {table[col.EQUAL_L0].mean():.3g}", 1, "{:.3f}"),
        col.L0: (L0_LABEL, 1, "{:.3g}"),
        col.DEAD_FRACTION: ("dead latents (%)", 100, "{:.1f}"),
    }
    for ax, (column, (label, unit, form)) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        values = unit * table[column].to_numpy(float)
        ax.bar(place, values, 0.7, color=colors)
        seeds = [unit * of_saes.loc[of_saes[col.KIND] == kind, column].to_numpy(float) for kind in table.index]
        tops = np.array([max(value, *each) for value, each in zip(values, seeds, strict=True)])
        for x, each in zip(place, seeds, strict=True):
            shift = np.linspace(-0.2, 0.2, len(each)) if len(each) > 1 else [0]
            ax.plot(x + shift, each, "o", color="black", markerfacecolor="white", markersize=3, markeredgewidth=0.7)
        if col.low(column) in table:
            high = unit * table[col.high(column)].to_numpy(float)
            ax.vlines(place, unit * table[col.low(column)], high, color="0.25", linewidth=1)
            tops = np.fmax(tops, high)
        for x, value, top in zip(place, values, tops, strict=True):
            ax.text(x, top, form.format(value), ha="center", va="bottom", fontsize=7)
        ax.set_xticks(place, labels)
        ax.set(ylabel=label, xlabel="trained on", ylim=(0, 1.15 * tops.max() if tops.max() > 0 else 1))
        ax.grid(True, axis="y")
    titled(figure, "SAEs on the parts of an error", title)
    return figure
