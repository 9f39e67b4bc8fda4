"""How much of an SAE's error is a linear function of what is known elsewhere.

This is analysis 8 of the dark-matter spec (Engels et al. 2024). Least squares predicts e, ê and ε of the SAE at one
hook point. Sources are at several: the same residual, the previous one, this layer's MLP and attention output.
A hook point with an SAE gives five sources:

    activation x', reconstruction Sae(x'), error e', linear error ê', nonlinear error ε'.

A hook point without one (`attn_z`, say) gives the activation alone. Probes for ê' are fitted on A, the regressions
on B. R² is measured on C.

At the target's own hook point some sources determine a target by definition. x gives ê, and each of e, ê and ε gives
itself. `by_definition` marks these rows. Whether a source comes earlier in the forward pass is not checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Chunk, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear, Moments, add_target, r2
from raysae.config import UserError
from raysae.sae.base import SAE

TARGETS = ("e", "ê", "ε")
BY_DEFINITION = {("activation", "ê"), ("error", "e"), ("linear error", "ê"), ("nonlinear error", "ε")}


@torch.no_grad()
def earlier_layers(
    activations: Activations,
    target: str,
    saes: Mapping[str, SAE],
    sources: Sequence[str] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """Runs analysis 8 for the SAE at the hook point `target`.

    Args:
        activations: at `target` and at every source.
        saes: folded, by hook point. One is at `target`.
        sources: hook points, by default all of `activations`.

    Returns:
        A row per source, part and target.
        `source`, `part`, `target`: hook point, what it gives, and what that predicts.
        `by_definition`: True where the source determines the target by definition.
        `r2`: mean over dimensions, the paper's figure.
        `r2_weighted`: variance-weighted.
        Both R² come with the ends of their intervals over groups of documents (`…_low`, `…_high`).

    Raises:
        UserError: no SAE at `target`, or no activations at a hook point.
    """
    sources = list(activations.widths) if sources is None else list(sources)
    if target not in saes:
        raise UserError(f"there is no SAE at {target} whose error to predict: name one of {', '.join(saes)}")
    for hook_point in [target, *sources]:
        if hook_point not in activations.widths:
            raise UserError(f"there are no activations at {hook_point}: name one of {', '.join(activations.widths)}")
    used = {hook_point: sae for hook_point, sae in saes.items() if hook_point in {target, *sources}}

    probes = _probes(activations, used)
    moments: dict[tuple[str, str], Moments] = {}
    for chunk in activations.chunks("B"):
        targets = _targets(chunk, target, used, probes)
        for source, predictor in _sources(chunk, sources, used, probes):
            moments.setdefault(source, Moments()).add(predictor, targets)
    maps = {source: fitted.solve().maps for source, fitted in moments.items()}

    sums = GroupSums(replicates, seed)
    for chunk in activations.chunks("C"):
        targets = _targets(chunk, target, used, probes)
        predictions: dict[str, dict[str, Tensor]] = {name: {} for name in targets}
        for source, predictor in _sources(chunk, sources, used, probes):
            for name in targets:
                predictions[name]["/".join(source)] = maps[source][name](predictor)
        for name, y in targets.items():
            add_target(sums, chunk.group, name, y, predictions[name])
    rows = []
    for hook_point, part in maps:
        for name in TARGETS:
            mean, weighted = r2(sums, name, f"{hook_point}/{part}")
            known = hook_point == target and (part, name) in BY_DEFINITION
            numbers = with_intervals({col.R2: mean, col.R2_WEIGHTED: weighted}, sums.groups)
            rows.append({col.SOURCE: hook_point, col.PART: part, col.TARGET: name, col.BY_DEFINITION: known, **numbers})
    return pd.DataFrame(rows)


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
    chunk: Chunk, hook_points: Sequence[str], saes: Mapping[str, SAE], probes: Mapping[str, Linear]
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    for hook_point in hook_points:
        for part, values in _parts(chunk, hook_point, saes, probes).items():
            yield (hook_point, part), values
