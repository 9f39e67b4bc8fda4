"""SAEs trained on the parts of another SAE's error (analysis 6 of the dark-matter spec, Engels et al. 2024).

An ordinary sweep trains them on e, ê or ε instead of x (`raysae.train.errors`). This module compares them on
held-out rows: how well can e, ê and ε be decomposed?
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Activity, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear
from raysae.sae.base import SAE


@torch.no_grad()
def error_saes(
    activations: Activations,
    hook_point: str,
    sae: SAE,
    probe: Linear,
    trained: Mapping[str, SAE],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """Compares SAEs trained on e, ê or ε of `sae` and its `probe`.

    `trained` maps "error", "linear" or "nonlinear" to the folded SAE trained on e, ê or ε.

    Returns:
        A row per SAE of `trained`. fvu, l0, worse and share are measured on C, with intervals over groups of documents.
        kind, width: key in `trained`, and number of latents.
        fvu: FVU of the SAE's own rows.
        l0: mean active latents.
        worse: fvu/fvu(linear) − 1, where there is an SAE on ê.
        share: variance of the SAE's own rows as a fraction of e's, where there is an SAE on e.
        dead_fraction: share of latents that are active on no row of A, B and C.
    """
    sums = {kind: GroupSums(replicates, seed) for kind in trained}
    activity = {kind: Activity(made.n) for kind, made in trained.items()}
    for split in "ABC":
        for chunk in activations.chunks(split):
            parts = error_parts(chunk.x[hook_point], sae, probe)
            for kind, made in trained.items():
                y = parts[kind]
                reconstruction, l0 = reconstruct(made, y, activity[kind])
                if split == "C":
                    missed = (y.double() - reconstruction).square().sum(1)
                    sums[kind].add(chunk.group, y=y, y_squared=y.double().square(), missed=missed, l0=l0)
    variance = {kind: sums[kind].variation("y").sum(1) for kind in trained}
    fvu = {kind: sums[kind]["missed"].squeeze(1) / variance[kind] for kind in trained}
    rows = []
    for kind, made in trained.items():
        numbers = {col.FVU: fvu[kind], col.L0: sums[kind].mean("l0")}
        if col.LINEAR in trained:
            numbers[col.WORSE] = fvu[kind] / fvu[col.LINEAR] - 1
        if col.ERROR in trained:
            numbers[col.SHARE] = variance[kind] / variance[col.ERROR]
        dead = float((activity[kind].count == 0).double().mean())
        rows.append(
            {col.KIND: kind, "width": made.n, **with_intervals(numbers, sums[kind].groups), col.DEAD_FRACTION: dead}
        )
    return pd.DataFrame(rows)


def error_parts(x: Tensor, sae: SAE, probe: Linear) -> dict[str, Tensor]:
    """e, ê and ε of the rows `x` (b, d), as "error", "linear" and "nonlinear", (b, d) float32 each."""
    e = x.double() - reconstruct(sae, x)[0].double()
    linear = probe(x)
    return {col.ERROR: e.float(), col.LINEAR: linear.float(), col.NONLINEAR: (e - linear).float()}
