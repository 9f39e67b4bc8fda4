"""TODO docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from raysae.analysis.dark_matter.measures import breakdown
from raysae.analysis.dark_matter.measures.error_regression import ErrorRegression, error_regression
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.config import SAEConfig

GROUP = 3  # SAEs that share a task's pass over the activations


# ---------------------------------------------------------------- 1 and 2


def regressions(lab: Lab, hook_point: str, saes: Mapping[str, Subject]) -> dict[str, ErrorRegression]:
    """Analyses 1 and 2 of each of `saes`, worked out or read."""
    recorded = lab.record([hook_point])
    by_width = sorted(saes.values(), key=lambda sae: sae.width)
    tasks = -(-len(by_width) // GROUP)
    groups = [by_width[i::tasks] for i in range(tasks)]  # wide and narrow ones together: tasks of like length
    parts = [
        Task("error_regression", lab.key(*group), _regress, (recorded, hook_point, group, lab.replicates, lab.seed)) for group in groups
    ]  # fmt: skip
    return {name: found for group in lab.run(parts) for name, found in group.items()}


def _regress(recorded: Recorded, hook_point: str, saes: Sequence[Subject], replicates: int, seed: int) -> dict[str, ErrorRegression]:
    return error_regression(recorded.open(), hook_point, {sae.name: sae.load() for sae in saes}, replicates, seed)


def regression_table(lab: Lab, saes: Mapping[str, Subject], found: Mapping[str, ErrorRegression]) -> pd.DataFrame:
    """A row per SAE: sae, hook_point, layer, width, architecture, and `ErrorRegression.row`."""
    rows = []
    for name, result in found.items():
        sae = saes[name]
        layer = next((int(part) for part in sae.hook_point.split(".") if part.isdigit()), 0)
        known = {"sae": name, "hook_point": sae.hook_point, "layer": layer, "width": sae.width, "architecture": sae.params.get("architecture", "")}
        rows.append(known | result.row())
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Shown:
    """One SAE per width at a hook point, those with the L0 nearest to the target, narrowest first: what the figures against width show."""

    hook_point: str
    table: pd.DataFrame
    results: dict[str, ErrorRegression]
    saes: dict[str, Subject]

    @property
    def probes(self) -> dict[str, Linear]:
        return {name: result.probe for name, result in self.results.items()}

    @property
    def central(self) -> Subject:
        """The one in the middle: analyses of a single SAE take it."""
        return list(self.saes.values())[(len(self.saes) - 1) // 2]


def main_hook_point(lab: Lab) -> str:
    """The one with the most SAEs."""
    return max(lab.hook_points, key=lambda hook: len(lab.of(hook)))


def shown(lab: Lab) -> Shown:
    """Of the main hook point, and of the architecture with the most SAEs there."""
    hook_point = main_hook_point(lab)
    saes = lab.of(hook_point)
    found = regressions(lab, hook_point, saes)
    table = regression_table(lab, saes, found)
    table = table[table["architecture"] == table["architecture"].mode()[0]]
    table = breakdown.at_nearest_l0(table, lab.config.target_l0).reset_index(drop=True)
    names = list(table["sae"])
    return Shown(hook_point, table, {name: found[name] for name in names}, {name: saes[name] for name in names})


def topk_like(lab: Lab, chosen: Shown, sae: Subject) -> SAEConfig:
    """A TopK SAE of the width and L0 of `sae`."""
    l0 = float(chosen.table.set_index("sae").loc[sae.name, "l0"])
    k = min(sae.width, max(1, round(l0)))
    return SAEConfig(architecture="topk", hook_point=sae.hook_point, width=sae.width, k=k, learning_rate=lab.sweep.learning_rates[0])


def model_name(lab: Lab) -> str:
    return Path(lab.plan.config.model.name).name


def described(lab: Lab, chosen: Shown) -> str:
    return f"{model_name(lab)} · {chosen.hook_point} · L0 {chosen.table['l0'].median():.3g}"


def per_hook_point(name: str, hook_point: str, lab: Lab) -> str:
    return name if len(lab.hook_points) == 1 else f"{name}_{hook_point}"
