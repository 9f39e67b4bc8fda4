"""The claims of the paper (Engels et al. 2024), each decided from the analyses' tables and their replicates.

A claim holds or does not hold. It cannot be told where its interval reaches over the border between the two, where what
it needs was not measured, or with fewer than 10 groups of documents. Ratios, slopes and medians over SAEs are worked
out per replicate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from raysae.analysis.dark_matter.measures.breakdown import FEWEST, SPAN, compared_slopes
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.intervals import Estimate, median_of, over_rows, replicated
from raysae.analysis.report.claims import (
    FAILS,
    HOLDS,
    UNTOLD,
    Claim,
    Tables,
    Verdict,
    between,
    claim_of,
    conjunction,
    unanimous,
    within,
)

FLAT = 0.25  # "Nearly flat": per doubling of the width it falls by at most this share of FVU's fall.
LEAST_FALL = 0.1  # FVU must fall by at least this share to be compared with.
HALF = (0.35, 0.65)  # "About half": R² lies between these.
LEAST_NORM_R2 = 0.86  # The lower end of the paper's range.
SAME_TOKENS = 0.5  # From this R² on, the errors of two SAEs count as lying on the same tokens.
PROPORTIONAL = (0.8, 1.25)  # Two shares count as proportional when their ratio lies between these.
FEW_PER_CENT = 0.10  # "A few per cent": at most this share of the nonlinear FVU.
DIAGONAL, OFF_DIAGONAL = 0.9, 0.5  # The least correlation on the diagonal, and the largest off it.
AGREEMENT = 0.02  # The code's estimates on the synthetic model are so near their closed form, relatively.
# An SAE tells the errors apart where its estimates are so near the closed form over the whole grid, and where it
# reconstructs its own reconstructions up to this FVU.
APART = 0.10
REENCODED = 0.05
CONTROLS = {  # Controls for undertraining: the ending of the column's name, and what R² it is.
    "": "",
    col.RESCALED: "after the best rescaling ",
    col.HALF_FIT: "fitted on half the contexts ",
}
RECOVERED = {col.LINEAR: "ê", col.NONLINEAR: "ε"}  # What is put back: where ε dominates, ê tells.
BASELINES = {
    col.R2_ERROR_NORM_FROM_TOKEN: "the token",
    col.R2_ERROR_NORM_FROM_TOKEN_LOSS: "its loss",
    col.R2_ERROR_NORM_FROM_L0: "L0",
    col.R2_ERROR_NORM_FROM_X_NORM: "‖x‖²",
}
MOST = 0.9  # "In general": for at least this share of the SAEs.


def decide(tables: Tables) -> list[Claim]:
    """Every claim, in the order of the analyses. Where `tables` lacks an analysis, its claims cannot be told."""
    return [rule(tables) for rule in RULES]


def _controlled(tables: Tables, column: str, judged: Callable[[Estimate], Verdict]) -> tuple[Verdict, str]:
    """A verdict on the R² `column`, by its median over the SAEs. Its controls for undertraining must agree.

    SAEs trained on half the tokens stand beside the same SAEs trained on all, not beside all SAEs.
    """
    found = tables["error_regression"]
    whole, half = found["regressions"], found.get("half_trained", pd.DataFrame())
    verdicts: list[Verdict] = []
    seen = []

    def judge(label: str, table: pd.DataFrame, name: str) -> None:
        if name not in table:
            verdicts.append(UNTOLD)
            seen.append(f"{label}not measured")
            return
        median = median_of(table, name)
        verdicts.append(judged(median))
        seen.append(f"{label}{median:.2f}")

    for control, label in CONTROLS.items():
        judge(label, whole, f"{column}{control}")
    judge("of SAEs trained on half the tokens ", half, f"{column}{col.HALF}")
    if column in half:
        judge(f"of the same {len(half)} SAEs trained on all ", half, column)
    ends = f"Over SAEs it goes from {whole[column].min():.2f} to {whole[column].max():.2f}"
    return unanimous(verdicts), f"median R² {', '.join(seen)}. {ends}"


def _general(differences: pd.DataFrame, column: str) -> tuple[Verdict, str]:
    """Whether a difference is above 0 in general: for most SAEs its whole interval is.

    The claim fails where for most SAEs the whole interval is below 0. The difference's median is given too.
    """
    above, below = (differences[col.low(column)] > 0).mean(), (differences[col.high(column)] < 0).mean()
    verdict = HOLDS if above >= MOST else FAILS if below >= MOST else UNTOLD
    seen = f"Clearly so for {above:.0%} of {len(differences)} SAEs, clearly the other way for {below:.0%}"
    return verdict, f"{seen}. The median difference is {median_of(differences, column):+.2f}"


# ---------------------------------------------------------------- the rules


@claim_of("breakdown", "Nonlinear FVU is nearly flat in width while FVU falls.", "flat from 2¹⁴ to 2²⁰ latents")
def _flat(tables: Tables) -> tuple[Verdict, str]:
    parts = tables["breakdown"]["breakdown"]
    span = parts["width"].max() / parts["width"].min()
    fvu, nonlinear = parts[col.FVU].to_numpy(), parts[col.NONLINEAR_FVU].to_numpy()
    seen = f"FVU goes from {fvu[0]:.3f} to {fvu[-1]:.3f} over {span:.3g}× in width"
    if len(parts) < FEWEST or span < SPAN:
        return UNTOLD, f"{seen}: {len(parts)} widths, and {FEWEST} over {SPAN}× are wanted"
    fall, share = compared_slopes(parts)
    if fvu[-1] > (1 - LEAST_FALL) * fvu[0] or fall.low <= 0:
        return UNTOLD, f"{seen}: too small a fall to compare with"
    seen += f", nonlinear FVU from {nonlinear[0]:.3f} to {nonlinear[-1]:.3f}: per doubling it falls by "
    seen += f"{share:.0%} of FVU's own fall (at most {FLAT:.0%} counts as flat)"
    return between(share.low, share.high, FLAT, above=False), seen


@claim_of(
    "error_regression",
    "About half of the error is a linear function of the activation, also once undertraining is ruled out.",
    "R² about 0.5",
)
def _half(tables: Tables) -> tuple[Verdict, str]:
    verdict, seen = _controlled(tables, col.R2_ERROR, lambda median: within(median.low, median.high, HALF))
    return verdict, f"mean over dimensions: {seen}"


@claim_of(
    "error_regression",
    "The squared norm of the error is predicted from the activation almost perfectly, also once undertraining is "
    "ruled out.",
    "R² 0.86 to 0.95",
)
def _norm(tables: Tables) -> tuple[Verdict, str]:
    return _controlled(tables, col.R2_ERROR_NORM, lambda median: between(median.low, median.high, LEAST_NORM_R2))


@claim_of(
    "error_regression",
    "The activation says more of ‖e‖² than the token, its loss, L0 or ‖x‖² do.",
    "x is the best predictor",
)
def _baselines(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_regression"]["regressions"]
    names = {column: label for column, label in BASELINES.items() if column in table}
    medians = ", ".join(f"{label} {round(table[column].median(), 2) + 0.0:.2f}" for column, label in names.items())
    verdict, seen = _general(table, col.R2_ERROR_NORM_LEAD)
    return verdict, f"median R² from x {table[col.R2_ERROR_NORM].median():.2f}, from {medians}. {seen}"


@claim_of(
    "error_regression",
    "‖ε‖² is predicted less well than ‖e‖²: ε holds fewer not yet learned features.",
    "ε has the lowest R²",
)
def _nonlinear_norm(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_regression"]["regressions"]
    verdict, seen = _general(table, col.R2_NORM_NONLINEAR_LACK)
    of_nonlinear, of_error = table[col.R2_NORM_NONLINEAR].median(), table[col.R2_ERROR_NORM].median()
    return verdict, f"median R² of ‖ε‖² {of_nonlinear:.2f}, of ‖e‖² {of_error:.2f}. {seen}"


@claim_of(
    "per_token_scaling",
    "Larger SAEs fail on the same tokens as smaller ones.",
    "error norms of small SAEs predict those of large ones",
)
def _same_tokens(tables: Tables) -> tuple[Verdict, str]:
    pairs = tables["per_token_scaling"]["pairs"]
    if not len(pairs):
        return UNTOLD, "there is only one width"
    verdicts, seen = [], []
    labels = {col.R2: "R² of ‖e_large‖ from ‖e_small‖", col.R2_BEYOND_X_NORM: "Of what ‖x‖ leaves, ‖e_small‖ explains"}
    for column, label in labels.items():
        worst = Estimate.of(replicated(pairs, column).min(0), int(pairs[col.GROUPS].min()))
        verdicts.append(between(worst.low, worst.high, SAME_TOKENS))
        pair = pairs.loc[pairs[column].idxmin()]
        widths = f"{int(pair[col.SMALL_WIDTH]):,} → {int(pair[col.LARGE_WIDTH]):,}"
        seen.append(f"{label} {pairs[column].mean():.2f} on average, least {worst:.2f} ({widths})")
    return unanimous(verdicts), f"{'. '.join(seen)}. The border is {SAME_TOKENS:g}"


@claim_of(
    "introduced_error",
    "The SAE's estimates tell dense from introduced error: they are what the closed form says.",
    "correlations large on the diagonal, small off it",
)
def _told_apart(tables: Tables) -> tuple[Verdict, str]:
    fault = _fault_of_estimates(tables["introduced_error"])
    row = tables["introduced_error"]["judged"].iloc[0]
    seen, verdicts = [], []
    limits = (
        (col.DEVIATION, APART, "over the grid the estimates are {} from the closed form"),
        (col.REENCODING_FVU, REENCODED, "FVU(x′, Sae(x′)) is {}"),
    )
    for column, limit, words in limits:
        low, high = row[col.low(column)], row[col.high(column)]
        verdicts.append(between(low, high, limit, above=False))
        seen.append(words.format(f"{row[column]:.1%} [{low:.1%}, {high:.1%}]") + f" (at most {limit:.0%})")
    if fault:
        return UNTOLD, fault
    return conjunction(verdicts), ". ".join(seen)


def _fault_of_estimates(tables: Mapping[str, pd.DataFrame]) -> str | None:
    """What is wrong with the code's estimates on the synthetic model, where the truth is known. None: nothing."""
    deviation = float(tables["synthetic_closed_form"][col.DEVIATION].max())
    if not deviation <= AGREEMENT:
        return f"on the synthetic model an estimate is {deviation:.1%} from its closed form: the code is at fault"
    table = tables["synthetic_correlations"].set_index(col.NOISE)
    own = min(table.loc[col.SIGMA_X, col.LINEAR], table.loc[col.SIGMA_R, col.NONLINEAR])
    other = max(abs(table.loc[col.SIGMA_X, col.NONLINEAR]), abs(table.loc[col.SIGMA_R, col.LINEAR]))
    if not (own > DIAGONAL and other < OFF_DIAGONAL):
        return (
            f"on the synthetic model the correlations are {own:.2f} on the diagonal and {other:.2f} off it: the code "
            "is at fault"
        )
    return None


