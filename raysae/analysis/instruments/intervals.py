"""Numbers with 95 % intervals over groups of documents.

Tokens of one document are alike, so a number's uncertainty comes from the choice of documents. The unit is a *group*:
documents that no context joins to a document of another group (`activations.split_contexts`). What is measured is a
function of sums over rows. It is worked out again for every *replicate*, a reweighting of the groups. Its spread over
replicates gives the interval. With G groups:

- G < 10: there is no interval, and the ends are NaN.
- 10 ≤ G ≤ 30: jackknife. Replicate g leaves out group g. The interval is θ ± t·s, where t is the quantile of Student's
  t with G − 1 degrees of freedom and s² = (G − 1)/G · Σ(θ_g − mean θ_g)² (Efron and Stein 1981).
- G > 30: bootstrap. A replicate counts a group Poisson(1) times, the streamed form of drawing groups with replacement
  (Chamandy et al. 2012). The interval runs between percentiles, which lie a little farther out than 2.5 and 97.5: for
  a mean of normal values that gives Student's t in place of z (Hesterberg 2015, "expanded percentile interval").

All numbers, SAEs and passes over the same groups share their replicates. So ratios, differences, slopes and medians are
worked out per replicate, and their intervals are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from raysae.analysis.instruments import columns as col

REPLICATES = 200
LEVEL = 0.95  # Confidence level of every interval
FEWEST_GROUPS = 10  # With fewer there is no interval
MOST_JACKKNIFE = 30  # With more groups the bootstrap takes over


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its 95 % interval. `replicates` (r,) is the number on each replicate of the `groups`."""

    value: float
    low: float
    high: float
    groups: int
    replicates: np.ndarray

    @classmethod
    def of(cls, values: Tensor | np.ndarray, groups: int) -> Estimate:
        """From `values` (1 + r,): the number itself, then its replicates.

        Bootstrap replicates that are not finite do not count. The ends are NaN where nothing gives an interval.
        """
        value, replicates = float(values[0]), np.asarray(values[1:], float)
        low, high = _jackknife(value, replicates) if groups <= MOST_JACKKNIFE else _percentiles(replicates, groups)
        return cls(value, low, high, groups, replicates)

    def __format__(self, spec: str) -> str:
        """The number and its ends by the format `spec`, or the number and why it has no interval."""
        number = format(self.value, spec)
        if self.groups < FEWEST_GROUPS:
            return f"{number} (no interval: {self.groups} groups of documents, and {FEWEST_GROUPS} are wanted)"
        return f"{number} [{self.low:{spec}}, {self.high:{spec}}]"


def _jackknife(value: float, replicates: np.ndarray) -> tuple[float, float]:
    groups = len(replicates)
    if groups < FEWEST_GROUPS:
        return math.nan, math.nan
    error = math.sqrt((groups - 1) / groups * np.square(replicates - replicates.mean()).sum())
    half = float(stats.t.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return value - half, value + half


def _percentiles(replicates: np.ndarray, groups: int) -> tuple[float, float]:
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return math.nan, math.nan
    t = stats.t.ppf((1 + LEVEL) / 2, groups - 1)
    tail = 100 * stats.norm.cdf(-math.sqrt(groups / (groups - 1)) * t)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)


# ---------------------------------------------------------------- sums


