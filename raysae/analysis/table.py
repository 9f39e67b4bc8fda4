"""Rows of the analyses' tables: numbers beside the ends of their intervals."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from raysae.analysis.regression import Estimate


def with_intervals(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Each number under its name, and under `NAME_low` and `NAME_high` the ends of its interval; `values` are (1 + replicates,), as in Estimate."""
    row: dict[str, float] = {}
    for name, replicates in values.items():
        estimate = Estimate.of(replicates)
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row
