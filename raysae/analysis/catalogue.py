"""The analyses of a study, by name. Each takes a `Lab` and returns tables, figures and numbers.

They build on one another through the lab's tasks, whose results are kept. So nothing is worked out twice, and the order
of the catalogue is free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raysae.analysis.dark_matter import (
    breakdown,
    downstream_loss,
    earlier_layers,
    error_regression,
    error_saes,
    introduced_error,
    per_token_scaling,
    pursuit,
)
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.results import Findings, carry_out
from raysae.config import AnalysisConfig, UserError

ANALYSES: dict[str, Callable[[Lab], Findings]] = {
    "error_regression": error_regression.run,
    "breakdown": breakdown.run,
    "per_token_scaling": per_token_scaling.run,
    "introduced_error": introduced_error.run,
    "downstream_loss": downstream_loss.run,
    "error_saes": error_saes.run,
    "pursuit": pursuit.run,
    "earlier_layers": earlier_layers.run,
}


def run(config: AnalysisConfig, given: Mapping[str, Any], analysis: str) -> int:
    """The job of one analysis, from its settings to its exit code. `given` are the knobs that the user has set."""
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    findings = carry_out(lab, analysis, ANALYSES[analysis])
    if not (findings.tables or findings.figures):
        raise UserError(f"{analysis} has nothing to show of study {lab.study}: {'. '.join(findings.notes)}")
    for note in findings.notes:
        print(f"Note: {note}")
    for name, value in findings.numbers.items():
        print(f"  {name:<40} {value:.4g}")
    print(f"Tables and figures: {lab.folder / analysis}")
    print(f"MLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}")
    return 0
