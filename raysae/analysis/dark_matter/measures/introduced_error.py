"""Introduced error on activations whose every error is known.

This is analysis 4 of the dark-matter spec (Engels et al. 2024, section 4). Ground truth is x′, a sum of known
features. Three errors are known too:

- *dense*: the activation is x′ + σ_x·n₁. n₁ stands for whatever no dictionary feature covers.
- *absent* features: r_f reconstructs the noise-free x′ without the share f of the latents of least mean value.
- *introduced*: the reconstruction is r_f + σ_r·n₂.

As always, the error is regressed on the activation:

    e = x′ + σ_x·n₁ − r_f − σ_r·n₂   on   x′ + σ_x·n₁.

The FVU that the regression removes estimates the linear error. What remains estimates the nonlinear error.

Every regression of the grid over (f, σ_x, σ_r) needs only moments of x′, r_f, n₁ and n₂. So two passes serve all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Activity, encoded, reconstruct
from raysae.analysis.instruments.regression import Moments
from raysae.config import UserError
from raysae.sae.base import SAE, Codes

LEVELS = (0.0, 1.0, 2.0, 3.0, 4.0)  # σ_x and σ_r, in units of `noise_unit`
CLOSED_FORMS = [col.LINEAR + col.CLOSED_FORM, col.NONLINEAR + col.CLOSED_FORM]
ABLATED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
# Share of the variance. A smaller expected error is not compared, because its estimate is as small as its own noise.
NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Parts:
    """Known parts of some rows, (b, d) float64 each.

    truth: x′.
    reconstructions: r_f for each share f of ablated latents.
    dense, introduced: the noises n₁ and n₂, before σ_x and σ_r scale them.
    """

    truth: Tensor
    reconstructions: list[Tensor]
    dense: Tensor
    introduced: Tensor


def noise_grid(
    fit: Iterator[Parts],
    evaluate: Iterator[Parts],
    ablated: Sequence[float],
    levels: Sequence[float],
    unit: float = 1.0,
) -> pd.DataFrame:
    """Estimates the errors for every (ablated share, σ_x, σ_r).

    Regressions are fitted on `fit` and measured on `evaluate`.

    Returns:
        A row per combination. Errors are shares of the variance of x′ + σ_x·n₁.
        ablated: share f of ablated latents.
        sigma_x, sigma_r: noise in units of `unit`.
        fvu: error before the regression.
        linear: what the regression removes of fvu.
        nonlinear: what remains.
        absent, dense, introduced: the truth, ‖x′ − r_f‖², ‖σ_x·n₁‖² and ‖σ_r·n₂‖².
    """
    fitted, measured = _Grid(len(ablated)), _Grid(len(ablated))
    for parts in fit:
        fitted.add(parts)
    for parts in evaluate:
        measured.add(parts)
    rows = []
    for sigma_x in levels:
        for f, share in enumerate(ablated):
            for sigma_r in levels:
                scales = {"x": sigma_x * unit, "r": sigma_r * unit}
                weight = fitted.regress(f, scales["x"], scales["r"])
                total, error, missed = measured.residual(f, scales["x"], scales["r"], weight, fitted)
                truth = measured.truth(f, scales["x"], scales["r"]) / total
                row = {col.ABLATED: share, col.SIGMA_X: sigma_x, col.SIGMA_R: sigma_r}
                row |= {col.FVU: error / total, col.LINEAR: (error - missed) / total, col.NONLINEAR: missed / total}
                rows.append(row | dict(zip((col.ABSENT, col.DENSE, col.INTRODUCED), truth.tolist(), strict=True)))
    return pd.DataFrame(rows).sort_values([col.ABLATED, col.SIGMA_X, col.SIGMA_R], ignore_index=True)


def correlation_table(grid: pd.DataFrame, ablated: float = 0.0) -> pd.DataFrame:
    """Pearson correlations over the grid at one ablated share.

    Rows are σ_x and σ_r. Columns are the estimated linear and nonlinear error.
    """
    part, sigmas = grid[grid[col.ABLATED] == ablated], (col.SIGMA_X, col.SIGMA_R)
    estimates = (col.LINEAR, col.NONLINEAR)
    return pd.DataFrame({column: {sigma: part[sigma].corr(part[column]) for sigma in sigmas} for column in estimates})


def closed_form(covariance: Tensor, sigma_x: float, sigma_r: float) -> tuple[float, float]:
    """Estimated linear and nonlinear error, as FVU, in the limit of many rows where Sae(x′) = x′.

    `covariance` (d, d) of x′ is Σ. With N = σ_x²·1 and M = σ_r²·1,

        linear = tr(N(Σ+N)⁻¹N) / tr(Σ+N),
        nonlinear = (tr N + tr M) / tr(Σ+N) − linear.
    """
    sigma = covariance.double()
    d = len(sigma)
    seen = sigma + sigma_x**2 * torch.eye(d, dtype=torch.float64)
    inverse_trace = float((1 / torch.linalg.eigvalsh(seen)).sum()) if sigma_x else 0.0
    linear = sigma_x**4 * inverse_trace / float(seen.trace())
    return linear, d * (sigma_x**2 + sigma_r**2) / float(seen.trace()) - linear


# ---------------------------------------------------------------- on an SAE


@dataclass(frozen=True)
class IntroducedError:
    """What the estimates make of known errors on one SAE.

    grid: see `noise_grid`.
    table: see `correlation_table`.
    closed_form: the grid beside the closed form, at no ablation. The form is exact where `reencoding_fvu` is 0.
    covariance: (d, d), covariance of x′ on the fitting split.
    unit: σ of one unit of noise.
    reencoding_fvu: FVU(x′, Sae(x′)), NaN where the grid lacks σ_x = σ_r = 0.
    """

    grid: pd.DataFrame
    table: pd.DataFrame
    closed_form: pd.DataFrame
    covariance: Tensor
    unit: float
    reencoding_fvu: float


@torch.no_grad()
def introduced_error(
    activations: Activations,
    hook_point: str,
    sae: SAE,
    levels: Sequence[float] = LEVELS,
    ablated: Sequence[float] = ABLATED,
    unit: float | None = None,
    seed: int = 0,
) -> IntroducedError:
    """Runs analysis 4 with x′ = Sae(x) for x of the hook point, fitted on A and measured on C.

    Args:
        levels: values of σ_x and of σ_r, in units of `unit`.
        ablated: shares of latents to ablate, 0 first, all below 1.
        unit: σ of one unit of noise, by default `noise_unit` of x′'s covariance.
        seed: seeds the generator that draws the noises.

    Raises:
        UserError: `ablated` does not begin with 0, or a share is below 0 or not below 1.
    """
    if not all(0 <= share < 1 for share in ablated) or ablated[0] != 0:
        raise UserError(f"the shares of ablated latents are {list(ablated)}: they must begin with 0 and be below 1")
    activity, moments = Activity(sae.n), Moments()
    for chunk in activations.chunks("A"):
        truth, _ = reconstruct(sae, chunk.x[hook_point])
        reconstruct(sae, truth, activity)
        moments.add(truth, {})
    covariance = moments.xx / moments.rows
    unit = noise_unit(covariance) if unit is None else unit
    rank = torch.empty(sae.n, dtype=torch.int64)
    rank[torch.argsort(activity.mean, stable=True)] = torch.arange(sae.n)  # Rank 0 is the latent of least mean value
    keep = [(rank >= round(share * sae.n)).to(sae.b_dec.device) for share in ablated]

    def parts(split: str) -> Iterator[Parts]:
        generator = torch.Generator().manual_seed(2 * seed + (split == "C"))
        for chunk in activations.chunks(split):
            truth, _ = reconstruct(sae, chunk.x[hook_point])
            reconstructions = [[] for _ in keep]
            for _, codes in encoded(sae, truth):
                for pieces, kept in zip(reconstructions, keep, strict=True):
                    pieces.append(sae.decode(_masked(codes, kept)).double())
            noise = [torch.randn(truth.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
            yield Parts(truth.double(), [torch.cat(pieces).to(truth.device) for pieces in reconstructions], *noise)

    grid = noise_grid(parts("A"), parts("C"), ablated, levels, unit)
    none = grid[grid[col.ABLATED] == 0]
    compared = none[[col.SIGMA_X, col.SIGMA_R, col.LINEAR, col.NONLINEAR]].reset_index(drop=True)
    noises = zip(compared[col.SIGMA_X], compared[col.SIGMA_R], strict=True)
    expected = [closed_form(covariance, x * unit, r * unit) for x, r in noises]
    compared[CLOSED_FORMS] = np.array(expected)
    own = none[(none[col.SIGMA_X] == 0) & (none[col.SIGMA_R] == 0)]
    reencoding_fvu = float(own[col.FVU].iloc[0]) if len(own) else float("nan")
    return IntroducedError(grid, correlation_table(grid), compared, covariance, unit, reencoding_fvu)


def noise_unit(covariance: Tensor) -> float:
    """σ of one unit of noise. At 4 units the noise has as much variance as x′ has in all: (4·unit)²·d = tr Σ."""
    return float((covariance.trace() / len(covariance)).sqrt()) / LEVELS[-1]


def _masked(codes: Codes | Tensor, keep: Tensor) -> Codes | Tensor:
    """Codes without the latents outside `keep` (n,) bool."""
    if isinstance(codes, Codes):
        return Codes(codes.values * keep[codes.indices], codes.indices)
    return codes * keep


# ---------------------------------------------------------------- a fully synthetic model


@dataclass(frozen=True)
class SyntheticModel:
    """x = Σ wᵢyᵢ + Dense(x): a known dictionary, sparse independent weights, and a dense part that no feature covers.

    dictionary: (m, d), the features yᵢ as rows of norm 1.
    probability: (m,), probability that wᵢ is not 0.
    strength: (m,). A wᵢ that is not 0 is strength·(1 + u), u uniform in [0, 1).
    dense: (d, d). Dense(x) is a Gaussian with covariance denseᵀ·dense.

    An SAE lacks the features of least mean wᵢ.
    """

    dictionary: Tensor
    probability: Tensor
    strength: Tensor
    dense: Tensor

    @classmethod
    def random(cls, d: int, features: int, seed: int = 0) -> SyntheticModel:
        """Draws random directions in the first half of a random basis.

        Frequencies fall as a power of the rank. The dense part fills the whole space.
        """
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
        directions = torch.randn(features, d // 2, generator=generator, dtype=torch.float64) @ basis[: d // 2]
        dictionary = directions / directions.norm(dim=1, keepdim=True)
        probability = 0.2 * torch.arange(1, features + 1, dtype=torch.float64) ** -0.5
        return cls(
            dictionary, probability, torch.ones(features, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
        )

    @property
    def mean(self) -> Tensor:
        """Mean of each wᵢ, (m,)."""
        return 1.5 * self.strength * self.probability

    @property
    def variance(self) -> Tensor:
        """Variance of each wᵢ, (m,)."""
        return self.strength.square() * (1.5**2 + 1 / 12) * self.probability - self.mean.square()

    def lacking(self, share: float) -> Tensor:
        """Marks the features that an SAE lacks, (m,) bool: the given share of them, those of least mean value."""
        order = torch.argsort(self.mean, stable=True)
        absent = torch.zeros(len(order), dtype=torch.bool)
        absent[order[: round(share * len(order))]] = True
        return absent

    def covariance(self, of: Tensor | None = None) -> Tensor:
        """Covariance (d, d) of the sum of the features, or of those that `of` (m,) bool marks."""
        variance = self.variance if of is None else self.variance * of
        return (self.dictionary.T * variance) @ self.dictionary

    def sample(
        self, rows: int, ablated: Sequence[float] = ABLATED, seed: int = 0, chunk: int = 8192
    ) -> Iterator[Parts]:
        """Yields `rows` rows, chunk by chunk.

        For each share in `ablated`, the SAE lacks that share of the features. It knows the others and their true
        weights.
        """
        generator = torch.Generator().manual_seed(seed)
        m, d = self.dictionary.shape
        for start in range(0, rows, chunk):
            b = min(chunk, rows - start)
            on = torch.rand(b, m, generator=generator, dtype=torch.float64) < self.probability
            w = on * self.strength * (1 + torch.rand(b, m, generator=generator, dtype=torch.float64))
            noise = (
                torch.randn(b, d, generator=generator, dtype=torch.float64),
                torch.randn(b, d, generator=generator, dtype=torch.float64),
            )
            yield Parts(
                w @ self.dictionary,
                [(w * ~self.lacking(f)) @ self.dictionary for f in ablated],
                noise[0] @ self.dense,
                noise[1],
            )

    def expected(self, ablated: float, sigma_x: float, sigma_r: float) -> tuple[float, float]:
        """Linear and nonlinear error, as FVU, in the limit of many rows.

        A is the covariance of the absent features, N that of the scaled dense part and Σ that of x. As
        Cov(e, x) = A + N, the regression removes tr((A+N)Σ⁻¹(A+N)) of tr(A+N) + σ_r²·d. It removes the absent
        features' mean as well.
        """
        d, absent = self.dictionary.shape[1], self.lacking(ablated)
        explained = self.covariance(absent) + sigma_x**2 * self.dense.T @ self.dense
        seen = self.covariance() + sigma_x**2 * self.dense.T @ self.dense
        removed = (explained @ torch.linalg.pinv(seen, hermitian=True, rtol=1e-12) @ explained).trace()
        mean = (self.mean * absent) @ self.dictionary
        return (
            float((removed + mean.square().sum()) / seen.trace()),
            float((explained.trace() + sigma_r**2 * d - removed) / seen.trace()),
        )

    def compare(self, grid: pd.DataFrame, unit: float) -> pd.DataFrame:
        """The estimates of `noise_grid` on this model beside their closed forms.

        Returns:
            The grid's ablated, sigma_x, sigma_r, linear and nonlinear, with three more columns.
            linear_closed_form, nonlinear_closed_form: what `expected` gives.
            deviation: larger of the two deviations, each as a share of its closed form. A closed form of at most
                `NEGLIGIBLE` does not count. NaN where neither counts.
        """
        compared = grid[[col.ABLATED, col.SIGMA_X, col.SIGMA_R, col.LINEAR, col.NONLINEAR]].copy()
        introduced = zip(compared[col.ABLATED], compared[col.SIGMA_X] * unit, compared[col.SIGMA_R] * unit, strict=True)
        truth = np.array([self.expected(*errors) for errors in introduced])
        compared[CLOSED_FORMS] = truth
        apart = (compared[[col.LINEAR, col.NONLINEAR]] / np.maximum(truth, NEGLIGIBLE) - 1).abs()
        compared[col.DEVIATION] = apart.where(truth > NEGLIGIBLE).max(axis=1)
        return compared


# ---------------------------------------------------------------- moments


class _Grid:
    """Moments from which every regression of the grid follows.

    They are those of x′, of n₁, of the lack x′ − r_f of each ablated share, and of n₂.
    """

    def __init__(self, shares: int) -> None:
        self.shares = shares
        self.moments = Moments()

    def add(self, parts: Parts) -> None:
        lacks = [parts.truth - r for r in parts.reconstructions]
        d = parts.truth.shape[1]
        self.d = d
        targets = {f"lack{f}": lack for f, lack in enumerate(lacks)} | {"introduced": parts.introduced}
        # Second moments (about 0) of the errors among themselves. The residual needs only their traces, so each row
        # adds scalars.
        n1, n2 = parts.dense, parts.introduced
        products = {"n1n1": (n1 * n1).sum(1), "n2n2": (n2 * n2).sum(1), "n1n2": (n1 * n2).sum(1)}
        for f, lack in enumerate(lacks):
            products |= {f"ll{f}": (lack * lack).sum(1), f"ln1{f}": (lack * n1).sum(1), f"ln2{f}": (lack * n2).sum(1)}
        self.moments.add(torch.cat([parts.truth, n1], 1), targets | products)

    def _seen(self, sigma_x: float) -> Tensor:
        """Centred sum of products of x′ + σ_x·n₁, (d, d)."""
        mix = torch.cat([torch.eye(self.d, dtype=torch.float64), sigma_x * torch.eye(self.d, dtype=torch.float64)])
        return mix.T @ self.moments.xx @ mix

    def _seen_error(self, f: int, sigma_x: float, sigma_r: float) -> Tensor:
        """Centred sum of products of x′ + σ_x·n₁ and e, (d, d)."""
        d, xy, xx = self.d, self.moments.xy, self.moments.xx
        with_lack = xy[f"lack{f}"][:d] + sigma_x * xy[f"lack{f}"][d:]
        with_dense = xx[:d, d:] + sigma_x * xx[d:, d:]
        with_introduced = xy["introduced"][:d] + sigma_x * xy["introduced"][d:]
        return with_lack + sigma_x * with_dense - sigma_r * with_introduced

    def _means(self, f: int, sigma_x: float, sigma_r: float) -> tuple[Tensor, Tensor]:
        """Means of x′ + σ_x·n₁ and of e, (d,)."""
        mean, target = self.moments.mean, self.moments.target_mean
        dense = sigma_x * mean[self.d :]
        return mean[: self.d] + dense, target[f"lack{f}"] + dense - sigma_r * target["introduced"]

    def regress(self, f: int, sigma_x: float, sigma_r: float) -> Tensor:
        """W (d, d) of e on x′ + σ_x·n₁."""
        part = Moments()
        part.rows, part.xx = self.moments.rows, self._seen(sigma_x)
        part.mean, error_mean = self._means(f, sigma_x, sigma_r)
        part.target_mean, part.xy = {"e": error_mean}, {"e": self._seen_error(f, sigma_x, sigma_r)}
        return part.solve().maps["e"].weight

    def truth(self, f: int, sigma_x: float, sigma_r: float) -> Tensor:
        """Σ‖x′ − r_f‖², Σ‖σ_x·n₁‖², Σ‖σ_r·n₂‖², (3,)."""
        mean, rows = self.moments.target_mean, self.moments.rows
        return rows * torch.cat([mean[f"ll{f}"], sigma_x**2 * mean["n1n1"], sigma_r**2 * mean["n2n2"]])

    def residual(
        self, f: int, sigma_x: float, sigma_r: float, weight: Tensor, fitted: _Grid
    ) -> tuple[float, float, float]:
        """Σ‖x − x̄‖², Σ‖e‖² and Σ‖ε‖² of these rows for W and the means of `fitted`."""
        mean, rows = self.moments.target_mean, self.moments.rows
        seen, cross = self._seen(sigma_x), self._seen_error(f, sigma_x, sigma_r)
        cross_terms = 2 * (sigma_x * mean[f"ln1{f}"] - sigma_r * mean[f"ln2{f}"] - sigma_x * sigma_r * mean["n1n2"])
        error = float(self.truth(f, sigma_x, sigma_r).sum() + rows * cross_terms)
        x_mean, e_mean = self._means(f, sigma_x, sigma_r)
        x_fitted, e_fitted = fitted._means(f, sigma_x, sigma_r)
        # ε = (e − ē) − (x − x̄)W + b, where b is the misfit of the intercept
        misfit = (e_mean - e_fitted) - (x_mean - x_fitted) @ weight
        centred = error - rows * float(e_mean.square().sum())
        missed = (
            centred
            - 2 * float((weight * cross).sum())
            + float(((seen @ weight) * weight).sum())
            + rows * float(misfit.square().sum())
        )
        return float(seen.trace()), error, missed
