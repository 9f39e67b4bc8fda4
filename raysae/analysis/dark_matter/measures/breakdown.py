"""How error falls with width (analysis 1 of the dark-matter spec).

The module fits FVU(W) = c + a·W^(−m) and measures how flat the nonlinear error is in width. It breaks errors down.
It works on tables of finished measurements and reads no activations.

The fit minimises, over c ≥ 0, a ≥ 0 and m in `EXPONENTS`,

    Σ((c + a·W^(−m))/FVU − 1)².

So the error of a point counts relative to its FVU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.intervals import LEVEL, Estimate, replicated
from raysae.config import UserError

EXPONENTS = (0.01, 5.0)  # Range of m
SPAN = 32  # Widest over narrowest. A fit over less comes with a warning
FEWEST = 6  # Different widths. A fit to fewer comes with a warning
ENDINGS = (col.LOW, col.HIGH, col.REPLICATES)  # What stands beside a number with an interval


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a·W^(−m).

    `c_low` and `c_high` are the ends of the 95 % profile-likelihood interval of c. `warning` says in a sentence why the
    fit is not to be trusted. It is None for a fit that can be trusted.
    """

    c: float
    a: float
    m: float
    c_low: float
    c_high: float
    warning: str | None

    def __call__(self, width: np.ndarray) -> np.ndarray:
        return self.c + self.a * np.asarray(width, float) ** -self.m


def fit_power_law(widths: Sequence[float], fvu: Sequence[float]) -> PowerLaw:
    """Fits a power law by least squares.

    SciPy searches the exponent. Given m, the law is linear in c and a, which non-negative least squares finds. The
    interval of c holds the values that raise the residual by no more than F(1, n − 3) allows. With 3 points it
    runs from 0 to the largest FVU.

    Raises:
        UserError: fewer than three different widths, or an FVU that is not above 0.
    """
    w, y = np.asarray(widths, float), np.asarray(fvu, float)
    if len(np.unique(w)) < 3:
        raise UserError(
            f"a power law needs SAEs of at least 3 widths, these have {len(np.unique(w))}: train more with --widths"
        )
    if not (y > 0).all():
        raise UserError(f"a power law needs values of FVU above 0, one is {y.min():g}")
    scaled = w / w.min()  # Keeps a within a few orders of magnitude of c

    def best(m: float) -> tuple[np.ndarray, float]:
        solution, norm = optimize.nnls(np.stack([1 / y, scaled**-m / y], 1), np.ones(len(y)))
        return solution, norm**2

    m = _minimum(lambda m: best(m)[1])
    (c, a), least = best(m)

    def profile(c: float) -> float:
        """The least residual for a given c."""

        def residual(m: float) -> float:
            u, v = scaled**-m / y, 1 - c / y
            return float(np.square(max(0.0, u @ v / (u @ u)) * u - v).sum())

        return residual(_minimum(residual))

    freedom = len(y) - 3
    low, high = 0.0, float(y.max())
    if freedom > 0:
        limit = max(least, profile(c), 1e-14) * (1 + stats.f.ppf(LEVEL, 1, freedom) / freedom)
        if profile(0.0) > limit:
            low = optimize.brentq(lambda c: profile(c) - limit, 0.0, c)
        if profile(high) > limit:
            high = optimize.brentq(lambda c: profile(c) - limit, c, high)
    law = PowerLaw(float(c), float(a * w.min() ** m), float(m), float(low), float(high), None)
    return PowerLaw(law.c, law.a, law.m, law.c_low, law.c_high, _warning(law, w, y, freedom))


def _minimum(function) -> float:
    """The exponent where `function` is least: the best of a grid, then refined."""
    grid = np.geomspace(*EXPONENTS, 40)
    i = int(np.argmin([function(m) for m in grid]))
    ends = np.log(grid[max(0, i - 1)]), np.log(grid[min(len(grid) - 1, i + 1)])
    return float(
        np.exp(
            optimize.minimize_scalar(
                lambda log_m: function(np.exp(log_m)), bounds=ends, method="bounded", options={"xatol": 1e-9}
            ).x
        )
    )


def _warning(law: PowerLaw, w: np.ndarray, y: np.ndarray, freedom: int) -> str | None:
    span = w.max() / w.min()
    different = len(np.unique(w))
    if freedom <= 0:
        return f"{len(y)} points leave no freedom for three parameters: c could be anything up to the largest FVU"
    if law.a == 0 or y[np.argmax(w)] >= y[np.argmin(w)]:
        return "FVU does not fall with width: there is no power law to fit"
    if law.c_high - law.c_low > 0.5 * y.min():
        return (
            f"c is undetermined: everything from {law.c_low:.3g} to {law.c_high:.3g} fits the {different} widths "
            f"over {span:.3g}×"
        )
    if different < FEWEST or span < SPAN:
        return (
            f"{different} widths over {span:.3g}× are few for three parameters: {FEWEST} over {SPAN}× or more are "
            "wanted"
        )
    if law.m < 1.01 * EXPONENTS[0] or law.m > 0.99 * EXPONENTS[1]:
        return f"the exponent is {law.m:.3g}, at the end of its range: FVU is not a power law of width here"
    return None


