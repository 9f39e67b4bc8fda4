"""The analyses of a study: each takes a `Lab`, has its parts worked out, and returns tables, figures and numbers, which are written and logged.

They build on one another through the lab's parts: every analysis but the first takes its probes from the first's, and nothing is worked out twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raysae.analysis.dark_matter import (
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
from raysae.config import AnalysisConfig

# ---------------------------------------------------------------- all of them


ANALYSES: dict[str, Callable[[Lab], Findings]] = {
    "pursuit": pursuit.run,  # before error_regression, whose breakdown shows what it found
    "error_regression": error_regression.run,
    "per_token_scaling": per_token_scaling.run,
    "introduced_error": introduced_error.run,
    "downstream_loss": downstream_loss.run,
    "error_saes": error_saes.run,
    "earlier_layers": earlier_layers.run,
}


def run(config: AnalysisConfig, given: Mapping[str, Any], analysis: str) -> int:
    """A job of one analysis; the exit code."""
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    findings = carry_out(lab, analysis, ANALYSES[analysis])
    for note in findings.notes:
        print(f"Note: {note}")
    for name, value in findings.numbers.items():
        print(f"  {name:<40} {value:.4g}")
    print(f"Tables and figures: {lab.folder / analysis}\nMLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}")
    return 0
