"""The regressions of every SAE's error, and which SAEs the figures show. Most experiments begin here.

A regression is a task whose result is kept, so the first experiment of a study works it out and all others read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from raysae.analysis.dark_matter.measures.breakdown import at_nearest_l0
from raysae.analysis.dark_matter.measures.error_regression import ErrorRegression, error_regression
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.regression import Linear
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.config import SAEConfig
from raysae.sweep.notes import SPOILT

GROUP = 3  # How many SAEs share a task's pass over the activations.


# ---------------------------------------------------------------- the regressions


def regressions(lab: Lab, hook_point: str, saes: Mapping[str, Subject]) -> dict[str, ErrorRegression]:
    """The regressions (analyses 1 and 2) of each of `saes`, all of one hook point, by name.

    Warns where a few outliers hold much of the variance.
    """
    recorded, outlier_norm = lab.record([hook_point]), lab.sweep.evaluation.outlier_norm
    by_width = sorted(saes.values(), key=lambda sae: sae.width)
    count = -(-len(by_width) // GROUP)
    groups = [by_width[i::count] for i in range(count)]  # Each mixes wide and narrow SAEs, so tasks take alike.
    tasks = [
        Task(
            "error_regression",
            lab.key(*group, outlier_norm=outlier_norm),
            _regress,
            (recorded, hook_point, group, lab.replicates, lab.seed, outlier_norm),
        )
        for group in groups
    ]
    found = {name: result for group in lab.run(tasks) for name, result in group.items()}
    for result in found.values():
        lab.warn(outliers_told(hook_point, result.largest_rows_share, outlier_norm))
    return found


def outliers_told(hook_point: str, share: float, outlier_norm: float) -> str | None:
    """What outliers do to the numbers where the largest rows hold that `share` of the variance. None: they are sound.

    `outlier_norm` is the multiple of the median norm above which a row is an outlier.
    """
    if not share > SPOILT:
        return None
    return (
        f"{hook_point}: the largest 0.1 % of the rows in C hold {share:.0%} of the variance, so FVU and R² say little "
        f"of the others. fvu_inliers is without rows of more than {outlier_norm:g} times the median norm. "
        f"--stream.leave_out_norm {outlier_norm:g} leaves such rows out of every analysis."
    )


def _regress(
    recorded: Recorded, hook_point: str, saes: Sequence[Subject], replicates: int, seed: int, outlier_norm: float
) -> dict[str, ErrorRegression]:
    loaded = {sae.name: sae.load() for sae in saes}
    return error_regression(recorded.open(), hook_point, loaded, replicates, seed, outlier_norm)


def regression_table(lab: Lab, saes: Mapping[str, Subject], found: Mapping[str, ErrorRegression]) -> pd.DataFrame:
    """A row per SAE: sae, hook_point, layer, width, architecture, alike, and `ErrorRegression.row`."""
    rows = []
    for name, result in found.items():
        sae = saes[name]
        layer = next((int(word) for word in sae.hook_point.split(".") if word.isdigit()), 0)
        architecture = sae.params.get("architecture", "")
        known = {"sae": name, "hook_point": sae.hook_point, "layer": layer, "width": sae.width}
        rows.append(known | {"architecture": architecture, col.ALIKE: alike(sae.params)} | result.row())
    return pd.DataFrame(rows)


def alike(params: Mapping[str, str]) -> str:
    """Architecture, learning rate and seed of an SAE in words. Empty for one that no sweep trained."""
    named = {"architecture": "", "learning_rate": "learning rate ", "seed": "seed "}
    return ", ".join(f"{label}{params[knob]}" for knob, label in named.items() if params.get(knob))


# ---------------------------------------------------------------- what the figures show


def largest_group(table: pd.DataFrame) -> pd.DataFrame:
    """The SAEs of `table` of one architecture, learning rate and seed: of most widths, then of most SAEs."""
    sizes = table.groupby(col.ALIKE, sort=False)["width"].agg(["nunique", "size"])
    return table[table[col.ALIKE] == sizes.sort_values(["nunique", "size"], ascending=False, kind="stable").index[0]]


@dataclass(frozen=True)
class Shown:
    """The SAEs that figures against width show: one per width at a hook point, narrowest first.

    All have one architecture, learning rate and seed. Each is the SAE of its width whose L0 is nearest to the target.
    """

    hook_point: str
    table: pd.DataFrame
    results: dict[str, ErrorRegression]
    saes: dict[str, Subject]

    @property
    def probes(self) -> dict[str, Linear]:
        """The maps x → ê, by SAE."""
        return {name: result.probe for name, result in self.results.items()}

    @property
    def central(self) -> Subject:
        """The SAE in the middle. Analyses of a single SAE take this one."""
        return list(self.saes.values())[(len(self.saes) - 1) // 2]


def main_hook_point(lab: Lab) -> str:
    """The hook point with the most SAEs."""
    return max(lab.hook_points, key=lambda hook: len(lab.of(hook)))


def shown(lab: Lab) -> Shown:
    """What the figures show: SAEs of the main hook point, of its largest group of SAEs alike."""
    hook_point = main_hook_point(lab)
    saes = lab.of(hook_point)
    found = regressions(lab, hook_point, saes)
    table = regression_table(lab, saes, found)
    table = at_nearest_l0(largest_group(table), lab.config.target_l0).reset_index(drop=True)
    names = list(table["sae"])
    return Shown(hook_point, table, {name: found[name] for name in names}, {name: saes[name] for name in names})


def topk_like(lab: Lab, chosen: Shown, sae: Subject) -> SAEConfig:
    """A TopK SAE of the width and L0 of `sae`, yet to be trained."""
    l0 = float(chosen.table.set_index("sae").loc[sae.name, col.L0])
    k = min(sae.width, max(1, round(l0)))
    rate = lab.sweep.learning_rates[0]
    return SAEConfig(architecture="topk", hook_point=sae.hook_point, width=sae.width, k=k, learning_rate=rate)


# ---------------------------------------------------------------- titles and names


def model_name(lab: Lab) -> str:
    """The language model's name without its folder."""
    return Path(lab.plan.config.model.name).name


def described(lab: Lab, chosen: Shown) -> str:
    """The second line of a figure's title: model, hook point and L0."""
    return f"{model_name(lab)} · {chosen.hook_point} · L0 {chosen.table[col.L0].median():.3g}"


def per_hook_point(name: str, hook_point: str, lab: Lab) -> str:
    """A figure's name, which has the hook point in it where there are several."""
    return name if len(lab.hook_points) == 1 else f"{name}_{hook_point}"
