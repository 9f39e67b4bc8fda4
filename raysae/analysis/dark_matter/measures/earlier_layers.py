"""How much of an SAE's error is a linear function of what is known elsewhere.

This is analysis 8 of the dark-matter spec (Engels et al. 2024). Least squares predicts e, ê and ε of the SAE at one
hook point. Sources are at several: the same hook point, and those that `earlier_hook_points` names.
A hook point with an SAE gives five sources:

    activation x', reconstruction Sae(x'), error e', linear error ê', nonlinear error ε'.

A hook point without one gives the activation alone. Probes for ê' are fitted on A, the regressions on B. R² is measured
on C.

At the target's own hook point some sources determine a target by definition. x gives ê, and each of e, ê and ε gives
itself. `by_definition` marks these rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.dark_matter.measures.pursuit import first_chunks
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Chunk, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, replicated, with_intervals
from raysae.analysis.instruments.regression import Linear, Moments, add_prediction, add_target, r2
from raysae.config import UserError
from raysae.lm.model import LanguageModel
from raysae.sae.base import SAE

TARGETS = ("e", "ê", "ε")
RESIDUAL, ATTENTION, MLP = ("resid_pre", "resid_post"), ("attn_out", "attn_z"), ("mlp_out", "mlp_act")
BY_DEFINITION = {("activation", "ê"), ("error", "e"), ("linear error", "ê"), ("nonlinear error", "ε")}


# ---------------------------------------------------------------- which hook points come earlier


def earlier_hook_points(target: str, kinds: Collection[str], attention_first: bool = True) -> list[str]:
    """The previous residual, and what this layer's MLP and attention give, where the target depends on them.

    None is the target's own tensor under another name. resid_pre.l is resid_post.(l − 1), so its layer is l − 1.
    attn_z is left out for attn_out, which is a linear function of it.

    Args:
        target: a hook point.
        kinds: the kinds of hook point that the model has.
        attention_first: whether the block's MLP reads what its attention adds. It does not in parallel blocks.
    """
    kind, _, number = target.partition(".")
    layer = int(number)
    if kind == "resid_pre":
        if layer == 0:
            return []
        previous, layer = f"resid_pre.{layer - 1}", layer - 1
    else:
        previous = f"resid_post.{layer - 1}" if layer else "resid_pre.0"
    of_layer: tuple[str, ...] = ()
    if kind in RESIDUAL:
        of_layer = ("mlp_out", *ATTENTION)
    elif kind in MLP and attention_first:
        of_layer = ATTENTION
    return [previous, *(f"{kind}.{layer}" for kind in of_layer if kind in kinds)]


def depends(lm: LanguageModel, tokens: Tensor, target: str, source: str) -> bool:
    """Whether the activation at the hook point `target` changes when that at `source` is replaced by zeros.

    `tokens` (c, t) are token ids.
    """
    seen = []

    def keep(activation: Tensor) -> Tensor:
        seen.append(activation.double())
        return activation

    for replaced in ({}, {source: torch.zeros_like}):
        lm.logits(tokens, {**replaced, target: keep})
    return float((seen[1] - seen[0]).norm()) > 1e-3 * float(seen[0].norm())


# ---------------------------------------------------------------- the regressions


@torch.no_grad()
def earlier_layers(
    activations: Activations,
    target: str,
    saes: Mapping[str, SAE],
    replicates: int = REPLICATES,
    seed: int = 0,
    rows: int | None = None,
) -> pd.DataFrame:
    """Runs analysis 8 for the SAE at the hook point `target`.

    Args:
        activations: at `target` and at every other source.
        saes: folded, by hook point. One is at `target`.
        rows: R² is measured on about so many rows of C. Unset: on all.

    Returns:
        A row per source, part and target.
        `source`, `part`, `target`: hook point, what it gives, and what that predicts.
        `by_definition`: True where the source determines the target by definition.
        `r2`: mean over dimensions, the paper's figure.
        `r2_weighted`: variance-weighted.
        Both R² come with the ends of their intervals over groups of documents (`…_low`, `…_high`).

    Raises:
        UserError: no SAE or no activations at `target`.
    """
    sources = list(activations.widths)
    if target not in saes:
        raise UserError(f"there is no SAE at {target} whose error to predict: name one of {', '.join(saes)}")
    if target not in sources:
        raise UserError(f"there are no activations at {target}: name one of {', '.join(sources)}")
    used = {hook_point: sae for hook_point, sae in saes.items() if hook_point in sources}

    probes = _probes(activations, used)
    moments: dict[tuple[str, str], Moments] = {}
    for chunk in activations.chunks("B"):
        targets = _targets(chunk, target, used, probes)
        for source, predictor in _sources(chunk, sources, used, probes):
            moments.setdefault(source, Moments()).add(predictor, targets)
    maps = {source: fitted.solve().maps for source, fitted in moments.items()}

    sums = GroupSums(replicates, seed)
    for chunk in first_chunks(activations.chunks("C"), rows):
        targets = _targets(chunk, target, used, probes)
        for name, y in targets.items():
            add_target(sums, chunk.group, name, y, {})
        for source, predictor in _sources(chunk, sources, used, probes):
            for name, y in targets.items():
                add_prediction(sums, chunk.group, name, y, "/".join(source), maps[source][name](predictor))
    rows = []
    for hook_point, part in maps:
        for name in TARGETS:
            mean, weighted = r2(sums, name, f"{hook_point}/{part}")
            known = hook_point == target and (part, name) in BY_DEFINITION
            numbers = with_intervals({col.R2: mean, col.R2_WEIGHTED: weighted}, sums.groups)
            rows.append({col.SOURCE: hook_point, col.PART: part, col.TARGET: name, col.BY_DEFINITION: known, **numbers})
    return pd.DataFrame(rows)


def beyond_pursuit(table: pd.DataFrame, target: str, pursued: pd.DataFrame) -> pd.DataFrame:
    """Compares what reconstructions at earlier places explain of ε with what pursuit removes of it.

    Args:
        table: that of `earlier_layers`.
        target: its target.
        pursued: that of `measures.pursuit` for the same SAE, measured on the same rows.

    Returns:
        One row with intervals, or none where no earlier place has an SAE.
        source: the earlier hook point whose reconstruction explains most.
        explained: the share of ε's variance that the best reconstruction explains. Each replicate takes its best.
        encoder_share: the share of the nonlinear FVU that pursuit removes.
        lead: explained less encoder_share, or less 0 where pursuit removes nothing.
    """
    of_reconstructions = (table[col.PART] == "reconstruction") & (table[col.TARGET] == "ε")
    elsewhere = table[of_reconstructions & (table[col.SOURCE] != target)]
    if elsewhere.empty:
        return pd.DataFrame()
    of_sources = replicated(elsewhere, col.R2_WEIGHTED)
    (removed,) = replicated(pursued, col.ENCODER_SHARE)
    explained = np.fmax.reduce(of_sources, axis=0)
    lead = explained - np.maximum(removed, 0.0)
    values = {col.EXPLAINED: explained, col.ENCODER_SHARE: removed, col.LEAD: lead}
    best = elsewhere[col.SOURCE].iloc[int(np.nanargmax(of_sources[:, 0]))]
    return pd.DataFrame([{col.SOURCE: best, **with_intervals(values, elsewhere[col.GROUPS].iloc[0])}])


def _probes(activations: Activations, saes: Mapping[str, SAE]) -> dict[str, Linear]:
    """The map x → ê of each SAE, by hook point, fitted on A."""
    errors = {hook_point: Moments() for hook_point in saes}
    for chunk in activations.chunks("A"):
        for hook_point, sae in saes.items():
            x = chunk.x[hook_point]
            errors[hook_point].add(x, {"e": x.double() - reconstruct(sae, x)[0]})
    return {hook_point: moments.solve().maps["e"] for hook_point, moments in errors.items()}


def _parts(chunk: Chunk, hook_point: str, saes: Mapping[str, SAE], probes: Mapping[str, Linear]) -> dict[str, Tensor]:
    """The sources that a hook point gives, (b, d) each, float64."""
    x = chunk.x[hook_point].double()
    if hook_point not in saes:
        return {"activation": x}
    reconstruction = reconstruct(saes[hook_point], chunk.x[hook_point])[0].double()
    e, linear = x - reconstruction, probes[hook_point](x)
    return {
        "activation": x,
        "reconstruction": reconstruction,
        "error": e,
        "linear error": linear,
        "nonlinear error": e - linear,
    }


def _targets(chunk: Chunk, target: str, saes: Mapping[str, SAE], probes: Mapping[str, Linear]) -> dict[str, Tensor]:
    parts = _parts(chunk, target, saes, probes)
    return dict(zip(TARGETS, (parts["error"], parts["linear error"], parts["nonlinear error"]), strict=True))


def _sources(
    chunk: Chunk, hook_points: Collection[str], saes: Mapping[str, SAE], probes: Mapping[str, Linear]
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for hook_point in hook_points:
        for part, values in _parts(chunk, hook_point, saes, probes).items():
            yield (hook_point, part), values