@claim_of(
    "downstream_loss",
    "Each part's share of the cross-entropy is proportional to its share of the error, be it of norm or of variance.",
    "ε's is about as much as its share of the norm",
)
def _proportional(tables: Tables) -> tuple[Verdict, str]:
    table = tables["downstream_loss"]["downstream"].dropna(subset=[col.recovered(part) for part in RECOVERED])
    if table.empty:
        return UNTOLD, "no SAE costs the model 0.01 nats"
    seen = ", ".join(
        f"{symbol} recovers {table[col.recovered(part)].median():.0%} of the lost cross-entropy"
        for part, symbol in RECOVERED.items()
    )
    verdicts = []
    for size, share in (("norm", col.norm_share), ("variance", col.variance_share)):
        of_parts = []
        for part, symbol in RECOVERED.items():
            ratio = over_rows(replicated(table, col.recovered(part)) / replicated(table, share(part)), table)
            of_parts.append(within(ratio.low, ratio.high, PROPORTIONAL))
            seen += f". {symbol}: {ratio:.2f} × its share of the {size}, {table[share(part)].median():.0%}"
        verdicts.append(conjunction(of_parts))
    least, most = PROPORTIONAL
    seen += f". Numbers are medians over {len(table)} SAEs. {least:g} to {most:g} counts as proportional"
    if HOLDS in verdicts:
        return HOLDS, seen
    return unanimous(verdicts), seen


