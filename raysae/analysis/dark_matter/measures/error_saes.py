"""SAEs trained on the parts of another SAE's error (analysis 6 of the dark-matter spec, Engels et al. 2024).

An ordinary sweep trains them on e, ê or ε instead of x (`raysae.train.errors`), with several seeds each. This module
compares them on held-out rows: how well can e, ê and ε be decomposed?

They are compared at equal L0. On every row each SAE keeps as many of its largest latents as the SAE with the fewest
active ones has there. TopK SAEs of one k differ in L0 only where fewer than k latents are positive.

Documents and seeds are two sources of chance. With S seeds, the values of the seeds have a t interval of S − 1 degrees
of freedom. It adds to the interval over documents by the rule of Zou and Donner (2008, Statistics in Medicine 27:1693):
distances of the ends from the value add up in squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Activity, encoded, reconstruct
from raysae.analysis.instruments.intervals import LEVEL, REPLICATES, Estimate, GroupSums
from raysae.analysis.instruments.regression import Linear
from raysae.sae.base import SAE, Codes


@torch.no_grad()
def error_saes(
    activations: Activations,
    hook_point: str,
    sae: SAE,
    probe: Linear,
    trained: Mapping[str, Sequence[SAE]],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compares SAEs trained on e, ê or ε of `sae` and its `probe`.

    `trained` maps "error", "linear" and "nonlinear" to the folded SAEs trained on e, ê and ε, one per seed. The seeds
    come in the same order everywhere.

    Returns:
        Two tables. The first has a row per kind, with intervals over documents and seeds.
        kind, width, seeds: key in `trained`, number of latents, number of SAEs.
        fvu_equal_l0: FVU of the SAEs' own rows at equal L0, the mean over seeds.
        equal_l0: mean active latents then.
        worse: geometric mean over seeds of fvu_equal_l0/fvu_equal_l0(linear), less 1.
        share: variance of the SAEs' own rows as a fraction of e's.
        fvu, l0, dead_fraction: means over seeds of what the second table has.

        The second has a row per SAE.
        kind, seed: key in `trained`, and which of its SAEs, counted from 0.
        fvu, l0: FVU of its own rows, and mean active latents, as it is.
        fvu_equal_l0: FVU at equal L0.
        dead_fraction: share of latents that are active on no row of A, B and C.
    """
    saes = {(kind, i): made for kind, group in trained.items() for i, made in enumerate(group)}
    sums = GroupSums(replicates, seed)
    activity = {key: Activity(made.n) for key, made in saes.items()}
    for split in "ABC":
        for chunk in activations.chunks(split):
            parts = error_parts(chunk.x[hook_point], sae, probe)
            codes = {key: ranked(made, parts[key[0]]) for key, made in saes.items()}
            for key, those in codes.items():
                activity[key].add(those)
            if split == "C":
                sums.add(chunk.group, **_of_rows(parts, saes, codes))
    dead = {key: float((seen.count == 0).double().mean()) for key, seen in activity.items()}
    return _tables(trained, sums, dead)


def ranked(sae: SAE, x: Tensor) -> Codes:
    """The active latents of `x` (b, d), the largest value first. Unused places have the value 0."""
    pieces = []
    for _, codes in encoded(sae, x):
        if isinstance(codes, Codes):
            values, order = codes.values.sort(dim=1, descending=True)
            pieces.append(Codes(values, codes.indices.gather(1, order)))
        else:
            pieces.append(Codes(*codes.topk(max(1, int((codes > 0).sum(1).max())))))
    longest = max(piece.values.shape[1] for piece in pieces)
    padded = [
        [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in (piece.values, piece.indices)]
        for piece in pieces
    ]
    values, indices = (torch.cat(part) for part in zip(*padded, strict=True))
    return Codes(values, indices)


