"""Introduced error on activations whose every error is known.

This is analysis 4 of the dark-matter spec (Engels et al. 2024, section 4). Ground truth is x′, a sum of known
features. Three errors are known too:

- *dense*: the activation is x′ + σ_x·n₁. n₁ stands for whatever no dictionary feature covers.
- *absent* features: r_f reconstructs the noise-free x′ without the share f of the latents of least mean value.
- *introduced*: the reconstruction is r_f + σ_r·n₂.

As always, the error is regressed on the activation:

    e = x′ + σ_x·n₁ − r_f − σ_r·n₂   on   x′ + σ_x·n₁.

The FVU that the regression removes estimates the linear error. What remains estimates the nonlinear error.

Least squares is linear in its target. So the regressions of x′ + σ_x·n₁ − r_f and of n₂ give those of every σ_r, and
one pass of moments serves the whole grid over (f, σ_x, σ_r). A second pass measures.

An SAE is judged by how far its estimates are from the closed form, and by FVU(x′, Sae(x′)). The closed form takes
Sae(x′) for x′ itself. Correlations of noise and estimates only check the code, on a synthetic model. What an SAE adds
to the error is the same for every σ, so a bad SAE may have the correlations of a perfect one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import Activations, Activity, encoded, reconstruct
from raysae.analysis.instruments.intervals import REPLICATES, GroupSums, with_intervals
from raysae.analysis.instruments.regression import Linear, Moments
from raysae.config import UserError
from raysae.sae.base import SAE, Codes

# Products of each row's parts. "left" is x′ − r_f + σ_x·n₁, "missed" what the regression leaves of it or of the noise.
PRODUCTS = (
    "lack²", "dense²", "noise²", "left²", "left·noise", "missed left²", "missed left·noise", "missed noise²",
)  # fmt: skip
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
    group: (b,) int64, what is resampled: rows of a group are not independent.
    """

    truth: Tensor
    reconstructions: list[Tensor]
    dense: Tensor
    introduced: Tensor
    group: Tensor


@dataclass(frozen=True)
class NoiseGrid:
    """Errors for every (ablated share, σ_x, σ_r), per replicate.

    ablated: shares of ablated latents.
    levels: values of σ_x and of σ_r, in units of `unit`.
    unit: σ of one unit of noise.
    sums: what `_measured` gives of the rows.
    """

    ablated: tuple[float, ...]
    levels: tuple[float, ...]
    unit: float
    sums: GroupSums

    def errors(self, f: int, sigma_x: float, sigma_r: float) -> dict[str, Tensor]:
        """Shares of the variance of x′ + σ_x·n₁ at the ablated share number `f`, (1 + r,) each.

        fvu: error before the regression.
        linear: what the regression removes of fvu.
        nonlinear: what remains.
        absent, dense, introduced: the truth, ‖x′ − r_f‖², ‖σ_x·n₁‖² and ‖σ_r·n₂‖².
        """
        variance = self.sums.variation(f"{sigma_x}/x").sum(1, keepdim=True)
        of = dict(zip(PRODUCTS, (self.sums[f"{sigma_x}/{f}"] / variance).unbind(1), strict=True))
        x, r = sigma_x * self.unit, sigma_r * self.unit
        fvu = of["left²"] - 2 * r * of["left·noise"] + r**2 * of["noise²"]
        missed = of["missed left²"] - 2 * r * of["missed left·noise"] + r**2 * of["missed noise²"]
        truth = {col.ABSENT: of["lack²"], col.DENSE: x**2 * of["dense²"], col.INTRODUCED: r**2 * of["noise²"]}
        return {col.FVU: fvu, col.LINEAR: fvu - missed, col.NONLINEAR: missed} | truth

    def table(self) -> pd.DataFrame:
        """A row per (ablated, sigma_x, sigma_r): `errors` with the ends of their intervals."""
        rows = []
        for (f, share), x, r in itertools.product(enumerate(self.ablated), self.levels, self.levels):
            rows.append(
                {
                    col.ABLATED: share,
                    col.SIGMA_X: x,
                    col.SIGMA_R: r,
                    **with_intervals(self.errors(f, x, r), self.sums.groups),
                }
            )
        return pd.DataFrame(rows)

    def deviation(self, spectrum: Tensor) -> Tensor:
        """How far the estimates are from the closed form at no ablation, (1 + r,).

        It is ‖estimates − closed forms‖ / ‖closed forms‖ over all (σ_x, σ_r), the larger of the linear and the
        nonlinear estimate's. `spectrum` (d,) is that of `closed_form`.

        Replicates resample the estimates alone. The spectrum is that of all rows, held fixed: one per replicate would
        need (r, d, d) sums. So the interval leaves out how far the closed form itself would vary.
        """
        apart, whole = 0.0, 0.0
        for x, r in itertools.product(self.levels, self.levels):
            errors = self.errors(0, x, r)
            estimates = torch.stack([errors[col.LINEAR], errors[col.NONLINEAR]])
            expected = estimates.new_tensor(closed_form(spectrum, x * self.unit, r * self.unit)).unsqueeze(1)
            apart, whole = apart + (estimates - expected).square(), whole + expected.square()
        return (apart / whole).sqrt().amax(0)