@dataclass(frozen=True)
class Level:
    """How flat the nonlinear FVU is in width.

    value: mean over the SAEs.
    slope: change per doubling of the width, as a share of `value`. NaN for a single width.
    share_of_fall: fall from the narrowest to the widest SAE, as a share of FVU's own fall. 0 if flat, 1 if both fall
        alike, NaN if FVU is the same at both.
    """

    value: float
    slope: float
    share_of_fall: float


def nonlinear_level(widths: Sequence[float], nonlinear_fvu: Sequence[float], fvu: Sequence[float]) -> Level:
    """Measures the mean level of the nonlinear FVU, and how far from constant it is."""
    w, y, f = (np.asarray(values, float) for values in (widths, nonlinear_fvu, fvu))
    mean = float(y.mean())
    slope = float(_slopes(w, y[:, None])[0]) / mean if len(np.unique(w)) >= 2 else np.nan
    narrow, wide = np.argmin(w), np.argmax(w)
    fall = f[narrow] - f[wide]
    return Level(mean, slope, float((y[narrow] - y[wide]) / fall) if fall else np.nan)


def compared_slopes(table: pd.DataFrame) -> tuple[Estimate, Estimate]:
    """FVU's fall per doubling of the width, and the fall of the nonlinear FVU as a share of it.

    Lines are fitted to both on every replicate, so the interval of the share is paired. A curve in width is no
    uncertainty and widens nothing.

    `table` has the columns width, fvu and nonlinear_fvu, with their replicates.
    """
    widths, groups = table["width"].to_numpy(float), int(table[col.GROUPS].min())
    fall, nonlinear = (-_slopes(widths, replicated(table, column)) for column in (col.FVU, col.NONLINEAR_FVU))
    return Estimate.of(fall, groups), Estimate.of(nonlinear / fall, groups)


def _slopes(widths: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least-squares slope per doubling of the width of each column of `values` (widths, r), (r,)."""
    centred = np.log2(widths) - np.log2(widths).mean()
    return centred @ values / (centred @ centred)


def breakdown(table: pd.DataFrame, law: PowerLaw) -> pd.DataFrame:
    """What the error of each SAE consists of, as FVU.

    Args:
        table: columns width, fvu, nonlinear_fvu and, where pursuit ran, encoder_share. Intervals are kept.
        law: fit of FVU against width, which gives c.

    Returns:
        A row per SAE by ascending width, with width, fvu, nonlinear_fvu and these columns.
        absent: fvu − c.
        linear: c − nonlinear_fvu.
        nonlinear: nonlinear_fvu.
        encoder: encoder_share · nonlinear_fvu, contained in nonlinear. Missing where pursuit did not run. The share
            comes from one set of rows and probes of the same fit, so both its terms are measured alike.
        linear_gap: fvu − nonlinear_fvu, which needs no fit.
        stacks: whether nonlinear_fvu ≤ c ≤ fvu. Otherwise absent and linear are no parts of a whole.
    """
    kept = [f"{column}{end}" for column in (col.FVU, col.NONLINEAR_FVU) for end in ("", *ENDINGS)]
    parts = table[[name for name in ("width", *kept, col.GROUPS) if name in table]].sort_values("width", kind="stable")
    parts[col.ABSENT] = parts[col.FVU] - law.c
    parts[col.LINEAR] = law.c - parts[col.NONLINEAR_FVU]
    parts[col.NONLINEAR] = parts[col.NONLINEAR_FVU]
    parts[col.LINEAR_GAP] = parts[col.FVU] - parts[col.NONLINEAR_FVU]
    parts[col.STACKS] = (parts[col.LINEAR] >= 0) & (parts[col.ABSENT] >= 0)
    if col.ENCODER_SHARE in table:
        parts[col.ENCODER] = table[col.ENCODER_SHARE].loc[parts.index] * parts[col.NONLINEAR_FVU]
    return parts


def at_nearest_l0(table: pd.DataFrame, target: float) -> pd.DataFrame:
    """Picks for each width the SAE whose L0 is nearest to `target`, by ascending width.

    Distance is logarithmic and counts in steps of a hundredth. Among ties the lower FVU wins. `table` has the columns
    width, l0, fvu and any others.
    """
    distance = np.abs(np.log(table[col.L0].clip(lower=1e-6) / target)).round(2)
    by_rank = table.assign(distance=distance).sort_values(["width", "distance", col.FVU], kind="stable")
    return by_rank.drop_duplicates("width").drop(columns="distance")
