"""Verdicts of claims on tables with a known answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from raysae.analysis.dark_matter.claims import RULES, decide
from raysae.analysis.dark_matter.measures.breakdown import breakdown, fit_power_law
from raysae.analysis.instruments.intervals import with_intervals
from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD

WIDTHS = np.array([256, 512, 1024, 2048, 4096, 8192])


def verdict(tables: dict, beginning: str) -> str:
    return next(claim.verdict for claim in decide(tables) if claim.text.startswith(beginning))


GROUPS = 40  # Of documents, so replicates are a bootstrap's


def sampled(groups: int = GROUPS, **values: tuple[float, float, float] | np.ndarray) -> dict[str, object]:
    """A row with replicates. A number with ends (low, value, high) has replicates spread evenly between them."""
    replicates = {}
    for name, each in values.items():
        if isinstance(each, tuple):
            low, value, high = each
            each = np.array([value, *np.linspace(low, high, 200 if groups > 30 else groups)])
        replicates[name] = each
    return with_intervals(replicates, groups)


def interval(**values: tuple[float, float, float]) -> dict[str, float]:
    return {
        f"{name}{end}": value
        for name, ends in values.items()
        for end, value in zip(("_low", "", "_high"), ends, strict=True)
    }


def scaling(nonlinear: np.ndarray, fvu: np.ndarray | None = None, noise: float = 0.002, **more) -> dict:
    """A breakdown of SAEs of WIDTHS. `noise` is the spread of each number over replicates, one draw for all."""
    fvu = 0.1 + 8 * WIDTHS**-0.8 if fvu is None else fvu
    rng = np.random.default_rng(0)
    common = 1 + noise * np.concatenate([[0], rng.normal(size=200)])
    own = 1 + noise * np.concatenate([np.zeros((6, 1)), rng.normal(size=(6, 200))], 1)
    rows = [
        {"width": width} | sampled(fvu=f * common, nonlinear_fvu=n * common * each, **more)
        for width, f, n, each in zip(WIDTHS, fvu, nonlinear, own, strict=True)
    ]
    table = pd.DataFrame(rows)
    return {"breakdown": {"breakdown": breakdown(table, fit_power_law(table["width"], table["fvu"]))}}


def test_without_any_analysis_nothing_can_be_told() -> None:
    claims = decide({})
    assert len(claims) == len(RULES)
    assert all(claim.verdict == UNTOLD and "was not measured" in claim.evidence for claim in claims)


FLAT = "Nonlinear FVU is nearly flat"


def test_flat_in_width() -> None:
    level = 0.08 + 0.001 * np.array([1, -1, 0.5, -0.5, 1, -1])
    falling = 0.08 * (1 + 0.9 * np.log2(8192 / WIDTHS))
    assert verdict(scaling(level), FLAT) == HOLDS
    assert verdict(scaling(falling), FLAT) == FAILS
    assert verdict(scaling(level, noise=0.3), FLAT) == UNTOLD
    assert verdict(scaling(level, fvu=np.full(6, 0.2) - 1e-4 * np.arange(6)), FLAT) == UNTOLD


def test_a_curve_in_width_is_no_uncertainty() -> None:
    """The nonlinear FVU bends, so a line does not fit it. Still it falls as FVU falls, and that is known well."""
    fvu = 0.05 + 8 * WIDTHS**-0.8
    assert verdict(scaling(0.9 * fvu, fvu), FLAT) == FAILS


def test_flat_in_width_needs_six_widths_over_a_span_of_32() -> None:
    tables = scaling(np.full(6, 0.08))
    parts = tables["breakdown"]["breakdown"]
    for few in (parts.iloc[:5], parts.assign(width=parts["width"] ** 0.9)):
        claims = decide({"breakdown": {"breakdown": few}})
        assert claims[0].verdict == UNTOLD
        assert "6 over 32× are wanted" in claims[0].evidence


def test_few_groups_of_documents_cannot_tell() -> None:
    for groups, expected in ((9, UNTOLD), (20, HOLDS)):
        row = sampled(groups, encoder_share=(0.0199, 0.02, 0.0201))
        claims = decide({"pursuit": {"pursuit": pd.DataFrame([row])}})
        claim = next(claim for claim in claims if claim.text.startswith("A better choice"))
        assert claim.verdict == expected
        assert ("9 groups of documents, and 10 are wanted" in claim.evidence) == (groups == 9)


def regressions(count: int = 4, **columns: float) -> pd.DataFrame:
    """A table of equal SAEs with intervals of ±0.02."""
    values = {"r2_error": 0.5, "r2_error_norm": 0.9, "r2_norm_nonlinear": 0.5, "r2_error_norm_from_token": 0.3}
    values |= {
        f"{name}{control}": value for name, value in values.items() for control in ("_rescaled", "_half_fit")
    } | columns
    return pd.DataFrame(
        [sampled(**{name: (value - 0.02, value, value + 0.02) for name, value in values.items()})] * count
    )


def half_trained(value: float, norm: float, **whole: float) -> pd.DataFrame:
    """SAEs trained on half the tokens, beside the same SAEs trained on all of them."""
    numbers = {"r2_error": value, "r2_error_norm": norm} | whole
    numbers |= {"r2_error_half": value, "r2_error_norm_half": norm}
    return pd.DataFrame([sampled(**{name: (v - 0.02, v, v + 0.02) for name, v in numbers.items()})] * 2)


@pytest.mark.parametrize(
    ("columns", "half", "expected"),
    [
        ({}, 0.5, HOLDS),
        ({}, None, UNTOLD),  # A control is missing
        ({"r2_error_rescaled": 0.1}, 0.5, UNTOLD),  # Shrinkage explains the error
        ({"r2_error_half_fit": 0.1}, 0.5, UNTOLD),  # The fit had too few tokens
        ({}, 0.9, UNTOLD),  # Training was too short
        ({"r2_error": 0.64}, 0.5, UNTOLD),  # The interval crosses the border
        ({"r2_error": 0.1, "r2_error_rescaled": 0.1, "r2_error_half_fit": 0.1}, 0.1, FAILS),
        ({"r2_error": 0.1, "r2_error_rescaled": 0.1, "r2_error_half_fit": 0.1}, 0.34, UNTOLD),
    ],
)
def test_about_half_needs_every_control(columns: dict, half: float | None, expected: str) -> None:
    tables = {"regressions": regressions(**columns)}
    if half is not None:
        tables["half_trained"] = half_trained(half, 0.9)
    assert verdict({"error_regression": tables}, "About half") == expected


def test_half_trained_saes_stand_beside_the_same_saes() -> None:
    tables = {"regressions": regressions(18, r2_error=0.5), "half_trained": half_trained(0.45, 0.9, r2_error=0.47)}
    claim = next(claim for claim in decide({"error_regression": tables}) if claim.text.startswith("About half"))
    assert "half the tokens 0.45 [0.43, 0.47], of the same 2 SAEs trained on all 0.47 [0.45, 0.49]" in claim.evidence
    assert claim.verdict == HOLDS


@pytest.mark.parametrize(
    ("columns", "half", "expected"),
    [
        ({}, 0.9, HOLDS),
        ({}, None, UNTOLD),
        ({"r2_error_norm_rescaled": 0.6}, 0.9, UNTOLD),
        ({"r2_error_norm_half_fit": 0.6}, 0.9, UNTOLD),
        ({}, 0.6, UNTOLD),
        ({"r2_error_norm": 0.86}, 0.9, UNTOLD),
        ({"r2_error_norm": 0.6, "r2_error_norm_rescaled": 0.6, "r2_error_norm_half_fit": 0.6}, 0.6, FAILS),
    ],
)
def test_the_norm_needs_every_control(columns: dict, half: float | None, expected: str) -> None:
    tables = {"regressions": regressions(**columns)}
    if half is not None:
        tables["half_trained"] = half_trained(0.5, half)
    claim = next(claim for claim in decide({"error_regression": tables}) if claim.text.startswith("The squared norm"))
    assert claim.verdict == expected
    assert all(
        words in claim.evidence for words in ("after the best rescaling", "half the contexts", "half the tokens")
    )


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(0.1, 0.2, 0.3)] * 4, HOLDS),
        ([(-0.3, -0.2, -0.1)] * 4, FAILS),
        ([(-0.1, 0.05, 0.2)] * 4, UNTOLD),  # Zero lies in the interval, so neither is ahead
        ([(0.1, 0.2, 0.3)] * 2 + [(-0.3, -0.2, -0.1)] * 2, UNTOLD),
    ],
)
@pytest.mark.parametrize(
    ("column", "claim"),
    [("r2_norm_nonlinear_lack", "‖ε‖² is predicted less"), ("r2_error_norm_lead", "The activation says more")],
)
def test_differences_are_judged_by_their_intervals(column: str, claim: str, ends: list, expected: str) -> None:
    differences = pd.DataFrame([sampled(**{column: each}) for each in ends])
    table = pd.concat([regressions().drop(columns="groups"), differences], axis=1)
    assert verdict({"error_regression": {"regressions": table}}, claim) == expected


def test_same_tokens_needs_more_than_the_norm_of_x() -> None:
    def pairs(r2: tuple, beyond: tuple) -> dict:
        widths = {"small_width": 256, "large_width": 512}
        easy = widths | sampled(r2=(0.8, 0.9, 0.95), r2_beyond_x_norm=(0.8, 0.9, 0.95))
        hard = widths | sampled(r2=r2, r2_beyond_x_norm=beyond)
        return {"per_token_scaling": {"pairs": pd.DataFrame([easy, hard])}}

    assert verdict(pairs((0.6, 0.7, 0.8), (0.55, 0.6, 0.65)), "Larger SAEs fail") == HOLDS
    assert verdict(pairs((0.6, 0.7, 0.8), (0.0, 0.1, 0.2)), "Larger SAEs fail") == UNTOLD
    assert verdict(pairs((0.1, 0.2, 0.3), (0.0, 0.1, 0.2)), "Larger SAEs fail") == FAILS


def test_introduced_error() -> None:
    good = pd.DataFrame({"noise": ["sigma_x", "sigma_r"], "linear": [0.97, -0.1], "nonlinear": [0.2, 0.95]})
    bad = good.assign(nonlinear=[0.7, 0.95])
    for own, deviation, expected in ((good, 0.01, HOLDS), (bad, 0.01, FAILS), (good, 0.03, FAILS)):
        compared = pd.DataFrame({"deviation": [0.001, np.nan, deviation]})
        tables = {
            "introduced_error": {"correlations": own, "synthetic_correlations": good, "synthetic_closed_form": compared}
        }
        assert verdict(tables, "The estimates tell") == expected


@pytest.mark.parametrize(
    ("ends", "norm", "expected"),
    [
        ((0.45, 0.5, 0.55), 0.52, HOLDS),
        ((0.45, 0.5, 0.55), 0.8, UNTOLD),  # Proportional to the variance and not to the norm
        ((0.1, 0.15, 0.2), 0.7, FAILS),
        ((0.3, 0.45, 0.6), 0.5, UNTOLD),
    ],
)
def test_downstream(ends: tuple, norm: float, expected: str) -> None:
    table = pd.DataFrame(
        [{"variance_share_nonlinear": 0.5, "norm_share_nonlinear": norm} | interval(recovered_nonlinear=ends)]
    )
    assert verdict({"downstream_loss": {"downstream": table}}, "The nonlinear part's share") == expected
    nothing_lost = table.assign(recovered_nonlinear=np.nan)
    assert verdict({"downstream_loss": {"downstream": nothing_lost}}, "The nonlinear part's share") == UNTOLD


def test_error_saes_pursuit_and_earlier_layers() -> None:
    for ends, expected in (((0.1, 0.2, 0.3), HOLDS), ((-0.3, -0.2, -0.1), FAILS), ((-0.1, 0.0, 0.1), UNTOLD)):
        table = pd.DataFrame(
            [{"kind": kind, "fvu": 0.3, **interval(worse=ends)} for kind in ("error", "linear", "nonlinear")]
        )
        assert verdict({"error_saes": {"error_saes": table}}, "SAEs trained on ε") == expected
    for ends, expected in (((0.001, 0.002, 0.003), HOLDS), ((0.03, 0.04, 0.05), FAILS), ((0.005, 0.01, 0.015), UNTOLD)):
        pursued = pd.DataFrame([sampled(encoder_share=tuple(10 * end for end in ends))])
        assert verdict({"pursuit": {"pursuit": pursued}}, "A better choice") == expected
    for ends, expected in (((0.2, 0.25, 0.3), HOLDS), ((0.01, 0.02, 0.03), FAILS)):
        row = {"part": "reconstruction", "target": "ε", "hook_point": "resid_post.2", **interval(r2_weighted=ends)}
        table = pd.DataFrame([row | {"source": "resid_post.2", "r2_weighted": 0.9}, row | {"source": "mlp_out.2"}])
        pursued = pd.DataFrame([{"nonlinear_fvu": 0.1} | interval(encoder_error=(0.009, 0.01, 0.011))])
        assert (
            verdict(
                {"earlier_layers": {"earlier_layers": table}, "pursuit": {"pursuit": pursued}},
                "Reconstructions at earlier",
            )
            == expected
        )
