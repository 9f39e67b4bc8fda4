"""Takes SAEs apart: one analysis, or all of a paper's with their report.

The analyses import torch and Ray. They are loaded only after `--help` and mistakes in the arguments.
"""

from __future__ import annotations

from collections.abc import Callable

from raysae.commands.parse import parse
from raysae.config import AnalysisConfig, SweepConfig


def analyse(analysis: str, description: str) -> Callable[[list[str]], int]:
    """The job of one analysis of `catalogue.ANALYSES`, from arguments to exit code. `description` heads its help."""

    def job(argv: list[str]) -> int:
        config, flags = parse(AnalysisConfig, argv, description)
        _refuse_unknown(config)
        from raysae.analysis.catalogue import run

        return run(config, flags.given, analysis)

    return job


def dark_matter(description: str) -> Callable[[list[str]], int]:
    """The job of all analyses of the first paper and their report, from arguments to exit code."""

    def job(argv: list[str]) -> int:
        config, flags = parse(AnalysisConfig, argv, description)
        _refuse_unknown(config)
        from raysae.analysis.catalogue import ANALYSES
        from raysae.analysis.dark_matter.report import run_all

        return run_all(config, flags.given, ANALYSES)

    return job


def _refuse_unknown(config: AnalysisConfig) -> None:
    """Raise UserError where MLflow's file knows no such sweep, before torch and Ray are imported."""
    from raysae.study.place import with_absolute_paths
    from raysae.tracking.database import refuse_unknown

    if not config.sae:
        tracking = with_absolute_paths(SweepConfig(tracking=config.tracking)).tracking
        refuse_unknown(tracking.uri, config.sweep)
