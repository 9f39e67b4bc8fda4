"""The watch over trainers: when Ray Tune may take its share of the cores, and how banks end."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from raysae.config import FaultsConfig
from raysae.sweep.watch import Watch, WatchedTrainer


@pytest.fixture
def watch() -> Watch:
    """A watch of one trainer, without the thread that asks it."""
    watch = object.__new__(Watch)
    watch.failure, watch.trainers, watch.abandoned = None, {"bank": WatchedTrainer(actor=None)}, False
    return watch


@pytest.mark.parametrize(
    "row", [{"state": "working", "tokens": 0}, {"state": "done", "tokens": 9}, {"state": "waiting", "tokens": 4096}]
)
def test_training_is_awaited(watch: Watch, row: dict) -> None:
    watch.trainers["bank"].status = [{"state": "waiting", "tokens": 0}]
    threading.Timer(0.5, setattr, (watch.trainers["bank"], "status", [row])).start()
    began = time.monotonic()
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30


class Actor:
    """Answers each of its methods with what it was made with. `asked` holds the calls."""

    def __init__(self, **answers: object) -> None:
        self.answers, self.asked = answers, []

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(
            remote=lambda *arguments: self.asked.append((method, *arguments)) or self.answers.get(method)
        )


@pytest.mark.parametrize("last", ["done", "working"])
def test_a_bank_that_has_ended_has_left_the_stream(watch: Watch, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own message may have been lost with a relay. Everyone else would then wait for it."""
    monkeypatch.setattr("raysae.sweep.watch.ray.get", lambda answers, timeout: answers)
    status = [{"name": "a", "state": "stopped"}, {"name": "b", "state": last}]
    watch.queue, watch.tracked, watch.faults = Actor(), {}, FaultsConfig()
    trainer = WatchedTrainer(Actor(status=status, news={}, silent_seconds=0.0, warnings=[]))
    watch.look("bank", trainer, 0)
    assert watch.queue.asked == ([("leave", "bank")] if last == "done" else [])


def test_what_comes_after_the_end_is_not_tracked(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C leaves the watch while it waits for a silent trainer. Then the study is closed."""
    monkeypatch.setattr("raysae.sweep.watch.ray.get", lambda answers, timeout: answers)
    monkeypatch.setattr("raysae.sweep.watch.track", lambda *arguments: pytest.fail("tracked"))
    watch.queue, watch.tracked, watch.faults, watch.study, watch.abandoned = (
        Actor(),
        {"a": 0},
        FaultsConfig(),
        None,
        True,
    )
    trainer = WatchedTrainer(
        Actor(status=[{"name": "a", "state": "working"}], news={"a": [{}]}, silent_seconds=0.0, warnings=[])
    )
    watch.look("bank", trainer, 0)
    assert trainer.status == []


def test_training_is_not_awaited_for_ever(watch: Watch) -> None:
    began = time.monotonic()
    watch.await_training(0.5)
    watch.failure = "no machine has room"
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30
