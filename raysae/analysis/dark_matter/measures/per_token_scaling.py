"""Per-token scaling of the error (analysis 3 of the dark-matter spec; Engels et al. 2024).

It measures how well a small SAE's error predicts a large one's. Each pair (i, j) of SAEs of ascending width has
regressions of ‖e_j‖ on ‖e_i‖, on ‖e_i‖ and ‖ε_i‖, on ‖x‖, and on ‖x‖ and ‖e_i‖, with an intercept each. All are fitted
on B, because ε comes from probes fitted on A. All are measured on C. They come from one matrix of moments of the norms.

Errors in proportion to ‖x‖ would predict each other perfectly. What ‖e_i‖ adds to ‖x‖ tells more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Chunk, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear, Moments
from raysae.config import UserError
from raysae.sae.base import SAE


@torch.no_grad()
def per_token_scaling(
    activations: Activations,
    hook_point: str,
    saes: Mapping[str, SAE],
    probes: Mapping[str, Linear],
    replicates: int = REPLICATES,
    seed: int = 0,
) -> pd.DataFrame:
    """Regresses error norms for every pair of `saes`, with the `probes` of `error_regression`.

    Returns:
        A row per pair, the narrower SAE first. Numbers come with `_low` and `_high`.
        small, large: names.
        small_width, large_width: numbers of latents.
        r2: R² of ‖e_large‖ from ‖e_small‖ and 1.
        squared_correlation: squared correlation of the two norms.
        r2_with_nonlinear: R² with ‖ε_small‖ added.
        gain: (r2_with_nonlinear − r2)/(1 − r2).
        r2_from_x_norm: R² of ‖e_large‖ from ‖x‖ and 1.
        r2_beyond_x_norm: the relative gain of adding ‖e_small‖ to ‖x‖, which is the squared partial correlation on the
            rows of the fit.

    Raises:
        UserError: fewer than two SAEs.
    """
    names = sorted(saes, key=lambda name: saes[name].n)
    if len(names) < 2:
        raise UserError(
            f"per-token scaling compares SAEs of different widths, and there is {len(names)}: name more SAEs"
        )
    fitted = Moments()
    for chunk in activations.chunks("B"):
        fitted.add(_norms(chunk, hook_point, saes, probes, names), {})
    sums = GroupSums(replicates, seed)
    for chunk in activations.chunks("C"):
        z = _norms(chunk, hook_point, saes, probes, names) - fitted.mean
        z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
        sums.add(chunk.group, products=(z.unsqueeze(2) * z.unsqueeze(1)).flatten(1))
    size = 2 * len(names) + 2
    products = sums["products"].view(-1, size, size)
    rows = []
    for i, small in enumerate(names):
        for j in range(i + 1, len(names)):
            large = names[j]
            pair = {col.SMALL: small, col.LARGE: large, col.SMALL_WIDTH: saes[small].n, col.LARGE_WIDTH: saes[large].n}
            rows.append(pair | with_intervals(_numbers(fitted, products, i, j), sums.groups))
    return pd.DataFrame(rows)


def _numbers(fitted: Moments, products: Tensor, i: int, j: int) -> dict[str, Tensor]:
    """The numbers of the pair (i, j), (1 + r,) each. The arguments are those of `_r2`."""
    nonlinear, x_norm = (products.shape[1] - 2) // 2 + i, products.shape[1] - 2
    alone, both = (_r2(fitted, products, predictors, j) for predictors in ([i], [i, nonlinear]))
    from_x, with_x = (_r2(fitted, products, predictors, j) for predictors in ([x_norm], [x_norm, i]))
    covariance = products - products[:, :, -1:] * products[:, -1:, :] / products[:, -1:, -1:]
    return {
        col.R2: alone,
        col.SQUARED_CORRELATION: covariance[:, i, j].square() / (covariance[:, i, i] * covariance[:, j, j]),
        col.R2_WITH_NONLINEAR: both,
        col.GAIN: (both - alone) / (1 - alone),
        col.R2_FROM_X_NORM: from_x,
        col.R2_BEYOND_X_NORM: (with_x - from_x) / (1 - from_x),
    }


@torch.no_grad()
def token_lines(
    activations: Activations,
    hook_point: str,
    saes: Mapping[str, SAE],
    probes: Mapping[str, Linear],
    tokens: int = 100,
    context: int = 0,
) -> pd.DataFrame:
    """‖e‖, ‖ê‖ and ‖ε‖ of all SAEs along one context of C.

    Takes the first `tokens` rows of context number `context`, counted from 0.

    Columns: sae, width, position, token, error, linear, nonlinear.

    Raises:
        UserError: C has no such context.
    """
    seen = 0
    for chunk in activations.chunks("C"):
        contexts, of_row = torch.unique_consecutive(chunk.context, return_inverse=True)
        if context >= seen + len(contexts):
            seen += len(contexts)
            continue
        rows = torch.nonzero(of_row == context - seen).squeeze(1)[:tokens]
        x = chunk.x[hook_point][rows]
        frames = []
        for name, sae in sorted(saes.items(), key=lambda item: item[1].n):
            e, linear = _error(x, sae, probes[name])
            columns = {col.POSITION: chunk.position[rows], col.TOKEN: chunk.token[rows], col.ERROR: e.norm(dim=1)}
            columns |= {col.LINEAR: linear.norm(dim=1), col.NONLINEAR: (e - linear).norm(dim=1)}
            frames.append(
                pd.DataFrame({"sae": name, "width": sae.n} | {key: values.numpy() for key, values in columns.items()})
            )
        return pd.concat(frames, ignore_index=True)
    raise UserError(f"there is no context number {context} to draw: the evaluation split has {seen}")


def _error(x: Tensor, sae: SAE, probe: Linear) -> tuple[Tensor, Tensor]:
    """e and ê of rows `x` (b, d), float64."""
    return x.double() - reconstruct(sae, x)[0].double(), probe(x)


def _norms(
    chunk: Chunk, hook_point: str, saes: Mapping[str, SAE], probes: Mapping[str, Linear], names: list[str]
) -> Tensor:
    """‖e‖ of every SAE, then ‖ε‖ of every SAE, then ‖x‖, (b, 2·SAEs + 1)."""
    errors, nonlinear = [], []
    for name in names:
        e, linear = _error(chunk.x[hook_point], saes[name], probes[name])
        errors.append(e.norm(dim=1))
        nonlinear.append((e - linear).norm(dim=1))
    return torch.stack([*errors, *nonlinear, chunk.x[hook_point].double().norm(dim=1)], 1)


def _r2(fitted: Moments, products: Tensor, predictors: list[int], target: int) -> Tensor:
    """R² on C of the regression fitted on B, (1 + replicates,).

    `fitted` has B's moments. `products` has C's moments about B's means.
    """
    part = Moments()
    part.rows, part.mean, part.xx = (
        fitted.rows,
        torch.zeros(len(predictors), dtype=torch.float64),
        fitted.xx[np.ix_(predictors, predictors)],
    )
    part.target_mean, part.xy = {"y": torch.zeros(1, dtype=torch.float64)}, {"y": fitted.xx[predictors][:, [target]]}
    weights = part.solve().maps["y"].weight.squeeze(1)
    used = [*predictors, target]
    difference = torch.cat([-weights, torch.ones(1, dtype=torch.float64)])
    missed = torch.einsum("rij,i,j->r", products[:, used][:, :, used], difference, difference)
    total = products[:, target, target] - products[:, target, -1].square() / products[:, -1, -1]
    return 1 - missed / total
