"""Finds in MLflow the SAEs that sweeps have saved, for the jobs that analyse them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import url2pathname

from raysae.borders import border
from raysae.config import TrackingConfig, UserError
from raysae.storage import is_name
from raysae.tracking.client import client_of
from raysae.tracking.database import absolute, refuse_unknown, unknown
from raysae.tracking.tags import KIND_SAE, KIND_STUDY, KIND_TAG, MADE_FOR_TAG, PARENT_TAG, SAE_TAG, STUDY_TAG, condition

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

URL_TAG = "raysae.folder"
# No local file, and no file systems within each other
PLAIN_URL = re.compile(r"(?!file:|local:)\w+://(?!.*(::|/\.\./))", re.DOTALL)
STUDY_CONFIG = "config.yaml"  # Artifact of the study's run
SAE_ARTIFACT = "sae"  # Artifact folder of a child run that holds its SAE


@dataclass(frozen=True)
class TrackedSAE:
    """What MLflow knows of a sweep's SAE."""

    name: str
    study: str
    run_id: str
    params: dict[str, str]
    metrics: dict[str, float]  # Last value of each
    _url: str | None = field(repr=False)  # Where the sweep wrote the SAE, if not to MLflow
    _artifacts: str = field(repr=False)  # URI of the run's artifacts
    _client: MlflowClient = field(repr=False, compare=False)

    @property
    def hook_point(self) -> str:
        """What it was trained on. UserError: the run does not say so."""
        if not self.params.get("hook_point"):
            raise _foreign(self.run_id, "it has no parameter hook_point")
        return self.params["hook_point"]

    @property
    def width(self) -> int:
        """Its latents. UserError: the run does not give a number."""
        if not self.params.get("width", "").isdecimal():
            raise _foreign(self.run_id, f"its parameter width is {self.params.get('width')}, which is no number")
        return int(self.params["width"])

    @cached_property
    def folder(self) -> str | Path:
        """Where the SAE's files are.

        This is their URL where the sweep wrote to one, or MLflow's own folder where that is local. Otherwise the files
        are downloaded now, and it is the copy.
        """
        if self._url:
            return self._url
        if self._artifacts.startswith("file:"):
            local = Path(url2pathname(urlparse(self._artifacts).path)) / SAE_ARTIFACT
            if local.is_dir():
                return local
        return Path(self._client.download_artifacts(self.run_id, SAE_ARTIFACT))


def find_saes(tracking: TrackingConfig, which: str | None = None) -> list[TrackedSAE]:
    """The saved SAEs of a sweep, sorted by name.

    Args:
        tracking: where to look.
        which: a study's name, or the run id of a sweep or of one SAE. None means the latest sweep that saved any SAE.

    Raises:
        UserError: there is no such SAE, MLflow does not answer, or what it says is not what a sweep has written.
    """
    refuse_unknown(tracking.uri, which)
    if which is not None and not is_name(which):
        raise unknown(tracking.uri, which)
    with border(
        "tracking.uri", tracking.uri, "where MLflow does not answer", "name the database or server of the SAEs"
    ):
        return _found(client_of(absolute(tracking.uri)), tracking, which)


def _found(client: MlflowClient, tracking: TrackingConfig, which: str | None) -> list[TrackedSAE]:
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        raise UserError(f"tracking.experiment is {tracking.experiment}: {tracking.uri} has no experiment of this name")

    def search(**tags: str) -> list[Run]:
        names = {"kind": KIND_TAG, "study": STUDY_TAG, "parent": PARENT_TAG}
        wanted = condition({names[key]: value for key, value in tags.items()})
        return client.search_runs([experiment.experiment_id], wanted, order_by=["attributes.start_time DESC"])

    if which is None:
        studies = (study for study in search(kind=KIND_STUDY) if MADE_FOR_TAG not in study.data.tags)
        candidates = (search(kind=KIND_SAE, parent=study.info.run_id) for study in studies)
    else:
        candidates = iter([search(kind=KIND_SAE, study=which) or _by_run_id(client, which, search)])
    for runs in candidates:
        found = [
            _tracked(client, run)
            for run in runs
            if URL_TAG in run.data.tags or client.list_artifacts(run.info.run_id, SAE_ARTIFACT)
        ]
        if found:
            return sorted(found, key=lambda sae: sae.name)
    place = f"the experiment {tracking.experiment} of {tracking.uri}"
    raise unknown(place, which) if which else UserError(f"no saved SAE in {place}: train some first")


def study_settings(sae: TrackedSAE) -> bytes | None:
    """The study's config.yaml that its sweep has put into MLflow. None where it has not."""
    parent = _parent(sae)
    if not any(artifact.path == STUDY_CONFIG for artifact in sae._client.list_artifacts(parent)):
        return None
    return Path(sae._client.download_artifacts(parent, STUDY_CONFIG)).read_bytes()


def study_params(sae: TrackedSAE) -> dict[str, str]:
    """The parameters of the sweep that trained `sae`. They are its resolved config, flattened.

    Raises:
        UserError: the SAE's run has no parent, or `output` is neither a folder nor a plain URL.
    """
    parent = _parent(sae)
    params = dict(sae._client.get_run(parent).data.params)
    output = params.get("output", "")
    if "://" in output and not PLAIN_URL.match(output):
        raise _foreign(parent, f"its parameter output is {output!r}, which is neither a folder nor a plain URL")
    return params


def _parent(sae: TrackedSAE) -> str:
    """The id of the run of the sweep that trained `sae`. UserError: its own run does not name it."""
    parent = sae._client.get_run(sae.run_id).data.tags.get(PARENT_TAG)
    if not parent:
        raise _foreign(sae.run_id, f"it has no tag {PARENT_TAG}")
    return parent


def _by_run_id(client: MlflowClient, run_id: str, search) -> list[Run]:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return []
        raise
    return [run] if run.data.tags.get(KIND_TAG) == KIND_SAE else search(kind=KIND_SAE, parent=run_id)


def _tracked(client: MlflowClient, run: Run) -> TrackedSAE:
    """What the run says of its SAE. Whoever can write to MLflow has written it, so names and places are checked.

    Raises:
        UserError: a name that is no file's, or a URL that is not the SAE's.
    """
    tags, info = run.data.tags, run.info
    params, metrics = dict(run.data.params), dict(run.data.metrics)
    for tag in (SAE_TAG, STUDY_TAG):
        if not is_name(tags.get(tag, "")):
            raise _foreign(info.run_id, f"its tag {tag} is {tags.get(tag)!r}, which is no name of a file")
    url = tags.get(URL_TAG)
    if url is not None and not (PLAIN_URL.match(url) and url.endswith(f"/{tags[STUDY_TAG]}/saes/{tags[SAE_TAG]}")):
        raise _foreign(info.run_id, f"its tag {URL_TAG} is {url!r}, which is no URL of this SAE")
    return TrackedSAE(tags[SAE_TAG], tags[STUDY_TAG], info.run_id, params, metrics, url, info.artifact_uri, client)


def _foreign(run_id: str, why: str) -> UserError:
    return UserError(f"run {run_id} in MLflow is not as a sweep writes it, and is not used: {why}")