def _of_rows(
    parts: Mapping[str, Tensor], saes: Mapping[tuple[str, int], SAE], codes: Mapping[tuple[str, int], Codes]
) -> dict[str, Tensor]:
    """What the tables need of each row: squared errors and L0 of each SAE, as it is and at equal L0."""
    l0 = {key: (those.values > 0).sum(1) for key, those in codes.items()}
    equal = torch.stack(list(l0.values())).amin(0)
    rows = {"equal_l0": equal}
    for kind, y in parts.items():
        rows |= {kind: y, f"{kind}_squared": y.double().square()}
    for (kind, i), those in codes.items():
        kept = torch.arange(those.values.shape[1], device=equal.device) < equal.unsqueeze(1)
        for name, values in (("missed", those.values), ("missed_equal", those.values * kept)):
            made = saes[kind, i].decode(Codes(values, those.indices)).to(parts[kind])
            rows[f"{kind}_{i}_{name}"] = (parts[kind].double() - made).square().sum(1)
        rows[f"{kind}_{i}_l0"] = l0[kind, i]
    return {name: values.cpu() for name, values in rows.items()}


def _tables(
    trained: Mapping[str, Sequence[SAE]], sums: GroupSums, dead: Mapping[tuple[str, int], float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    variance = {kind: sums.variation(kind).sum(1) for kind in (*trained, col.ERROR)}

    def fvu(kind: str, i: int, name: str) -> Tensor:
        return sums[f"{kind}_{i}_{name}"].squeeze(1) / variance[kind]

    equal = {kind: [fvu(kind, i, "missed_equal") for i in range(len(group))] for kind, group in trained.items()}
    rows, of_saes = [], []
    for kind, group in trained.items():
        of_saes += [
            {
                col.KIND: kind, col.SEED: i, col.FVU: float(fvu(kind, i, "missed")[0]),
                col.L0: float(sums.mean(f"{kind}_{i}_l0")[0]), col.FVU_EQUAL_L0: float(equal[kind][i][0]),
                col.DEAD_FRACTION: dead[kind, i],
            }
            for i in range(len(group))
        ]  # fmt: skip
        row = {col.KIND: kind, "width": group[0].n, col.SEEDS: len(group)}
        row |= over_seeds(col.FVU_EQUAL_L0, equal[kind], sums.groups) | {col.EQUAL_L0: float(sums.mean("equal_l0")[0])}
        if col.LINEAR in trained:
            ratios = [(own / other).log() for own, other in zip(equal[kind], equal[col.LINEAR], strict=True)]
            row |= {name: math.expm1(value) for name, value in over_seeds(col.WORSE, ratios, sums.groups).items()}
        rows.append(row | {col.SHARE: float((variance[kind] / variance[col.ERROR])[0])})
    each = pd.DataFrame(of_saes)
    means = each.groupby(col.KIND)[[col.FVU, col.L0, col.DEAD_FRACTION]].mean()
    return pd.DataFrame(rows).join(means, on=col.KIND), each


def over_seeds(name: str, values: Sequence[Tensor], groups: int) -> dict[str, float]:
    """The mean over seeds under `name`, and the ends of its interval over documents and seeds.

    `values` has a number and its replicates over `groups` per seed, (1 + r,) each. A single seed gives no interval.
    """
    every = torch.stack(list(values))
    documents = Estimate.of(every.mean(0), groups)
    seeds = every[:, 0].numpy()
    half = math.nan
    if len(seeds) > 1:
        half = stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1) * seeds.std(ddof=1) / np.sqrt(len(seeds))
    below, above = (math.hypot(end - documents.value, half) for end in (documents.low, documents.high))
    return {
        name: documents.value,
        col.low(name): documents.value - below,
        col.high(name): documents.value + above,
    }


def error_parts(x: Tensor, sae: SAE, probe: Linear) -> dict[str, Tensor]:
    """e, ê and ε of the rows `x` (b, d), as "error", "linear" and "nonlinear", (b, d) float32 each."""
    e = x.double() - reconstruct(sae, x)[0].double()
    linear = probe(x)
    return {col.ERROR: e.float(), col.LINEAR: linear.float(), col.NONLINEAR: (e - linear).float()}
