"""Studies in a real MLflow on SQLite: found again, nothing lost, nothing doubled, nothing blocked."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from raysae.commands.send import job, send
from raysae.config import SweepConfig, TrackingConfig, UserError
from raysae.tracking import delivery
from raysae.tracking.client import client_of
from raysae.tracking.find import find_saes
from raysae.tracking.outbox import Outbox, refusal
from raysae.tracking.runs import Study, flatten

ROOT = Path(__file__).parents[2]
CONFIG = SweepConfig(hook_points=["resid_post.2"]).model_dump()


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "s1" / "outbox.db"


def all_runs(tracking: TrackingConfig) -> dict[str, Run]:
    client = MlflowClient(tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name(tracking.experiment).experiment_id])
    assert len({run.info.run_name for run in runs}) == len(runs), "a run is doubled"
    return {run.info.run_name: run for run in runs}


def history(tracking: TrackingConfig, run: Run, key: str) -> list[tuple[int, float, int]]:
    return sorted(
        (m.step, m.value, m.timestamp) for m in MlflowClient(tracking.uri).get_metric_history(run.info.run_id, key)
    )


def closed(study: Study) -> None:
    assert study.flush(60) == 0
    study.close()


def test_a_study_arrives_whole(tracking: TrackingConfig, box: Path, tmp_path: Path):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    (tmp_path / "frontier.png").write_bytes(b"png")
    study = Study(box, tracking, "s1", CONFIG)
    study.child("a", {"architecture": "topk", "width": 256, "k": 8, "sparsity": None, "hook_point": "resid_post.2"})
    for step in range(1500):  # More than one batch
        study.metrics("a", {"fvu": 1 / (step + 1), "l0": 8}, step * 1024, time=1.7e9 + step)
    study.metrics("a", {"fvu": math.nan, "kl": math.inf, "cosine": 0.9}, 10**7)
    study.artifact("a", tmp_path / "sae", "sae")
    study.artifact(None, tmp_path / "frontier.png", "figures")
    study.tag("a", {"raysae.reason": "x"})
    study.metrics(None, {"best_fvu": 0.1}, 10**7)
    study.end("a", "FINISHED")
    study.end(None, "FINISHED")
    closed(study)

    runs = all_runs(tracking)
    parent, child = runs["s1"], runs["a"]
    assert {parent.info.status, child.info.status} == {"FINISHED"}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"architecture": "topk", "width": "256", "k": "8", "hook_point": "resid_post.2"}
    assert parent.data.params["train.tokens"] == "1000000"
    assert parent.data.params["widths"] == "256, 512, 1024, 2048, 4096, 8192"
    assert parent.data.metrics == {"best_fvu": 0.1}
    assert history(tracking, child, "fvu") == [
        (step * 1024, 1 / (step + 1), round(1000 * (1.7e9 + step))) for step in range(1500)
    ]
    assert "kl" not in child.data.metrics
    assert child.data.metrics["cosine"] == 0.9
    assert child.data.tags["raysae.nonfinite.kl"] == "inf at step 10000000"
    assert child.data.tags["raysae.nonfinite.fvu"] == "nan at step 10000000"
    client = MlflowClient(tracking.uri)
    assert [f.path for f in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/frontier.png"]
    assert parent.data.tags["mlflow.user"]

    (found,) = find_saes(tracking)
    assert (found.name, found.study, found.run_id, found.params["k"], found.metrics["cosine"]) == (
        "a",
        "s1",
        child.info.run_id,
        "8",
        0.9,
    )
    assert (found.folder / "cfg.json").read_text() == "{}"
    assert found.folder.is_relative_to(tmp_path / "mlartifacts")


def test_a_resumed_study_replays_without_doubling(tracking: TrackingConfig, box: Path):
    def report(study: Study, steps: range, offset: float) -> None:
        study.child("a", {"k": 8})
        study.child("b", {"k": 16})
        for step in steps:
            study.metrics("a", {"fvu": float(step)}, step, time=1000 + step + offset)

    study = Study(box, tracking, "s1", CONFIG)
    report(study, range(50), 0)
    study.end("b", "FINISHED")
    study.end(None, "KILLED")
    closed(study)
    assert {name: run.info.status for name, run in all_runs(tracking).items()} == {
        "s1": "KILLED",
        "a": "KILLED",
        "b": "FINISHED",
    }

    study = Study(box, tracking, "s1", CONFIG)
    assert study.flush(60) == 0
    assert all_runs(tracking)["s1"].info.status == "RUNNING"
    report(study, range(30, 80), 500)
    study.flush(60)
    assert {name: run.info.status for name, run in all_runs(tracking).items()} == {
        "s1": "RUNNING",
        "a": "RUNNING",
        "b": "FINISHED",
    }
    study.end("a", "FINISHED")
    study.end(None, "FINISHED")
    closed(study)
    runs = all_runs(tracking)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    expected = [(s, float(s), 1000 * (1000 + s + (500 if s >= 50 else 0))) for s in range(80)]
    assert history(tracking, runs["a"], "fvu") == expected


def test_a_lost_outbox_neither_doubles_runs_nor_numbers(tracking: TrackingConfig, box: Path):
    for attempt in range(2):
        study = Study(box.with_name(f"outbox{attempt}.db"), tracking, "s1", CONFIG)
        study.child("a", {"k": 8})
        if attempt == 0:
            study.child("left", {"k": 8})
        for step in range(20 + 10 * attempt):
            study.metrics("a", {"fvu": float(step)}, step)
        if attempt == 1:
            study.end("a", "FINISHED")
            study.end(None, "FINISHED")
        closed(study)
    runs = all_runs(tracking)
    assert {name: run.info.status for name, run in runs.items()} == {
        "s1": "FINISHED",
        "a": "FINISHED",
        "left": "KILLED",
    }
    assert [step for step, _, _ in history(tracking, runs["a"], "fvu")] == list(range(30))


def test_a_batch_whose_answer_was_lost_is_stored_once(
    tracking: TrackingConfig, box: Path, monkeypatch: pytest.MonkeyPatch
):
    original, failures = MlflowClient.log_batch, []

    def lossy(client, *arguments, **named):
        original(client, *arguments, **named)
        if len(failures) < 3:
            failures.append(1)
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", lossy)
    study = Study(box, tracking, "s1", CONFIG)
    study.child("a", {"k": 8})
    for step in range(100):
        study.metrics("a", {"fvu": float(step)}, step)
    closed(study)
    assert len(failures) == 3
    assert [step for step, _, _ in history(tracking, all_runs(tracking)["a"], "fvu")] == list(range(100))


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    tracking: TrackingConfig, box: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
):
    study = Study(box, tracking, "s1", CONFIG)
    study.child("a", {"k": 8, "bad{key}": 1, "width": 5, "long": "x" * 9000})
    study.metrics("a", {"fvu": 0.1, "bad{key}": 1}, 1)
    study.artifact("a", "/no/such/file", "x")
    closed(study)
    run = all_runs(tracking)["a"]
    assert set(run.data.params) == {"k", "width", "long"}
    assert len(run.data.params["long"]) == 500
    assert run.data.metrics == {"fvu": 0.1}
    assert "bad{key}" in caplog.text
    assert "/no/such/file" in caplog.text
    told = (
        "3 entries for good, kept in .* alone: "
        "metrics bad{key} of a, params bad{key} of a, artifacts /no/such/file of a$"
    )
    assert re.search(told, refusal(Outbox(box)))
    assert send(box) == 2, "the ends of both runs"
    Outbox(box).add_metrics("a", {"also bad{key}": 1.0, "l0": 8.0}, 2, 1000)
    assert send(box) == 1, "what is refused does not count as sent"
    job([str(box)])
    sent, refused = capsys.readouterr().out.splitlines()[-2:]
    assert sent == "0 entries sent"
    assert refused.startswith("MLflow has refused 4 entries for good")


def test_a_run_deleted_on_the_server_is_sent_anew(tracking: TrackingConfig, box: Path):
    study = Study(box, tracking, "s1", CONFIG)
    study.child("a", {"k": 8})
    study.metrics("a", {"fvu": 0.1}, 1)
    closed(study)
    MlflowClient(tracking.uri).delete_run(all_runs(tracking)["s1"].info.run_id)
    MlflowClient(tracking.uri).delete_run(all_runs(tracking)["a"].info.run_id)
    study = Study(box, tracking, "s1", CONFIG)
    study.metrics("a", {"fvu": 0.2}, 2)
    closed(study)
    runs = all_runs(tracking)
    assert [value for _, value, _ in history(tracking, runs["a"], "fvu")] == [0.1, 0.2]
    assert runs["a"].data.tags["mlflow.parentRunId"] == runs["s1"].info.run_id


def test_a_deleted_experiment_is_told_in_a_sentence(tracking: TrackingConfig, box: Path):
    study = Study(box, tracking, "s1", CONFIG)
    closed(study)
    client = MlflowClient(tracking.uri)
    client.delete_experiment(client.get_experiment_by_name(tracking.experiment).experiment_id)
    with pytest.raises(
        UserError, match=r"^the experiment .* was deleted in MLflow: restore it there, or name another one$"
    ):
        send(box)
    assert send(box, experiment="another") > 0


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers: the worst kind of outage."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_dead_server_blocks_nothing_and_loses_nothing(
    kind: str, silent_server: str, tracking: TrackingConfig, box: Path
):
    uri = "http://127.0.0.1:9" if kind == "refused" else silent_server
    start = time.monotonic()
    study = Study(box, TrackingConfig(uri=uri, experiment=tracking.experiment), "s1", CONFIG)
    slowest = 0.0
    for name in ("a", "b"):
        study.child(name, {"k": 8})
    for step in range(300):
        before = time.monotonic()
        study.metrics("a", {"fvu": 0.5, "l0": 8.0}, step, time=1000 + step)
        slowest = max(slowest, time.monotonic() - before)
    study.end("a", "FINISHED")
    # Takes milliseconds on an idle machine. Seconds would be the server's timeout.
    assert slowest < 2
    assert study.flush(1) >= 600
    study.close(timeout=1)
    assert time.monotonic() - start < 15

    if kind == "silent":
        # The study's thread holds the lock until the request times out
        return
    wait_until_unlocked(box)
    assert send(box, uri=tracking.uri) >= 600
    runs = all_runs(tracking)
    assert {name: run.info.status for name, run in runs.items()} == {"s1": "KILLED", "a": "FINISHED", "b": "KILLED"}
    expected = [(step, 0.5, 1000 * (1000 + step)) for step in range(300)]
    assert history(tracking, runs["a"], "fvu") == expected
    assert send(box) == 0
    assert history(tracking, all_runs(tracking)["a"], "fvu") == expected


def wait_until_unlocked(box: Path) -> None:
    deadline = time.monotonic() + 30
    while any(thread.name == "raysae-tracking" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_driver_killed_at_any_moment_loses_and_doubles_nothing(tracking: TrackingConfig, box: Path):
    driver = f"""
