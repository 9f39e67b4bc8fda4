"""The tags by which runs are told apart and found again, and MLflow's filter language."""

from __future__ import annotations

from collections.abc import Mapping

STUDY_TAG, SAE_TAG, KIND_TAG = "raysae.study", "raysae.sae", "raysae.kind"
PARENT_TAG = "mlflow.parentRunId"
KIND_STUDY, KIND_SAE = "study", "sae"
KIND_ANALYSIS, KIND_ANALYSED = "analysis", "analysed SAE"  # a run of an analysis, and below it one for each SAE it read
MADE_FOR_TAG = "raysae.made_for"  # of a study that an analysis of another needed


def condition(tags: Mapping[str, str]) -> str:
    """The filter that finds runs with these tags."""
    return " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())


def quoted(value: str) -> str:
    """A string in MLflow's filter language, which knows no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
