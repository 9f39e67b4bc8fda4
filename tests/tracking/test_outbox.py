"""The outbox on its own: the first write wins, and everything survives the process's death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raysae.tracking.outbox import FINISHED, KILLED, REFUSED, RUNNING, SENT, STUDY, Metric, Outbox


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    box = Outbox(tmp_path / "deep" / "outbox.db")
    box.start(STUDY, 1000)
    box.start("a", 1001)
    return box


def test_first_write_of_a_metric_wins(outbox: Outbox):
    outbox.add_metrics("a", {"fvu": 0.5, "l0": 8}, 100, 2000)
    outbox.add_metrics("a", {"fvu": 0.7, "kl": 1}, 100, 3000)
    outbox.add_metrics("a", {"fvu": 0.4}, 200, 3000)
    assert set(outbox.unsent_metrics("a", 10)) == {
        Metric("fvu", 100, 0.5, 2000), Metric("l0", 100, 8.0, 2000), Metric("kl", 100, 1.0, 3000),
        Metric("fvu", 200, 0.4, 3000),
    }  # fmt: skip


def test_what_is_sent_or_refused_waits_no_longer(outbox: Outbox):
    outbox.add_metrics("a", {"fvu": 0.5}, 1, 0)
    outbox.add_params("a", {"k": "8"})
    outbox.add_tags("a", {"t": "1"})
    outbox.add_artifact("a", "/x", "sae")
    assert outbox.unsent() == 2 + 4
    outbox.mark_metrics("a", outbox.unsent_metrics("a", 10), SENT)
    outbox.mark_pairs("params", "a", [("k", "8")], REFUSED)
    outbox.mark_pairs("tags", "a", [("t", "1")], SENT)
    outbox.mark_pairs("artifacts", "a", [("/x", "sae")], SENT)
    for run in outbox.runs():
        outbox.mark_run(run, SENT)
    assert outbox.unsent() == 0
    outbox.add_metrics("a", {"fvu": 0.9}, 1, 5)  # A replayed metric changes nothing
    outbox.add_params("a", {"k": "9"})
    outbox.add_tags("a", {"t": "1"})
    assert outbox.unsent() == 0
    outbox.add_tags("a", {"t": "2"})
    outbox.add_artifact("a", "/x", "sae")
    assert outbox.unsent_runs() == {"a"}
    assert outbox.unsent() == 2
    outbox.forget("a")
    assert outbox.unsent() == 1 + 4


def test_a_tag_changed_while_it_is_sent_is_sent_again(outbox: Outbox):
    outbox.add_tags("a", {"t": "1"})
    outbox.add_tags("a", {"t": "2"})
    outbox.mark_pairs("tags", "a", [("t", "1")], SENT)
    assert outbox.unsent_pairs("tags", "a", 10) == [("t", "2")]


def test_a_run_ended_while_its_start_is_sent_is_sent_again(outbox: Outbox):
    before = outbox.runs()[1]
    outbox.end("a", FINISHED, 5000)
    outbox.mark_run(before, SENT)
    assert "a" in outbox.unsent_runs()


def test_the_studys_end_closes_what_is_open_and_a_start_opens_what_has_not_finished(outbox: Outbox):
    outbox.start("b", 1002)
    outbox.end("b", FINISHED, 2000)
    outbox.end(STUDY, KILLED, 3000)
    assert [(run.run, run.status, run.ended) for run in outbox.runs()] == [
        (STUDY, KILLED, 3000),
        ("a", KILLED, 3000),
        ("b", FINISHED, 2000),
    ]
    for run in (STUDY, "a", "b"):
        outbox.start(run, 4000)
    assert [(run.status, run.ended, run.started) for run in outbox.runs()] == [
        (RUNNING, None, 1000),
        (RUNNING, None, 1001),
        (FINISHED, 2000, 1002),
    ]


def test_threads_write_at_once(outbox: Outbox):
    def write(thread: int) -> None:
        for step in range(50):
            outbox.add_metrics("a", {f"m{thread}": step, "shared": thread}, step, 0)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outbox.unsent_metrics("a", 1000)) == 5 * 50


def test_survives_sigkill(tmp_path: Path):
    writer = f"""
from raysae.tracking.outbox import Outbox
box = Outbox({str(tmp_path / "o.db")!r})
box.start("a", 0)
for step in range(10**9):
    box.add_metrics("a", {{"fvu": 1.0}}, step, 0)
    if step == 200: print("go", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", writer], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    metrics = Outbox(tmp_path / "o.db").unsent_metrics("a", 10**9)
    assert sorted(metric.step for metric in metrics) == list(range(len(metrics)))
    assert len(metrics) > 200
