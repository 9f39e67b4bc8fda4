"""The tags that tell runs apart and find them again, and MLflow's filter language."""

from __future__ import annotations

from collections.abc import Mapping

STUDY_TAG, SAE_TAG, KIND_TAG = "raysae.study", "raysae.sae", "raysae.kind"
PARENT_TAG = "mlflow.parentRunId"
KIND_STUDY, KIND_SAE = "study", "sae"
KIND_ANALYSIS, KIND_ANALYSED = "analysis", "analysed SAE"  # An analysis's run, and below it one per SAE it read
MADE_FOR_TAG = "raysae.made_for"  # Marks a study that another's analysis needed


def condition(tags: Mapping[str, str]) -> str:
    """The filter that finds runs with these tags."""
    return " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())


def quoted(value: str) -> str:
    """A string in MLflow's filter language, which knows no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"
