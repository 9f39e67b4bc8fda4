"""A path and its database URL mean the same file to us, to MLflow and to SQLite."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from raysae.config import TrackingConfig, UserError
from raysae.tracking.client import client_of, experiment_id
from raysae.tracking.database import absolute, check_database, database_file, database_url, refuse_unknown
from raysae.tracking.runs import Study

ODD = ["my%20project", "a?b", "a b", "a,b[1]", "a#b", "a%b", "it's", "a&b=c;d", "ü", "a@b:c"]


@pytest.mark.parametrize("name", ODD)
def test_a_study_in_a_folder_of_any_name_is_in_the_database_there(
    name: str, tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "all" / name
    folder.mkdir(parents=True)
    shutil.copy(migrated, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    tracking = TrackingConfig()
    (folder / "x.txt").write_text("x")
    study = Study(folder / "outbox.db", tracking, "s1", {})
    study.metrics(None, {"fvu": 0.5}, 1)
    study.artifact(None, folder / "x.txt", "sae")
    study.end(None, "FINISHED")
    assert study.flush(60) == 0
    study.close()
    uri = absolute(tracking.uri)
    assert database_file(uri) == folder / "mlflow.db"
    assert absolute(uri) == uri
    check_database(uri)
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT value FROM metrics WHERE key = 'fvu'").fetchall() == [(0.5,)]
    client = client_of(uri)
    (run,) = client.search_runs([experiment_id(client, uri, tracking.experiment)])
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "sae")] == ["sae/x.txt"]
    assert list((folder / "mlartifacts").rglob("x.txt"))
    assert [path.name for path in folder.parent.iterdir()] == [name], "nothing is written elsewhere"
    refuse_unknown(uri, "s1")
    refuse_unknown(uri, run.info.run_id)
    with pytest.raises(UserError, match="sweep is s2, which is neither a run id nor a study"):
        refuse_unknown(uri, "s2")


def test_ordinary_paths_have_the_url_they_always_had() -> None:
    assert database_url(Path("/a b/c[1]/mlflow.db")) == "sqlite:////a b/c[1]/mlflow.db"
    assert absolute("sqlite:///mlflow.db", Path("/x")) == "sqlite:////x/mlflow.db"
    assert absolute("sqlite:///mlflow.db?timeout=9", Path("/x")) == "sqlite:////x/mlflow.db?timeout=9"
    assert absolute("http://host:5000/a?b") == "http://host:5000/a?b"


def test_what_no_sweep_could_be_tracked_to_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "my%20project").mkdir()
    (tmp_path / "text.db").write_text("this is no database")
    (tmp_path / "file").write_text("")
    cases = {
        f"sqlite:///{tmp_path}/my%20project/mlflow.db": f"here sqlite+pysqlite:///{tmp_path}/my%2520project/mlflow.db",
        f"sqlite:///{tmp_path}/text.db": "which is no SQLite file",
        f"sqlite:///{tmp_path}/file/mlflow.db": f"which cannot be written: {tmp_path}/file is a file",
        f"sqlite:///{tmp_path}": "which cannot be used",
        "sqlite://": "which names no file",
        "sqlite:///:memory:": "which names no file",
        "mysql+nodriver://host/db": "whose driver cannot be loaded",
    }
    for uri, words in cases.items():
        with pytest.raises(UserError) as caught:
            check_database(uri)
        assert str(caught.value).startswith(f"tracking.uri is {uri}, ")
        assert words in str(caught.value)
    check_database(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    check_database("http://127.0.0.1:9")
    assert not (tmp_path / "new").exists()
