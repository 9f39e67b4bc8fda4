"""The watch over trainers: when Ray Tune may take its share of the cores, and how banks end."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from raysae.config import SweepConfig
from raysae.sweep.watch import TRACKED, Watch, WatchedTrainer, metrics_of, track


class Actor:
    """Answers each of its methods with what it was made with. `asked` holds the calls."""

    def __init__(self, **answers: object) -> None:
        self.answers, self.asked = answers, []

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(
            remote=lambda *arguments: self.asked.append((method, *arguments)) or self.answers.get(method)
        )


@pytest.fixture
def watch() -> Watch:
    """A watch of one trainer that trains two SAEs. It is not entered, so no thread asks the trainer."""
    settled = SimpleNamespace(config=SweepConfig())
    return Watch(settled, Actor(), {"bank": Actor()}, {"bank": ["a", "b"]}, study=None)


@pytest.mark.parametrize(
    "row", [{"state": "working", "tokens": 0}, {"state": "done", "tokens": 9}, {"state": "waiting", "tokens": 4096}]
)
def test_training_is_awaited(watch: Watch, row: dict) -> None:
    watch.trainers["bank"].status = [{"state": "waiting", "tokens": 0}]
    threading.Timer(0.5, setattr, (watch.trainers["bank"], "status", [row])).start()
    began = time.monotonic()
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30


@pytest.mark.parametrize("last", ["done", "working"])
def test_a_bank_that_has_ended_has_left_the_stream(watch: Watch, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own message may have been lost with a relay. Everyone else would then wait for it."""
    monkeypatch.setattr("raysae.sweep.watch.ray.get", lambda answers, timeout: answers)
    status = [{"name": "a", "state": "stopped"}, {"name": "b", "state": last}]
    trainer = WatchedTrainer(Actor(status=status, news={}, silent_seconds=0.0, warnings=[]))
    watch.look("bank", trainer, 0)
    assert watch.queue.asked == ([("dismiss", "bank")] if last == "done" else [])


def test_what_comes_after_the_end_is_not_tracked(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C leaves the watch while it waits for a silent trainer. Then the study is closed."""
    monkeypatch.setattr("raysae.sweep.watch.ray.get", lambda answers, timeout: answers)
    monkeypatch.setattr("raysae.sweep.watch.track", lambda *arguments: pytest.fail("tracked"))
    watch.tracked, watch.abandoned = {"a": 0}, True
    trainer = WatchedTrainer(
        Actor(status=[{"name": "a", "state": "working"}], news={"a": [{}]}, silent_seconds=0.0, warnings=[])
    )
    watch.look("bank", trainer, 0)
    assert trainer.status == []


def test_a_trainer_that_was_restarted_while_it_stopped_is_not_killed_again(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process died before it had stopped. Ray has restarted it on a machine that stays."""
    killed = []
    monkeypatch.setattr("raysae.sweep.watch.ray.wait", lambda calls, timeout: (calls, []))
    monkeypatch.setattr("raysae.sweep.watch.ray.kill", lambda actor, no_restart: killed.append(actor))
    trainer = watch.trainers["bank"]
    for machine in ("another", "drained"):
        assert killed == []
        trainer.stopping, trainer.stop_on = "the call", "drained"
        monkeypatch.setattr("raysae.sweep.watch.machine_of", lambda actor, machine=machine: machine)
        watch._restart_elsewhere("bank", trainer)
        assert trainer.stopping is None
    assert killed == [trainer.actor]


def test_saes_are_counted_before_their_trainer_has_told_of_them(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [{"name": name, "state": "waiting", "tokens": None} for name in "ab"]
    assert watch.trainers["bank"].status == told

    def died(answers, timeout):
        raise RayError("it died too often")

    monkeypatch.setattr("raysae.sweep.watch.ray.get", died)
    watch.look("bank", watch.trainers["bank"], 0)
    assert [row["state"] for row in watch.trainers["bank"].status] == ["failed", "failed"]


def test_training_is_not_awaited_for_ever(watch: Watch) -> None:
    began = time.monotonic()
    watch.await_training(0.5)
    watch.failure = "no machine has room"
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30


def test_a_trainer_that_ends_is_asked_no_more(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last answers are awaited first. A call that a kill cuts off makes Ray print a line."""
    ended = []
    monkeypatch.setattr("raysae.sweep.watch.machine_of", lambda actor: "somewhere")
    monkeypatch.setattr("raysae.sweep.watch.end_trainers", lambda actors, calls: ended.append((actors, calls)))
    monkeypatch.setattr("raysae.sweep.watch.ray.kill", lambda actor: None)
    trainer = watch.trainers["bank"]
    trainer.asked = ["status", "news"]
    watch.end_trainers()
    watch.end_trainers()
    assert ended == [([trainer.actor], ["status", "news"])]
    trainer.asked = None
    watch.look("bank", trainer, 0)
    assert trainer.actor.asked == []


REPORT = {"tokens": 4096, "time": 5.0, "fvu": 0.2, "l0": 8.0, "cosine": 0.9, "norm_ratio": 0.8, "dead_fraction": 0.5}


def test_numbers_that_depend_on_the_rows_have_names_of_their_own_until_the_last_report() -> None:
    """An interim report reads few rows, on which more latents look dead."""
    interim, last = metrics_of(REPORT | {"final": False}), metrics_of(REPORT | {"final": True})
    assert last == {key: REPORT[key] for key in TRACKED if key in REPORT}
    assert interim == {key: value for key, value in last.items() if key != "dead_fraction"} | {
        "interim/dead_fraction": 0.5
    }


def test_a_report_is_tracked_at_its_tokens() -> None:
    told = []
    study = SimpleNamespace(metrics=lambda name, metrics, step, time: told.append((name, metrics, step, time)))
    track(study, "a", REPORT | {"final": True, "learning_rate": None})
    assert told == [("a", {key: REPORT[key] for key in TRACKED if key in REPORT}, 4096, 5.0)]
