"""A tracking database that is ready at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raysae.config import TrackingConfig


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables. Making them takes seconds, and copying them does not."""
    path = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path: Path, migrated: Path) -> TrackingConfig:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="it's raysae")
