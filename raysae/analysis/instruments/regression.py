"""Least squares with an intercept from streamed moments in float64.

It also measures R² on other tokens, with bootstrap intervals over contexts. Sums are co-moments, and weighted sums per
bootstrap replicate. Their sizes do not depend on the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raysae.analysis.instruments import columns as col

RIDGE = 1e-12  # Added to the diagonal of the predictors' correlation matrix
# Least squared pivot for Cholesky. Below it the eigen-decomposition takes over. A squared pivot is the share of a
# predictor's variance that the predictors before it leave unexplained.
SINGULAR = 1e-8
# Share of the largest eigenvalue. Directions of less variance are left out: in float32 they may be rounding.
EIGENVALUE_CUTOFF = 1e-10
REPLICATES = 200
LEVEL = 0.95  # Confidence level of every interval


# ---------------------------------------------------------------- linear maps


@dataclass(frozen=True)
class Linear:
    """ŷ = x·weight + bias, float64: `weight` (d, m), `bias` (m,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions (b, m) for `x` (b, d)."""
        return torch.addmm(self.bias, x.double(), self.weight)


def save_linear(maps: Mapping[str, Linear], path: str | Path) -> None:
    """Writes linear maps by name to one safetensors file."""
    save_file(
        {f"{name}/{part}": getattr(m, part).contiguous() for name, m in maps.items() for part in ("weight", "bias")},
        path,
    )


def load_linear(path: str | Path) -> dict[str, Linear]:
    """Reads what `save_linear` wrote."""
    tensors = load_file(path)
    names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
    return {name: Linear(tensors[f"{name}/weight"], tensors[f"{name}/bias"]) for name in names}


@dataclass(frozen=True)
class Fit:
    """Solutions of one factorisation.

    maps: solution of each target.
    rows: number of rows it was fitted on.
    method: "cholesky" or "eigen".
    ridge: what was added to the diagonal of the predictors' correlation matrix.
    rank: number of directions used.
    condition: largest eigenvalue over the smallest one used.
    """

    maps: dict[str, Linear]
    rows: int
    method: str
    ridge: float
    rank: int
    condition: float


# ---------------------------------------------------------------- pass 1: moments


class Moments:
    """Means and centred products of predictors x (b, d) with themselves and with named targets y (b, m) or (b,).

    There may be any number of targets. All share XᵀX and its factorisation. Each chunk is centred on its own means and
    merged by Chan's rule. So means far from 0, which residual streams have, cost no digits.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean: Tensor = torch.zeros(0)  # (d,)
        self.xx: Tensor = torch.zeros(0)  # (d, d)
        self.target_mean: dict[str, Tensor] = {}  # (m,)
        self.xy: dict[str, Tensor] = {}  # (d, m)

    def add(self, x: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Takes in rows. The targets must be the same every time."""
        if len(x) == 0:
            return
        part = Moments()
        part.rows = len(x)
        x = x.double()
        part.mean = x.mean(0)
        x = x - part.mean
        part.xx = x.T @ x
        for name, y in targets.items():
            y = y.double().reshape(len(x), -1)
            part.target_mean[name] = y.mean(0)
            part.xy[name] = x.T @ y  # As x is centred, y need not be
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Adds the rows that `other` has seen."""
        if other.rows == 0:
            return
        if self.rows == 0:
            self.rows, self.mean, self.xx = other.rows, other.mean, other.xx
            self.target_mean, self.xy = dict(other.target_mean), dict(other.xy)
            return
        rows = self.rows + other.rows
        weight = self.rows * other.rows / rows
        shift = other.mean - self.mean
        self.xx = self.xx + other.xx + weight * torch.outer(shift, shift)
        for name, mean in other.target_mean.items():
            moved = mean - self.target_mean[name]
            self.xy[name] = self.xy[name] + other.xy[name] + weight * torch.outer(shift, moved)
            self.target_mean[name] = self.target_mean[name] + moved * (other.rows / rows)
        self.mean = self.mean + shift * (other.rows / rows)
        self.rows = rows

    def solve(self, ridge: float = RIDGE) -> Fit:
        """Solves least squares for every target.

        Predictors are scaled to variance 1. Cholesky then solves with `ridge` added to the diagonal. Where XᵀX is
        singular, the eigen-decomposition takes over, without the directions that do not vary. Constant predictors get
        the weight 0.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.rows < 2:
            raise ValueError(f"a regression needs at least 2 rows, there are {self.rows}")
        variance = self.xx.diagonal()
        # Predictors are rounded to float32. A variance below the square of that rounding counts as none.
        varies = variance > self.rows * (1e-7 * self.mean.abs()).square() + torch.finfo(torch.float64).tiny
        scale = torch.where(varies, variance.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)  # (d,)
        correlation = self.xx * scale * scale.unsqueeze(1)
        correlation.diagonal().copy_(torch.ones_like(scale))  # Constants get 1 too: they covary with nothing
        with_ridge = correlation.clone()
        with_ridge.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(with_ridge)
        pivots = factor.diagonal().square()
        if not failed and float(pivots.min()) > SINGULAR:
            solved = {name: torch.cholesky_solve(xy * scale.unsqueeze(1), factor) for name, xy in self.xy.items()}
            eigenvalues = torch.linalg.eigvalsh(correlation)
            method, rank = "cholesky", int(varies.sum())
        else:
            eigenvalues, vectors = torch.linalg.eigh(correlation)
            used = eigenvalues > EIGENVALUE_CUTOFF * eigenvalues[-1]
            eigenvalues, vectors = eigenvalues[used], vectors[:, used]
            solved = {
                name: vectors @ ((vectors.T @ (xy * scale.unsqueeze(1))) / eigenvalues.unsqueeze(1))
                for name, xy in self.xy.items()
            }
            method, rank, ridge = "eigen", int(used.sum() - (~varies).sum()), 0.0
        maps = {}
        for name, weight in solved.items():
            weight = weight * scale.unsqueeze(1)
            maps[name] = Linear(weight, self.target_mean[name] - self.mean @ weight)
        return Fit(maps, self.rows, method, ridge, rank, float(eigenvalues[-1] / eigenvalues[0]))


# ---------------------------------------------------------------- pass 2: bootstrapped sums over contexts


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval from resampled contexts."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From `values` (1 + replicates,): first the number itself, then its replicates.

        Replicates that are not finite do not count. With none left, the ends are NaN.
        """
        replicates = values[1:][values[1:].isfinite()].numpy()
        tail = 50 * (1 - LEVEL)
        low, high = np.percentile(replicates, [tail, 100 - tail]) if len(replicates) else (math.nan, math.nan)
        return cls(float(values[0]), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


class ContextSums:
    """Sums of per-row quantities over all rows, and over bootstrap resamples of the contexts.

    Every quantity's sum is `(1 + replicates, m)`. The first entry is over all rows. In the others a context counts as
    often as the replicate drew it. The counts are Poisson(1), the streamed form of drawing contexts with replacement
    (Chamandy et al. 2012). Their generator is seeded with (seed, context), so all quantities, SAEs and passes see the
    same resamples. Any function of the sums has a paired interval, ratios and differences included.
    """

    def __init__(self, replicates: int = REPLICATES, seed: int = 0) -> None:
        self.replicates, self.seed = replicates, seed
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}  # Rows behind each quantity, (1 + replicates, 1)
        # Contexts and weights of the last chunk, because many SAEs ask for the same.
        self._drawn: tuple[Tensor, Tensor] | None = None

    def add(self, context: Tensor, **rows: Tensor) -> None:
        """Takes in named quantities (b,) or (b, m) of rows of `context` (b,).

        All rows of a context must come in one call.
        """
        contexts, of_row = torch.unique(context, return_inverse=True)
        weights = self._weights(contexts)
        counted = weights @ torch.bincount(of_row).double().unsqueeze(1)
        for name, values in rows.items():
            values = values.double().reshape(len(context), -1)
            per_context = torch.zeros(len(contexts), values.shape[1], dtype=torch.float64).index_add_(0, of_row, values)
            total = weights @ per_context
            self.sums[name] = self.sums[name] + total if name in self.sums else total
            self.rows[name] = self.rows[name] + counted if name in self.rows else counted

    def __getitem__(self, name: str) -> Tensor:
        """Sum of the quantity `name`, (1 + replicates, m)."""
        return self.sums[name]

    def mean(self, name: str) -> Tensor:
        """Mean per row of a scalar quantity, (1 + replicates,)."""
        return (self.sums[name] / self.rows[name]).squeeze(1)

    def variation(self, name: str) -> Tensor:
        """Σ(y − ȳ)² per dimension, (1 + replicates, m).

        y was added as `name` and its square as `name_squared`. What may be rounding counts as 0.
        """
        total = self.sums[f"{name}_squared"] - self.sums[name].square() / self.rows[name].clamp_min(1)
        rounding = 1e-12 * self.sums[f"{name}_squared"]
        return torch.where(total > rounding, total, 0.0)

    def _weights(self, contexts: Tensor) -> Tensor:
        """How often each replicate counts each context, (1 + replicates, c)."""
        if self._drawn is None or not torch.equal(self._drawn[0], contexts):
            drawn = [
                np.random.default_rng([self.seed, context]).poisson(1.0, self.replicates)
                for context in contexts.tolist()
            ]
            weights = torch.from_numpy(np.stack(drawn, 1)).double()
            self._drawn = contexts, torch.cat([torch.ones(1, len(contexts), dtype=torch.float64), weights])
        return self._drawn[1]


def add_target(sums: ContextSums, context: Tensor, name: str, y: Tensor, predicted: Mapping[str, Tensor]) -> None:
    """Adds what R² of a target `y` (b, m) or (b,) needs, under `name`: see `r2`.

    `predicted` maps the name of a prediction to its values.
    """
    y = y.double()
    residuals = {f"{name}_missed_{by}": (y - ŷ.reshape(y.shape)).square() for by, ŷ in predicted.items()}
    sums.add(context, **{name: y, f"{name}_squared": y.square()}, **residuals)


def r2(sums: ContextSums, name: str, by: str, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """R² of prediction `by` of target `name`: the mean over dimensions, and the variance-weighted one.

    Both are (1 + replicates,). Dimensions that do not vary count in neither. `residual` (1 + replicates, m) replaces
    the residual sums of squares where they are known otherwise.
    """
    missed = sums[f"{name}_missed_{by}"] if residual is None else residual
    total = sums.variation(name)
    varies = total > 0
    per_dimension = torch.where(varies, 1 - missed / torch.where(varies, total, 1.0), torch.nan)
    return per_dimension.nanmean(1), 1 - torch.where(varies, missed, 0.0).sum(1) / total.sum(1)


def with_intervals(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Each number under its name, and the ends of its interval under `NAME_low` and `NAME_high`.

    `values` are (1 + replicates,), as in `Estimate.of`.
    """
    row: dict[str, float] = {}
    for name, replicates in values.items():
        estimate = Estimate.of(replicates)
        row |= {name: estimate.value, col.low(name): estimate.low, col.high(name): estimate.high}
    return row
