"""Least squares with an intercept from streamed moments in float64, and R² on other tokens per replicate of the groups.

Sums are co-moments, whose sizes do not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raysae.analysis.instruments.intervals import GroupSums

RIDGE = 1e-12  # Added to the diagonal of the predictors' correlation matrix
# Least squared pivot for Cholesky. Below it the eigen-decomposition takes over. A squared pivot is the share of a
# predictor's variance that the predictors before it leave unexplained.
SINGULAR = 1e-8
# Share of the largest eigenvalue. Directions of less variance are left out: in float32 they may be rounding.
EIGENVALUE_CUTOFF = 1e-10


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

    def through_origin(self) -> Moments:
        """The moments about 0 in place of the means. Solving them gives maps without an intercept."""
        about = Moments()
        about.rows, about.mean = self.rows, torch.zeros_like(self.mean)
        about.xx = self.xx + self.rows * torch.outer(self.mean, self.mean)
        for name, mean in self.target_mean.items():
            about.target_mean[name] = torch.zeros_like(mean)
            about.xy[name] = self.xy[name] + self.rows * torch.outer(self.mean, mean)
        return about

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


# ---------------------------------------------------------------- pass 2: R² per replicate


def add_target(sums: GroupSums, group: Tensor, name: str, y: Tensor, predicted: Mapping[str, Tensor]) -> None:
    """Adds what R² of a target `y` (b, m) or (b,) needs, under `name`: see `r2`.

    `predicted` maps the name of a prediction to its values.
    """
    y = y.double()
    sums.add(group, **{name: y, f"{name}_squared": y.square()})
    for by, ŷ in predicted.items():
        add_prediction(sums, group, name, y, by, ŷ)


def add_prediction(sums: GroupSums, group: Tensor, name: str, y: Tensor, by: str, predicted: Tensor) -> None:
    """Adds what R² of one more prediction of the target `name` needs. `add_target` has added `y` before."""
    sums.add(group, **{f"{name}_missed_{by}": (y.double() - predicted.reshape(y.shape)).square()})


def r2(sums: GroupSums, name: str, by: str, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """R² of prediction `by` of target `name`: the mean over dimensions, and the variance-weighted one.

    Both are (1 + r,). Dimensions that do not vary count in neither. `residual` (1 + r, m) replaces
    the residual sums of squares where they are known otherwise.
    """
    missed = sums[f"{name}_missed_{by}"] if residual is None else residual
    total = sums.variation(name)
    varies = total > 0
    per_dimension = torch.where(varies, 1 - missed / torch.where(varies, total, 1.0), torch.nan)
    return per_dimension.nanmean(1), 1 - torch.where(varies, missed, 0.0).sum(1) / total.sum(1)
