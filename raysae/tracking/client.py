"""The MLflow client, set up so that it never blocks for minutes, prints to the terminal or reports home."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

from raysae.config import UserError
from raysae.tracking.database import absolute, database_file, database_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # The default of 7 retries blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # Seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def import_ahead() -> None:
    """Begin the import of MLflow, which takes seconds, in a thread."""
    _set_environment()  # Set here, because no other thread may read the environment meanwhile
    threading.Thread(target=importlib.import_module, args=["mlflow"], daemon=True).start()


def _set_environment() -> None:
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def client_of(uri: str) -> MlflowClient:
    """A client for `uri`.

    This is slow. MLflow's import takes seconds. So does the first use of a new SQLite file, which MLflow migrates table
    by table.
    """
    _set_environment()
    from mlflow import MlflowClient

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if (file := database_file(uri)) and not file.exists():
        _make(file)
    return MlflowClient(uri)


def _make(path: Path) -> None:
    """Make a SQLite file with MLflow's tables, as a whole or not at all.

    MLflow's migrations cannot continue after a kill half-way. So they run on a temporary file.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        MlflowClient(database_url(new)).search_experiments(max_results=1)  # The first use makes the tables
        try:
            os.link(new, path)
        except FileExistsError:  # Another process was faster
            pass
        except OSError:  # This file system has no hard links
            os.rename(new, path)
    finally:
        new.unlink(missing_ok=True)


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The id of the experiment called `name`, which is created where missing.

    With a SQLite file, artifacts go to the folder `mlartifacts` next to it.

    Raises:
        UserError: the experiment was deleted.
    """
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        file = database_file(absolute(uri))
        location = (file.parent / "mlartifacts" / quote(name, safe="")).as_uri() if file else None
        # Without this kind the UI opens the experiment as one of language-model traces.
        return client.create_experiment(
            name, artifact_location=location, tags={"mlflow.experimentKind": "custom_model_development"}
        )
    if experiment.lifecycle_stage != "active":
        raise UserError(f"the experiment {name!r} was deleted in MLflow: restore it there, or name another one")
    return experiment.experiment_id
