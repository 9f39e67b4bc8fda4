"""When Ray Tune may take its share of the cores."""

from __future__ import annotations

import threading
import time

import pytest

from raysae.sweep.watch import Watch, _Trainer


@pytest.fixture
def watch() -> Watch:
    """Of one trainer, without the thread that asks it."""
    watch = object.__new__(Watch)
    watch.failure, watch.trainers = None, {"bank": _Trainer(actor=None)}
    return watch


@pytest.mark.parametrize("row", [{"state": "working", "tokens": 0}, {"state": "done", "tokens": 9}, {"state": "waiting", "tokens": 4096}])
def test_training_is_awaited(watch: Watch, row: dict) -> None:
    watch.trainers["bank"].status = [{"state": "waiting", "tokens": 0}]
    threading.Timer(0.5, setattr, (watch.trainers["bank"], "status", [row])).start()
    began = time.monotonic()
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30


def test_training_is_not_awaited_for_ever(watch: Watch) -> None:
    began = time.monotonic()
    watch.await_training(0.5)
    watch.failure = "no machine has room"
    watch.await_training(60)
    assert 0.4 < time.monotonic() - began < 30