from raysae.config import TrackingConfig
from raysae.tracking.runs import Study
study = Study({str(box)!r}, TrackingConfig(uri={tracking.uri!r}, experiment={tracking.experiment!r}), "s1", {{}})
study.child("a", {{"k": 8}})
for step in range(10**9):
    study.metrics("a", {{"fvu": float(step)}}, step)
    if step == 50: study.flush(60)
    if step % 100 == 0: print(step, flush=True)
"""
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", driver], stdout=subprocess.PIPE, cwd=ROOT) as process:
            for _ in range(8):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
    process = subprocess.run(
        [sys.executable, "-m", "raysae.commands.send", str(box)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("entries sent\n")
    kept = sqlite3.connect(box).execute("SELECT count(*) FROM metrics").fetchone()[0]
    run = all_runs(tracking)["a"]
    assert [step for step, _, _ in history(tracking, run, "fvu")] == list(range(kept))
    assert kept > 700
    assert run.info.status == "KILLED"


def test_the_experiment_and_study_of_an_outbox(tracking: TrackingConfig, box: Path, tmp_path: Path):
    study = Study(box, tracking, "s1", CONFIG)
    with pytest.raises(UserError, match="holds the numbers of the study s1"):
        Study(box, tracking, "s2", CONFIG)
    study.flush(30)
    with pytest.raises(UserError, match="running and sends it itself"):
        send(box)
    with pytest.raises(ValueError, match="status is DONE"):
        study.end(None, "DONE")
    closed(study)
    with pytest.raises(UserError, match="is not there"):
        send(tmp_path / "nowhere.db")
    Outbox(tmp_path / "empty.db")
    with pytest.raises(UserError, match="holds no study"):
        send(tmp_path / "empty.db")


def test_saes_are_found_by_study_and_run(tracking: TrackingConfig, tmp_path: Path):
    with pytest.raises(UserError, match="no experiment of this name"):
        find_saes(tracking)
    with pytest.raises(UserError, match="there is no such database"):
        find_saes(TrackingConfig(uri=f"sqlite:///{tmp_path}/other.db"))
    assert not (tmp_path / "other.db").exists()
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    for i, name in enumerate(("old", "new", "empty")):
        study = Study(tmp_path / f"{name}.db", tracking, name, CONFIG)
        for sae in ("b", "a"):
            study.child(sae + name, {"k": 8})
            if name != "empty":
                study.artifact(sae + name, tmp_path / "sae", "sae")
        study.end(None, "FINISHED")
        closed(study)
        time.sleep(0.01 * i)
    assert [sae.name for sae in find_saes(tracking)] == ["anew", "bnew"]
    old = find_saes(tracking, "old")
    assert [sae.name for sae in old] == ["aold", "bold"]
    assert [sae.name for sae in find_saes(tracking, old[1].run_id)] == ["bold"]
    parent = MlflowClient(tracking.uri).get_run(old[0].run_id).data.tags["mlflow.parentRunId"]
    assert find_saes(tracking, parent) == old
    for which in ("empty", "nonsense", "0" * 32):
        with pytest.raises(UserError, match="neither a run id nor a study"):
            find_saes(tracking, which)


def test_flatten():
    assert flatten({"train": {"tokens": 5, "warmup": 0.05}, "k": [8, 16], "study": None, "on": True}) == {
        "train.tokens": "5", "train.warmup": "0.05", "k": "8, 16", "on": "True",
    }  # fmt: skip


def test_batches_keep_mlflows_limits():
    assert delivery.METRICS_PER_BATCH <= 1000
    assert delivery.PAIRS_PER_BATCH <= 100


def test_a_server_that_does_not_answer_does_not_become_the_outbox_s_own(tracking: TrackingConfig, box: Path):
    study = Study(box, tracking, "s1", CONFIG)
    study.child("a", {"k": 8})
    study.end(None, "FINISHED")
    closed(study)
    with pytest.raises(UserError, match=r"^tracking\.uri is http://127\.0\.0\.1:9, where MLflow takes nothing now"):
        send(box, uri="http://127.0.0.1:9")
    assert Outbox(box).meta("uri") == tracking.uri
    assert send(box.parent) == 0, "a folder stands for the outbox in it"


def test_a_driver_killed_while_a_database_is_made_leaves_none_or_a_whole_one(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    command = [
        sys.executable,
        "-c",
        f"from raysae.tracking.client import client_of; client_of({uri!r}).search_experiments()",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    # Wait until some of the tables are there. The pattern leaves out the journal, which comes and goes.
    while process.poll() is None and not any(path.stat().st_size > 300_000 for path in tmp_path.glob("new/*[!l]")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was too fast for this test"
    assert client_of(uri).get_experiment_by_name("Default")
