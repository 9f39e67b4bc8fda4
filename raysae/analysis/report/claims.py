"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Tables = Mapping[str, Mapping[str, pd.DataFrame]]  # analysis → name → table
Verdict = Literal["holds", "does not hold", "cannot be told here"]
HOLDS, FAILS, UNTOLD = "holds", "does not hold", "cannot be told here"


@dataclass(frozen=True)
class Claim:
    analysis: str
    text: str
    paper: str  # what it found
    verdict: Verdict
    evidence: str


def claim_of(analysis: str, text: str, paper: str) -> Callable[[Callable[[Tables], tuple[Verdict, str]]], Callable[[Tables], Claim]]:
    def decorated(rule: Callable[[Tables], tuple[Verdict, str]]) -> Callable[[Tables], Claim]:
        def decided(tables: Tables) -> Claim:
            try:
                verdict, evidence = rule(tables)
            except KeyError as missing:
                verdict, evidence = UNTOLD, f"what it needs ({str(missing).strip(chr(39))}) was not measured"
            return Claim(analysis, text, paper, verdict, evidence)

        return decided

    return decorated


def between(low: float, high: float, border: float, above: bool = True) -> Verdict:
    """Whether a number with the interval [low, high] lies above (or below) a border."""
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
    return next(iter(verdicts)) if len(set(verdicts)) == 1 else UNTOLD