@claim_of("error_saes", "SAEs trained on ε reconstruct worse than SAEs trained on ê.", "worse on ε")
def _worse(tables: Tables) -> tuple[Verdict, str]:
    table = tables["error_saes"]["error_saes"].set_index(col.KIND)
    row, fvu = table.loc[col.NONLINEAR], table[col.FVU_EQUAL_L0]
    low, high = row[col.low(col.WORSE)], row[col.high(col.WORSE)]
    seen = f"at L0 {row[col.EQUAL_L0]:.3g}, FVU on ε {fvu[col.NONLINEAR]:.3f}, on ê {fvu[col.LINEAR]:.3f}, "
    seen += f"on e {fvu[col.ERROR]:.3f}: {row[col.WORSE]:+.0%} [{low:+.0%}, {high:+.0%}] over documents and "
    seen += f"{row[col.SEEDS]:.0f} seeds. How interpretable they are is left open"
    return between(low, high, 0.0), seen


@claim_of("pursuit", "A better choice of latents removes little of the nonlinear error.", "a few per cent")
def _little(tables: Tables) -> tuple[Verdict, str]:
    table = tables["pursuit"]["pursuit"]
    share = median_of(table, col.ENCODER_SHARE)
    seen = f"pursuit removes {share:.1%} of the nonlinear FVU, the median over {len(table)} SAEs. "
    seen += f"The border is {FEW_PER_CENT:.0%}"
    return between(share.low, share.high, FEW_PER_CENT, above=False), seen


@claim_of(
    "earlier_layers",
    "Reconstructions at earlier places predict part of ε, more than pursuit removes.",
    "more than pursuit",
)
def _earlier(tables: Tables) -> tuple[Verdict, str]:
    table = tables["earlier_layers"]["beyond_pursuit"]
    if table.empty:
        return UNTOLD, "there is no SAE at an earlier place"
    row = table.iloc[0]
    low, high = row[col.low(col.LEAD)], row[col.high(col.LEAD)]
    seen = f"the best, at {row[col.SOURCE]}, predicts {row[col.EXPLAINED]:.1%} of ε's variance, and pursuit removes "
    seen += f"{row[col.ENCODER_SHARE]:.1%} on the same rows: {100 * row[col.LEAD]:+.1f} "
    return between(low, high, 0.0), f"{seen}[{100 * low:+.1f}, {100 * high:+.1f}] percentage points"


RULES = (
    _flat, _half, _norm, _baselines, _nonlinear_norm, _same_tokens, _told_apart, _proportional, _worse, _little,
    _earlier,
)  # fmt: skip
