"""Each process of a sweep is killed, at a random moment and at nasty ones; what comes out is what the undisturbed run left, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

import pytest
import ray

from tests.faults.harness import PATIENCE, Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
Start = Callable[..., Sweep]


@pytest.fixture
def moment(request: pytest.FixtureRequest) -> float:
    """A random share of the run, by the name of the test: another name, another moment, and the same one when it is repeated."""
    return random.Random(request.node.name).uniform(0.1, 0.5)


def checkpoints(sweep: Sweep) -> int:
    return len(list((sweep.place / "checkpoints").glob("*/*.safetensors")))


def test_producer(sweep: Start, undisturbed: Start, moment: float) -> None:
    """At the first shard, at a random moment, and its replacement as soon as it is there."""
    ours = sweep()
    ours.kill("producer")
    ours.until_share(moment)
    first = ours.kill("producer")
    second = ours.kill("producer", ours.wait_for("producer", {first}))
    ours.wait_for("producer", {first, second})
    ours.finish()
    assert_same(ours, undisturbed())


def test_hung_producer(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Stopped, so that it is alive and silent: it is replaced, and its process does not stay."""
    ours = sweep(faults__hang_seconds=8)
    ours.until_share(moment)
    hung = ours.wait_for("producer")
    os.kill(hung, signal.SIGSTOP)
    ours.wait_for("producer", {hung}, seconds=60)
    ours.until(lambda: not os.path.exists(f"/proc/{hung}"), 30, "the hung process is still there")
    ours.finish()
    assert_same(ours, undisturbed())


def test_trainer(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Before its first checkpoint, at a random moment, and the one that takes its place as soon as it is there."""
    ours = sweep(train__checkpoint_seconds=2)
    first = ours.wait_for("trainer")
    assert not checkpoints(ours)
    ours.kill("trainer", first)
    ours.until_share(moment)
    second = ours.kill("trainer")
    third = ours.kill("trainer", ours.wait_for("trainer", {first, second, *ours.pids("trainer")}))
    ours.wait_for("trainer", {first, second, third})
    ours.finish()
    assert_same(ours, undisturbed())


def test_hung_trainer(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Stopped: it is restarted from its checkpoints."""
    ours = sweep(faults__hang_seconds=8)
    ours.until_share(moment)
    before = set(ours.pids("trainer"))
    os.kill(min(before), signal.SIGSTOP)
    ours.wait_for("trainer", before, seconds=60)
    ours.finish()
    assert_same(ours, undisturbed())


def test_queue_and_trial(sweep: Start, undisturbed: Start, moment: float) -> None:
    """The queue at a random moment and again while consumers rejoin; both trials' handles, and the one that takes their place."""
    ours = sweep()
    ours.until_share(moment)
    first = ours.kill("queue")
    second = ours.kill("queue", ours.wait_for("queue", {first}))
    ours.wait_for("queue", {first, second})
    trials = {ours.kill("trial", pid) for pid in ours.pids("trial")}
    ours.kill("trial", ours.wait_for("trial", trials))
    ours.finish()
    assert_same(ours, undisturbed())


def test_driver(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Before the first checkpoint, at a random moment, and its successor as soon as it trains; then when all SAEs have ended and their evaluation in
    the language model begins. Each time `--resume` goes on, at once."""
    ours = sweep(train__checkpoint_seconds=1)
    ours.wait_for("trainer")
    ours.kill("driver")
    assert not checkpoints(ours)
    ours.start()
    ours.until_share(moment)
    ours.kill("driver")
    ours.start()
    ours.wait_for("trainer")
    ours.kill("driver")
    ours.start()
    ours.until(lambda: len(list((ours.place / "saes").glob("*/outcome.json"))) == 4)
    ours.kill("driver")
    ours.start()
    ours.finish()
    assert_same(ours, undisturbed())


@pytest.mark.parametrize(("kind", "sentence"), [("producer", "room for a language model"), ("trainer", "room for the trainer resid_post.0-")])
def test_no_room_is_said_within_bounded_time(kind: str, sentence: str, sweep: Start) -> None:
    """Somebody else has taken the place that a producer or a trainer needs: the sweep ends and says what is missing. (What could never fit is
    refused before anything starts.)"""
    blocker = ray.remote(num_cpus=3.5)(Blocker).remote()
    ray.get(blocker.here.remote())
    needs = {"resources__producer_cpus": 0.1, "resources__trainer_cpus": 0.1} | {f"resources__{kind}_cpus": 1.5}
    ours = sweep(**needs, faults__start_seconds=30)
    assert ours.driver.wait(PATIENCE) == 1, ours.log()
    ray.kill(blocker)
    words = " ".join(ours.log().split())
    assert f"no machine has had {sentence}" in words
    assert "for 30 s: 1.5 CPUs on one machine are needed, free are 0." in words
    assert "of 4 CPUs" in words
    assert "python jobs/scaling_sweep.py --output" in words


class Blocker:
    """Takes the place of others."""

    def here(self) -> None:
        pass
