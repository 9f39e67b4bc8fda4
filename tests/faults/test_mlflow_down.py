"""The MLflow server stops answering, dies and comes back, or dies for good.

Numbers wait on disk with their time stamps. None is lost or doubled.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raysae.commands.ui import answers
from raysae.config import TrackingConfig
from raysae.tracking.client import ENVIRONMENT
from raysae.tracking.outbox import Outbox
from raysae.tracking.runs import Study
from tests.tracking.conftest import migrated  # noqa: F401 (a fixture)

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
KEYS = ("fvu", "l0", "loss")


class Server:
    """A real MLflow server on a database. It keeps its own port.

    Its processes form a group and get signals together.
    """

    def __init__(self, database: Path):
        self.database = database
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}",
            "--workers", "1",
        ]  # fmt: skip
        command += [
            "--host", "127.0.0.1", "--port", str(self.port),
            "--artifacts-destination", str(self.database.parent / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | ENVIRONMENT | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.database.parent / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        give_up = time.monotonic() + 240
        while not answers(self.uri):
            assert self.process.poll() is None, (self.database.parent / "server.log").read_text()
            assert time.monotonic() < give_up, "MLflow does not start"
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path, migrated: Path) -> Iterator[Server]:  # noqa: F811
    (tmp_path / "server").mkdir()
    shutil.copy(migrated, tmp_path / "server" / "mlflow.db")
    one = Server(tmp_path / "server" / "mlflow.db")
    one.start()
    yield one
    if one.process.poll() is None:
        one.signal(signal.SIGKILL)


class Told:
    """The numbers that a study was told, with their time stamps."""

    def __init__(self, study: Study):
        self.study = study
        self.numbers: dict[str, list[tuple[int, float, int]]] = {key: [] for key in KEYS}

    def report(self, steps: range) -> float:
        """Reports the SAE "a" once per step. Returns the longest time, in seconds, that a report took."""
        longest = 0.0
        for step in steps:
            began = time.monotonic()
            now = 1.7e9 + 10 * step
            self.study.metrics("a", {key: step + number for number, key in enumerate(KEYS)}, step, time=now)
            longest = max(longest, time.monotonic() - began)
            for number, key in enumerate(KEYS):
                self.numbers[key].append((step, float(step + number), round(1000 * now)))
        return longest


def in_mlflow(database: Path) -> dict[str, list[tuple[int, float, int]]]:
    """All numbers that the database has of the SAE "a".

    It reads them with SQL, because MLflow might hide what is there twice.
    """
    db = sqlite3.connect(database)
    assert db.execute("SELECT count(*) FROM runs").fetchone() == (2,), "the study and its SAE, each once"
    (run,) = db.execute("SELECT run_uuid FROM runs WHERE name = 'a'").fetchone()
    found = {}
    for key in KEYS:
        found[key] = db.execute(
            "SELECT step, value, timestamp FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step", (run, key)
        ).fetchall()
    db.close()
    return found


def test_silent_for_a_while_then_dead_for_a_while(server: Server, tmp_path: Path) -> None:
    study = Study(tmp_path / "outbox.db", TrackingConfig(uri=server.uri), "s", {"a": 1})
    study.child("a", {"k": 8})
    told = Told(study)
    told.report(range(200))
    assert study.flush(240) == 0
    assert in_mlflow(server.database) == told.numbers

    server.signal(signal.SIGSTOP)  # The server takes connections and never answers
    assert told.report(range(200, 400)) < 5, "nobody waits for the server"
    assert study.flush(2) >= 600
    server.signal(signal.SIGCONT)
    assert study.flush(240) == 0
    assert in_mlflow(server.database) == told.numbers

    told.report(range(400, 450))
    server.signal(signal.SIGKILL)  # It dies while numbers are sent to it
    assert told.report(range(450, 600)) < 5
    assert study.flush(2) >= 450
    server.start()
    assert study.flush(240) == 0
    study.end("a", "FINISHED")
    study.end(None, "FINISHED")
    assert study.flush(240) == 0
    study.close()
    assert in_mlflow(server.database) == told.numbers
    runs = MlflowClient(f"sqlite:///{server.database}").search_runs(["1"])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_dead_for_good(server: Server, migrated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """The sweep ends without the server and says what to do.

    Doing it sends everything. Doing it again sends nothing.
    """
    box = tmp_path / "outbox.db"
    study = Study(box, TrackingConfig(uri=server.uri), "s", {"a": 1})
    study.child("a", {"k": 8})
    told = Told(study)
    told.report(range(100))
    assert study.flush(240) == 0
    server.signal(signal.SIGKILL)
    told.report(range(100, 300))
    study.artifact("a", __file__, "source")
    study.end("a", "FINISHED")
    study.end(None, "FINISHED")
    assert study.flush(2) >= 600
    study.close()
    assert f"python -m raysae.commands.send {box}" in caplog.text
    assert in_mlflow(server.database)["fvu"] == told.numbers["fvu"][:100]

    def send(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "raysae.commands.send", str(box), *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)

    refused = send()
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: tracking.uri is {server.uri}, where MLflow takes nothing now"), (
        refused.stderr
    )
    assert len(refused.stderr.splitlines()) == 1
    assert Outbox(box).unsent() >= 600, "and what could not be sent waits on"
    shutil.copy(migrated, other := tmp_path / "other.db")
    # Everything is sent, also what the lost server had
    sent = send("--uri", f"sqlite:///{other}")
    assert sent.returncode == 0, sent.stderr
    assert in_mlflow(other) == told.numbers
    assert send().stdout == "0 entries sent\n"
    assert in_mlflow(other) == told.numbers
    client = MlflowClient(f"sqlite:///{other}")
    (run,) = (run for run in client.search_runs(["1"]) if run.info.run_name == "a")
    assert run.info.status == "FINISHED"
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "source")] == [
        "source/test_mlflow_down.py"
    ]
