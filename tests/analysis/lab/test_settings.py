"""A sweep's settings come from its config.yaml. What MLflow says is checked before it is used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from mlflow import MlflowClient

from raysae.analysis.lab.lab import _trained_with
from raysae.config import SweepConfig, TrackingConfig, UserError
from raysae.tracking.find import STUDY_CONFIG, TrackedSAE, find_saes, study_params
from raysae.tracking.runs import Study

FILES = ",".join(f"/data/part-{i:04d}.txt" for i in range(400))  # More than MLflow keeps of a parameter


def study_of(tmp_path: Path, tracking: TrackingConfig, in_folder: bool, in_mlflow: bool, **knobs: object) -> TrackedSAE:
    """The SAE of a study whose config.yaml lies in its folder, in MLflow, or nowhere."""
    settings = {"output": str(tmp_path / "runs"), "study": "s1", "hook_points": ["resid_post.2"], **knobs}
    config = SweepConfig.model_validate(settings)
    folder = tmp_path / "runs" / "s1" if in_folder else tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    (folder / STUDY_CONFIG).write_text(yaml.safe_dump(config.model_dump()))
    (tmp_path / "cfg.json").write_text("{}")
    study = Study(tmp_path / "outbox.db", tracking, "s1", config.model_dump())
    if in_mlflow:
        study.artifact(None, folder / STUDY_CONFIG)
    study.child("a", {"width": 8, "hook_point": "resid_post.2"})
    study.artifact("a", tmp_path / "cfg.json", "sae")
    study.end(None, "FINISHED")
    assert study.flush(60) == 0
    study.close()
    (found,) = find_saes(tracking, "s1")
    assert (found.hook_point, found.width) == ("resid_post.2", 8)
    return found


@pytest.mark.parametrize(("in_folder", "in_mlflow"), [(True, False), (False, True)])
def test_a_long_list_of_files_comes_back_whole(
    in_folder: bool, in_mlflow: bool, tmp_path: Path, tracking: TrackingConfig
) -> None:
    sae = study_of(tmp_path, tracking, in_folder, in_mlflow, text={"source": FILES})
    assert _trained_with(sae, {}).text.source == FILES


def test_of_an_older_study_the_parameters_count_unless_one_is_cut(tmp_path: Path, tracking: TrackingConfig) -> None:
    sae = study_of(tmp_path, tracking, in_folder=False, in_mlflow=False, text={"source": FILES})
    with pytest.raises(UserError, match=r"only the beginning of text\.source: .* or give --text\.source$"):
        _trained_with(sae, {})
    assert _trained_with(sae, {"text.source": "mine.txt"}).hook_points == ["resid_post.2"]


def test_leave_to_run_a_models_code_is_never_inherited(tmp_path: Path, tracking: TrackingConfig) -> None:
    model = {"name": "owner/model", "trust_remote_code": True}
    sae = study_of(tmp_path, tracking, in_folder=False, in_mlflow=True, model=model)
    with pytest.raises(UserError, match=r"code from the repository of owner/model: give --model\.trust_remote_code"):
        _trained_with(sae, {})
    assert _trained_with(sae, {"model.trust_remote_code": True}).model.name == "owner/model"


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("raysae.sae", "../../outside"),
        ("raysae.sae", "/etc/passwd"),
        ("raysae.sae", ".."),
        ("raysae.study", "../s1"),
        ("raysae.study", "a/b"),
        ("raysae.folder", "file:///etc/s1/saes/a"),
        ("raysae.folder", "/etc/s1/saes/a"),
        ("raysae.folder", "s3://bucket/another"),
        ("raysae.folder", "simplecache::s3://bucket/s1/saes/a"),
        ("raysae.folder", "s3://bucket/../s1/saes/a"),
    ],
)
def test_names_and_places_in_mlflow_that_no_sweep_writes_are_refused(
    tag: str, value: str, tmp_path: Path, tracking: TrackingConfig
) -> None:
    sae = study_of(tmp_path, tracking, in_folder=True, in_mlflow=False)
    MlflowClient(tracking.uri).set_tag(sae.run_id, tag, value)
    with pytest.raises(UserError, match=f"run {sae.run_id} in MLflow is not as a sweep writes it") as caught:
        find_saes(tracking, sae.run_id)
    assert repr(value) in str(caught.value)


def test_a_url_that_a_sweep_writes_is_taken(tmp_path: Path, tracking: TrackingConfig) -> None:
    sae = study_of(tmp_path, tracking, in_folder=True, in_mlflow=False)
    MlflowClient(tracking.uri).set_tag(sae.run_id, "raysae.folder", "s3://bucket/runs/s1/saes/a")
    (found,) = find_saes(tracking, sae.run_id)
    assert found.folder == "s3://bucket/runs/s1/saes/a"


def test_a_run_without_hook_point_or_width_is_told() -> None:
    sae = TrackedSAE("a", "s1", "run7", {"width": "../x"}, {}, None, "", SimpleNamespace())
    with pytest.raises(UserError, match=r"run run7 in MLflow .* it has no parameter hook_point"):
        _ = sae.hook_point
    with pytest.raises(UserError, match=r"its parameter width is \.\./x, which is no number"):
        _ = sae.width


def tracked_with(tags: dict[str, str], output: str) -> TrackedSAE:
    """An SAE whose run has these tags, in an MLflow whose sweeps all have this output."""
    run = SimpleNamespace(data=SimpleNamespace(tags=tags, params={"output": output}))
    return TrackedSAE("a", "s1", "run7", {}, {}, None, "", SimpleNamespace(get_run=lambda run_id: run))


@pytest.mark.parametrize(
    "output",
    [
        "simplecache::s3://bucket/runs",
        "zip://x::http://host/a.zip",
        "s3://bucket/../x",
        "file:///etc",
        "local:///etc",
        "s3://a\n::b://c",
    ],
)
def test_an_output_in_mlflow_that_no_sweep_writes_is_not_opened(output: str) -> None:
    with pytest.raises(UserError, match=r"run run1 in MLflow .* its parameter output is ") as caught:
        _trained_with(tracked_with({"mlflow.parentRunId": "run1"}, output), {})
    assert repr(output) in str(caught.value)


@pytest.mark.parametrize("output", ["/data/runs", "s3://bucket/runs"])
def test_an_output_that_a_sweep_writes_is_taken(output: str) -> None:
    assert study_params(tracked_with({"mlflow.parentRunId": "run1"}, output)) == {"output": output}


def test_a_run_without_its_sweep_is_told() -> None:
    with pytest.raises(UserError, match=r"run run7 in MLflow .* it has no tag mlflow\.parentRunId"):
        study_params(tracked_with({}, "/data/runs"))