def noise_grid(
    fit: Iterator[Parts],
    evaluate: Iterator[Parts],
    ablated: Sequence[float],
    levels: Sequence[float],
    unit: float = 1.0,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> NoiseGrid:
    """Estimates the errors for every (ablated share, σ_x, σ_r).

    Regressions are fitted on `fit` and measured on `evaluate`. `levels` are the values of σ_x and σ_r, times `unit`.
    """
    fitted = Moments()
    for parts in fit:
        targets = {f"lack{f}": parts.truth - r for f, r in enumerate(parts.reconstructions)}
        fitted.add(torch.cat([parts.truth, parts.dense], 1), targets | {"introduced": parts.introduced})
    maps = {sigma_x: _maps(fitted, sigma_x * unit) for sigma_x in levels}
    sums = GroupSums(replicates, seed)
    for parts in evaluate:
        for sigma_x, of_level in maps.items():
            sums.add(parts.group, **_measured(parts, sigma_x, sigma_x * unit, of_level))
    return NoiseGrid(tuple(ablated), tuple(levels), unit, sums)


def _maps(fitted: Moments, sigma_x: float) -> dict[str, Linear]:
    """The maps from x′ + σ_x·n₁ to "left{f}" = x′ − r_f + σ_x·n₁ for each f, and to "introduced" = n₂.

    The predictors of `fitted` are x′ and n₁ side by side, its targets x′ − r_f ("lack{f}") and n₂.
    """
    d = len(fitted.mean) // 2

    def seen(products: Tensor) -> Tensor:
        return products[:d] + sigma_x * products[d:]

    dense, dense_mean = seen(fitted.xx[:, d:]), fitted.mean[d:]
    part = Moments()
    part.rows, part.mean = fitted.rows, seen(fitted.mean)
    part.xx = seen(fitted.xx[:, :d]) + sigma_x * dense
    for name, products in fitted.xy.items():
        if name == "introduced":
            part.xy[name], part.target_mean[name] = seen(products), fitted.target_mean[name]
        else:
            left = name.replace("lack", "left")
            part.xy[left] = seen(products) + sigma_x * dense
            part.target_mean[left] = fitted.target_mean[name] + sigma_x * dense_mean
    return part.solve().maps


def _measured(parts: Parts, level: float, sigma_x: float, maps: Mapping[str, Linear]) -> dict[str, Tensor]:
    """What the estimates at one σ_x need of each row, for every f and σ_r.

    x′ + σ_x·n₁ stands under "LEVEL/x", the `PRODUCTS` (b, 8) of the ablated share number f under "LEVEL/f".
    """
    x, noise = parts.truth + sigma_x * parts.dense, parts.introduced
    missed_noise = noise - maps["introduced"](x)
    found = {f"{level}/x": x, f"{level}/x_squared": x.square()}
    for f, reconstruction in enumerate(parts.reconstructions):
        lack = parts.truth - reconstruction
        left = lack + sigma_x * parts.dense
        missed = left - maps[f"left{f}"](x)
        pairs = [(lack, lack), (parts.dense, parts.dense), (noise, noise), (left, left), (left, noise)]
        pairs += [(missed, missed), (missed, missed_noise), (missed_noise, missed_noise)]
        found[f"{level}/{f}"] = torch.stack([torch.linalg.vecdot(a, b) for a, b in pairs], 1)
    return found


def correlation_table(grid: pd.DataFrame, ablated: float = 0.0) -> pd.DataFrame:
    """Pearson correlations over the grid at one ablated share.

    Rows are σ_x and σ_r. Columns are the estimated linear and nonlinear error.
    """
    part, sigmas = grid[grid[col.ABLATED] == ablated], (col.SIGMA_X, col.SIGMA_R)
    estimates = (col.LINEAR, col.NONLINEAR)
    return pd.DataFrame({column: {sigma: part[sigma].corr(part[column]) for sigma in sigmas} for column in estimates})


def closed_form(spectrum: Tensor, sigma_x: float, sigma_r: float) -> tuple[float, float]:
    """Estimated linear and nonlinear error, as FVU, in the limit of many rows where Sae(x′) = x′.

    `spectrum` (d,) holds the eigenvalues of Σ, the covariance of x′. With N = σ_x²·1 and M = σ_r²·1,

        linear = tr(N(Σ+N)⁻¹N) / tr(Σ+N),
        nonlinear = (tr N + tr M) / tr(Σ+N) − linear.
    """
    seen = spectrum.double() + sigma_x**2
    variance = float(seen.sum())
    linear = sigma_x**4 * float((1 / seen).sum()) / variance if sigma_x else 0.0
    return linear, len(seen) * (sigma_x**2 + sigma_r**2) / variance - linear


# ---------------------------------------------------------------- on an SAE


@dataclass(frozen=True)
class IntroducedError:
    """What the estimates make of known errors on one SAE.

    grid: see `NoiseGrid.table`.
    table: see `correlation_table`.
    closed_form: the grid beside the closed form, at no ablation. The form is exact where the re-encoding FVU is 0.
    judged: one row with intervals. `deviation` is that of `NoiseGrid.deviation`, `reencoding_fvu` FVU(x′, Sae(x′)).
    unit: σ of one unit of noise.
    """

    grid: pd.DataFrame
    table: pd.DataFrame
    closed_form: pd.DataFrame
    judged: pd.DataFrame
    unit: float


@torch.no_grad()
def introduced_error(
    activations: Activations,
    hook_point: str,
    sae: SAE,
    levels: Sequence[float] = LEVELS,
    ablated: Sequence[float] = ABLATED,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> IntroducedError:
    """Runs analysis 4 with x′ = Sae(x) for x of the hook point, fitted on A and measured on C.

    One unit of noise is `noise_unit` of x′'s covariance on A. The closed form takes its covariance on C.

    Args:
        levels: values of σ_x and of σ_r, in these units, 0 first.
        ablated: shares of latents to ablate, 0 first, all below 1.
        seed: seeds the generator that draws the noises, and the resampling.

    Raises:
        UserError: `ablated` does not begin with 0, or a share is below 0 or not below 1.
    """
    if not all(0 <= share < 1 for share in ablated) or ablated[0] != 0:
        raise UserError(f"the shares of ablated latents are {list(ablated)}: they must begin with 0 and be below 1")
    activity, moments = Activity(sae.n), {split: Moments() for split in "AC"}
    for chunk in activations.chunks("A"):
        truth, _ = reconstruct(sae, chunk.x[hook_point])
        reconstruct(sae, truth, activity)
        moments["A"].add(truth, {})
    unit = noise_unit(moments["A"].xx / moments["A"].rows)
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
            made = [torch.cat(pieces).to(truth.device) for pieces in reconstructions]
            if split == "C":
                moments["C"].add(truth, {})
            yield Parts(truth.double(), made, *noise, chunk.group)

    found = noise_grid(parts("A"), parts("C"), ablated, levels, unit, replicates, seed)
    spectrum = torch.linalg.eigvalsh(moments["C"].xx / moments["C"].rows)
    grid = found.table()
    none = grid[grid[col.ABLATED] == 0]
    compared = none[[col.SIGMA_X, col.SIGMA_R, col.LINEAR, col.NONLINEAR]].reset_index(drop=True)
    noises = zip(compared[col.SIGMA_X], compared[col.SIGMA_R], strict=True)
    compared[CLOSED_FORMS] = np.array([closed_form(spectrum, x * unit, r * unit) for x, r in noises])
    judged = {col.DEVIATION: found.deviation(spectrum), col.REENCODING_FVU: found.errors(0, 0.0, 0.0)[col.FVU]}
    return IntroducedError(
        grid, correlation_table(grid), compared, pd.DataFrame([with_intervals(judged, found.sums.groups)]), unit
    )


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
        weights. Rows are independent. The number of the chunk stands for their group.
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
                torch.full((b,), start // chunk),
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
        """The estimates of `NoiseGrid.table` on this model beside their closed forms.

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
