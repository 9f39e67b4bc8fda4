"""Runs of analyses beside those of sweeps.

They are told apart, found by their tags, and never mistaken for SAEs.
"""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient

from raysae.config import TrackingConfig
from raysae.tracking.find import find_saes, study_params
from raysae.tracking.runs import Study

VIEWS = "mlflow.sharedViewState."


def swept(tracking: TrackingConfig, folder: Path, name: str, made_for: str | None = None) -> None:
    """A study of one SAE."""
    file = folder / "cfg.json"
    file.write_text("{}")
    study = Study(folder / f"{name}.db", tracking, name, {"model": {"name": name}}, made_for=made_for)
    study.child("an_SAE", {"width": 8})
    study.artifact("an_SAE", file, "sae")
    study.end(None, "FINISHED")
    assert study.flush(60) == 0
    study.close()


def test_the_latest_sweep_is_never_one_that_an_analysis_has_trained(tracking: TrackingConfig, tmp_path: Path) -> None:
    swept(tracking, tmp_path, "mine")
    client = MlflowClient(tracking.uri)
    views = client.get_experiment_by_name(tracking.experiment).tags
    swept(tracking, tmp_path, "mine-errors", made_for="mine")
    (found,) = find_saes(tracking)
    assert found.study == "mine"
    assert study_params(found)["model.name"] == "mine"
    (named,) = find_saes(tracking, "mine-errors")
    assert named.study == "mine-errors", "it is found by its name"
    assert (
        client.get_experiment_by_name(tracking.experiment).tags[f"{VIEWS}raysae-latest"]
        == views[f"{VIEWS}raysae-latest"]
    )


def test_an_analysis_has_runs_of_its_own_kind(tracking: TrackingConfig, tmp_path: Path) -> None:
    swept(tracking, tmp_path, "mine")
    for _ in range(2):  # The second time everything is there already
        analysis = Study(
            tmp_path / "analysis.db", tracking, "mine pursuit 0123", {"analysis": "pursuit"}, analysis=True
        )
        analysis.metrics(None, {"median/encoder_error": 0.1}, step=0)
        analysis.child("an_SAE", {"width": 8})
        analysis.metrics("an_SAE", {"nonlinear_fvu": 0.2}, step=100)
        analysis.end("an_SAE", "FINISHED")
        analysis.end(None, "FINISHED")
        assert analysis.flush(60) == 0
        analysis.close()
    client = MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert f"{VIEWS}raysae-analyses" in experiment.tags
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["raysae.kind"] for run in runs)
    assert kinds == ["analysed SAE", "analysis", "sae", "study"]
    below = next(run for run in runs if run.data.tags["raysae.kind"] == "analysed SAE")
    above = next(run for run in runs if run.data.tags["raysae.kind"] == "analysis")
    assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
    assert below.data.metrics == {"nonlinear_fvu": 0.2}
    assert len(client.get_metric_history(below.info.run_id, "nonlinear_fvu")) == 1
    (found,) = find_saes(tracking)
    assert found.study == "mine"
