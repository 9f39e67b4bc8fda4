"""Claims of a paper and the verdicts on them: what a claim is, and how an interval decides one. Knows no paper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Tables = Mapping[str, Mapping[str, pd.DataFrame]]  # Tables by analysis, then by name.
Verdict = Literal["holds", "does not hold", "cannot be told here"]
Rule = Callable[[Tables], tuple[Verdict, str]]
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told here"


@dataclass(frozen=True)
class Claim:
    """A claim that has been decided.

    Args:
        analysis: the analysis that it belongs to.
        text: the claim.
        paper: what the paper found.
        verdict: whether it holds here.
        evidence: the numbers that the verdict rests on.
    """

    analysis: str
    text: str
    paper: str
    verdict: Verdict
    evidence: str


def claim_of(analysis: str, text: str, paper: str) -> Callable[[Rule], Callable[[Tables], Claim]]:
    """Makes a claim of a rule, a function from tables to verdict and evidence.

    A rule may raise a KeyError for a table or column that is missing. The claim then cannot be told.
    """

    def decorated(rule: Rule) -> Callable[[Tables], Claim]:
        def decided(tables: Tables) -> Claim:
            try:
                verdict, evidence = rule(tables)
            except KeyError as missing:
                verdict, evidence = UNTOLD, f"what it needs ({str(missing).strip(chr(39))}) was not measured"
            return Claim(analysis, text, paper, verdict, evidence)

        return decided

    return decorated


def between(low: float, high: float, border: float, above: bool = True) -> Verdict:
    """Whether a number with the interval [low, high] lies above a border, or below it where not `above`."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return UNTOLD
    if low > border:
        return HOLDS if above else FAILS
    if high < border:
        return FAILS if above else HOLDS
    return UNTOLD


def within(low: float, high: float, borders: tuple[float, float]) -> Verdict:
    """Whether a number with the interval [low, high] lies within `borders`."""
    if low >= borders[0] and high <= borders[1]:
        return HOLDS
    return FAILS if high < borders[0] or low > borders[1] else UNTOLD


def unanimous(verdicts: Collection[Verdict]) -> Verdict:
    """The verdict that all agree on. It cannot be told where they differ, or where there is none."""
    return next(iter(verdicts)) if len(set(verdicts)) == 1 else UNTOLD


def conjunction(verdicts: Collection[Verdict]) -> Verdict:
    """The verdict on a claim that holds where all of `verdicts` hold and fails where one fails."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else UNTOLD
