"""How error falls with width (analysis 1 of the dark-matter spec): FVU(W) = c + a·W^(−m), the level of the nonlinear part, and the breakdown.

Errors of a point are taken as relative: the fit minimises Σ((c + a·W^(−m))/FVU − 1)² over c ≥ 0, a ≥ 0 and m in `EXPONENTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.regression import LEVEL
from raysae.config import UserError

EXPONENTS = (0.01, 5.0)  # m
SPAN = 32  # of widths, from which on a fit counts as determined
FEWEST = 6  # widths, likewise


@dataclass(frozen=True)
class PowerLaw:
    """FVU(W) = c + a·W^(−m), the 95 % profile-likelihood interval of c, and, in a sentence, why the fit is not to be trusted (None if it is)."""

    c: float
    a: float
    m: float
    c_low: float
    c_high: float
    warning: str | None

    def __call__(self, width: np.ndarray) -> np.ndarray:
        return self.c + self.a * np.asarray(width, float) ** -self.m


def fit_power_law(widths: Sequence[float], fvu: Sequence[float]) -> PowerLaw:
    """Least squares over the exponent by SciPy, c and a being linear given it; the interval of c holds the values that raise the residual by no more
    than F(1, n − 3) allows.

    Raises:
        UserError: fewer than three different widths, or an FVU that is not above 0.
    """
    w, y = np.asarray(widths, float), np.asarray(fvu, float)
    if len(np.unique(w)) < 3:
        raise UserError(f"a power law needs SAEs of at least 3 widths, these have {len(np.unique(w))}: train more with --widths")
    if not (y > 0).all():
        raise UserError(f"a power law needs values of FVU above 0, one is {y.min():g}")
    scaled = w / w.min()  # keeps a within a few orders of magnitude of c

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
    """The exponent of least `function`: the best of a grid, polished."""
    grid = np.geomspace(*EXPONENTS, 40)
    i = int(np.argmin([function(m) for m in grid]))
    ends = np.log(grid[max(0, i - 1)]), np.log(grid[min(len(grid) - 1, i + 1)])
    return float(np.exp(optimize.minimize_scalar(lambda log_m: function(np.exp(log_m)), bounds=ends, method="bounded", options={"xatol": 1e-9}).x))


def _warning(law: PowerLaw, w: np.ndarray, y: np.ndarray, freedom: int) -> str | None:
    span = w.max() / w.min()
    different = len(np.unique(w))
    if freedom <= 0:
        return f"{len(y)} points leave no freedom for three parameters: c could be anything up to the largest FVU"
    if law.a == 0 or y[np.argmax(w)] >= y[np.argmin(w)]:
        return "FVU does not fall with width: there is no power law to fit"
    if law.c_high - law.c_low > 0.5 * y.min():
        return f"c is undetermined: everything from {law.c_low:.3g} to {law.c_high:.3g} fits the {different} widths over {span:.3g}×"
    if different < FEWEST or span < SPAN:
        return f"{different} widths over {span:.3g}× are few for three parameters: {FEWEST} over {SPAN}× or more are wanted"
    if law.m < 1.01 * EXPONENTS[0] or law.m > 0.99 * EXPONENTS[1]:
        return f"the exponent is {law.m:.3g}, at the end of its range: FVU is not a power law of width here"
    return None


@dataclass(frozen=True)
class Level:
    """How flat the nonlinear part is in width.

    `value` is its mean over widths, `slope` its change per doubling of the width as a share of `value`, with a 95 % interval (NaN below three
    points); `share_of_fall` is how much it falls from the narrowest to the widest SAE as a share of FVU's own fall: 0 if flat, 1 if it falls alike.
    """

    value: float
    slope: float
    slope_low: float
    slope_high: float
    share_of_fall: float


def nonlinear_level(widths: Sequence[float], nonlinear_fvu: Sequence[float], fvu: Sequence[float]) -> Level:
    """The constant level of the nonlinear FVU and how far from constant it is."""
    w, y, f = (np.asarray(values, float) for values in (widths, nonlinear_fvu, fvu))
    mean, slope, half = float(y.mean()), np.nan, np.nan
    if len(np.unique(w)) >= 2:
        line = stats.linregress(np.log2(w), y / mean)
        slope = float(line.slope)
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(y) - 2) * line.stderr) if len(y) > 2 else np.nan
    narrow, wide = np.argmin(w), np.argmax(w)
    fall = f[narrow] - f[wide]
    return Level(mean, slope, slope - half, slope + half, float((y[narrow] - y[wide]) / fall) if fall else np.nan)


def breakdown(table: pd.DataFrame, law: PowerLaw) -> pd.DataFrame:
    """What the error of each SAE of `table` (columns width, fvu, nonlinear_fvu and, where pursuit ran, pursuit_nonlinear_fvu) consists of, as FVU.

    Columns: absent = fvu − c, linear = c − nonlinear_fvu, nonlinear = nonlinear_fvu, of it encoder = nonlinear_fvu − pursuit's; linear_gap =
    fvu − nonlinear_fvu needs no fit; `stacks` is False where c < nonlinear_fvu: absent and linear are then no parts of a whole.
    """
    parts = table[["width", col.FVU, col.NONLINEAR_FVU]].sort_values("width", kind="stable").copy()
    parts[col.ABSENT] = parts[col.FVU] - law.c
    parts[col.LINEAR] = law.c - parts[col.NONLINEAR_FVU]
    parts[col.NONLINEAR] = parts[col.NONLINEAR_FVU]
    parts[col.LINEAR_GAP] = parts[col.FVU] - parts[col.NONLINEAR_FVU]
    parts[col.STACKS] = parts[col.LINEAR] >= 0
    if col.PURSUIT_NONLINEAR_FVU in table:
        parts[col.ENCODER] = parts[col.NONLINEAR_FVU] - table[col.PURSUIT_NONLINEAR_FVU].loc[parts.index]
    return parts


def at_nearest_l0(table: pd.DataFrame, target: float) -> pd.DataFrame:
    """Of each width in `table` (columns width, l0, …) the SAE whose L0 is nearest to `target` on a logarithmic scale, by ascending width."""
    distance = np.abs(np.log(table[col.L0].clip(lower=1e-6) / target))
    return table.loc[distance.groupby(table["width"]).idxmin()].sort_values("width")
