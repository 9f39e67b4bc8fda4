"""What each part of an SAE's error costs the language model (analysis 5 of the dark-matter spec; Engels et al. 2024).

At the positions `kept` of every context, Sae(x), Sae(x) + ê or Sae(x) + ε replaces the activation x. Others stay
intact. Cross-entropy (CE) covers the predictions made at a replaced position, as in `raysae.lm.patched_loss`. Adding a
part v of the error recovers this share of what Sae(x) costs:

    recovered = (CE_sae − CE_v) / (CE_sae − CE_x),   v = ê (linear) or ε (nonlinear).

It is undefined (NaN) where the denominator is below 0.01 nats. Two sizes of v on the replaced rows stand beside it:

    share of the error's variance = Σ‖v − v̄‖² / Σ‖e − ē‖²,
    share of the error's norm = Σ‖v‖ / Σ‖e‖.

On the rows of the probe's fit, the variances of ê and ε add up to that of e. Where ε is nearly all of e, the share that
it recovers is near its own whatever the model does. Then what ê recovers tells whether loss is proportional to error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear
from raysae.lm.model import LanguageModel, Prefix, next_token_loss
from raysae.lm.patched_loss import LEAST_DENOMINATOR, ROWS_AT_ONCE
from raysae.sae.base import SAE

PARTS = (col.LINEAR, col.NONLINEAR)


@dataclass(frozen=True)
class Patched:
    """Contexts whose activations are replaced. No probe was fitted on them.

    tokens: (c, t) token ids.
    group: (c,) int64, the group of documents of each context.
    kept: (c, t) bool, the positions whose activation is replaced. The others stay intact.
    """

    tokens: Tensor
    group: Tensor
    kept: Tensor


@torch.no_grad()
def downstream_loss(
    lm: LanguageModel,
    patched: Patched,
    hook_point: str,
    saes: Mapping[str, SAE],
    probes: Mapping[str, Linear],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """Runs analysis 5 for the folded `saes` (by name) of one hook point.

    Args:
        lm: the language model.
        patched: the contexts.
        probes: by SAE, x → ê.

    Returns:
        A row per SAE. Columns other than `sae` and `width` come with the ends of their intervals over groups of
        documents (`…_low`, `…_high`).
        `sae`, `width`: name and number of latents.
        `l0`, `fvu`: measured on the replaced rows.
        `ce_clean`, `ce_sae`, `ce_linear`, `ce_nonlinear`: nats per token, the last two with Sae(x) + that part.
        `recovered_linear`, `variance_share_linear`, `norm_share_linear`: fractions, and the same for `nonlinear`.

    Raises:
        ValueError: no contexts, or no predictions at a replaced position.
    """
    contexts, length = patched.tokens.shape
    if not patched.kept[:, :-1].any():
        raise ValueError(f"{contexts} contexts of {length} tokens predict nothing at a replaced position")
    common = GroupSums(replicates, seed)
    sums = {name: GroupSums(replicates, seed) for name in saes}
    size = max(1, min(lm.contexts_at_once(length), ROWS_AT_ONCE // length))
    for start in range(0, contexts, size):
        part = slice(start, start + size)
        batch, group, replaced = patched.tokens[part], patched.group[part], patched.kept[part]
        if not replaced[:, :-1].any():
            continue
        prefix = lm.prefix(batch, hook_point)
        x = prefix.activation[replaced].float()  # (rows, d)
        of_row, of_prediction = (group[torch.nonzero(places.cpu())[:, 0]] for places in (replaced, replaced[:, :-1]))
        common.add(of_row, x=x.cpu(), x_squared=x.cpu().double().square())
        common.add(of_prediction, **{col.CE_CLEAN: _loss(lm, prefix, x, replaced)})
        for name, sae in saes.items():
            reconstruction, l0 = reconstruct(sae, x)
            e = x - reconstruction
            linear = probes[name](x.cpu()).to(e)
            parts = {col.LINEAR: linear, col.NONLINEAR: e - linear}
            sums[name].add(of_row, **{col.L0: l0.cpu()}, **_sizes("e", e))
            sums[name].add(of_prediction, **{col.CE_SAE: _loss(lm, prefix, reconstruction, replaced)})
            for part, v in parts.items():
                sums[name].add(of_row, **_sizes(part, v))
                sums[name].add(of_prediction, **{col.ce(part): _loss(lm, prefix, reconstruction + v, replaced)})
    return pd.DataFrame([{"sae": name, "width": sae.n, **_numbers(common, sums[name])} for name, sae in saes.items()])


def _loss(lm: LanguageModel, prefix: Prefix, replacement: Tensor, replaced: Tensor) -> Tensor:
    """Cross-entropy of the predictions made at the positions `replaced` (c, t) bool, (predictions,).

    `replacement` (rows, d) replaces the activation there.
    """
    activation = prefix.activation.clone()
    activation[replaced] = replacement.to(activation)
    loss = next_token_loss(lm.resume(prefix, activation), prefix.tokens)
    return loss[replaced[:, :-1].to(loss.device)].cpu()


def _sizes(name: str, v: Tensor) -> dict[str, Tensor]:
    v = v.cpu().double()
    return {name: v, f"{name}_squared": v.square(), f"{name}_norm": torch.linalg.vector_norm(v, dim=1)}


def _numbers(common: GroupSums, sums: GroupSums) -> dict[str, float]:
    clean, damaged = common.mean(col.CE_CLEAN), sums.mean(col.CE_SAE)
    fvu = sums["e_squared"].sum(1) / common.variation("x").sum(1)
    numbers = {col.L0: sums.mean(col.L0), col.FVU: fvu, col.CE_CLEAN: clean, col.CE_SAE: damaged}
    for part in PARTS:
        ce = sums.mean(col.ce(part))
        numbers[col.ce(part)] = ce
        numbers[col.recovered(part)] = torch.where(
            damaged - clean >= LEAST_DENOMINATOR, (damaged - ce) / (damaged - clean), torch.nan
        )
        numbers[col.variance_share(part)] = sums.variation(part).sum(1) / sums.variation("e").sum(1)
        numbers[col.norm_share(part)] = sums.mean(f"{part}_norm") / sums.mean("e_norm")
    return with_intervals(numbers, sums.groups)
