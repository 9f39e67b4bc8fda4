"""Planted power laws come back, intervals cover the truth, and meaningless fits say so."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from raysae.analysis.dark_matter.measures.breakdown import (
    at_nearest_l0,
    breakdown,
    compared_slopes,
    fit_power_law,
    nonlinear_level,
)
from raysae.analysis.instruments.intervals import with_intervals
from raysae.config import UserError

WIDTHS = np.array([256, 512, 1024, 2048, 4096, 8192, 16384])


def planted(c=0.05, a=3.0, m=0.6, noise=0.0, seed=0, widths=WIDTHS):
    return (c + a * widths**-m) * (1 + noise * np.random.default_rng(seed).standard_normal(len(widths)))


@pytest.mark.parametrize(("c", "a", "m"), [(0.05, 3.0, 0.6), (0.0, 2.0, 0.4), (0.3, 40.0, 1.3)])
def test_a_planted_law_comes_back(c, a, m):
    law = fit_power_law(WIDTHS, planted(c, a, m))
    assert (law.c, law.a, law.m) == pytest.approx((c, a, m), rel=1e-4, abs=1e-6)
    assert law.c_low <= law.c + 1e-9
    assert law.c_high == pytest.approx(c, abs=1e-4)
    assert law.warning is None
    np.testing.assert_allclose(law(WIDTHS), planted(c, a, m), rtol=1e-5)


def test_equal_to_scipy_curve_fit():
    y = planted(noise=0.01, seed=3)
    law = fit_power_law(WIDTHS, y)
    theirs, _ = curve_fit(
        lambda w, c, a, m: c + a * w**-m, WIDTHS.astype(float), y, p0=[0.04, 2, 0.5], sigma=y, bounds=(0, np.inf)
    )
    assert (law.c, law.a, law.m) == pytest.approx(tuple(theirs), rel=1e-3)


def test_intervals_cover():
    laws = [fit_power_law(WIDTHS, planted(noise=0.01, seed=seed)) for seed in range(60)]
    covered = np.mean([law.c_low <= 0.05 <= law.c_high for law in laws])
    assert covered >= 0.85
    assert all(law.c_low <= law.c <= law.c_high for law in laws)
    assert np.mean([law.c_high - law.c_low for law in laws]) < 0.04


@pytest.mark.parametrize(
    ("widths", "fvu", "sentence"),
    [
        (WIDTHS[:3], planted(widths=WIDTHS[:3]), "leave no freedom"),
        (WIDTHS[:4], planted(widths=WIDTHS[:4]), "4 widths over 8× are few"),
        (WIDTHS[:4], planted(widths=WIDTHS[:4], noise=0.05), "c is undetermined: everything from 0 to"),
        (WIDTHS, planted(m=0.05, noise=0.01), "c is undetermined"),
        (WIDTHS, np.linspace(0.1, 0.2, 7), "does not fall"),
    ],
)
def test_fits_that_mean_nothing_say_so(widths, fvu, sentence):
    assert sentence in fit_power_law(widths, fvu).warning


def test_too_little_to_fit_is_refused():
    with pytest.raises(UserError, match="at least 3 widths, these have 2"):
        fit_power_law([256, 512, 512], [0.2, 0.1, 0.1])
    with pytest.raises(UserError, match="above 0"):
        fit_power_law(WIDTHS, planted() - 0.06)


def test_level_of_the_nonlinear_part():
    flat = nonlinear_level(WIDTHS, np.full(7, 0.08), planted())
    assert (flat.value, flat.slope, flat.share_of_fall) == pytest.approx((0.08, 0, 0))
    falling = nonlinear_level(WIDTHS, 0.5 * planted(), planted())
    assert falling.share_of_fall == pytest.approx(0.5)
    line = stats.linregress(np.log2(WIDTHS), 0.5 * planted())
    assert falling.slope * falling.value == pytest.approx(line.slope)


def test_slopes_are_compared_per_replicate():
    """Both FVUs swing together by a tenth, so the share of the fall does not."""
    swing = 1 + 0.1 * np.array([0, *([1, -1] * 20)])
    rows = [
        {"width": width} | with_intervals({"fvu": fvu * swing, "nonlinear_fvu": (0.02 + 0.25 * fvu) * swing}, 40)
        for width, fvu in zip(WIDTHS, planted(), strict=True)
    ]
    fall, share = compared_slopes(pd.DataFrame(rows))
    assert (share.low, share.value, share.high) == pytest.approx((0.25, 0.25, 0.25))
    assert fall.value == pytest.approx(-stats.linregress(np.log2(WIDTHS), planted()).slope)
    assert (fall.low, fall.high) == pytest.approx((0.9 * fall.value, 1.1 * fall.value))


def test_breakdown():
    table = pd.DataFrame(
        {
            "width": [1024, 256, 512],
            "fvu": [0.1, 0.2, 0.14],
            "nonlinear_fvu": [0.06, 0.09, 0.07],
            "encoder_share": [0.5, 0.25, 0.1],
        }
    )
    law = fit_power_law(WIDTHS, planted(c=0.08))
    parts = breakdown(table, law)
    assert parts["width"].tolist() == [256, 512, 1024]
    np.testing.assert_allclose(parts[["absent", "linear", "nonlinear"]].sum(1), parts["fvu"])
    np.testing.assert_allclose(parts["absent"], parts["fvu"] - 0.08, atol=1e-5)
    np.testing.assert_allclose(parts["linear_gap"], [0.11, 0.07, 0.04])
    np.testing.assert_allclose(parts["encoder"], [0.0225, 0.007, 0.03])
    assert parts["stacks"].tolist() == [False, True, True]
    assert breakdown(table.assign(fvu=[0.07, 0.2, 0.14]), law)["stacks"].tolist() == [False, True, False]
    assert "encoder" not in breakdown(table.drop(columns="encoder_share"), law)


def test_the_sae_of_nearest_l0_per_width():
    table = pd.DataFrame(
        {"width": [512, 256, 256, 512, 256], "l0": [50, 30, 100, 130, 61], "fvu": 0.1, "name": list("abcde")},
        index=[9, 3, 5, 1, 2],
    )
    assert at_nearest_l0(table, 60)["name"].tolist() == ["e", "a"]
    assert at_nearest_l0(table, 90)["name"].tolist() == ["c", "d"]
    tied = pd.DataFrame({"width": 256, "l0": [32.0, 128, 31.95], "fvu": [0.3, 0.1, 0.2], "name": list("abc")})
    assert at_nearest_l0(tied, 64)["name"].tolist() == ["b"], "32 and 128 are as far from 64"
    assert at_nearest_l0(tied, 30)["name"].tolist() == ["c"]
