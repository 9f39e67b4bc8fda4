"""Verdicts of claims on tables with a known answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from raysae.analysis.dark_matter.claims import RULES, decide
from raysae.analysis.dark_matter.measures.breakdown import breakdown, fit_power_law
from raysae.analysis.dark_matter.measures.introduced_error import introduced_error
from raysae.analysis.instruments.intervals import with_intervals
from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD
from tests.analysis.planted import HOOK, activations, linear_sae

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


def introduced(**values: tuple[float, float, float]) -> dict:
    """Tables of an SAE that tells the errors apart, and of a synthetic model without a fault."""
    ends = {"deviation": (0.04, 0.05, 0.06), "reencoding_fvu": (0.01, 0.02, 0.03)} | values
    correlations = pd.DataFrame({"noise": ["sigma_x", "sigma_r"], "linear": [0.97, -0.1], "nonlinear": [0.2, 0.95]})
    return {
        "judged": pd.DataFrame([interval(**ends)]),
        "synthetic_correlations": correlations,
        "synthetic_closed_form": pd.DataFrame({"deviation": [0.001, np.nan, 0.01]}),
    }


def test_same_tokens_needs_more_than_the_norm_of_x() -> None:
    def pairs(r2: tuple, beyond: tuple) -> dict:
        widths = {"small_width": 256, "large_width": 512}
        easy = widths | sampled(r2=(0.8, 0.9, 0.95), r2_beyond_x_norm=(0.8, 0.9, 0.95))
        hard = widths | sampled(r2=r2, r2_beyond_x_norm=beyond)
        return {"per_token_scaling": {"pairs": pd.DataFrame([easy, hard])}}

    assert verdict(pairs((0.6, 0.7, 0.8), (0.55, 0.6, 0.65)), "Larger SAEs fail") == HOLDS
    assert verdict(pairs((0.6, 0.7, 0.8), (0.0, 0.1, 0.2)), "Larger SAEs fail") == UNTOLD
    assert verdict(pairs((0.1, 0.2, 0.3), (0.0, 0.1, 0.2)), "Larger SAEs fail") == FAILS


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, HOLDS),
        ({"deviation": (0.2, 0.3, 0.4)}, FAILS),
        ({"reencoding_fvu": (0.1, 0.2, 0.3)}, FAILS),
        ({"deviation": (0.08, 0.09, 0.12)}, UNTOLD),
        ({"deviation": (np.nan, 0.05, np.nan)}, UNTOLD),
    ],
)
def test_an_sae_tells_dense_from_introduced_error_or_not(values: dict, expected: str) -> None:
    assert verdict({"introduced_error": introduced(**values)}, "The SAE's estimates tell") == expected


@pytest.mark.parametrize(
    "fault",
    [
        {"synthetic_closed_form": pd.DataFrame({"deviation": [0.001, np.nan, 0.03]})},
        {"synthetic_closed_form": pd.DataFrame({"deviation": [np.nan]})},
        {
            "synthetic_correlations": pd.DataFrame(
                {"noise": ["sigma_x", "sigma_r"], "linear": [0.97, -0.1], "nonlinear": [0.7, 0.95]}
            )
        },
    ],
)
def test_where_the_code_is_at_fault_nothing_is_said_of_the_sae(fault: dict) -> None:
    assert verdict({"introduced_error": introduced() | fault}, "The SAE's estimates tell") == UNTOLD


def test_a_planted_bad_sae_fails_the_claim_that_a_good_one_passes() -> None:
    source = activations(contexts=900, chunk_rows=8000)
    keeps = torch.tensor([1.0] * 4 + [0.7] * 8)
    for weight, expected in ((torch.eye(12), HOLDS), (torch.diag(keeps), FAILS)):
        judged = introduced_error(source, HOOK, linear_sae(weight), ablated=(0.0,)).judged
        tables = {"introduced_error": introduced() | {"judged": judged}}
        assert verdict(tables, "The SAE's estimates tell") == expected


def patched(
    linear: tuple[float, float], nonlinear: tuple[float, float], spread: float = 0.005, groups: int = 40
) -> dict:
    """Three equal SAEs. Each part has (its share of the cross-entropy, its share of the error's norm).

    Its share of the variance is the square of that of the norm. `spread` is the deviation of the replicates.
    """
    generator, values = np.random.default_rng(0), {}
    for part, (recovered, norm) in (("linear", linear), ("nonlinear", nonlinear)):
        means = {f"recovered_{part}": recovered, f"norm_share_{part}": norm, f"variance_share_{part}": norm**2}
        for name, value in means.items():
            noise = spread * generator.standard_normal(200 if groups > 30 else groups) * name.startswith("recovered")
            values[name] = torch.from_numpy(np.concatenate([[value], value + noise]))
    return {"downstream_loss": {"downstream": pd.DataFrame([with_intervals(values, groups)] * 3)}}


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (patched(linear=(0.6, 0.6), nonlinear=(0.8, 0.8)), HOLDS),  # To the norm
        (patched(linear=(0.36, 0.6), nonlinear=(0.64, 0.8)), HOLDS),  # To the variance
        (patched(linear=(0.6, 0.6), nonlinear=(0.2, 0.8)), FAILS),
        (patched(linear=(0.6, 0.2), nonlinear=(0.98, 0.98)), FAILS),  # ε is all, and ê tells
        (patched(linear=(0.041, 0.2), nonlinear=(0.98, 0.98), spread=0.001), HOLDS),
        (patched(linear=(0.041, 0.2), nonlinear=(0.98, 0.98), spread=0.1), UNTOLD),
        (patched(linear=(0.6, 0.6), nonlinear=(0.8, 0.8), groups=8), UNTOLD),
    ],
)
def test_downstream(tables: dict, expected: str) -> None:
    assert verdict(tables, "Each part's share") == expected


def test_downstream_where_nothing_is_lost() -> None:
    table = patched(linear=(np.nan, 0.6), nonlinear=(np.nan, 0.8))
    assert verdict(table, "Each part's share") == UNTOLD


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.1, 0.2, 0.3), HOLDS),
        ((-0.3, -0.2, -0.1), FAILS),
        ((-0.1, 0.0, 0.1), UNTOLD),
        ((np.nan, 0.2, np.nan), UNTOLD),
    ],
)
def test_saes_on_the_error(ends: tuple, expected: str) -> None:
    known = {"fvu_equal_l0": 0.3, "equal_l0": 16.0, "seeds": 3, **interval(worse=ends)}
    table = pd.DataFrame([{"kind": kind, **known} for kind in ("error", "linear", "nonlinear")])
    assert verdict({"error_saes": {"error_saes": table}}, "SAEs trained on ε") == expected


def test_pursuit() -> None:
    for ends, expected in (((0.001, 0.002, 0.003), HOLDS), ((0.03, 0.04, 0.05), FAILS), ((0.005, 0.01, 0.015), UNTOLD)):
        pursued = pd.DataFrame([sampled(encoder_share=tuple(10 * end for end in ends))])
        assert verdict({"pursuit": {"pursuit": pursued}}, "A better choice") == expected


@pytest.mark.parametrize(
    ("ends", "expected"), [((0.1, 0.2, 0.3), HOLDS), ((-0.3, -0.2, -0.1), FAILS), ((-0.1, 0.1, 0.3), UNTOLD)]
)
def test_earlier_layers_against_pursuit(ends: tuple, expected: str) -> None:
    row = {"source": "resid_post.1", "explained": 0.3, "encoder_share": 0.1, **interval(lead=ends)}
    tables = {"earlier_layers": {"beyond_pursuit": pd.DataFrame([row])}}
    assert verdict(tables, "Reconstructions at earlier") == expected
    assert verdict({"earlier_layers": {"beyond_pursuit": pd.DataFrame()}}, "Reconstructions at earlier") == UNTOLD
