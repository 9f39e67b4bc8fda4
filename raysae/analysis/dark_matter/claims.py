"""The claims of the paper (Engels et al. 2024, as the dark-matter spec states them), each decided from the analyses' tables and their intervals.

A claim holds, does not hold, or cannot be told: where its interval reaches over the border between the two, or where what it needs was not measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from raysae.analysis.report.claims import (
    FAILS,
    HOLDS,
    UNTOLD,
    Claim,
    Tables,
    Verdict,
    between,
    claim_of,
    unanimous,
    within,
)

FLAT = 0.25  # "nearly flat": falls by at most this share of FVU's fall per doubling of the width
HALF = (0.35, 0.65)  # "about one half"
LEAST_NORM_R2 = 0.86  # the lower end of the paper's range
SAME_TOKENS = 0.5  # R² from which errors of two SAEs count as lying on the same tokens
PROPORTIONAL = (0.8, 1.25)  # ratio of two shares that count as proportional
FEW_PER_CENT = 0.10
DIAGONAL, OFF_DIAGONAL = 0.9, 0.5
AGREEMENT = 0.02  # of estimates with their closed form
CONTROLS = {  # for undertraining: what an R² is measured on, by the end of its column's name
    "": "",
    "_rescaled": "after the best rescaling ",
    "_half_fit": "fitted on half the contexts ",
    "_half": "of SAEs trained on half the tokens ",
}
BASELINES = {"token": "the token", "token_loss": "its loss", "l0": "L0", "x_norm": "‖x‖²"}
MOST = 0.9  # of the SAEs, for "in general"


def decide(tables: Tables) -> list[Claim]:
    """Every claim, in the order of the analyses; where an analysis is missing in `tables`, its claims cannot be told."""
    return [rule(tables) for rule in RULES]


def _controlled(tables: Tables, column: str, judged: Callable[[float, float], Verdict]) -> tuple[Verdict, str]:
    """A verdict on an R² over the SAEs and on its controls for undertraining, which must agree; `judged` takes the ends of a median interval."""
    found = tables["error_regression"]
    verdicts, seen = [], []
    for control, label in CONTROLS.items():
        table = found.get("half_trained", pd.DataFrame()) if control == "_half" else found["regressions"]
        if f"{column}{control}" not in table:
            verdicts.append(UNTOLD)
            seen.append(f"{label}not measured")
            continue
        low, value, high = (float(table[f"{column}{control}{end}"].median()) for end in ("_low", "", "_high"))
        verdicts.append(judged(low, high))
        counterparts = f" ({len(table)} of the SAEs; all tokens: {table[column].median():.2f})" if control == "_half" and column in table else ""
        seen.append(f"{label}{value:.2f} [{low:.2f}, {high:.2f}]{counterparts}")
    whole = found["regressions"][column]
    return unanimous(verdicts), f"median R² {', '.join(seen)}; over SAEs {whole.min():.2f} to {whole.max():.2f}"


def _general(differences: pd.DataFrame, column: str) -> tuple[Verdict, str]:
    """Whether a difference is above 0 in general: its interval lies above it for most SAEs, or below it."""
    above, below = (differences[f"{column}_low"] > 0).mean(), (differences[f"{column}_high"] < 0).mean()
    verdict = HOLDS if above >= MOST else FAILS if below >= MOST else UNTOLD
    return verdict, f"clearly so for {above:.0%} of {len(differences)} SAEs, clearly the other way for {below:.0%}"


# ---------------------------------------------------------------- the rules


@claim_of("error_regression", "Nonlinear FVU is nearly flat in width while FVU falls.", "flat from 2¹⁴ to 2²⁰ latents")
def _flat(tables: Tables) -> tuple[Verdict, str]:
    parts, fit = tables["error_regression"]["breakdown"], tables["error_regression"]["fit"].iloc[0]
    steps = np.log2(parts["width"])
    span = 2 ** (steps.max() - steps.min())
    fall = -float(np.polyfit(steps, parts["fvu"], 1)[0])  # of FVU per doubling
    seen = f"FVU falls from {parts['fvu'].iloc[0]:.3f} to {parts['fvu'].iloc[-1]:.3f} over {span:.3g}× in width"
    if len(parts) < 4 or fall <= 0 or parts["fvu"].iloc[-1] > 0.9 * parts["fvu"].iloc[0]:
        return UNTOLD, f"{seen}: too few widths, or too small a fall, to compare with"
    falls = [-slope * fit["level_value"] / fall for slope in (fit["level_slope_high"], fit["level_slope"], fit["level_slope_low"])]
    seen += f", nonlinear FVU from {parts['nonlinear_fvu'].iloc[0]:.3f} to {parts['nonlinear_fvu'].iloc[-1]:.3f}: per doubling it falls by "
    seen += f"{falls[1]:.0%} [{falls[0]:.0%}, {falls[2]:.0%}] of FVU's own fall (at most {FLAT:.0%} counts as flat)"
    return between(falls[0], falls[2], FLAT, above=False), seen


@claim_of("error_regression", "About half of the error is a linear function of the activation, also once undertraining is ruled out.", "R² about 0.5")
def _half(tables: Tables) -> tuple[Verdict, str]:
    verdict, seen = _controlled(tables, "r2_error", lambda low, high: within(low, high, HALF))
    return verdict, f"mean over dimensions: {seen}"


@claim_of(
    "error_regression",
    "The squared norm of the error is predicted from the activation almost perfectly, also once undertraining is ruled out.",
    "R² 0.86 to 0.95",
)
def _norm(tables: Tables) -> tuple[Verdict, str]:
    return _controlled(tables, "r2_error_norm", lambda low, high: between(low, high, LEAST_NORM_R2))


@claim_of("error_regression", "The activation says more of ‖e‖² than the token, its loss, L0 or ‖x‖² do.", "x is the best predictor")
def _baselines(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_regression"]["regressions"]
    names = {f"r2_error_norm_from_{by}": label for by, label in BASELINES.items() if f"r2_error_norm_from_{by}" in table}
    medians = ", ".join(f"{label} {round(table[name].median(), 2) + 0.0:.2f}" for name, label in names.items())
    verdict, seen = _general(table, "r2_error_norm_lead")
    return verdict, f"median R² from x {table['r2_error_norm'].median():.2f}, from {medians}; {seen}"


@claim_of("error_regression", "‖ε‖² is predicted less well than ‖e‖²: ε holds fewer not yet learned features.", "ε has the lowest R²")
def _nonlinear_norm(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_regression"]["regressions"]
    verdict, seen = _general(table, "r2_norm_nonlinear_lack")
    return verdict, f"median R² of ‖ε‖² {table['r2_norm_nonlinear'].median():.2f}, of ‖e‖² {table['r2_error_norm'].median():.2f}; {seen}"


@claim_of("per_token_scaling", "Larger SAEs fail on the same tokens as smaller ones.", "error norms of small SAEs predict those of large ones")
def _same_tokens(tables: Tables) -> tuple[Verdict, str]:
    pairs = tables["per_token_scaling"]["pairs"]
    if not len(pairs):
        return UNTOLD, "there is only one width"
    worst = pairs.loc[pairs["r2"].idxmin()]
    seen = f"R² of ‖e_large‖ from ‖e_small‖ is {pairs['r2'].mean():.2f} on average, least {worst['r2']:.2f} [{worst['r2_low']:.2f}, "
    seen += f"{worst['r2_high']:.2f}] for {int(worst['small_width']):,} → {int(worst['large_width']):,}"
    return between(worst["r2_low"], worst["r2_high"], SAME_TOKENS), seen


@claim_of(
    "introduced_error",
    "The estimates tell dense from introduced error, and are what the closed form says.",
    "correlations large on the diagonal, small off it",
)
def _told_apart(tables: Tables) -> tuple[Verdict, str]:
    seen, verdicts = [], []
    for name, key in (("on the SAE", "correlations"), ("on the synthetic model", "synthetic_correlations")):
        table = tables["introduced_error"][key].set_index("noise")
        own = table.loc["sigma_x", "linear"], table.loc["sigma_r", "nonlinear"]
        other = table.loc["sigma_x", "nonlinear"], table.loc["sigma_r", "linear"]
        verdicts.append(min(own) > DIAGONAL and max(map(abs, other)) < OFF_DIAGONAL)
        seen.append(f"{name} {own[0]:.2f} and {own[1]:.2f} on the diagonal, {other[0]:.2f} and {other[1]:.2f} off it")
    deviation = float(tables["introduced_error"]["synthetic_closed_form"]["deviation"].max())
    seen.append(f"there every estimate that is not negligible is within {deviation:.1%} of its closed form ({AGREEMENT:.0%} counts as agreement)")
    return (HOLDS if all(verdicts) and deviation <= AGREEMENT else FAILS), "; ".join(seen)


@claim_of(
    "downstream_loss",
    "The nonlinear part's share of the cross-entropy is proportional to its share of the error.",
    "about as much as its share of the norm",
)
def _proportional(tables: Tables) -> tuple[Verdict, str]:
    table = tables["downstream_loss"]["downstream"].dropna(subset=["recovered_nonlinear"])
    if table.empty:
        return UNTOLD, "no SAE costs the model 0.01 nats"
    seen, verdicts = [f"median: putting ε back recovers {table['recovered_nonlinear'].median():.0%} of the lost cross-entropy"], []
    for size in ("norm", "variance"):
        share = table[f"{size}_share_nonlinear"]
        low, value, high = (float((table[f"recovered_nonlinear{end}"] / share).median()) for end in ("_low", "", "_high"))
        verdicts.append(within(low, high, PROPORTIONAL))
        seen.append(f"ε is {share.median():.0%} of the error's {size}: ratio {value:.2f} [{low:.2f}, {high:.2f}]")
    return unanimous(verdicts), f"{'; '.join(seen)} ({PROPORTIONAL[0]:g} to {PROPORTIONAL[1]:g} counts as proportional)"


@claim_of("error_saes", "SAEs trained on ε reconstruct worse than SAEs trained on ê.", "worse on ε")
def _worse(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_saes"]["error_saes"].set_index("kind")
    row = table.loc["nonlinear"]
    seen = f"FVU on ε {row['fvu']:.3f}, on ê {table.loc['linear', 'fvu']:.3f}, on e {table.loc['error', 'fvu']:.3f}: {row['worse']:+.0%} "
    seen += f"[{row['worse_low']:+.0%}, {row['worse_high']:+.0%}]. How interpretable they are is left open"
    return between(row["worse_low"], row["worse_high"], 0.0), seen


@claim_of("pursuit", "A better choice of latents removes little of the nonlinear error.", "a few per cent")
def _little(tables: Tables) -> tuple[Verdict, str]:
    table = tables["pursuit"]["pursuit"]
    low, value, high = (float((table[f"encoder_error{end}"] / table["nonlinear_fvu"]).median()) for end in ("_low", "", "_high"))
    seen = (
        f"pursuit removes {value:.1%} [{low:.1%}, {high:.1%}] of the nonlinear FVU (median over {len(table)} SAEs; {FEW_PER_CENT:.0%} is the border)"
    )
    return between(low, high, FEW_PER_CENT, above=False), seen


@claim_of("earlier_layers", "Reconstructions at earlier places predict part of ε, more than pursuit removes.", "more than pursuit")
def _earlier(tables: Tables) -> tuple[Verdict, str]:
    table = tables["earlier_layers"]["earlier_layers"]
    found = table[(table["part"] == "reconstruction") & (table["target"] == "ε")]
    elsewhere = found[found["source"] != found["hook_point"]]
    if elsewhere.empty:
        return UNTOLD, "there is no SAE at an earlier place"
    best = elsewhere.loc[elsewhere["r2_weighted"].idxmax()]
    seen = f"best from {best['source']}: {best['r2_weighted']:.1%} [{best['r2_weighted_low']:.1%}, {best['r2_weighted_high']:.1%}] of ε's variance"
    pursued = tables["pursuit"]["pursuit"]
    share = pursued["encoder_error"] / pursued["nonlinear_fvu"]
    seen += f"; pursuit removes {share.median():.1%}"
    return between(best["r2_weighted_low"], best["r2_weighted_high"], max(0.0, float(share.median()))), seen


RULES = (
    _flat, _half, _norm, _baselines, _nonlinear_norm, _same_tokens, _told_apart, _proportional, _worse, _little, _earlier,
)  # fmt: skip
