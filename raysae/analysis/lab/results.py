"""TODO docstring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from raysae.analysis.lab.lab import Lab
from raysae.config import UserError


@dataclass
class Findings:
    """What an analysis has found. `numbers` are its headlines; `per_sae` has a row per SAE (column `sae`); both go to MLflow as metrics."""

    analysis: str
    key: list  # what they depend on
    per_sae: pd.DataFrame
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)  # name → Figure
    notes: list[str] = field(default_factory=list)  # what could not be shown, and why
    files: list[Path] = field(default_factory=list)  # written

    def draw(self, name: str, figure: Callable[..., Any], *arguments: object) -> None:
        """Adds a figure, or a note where these SAEs do not give one."""
        try:
            self.figures[name] = figure(*arguments)
        except UserError as error:
            self.notes.append(str(error))


def carry_out(lab: Lab, analysis: str, experiment: Callable[[Lab], Findings]) -> Findings:
    """Works an analysis out, writes its tables and figures and logs it to MLflow."""
    findings = experiment(lab)
    findings.files += lab.save(analysis, findings.tables, findings.figures)
    lab.track(analysis, findings.key, findings.numbers, findings.per_sae, findings.files)
    return findings