class GroupSums:
    """Sums of per-row quantities over all rows, and over each replicate of the groups.

    Every quantity's sum is `(1 + r, m)`: over all rows, then over each replicate. r is the number of groups for the
    jackknife and `replicates` for the bootstrap. Up to 30 groups have their own sums, so memory depends neither on rows
    nor on groups. The generator of a group's counts is seeded with (seed, group).
    """

    def __init__(self, replicates: int = REPLICATES, seed: int = 0) -> None:
        self.replicates, self.seed = replicates, seed
        self._seen: set[int] = set()
        self._of_group: dict[str, dict[int, Tensor]] = {}  # Sums (m + 1,) of each of few groups. The last counts rows
        self._resampled: dict[str, Tensor] = {}  # Sums (1 + replicates, m + 1) over many groups
        # Groups and weights of the last chunk, because many quantities ask for the same.
        self._drawn: tuple[list[int], Tensor] = [], torch.zeros(0)

    @property
    def groups(self) -> int:
        """The number of groups seen."""
        return len(self._seen)

    def add(self, group: Tensor, **rows: Tensor) -> None:
        """Takes in named quantities (b,) or (b, m) of rows whose groups are `group` (b,)."""
        if not len(group):
            return
        groups, of_row = torch.unique(group, return_inverse=True)
        there = groups.tolist()
        self._seen.update(there)
        if self.groups > MOST_JACKKNIFE and self._of_group:
            self._resample()
        for name, values in rows.items():
            values = values.double().reshape(len(group), -1)
            counted = torch.cat([values, torch.ones_like(values[:, :1])], 1)
            sums = torch.zeros(len(there), counted.shape[1], dtype=torch.float64).index_add_(0, of_row, counted)
            if self.groups > MOST_JACKKNIFE:
                self._resampled[name] = self._resampled.get(name, 0) + self._weights(there) @ sums
                continue
            known = self._of_group.setdefault(name, {})
            for g, total in zip(there, sums, strict=True):
                known[g] = known[g] + total if g in known else total.clone()

    def _resample(self) -> None:
        """Turns the sums of few groups into sums over bootstrap replicates."""
        for name, known in self._of_group.items():
            self._resampled[name] = self._weights(list(known)) @ torch.stack(list(known.values()))
        self._of_group = {}

    def _weights(self, groups: list[int]) -> Tensor:
        """How often all rows and each bootstrap replicate count each group, (1 + replicates, groups)."""
        if self._drawn[0] != groups:
            drawn = [np.random.default_rng([self.seed, g]).poisson(1.0, self.replicates) for g in groups]
            counts = torch.from_numpy(np.stack(drawn, 1)).double()
            self._drawn = groups, torch.cat([torch.ones(1, len(groups), dtype=torch.float64), counts])
        return self._drawn[1]

    def __contains__(self, name: str) -> bool:
        return name in self._of_group or name in self._resampled

    def _sums(self, name: str) -> Tensor:
        if name in self._resampled:
            return self._resampled[name]
        known = self._of_group[name]
        nothing = torch.zeros_like(next(iter(known.values())))
        of_group = torch.stack([known.get(g, nothing) for g in sorted(self._seen)])
        left = torch.cat([torch.ones(1, self.groups), 1 - torch.eye(self.groups)]).double()
        return left @ of_group

    def __getitem__(self, name: str) -> Tensor:
        """Sum of the quantity `name`, (1 + r, m)."""
        return self._sums(name)[:, :-1]

    def mean(self, name: str) -> Tensor:
        """Mean per row of a scalar quantity, (1 + r,)."""
        total, rows = self._sums(name).unbind(1)
        return total / rows

    def variation(self, name: str) -> Tensor:
        """Σ(y − ȳ)² per dimension, (1 + r, m).

        y was added as `name` and its square as `name_squared`. What may be rounding counts as 0.
        """
        squared, sums = self[f"{name}_squared"], self._sums(name)
        total = squared - sums[:, :-1].square() / sums[:, -1:].clamp_min(1)
        return torch.where(total > 1e-12 * squared, total, 0.0)


# ---------------------------------------------------------------- tables


def with_intervals(values: Mapping[str, Tensor], groups: int) -> dict[str, object]:
    """A row of a table. Each number has its ends under `NAME_low` and `NAME_high`, and its replicates beside them.

    `values` are (1 + r,), as in `Estimate.of`. The column `groups` says how many groups they stand on.
    """
    return in_columns({name: Estimate.of(each, groups) for name, each in values.items()})


def in_columns(estimates: Mapping[str, Estimate]) -> dict[str, object]:
    """The same row from estimates that are made already."""
    row: dict[str, object] = {}
    for name, each in estimates.items():
        ends = {col.low(name): each.low, col.high(name): each.high, col.replicates(name): each.replicates}
        row |= {name: each.value} | ends | {col.GROUPS: each.groups}
    return row


def replicated(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column's numbers and their replicates, (rows, 1 + r).

    Raises:
        KeyError: the table has no such column, or no replicates of it.
    """
    return np.column_stack([table[column].to_numpy(float), np.stack(list(table[col.replicates(column)]))])


def over_rows(values: np.ndarray, table: pd.DataFrame) -> Estimate:
    """The median over a table's rows of `values` (rows, 1 + r), per replicate. Numbers that are NaN do not count."""
    return Estimate.of(medians(values), int(table[col.GROUPS].min()))


def medians(values: np.ndarray) -> np.ndarray:
    """The median of `values` (rows, 1 + r) per replicate, (1 + r,). NaN where every row's number is."""
    none = np.isnan(values).all(0)
    return np.where(none, math.nan, np.nanmedian(np.where(none, 0.0, values), 0))


def median_of(table: pd.DataFrame, column: str) -> Estimate:
    """The median of a column over a table's rows, per replicate."""
    return over_rows(replicated(table, column), table)
