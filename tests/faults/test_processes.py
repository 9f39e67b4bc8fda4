"""Each process of a sweep is killed, at a random moment and at nasty ones.

What comes out equals what the undisturbed run left, bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import ray
import torch
from safetensors.torch import load_file

from tests.faults.harness import ENVIRONMENT, LONG, PATIENCE, REPOSITORY, Sweep, assert_same, result_of

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]
Start = Callable[..., Sweep]


@pytest.fixture
def moment(request: pytest.FixtureRequest) -> float:
    """A random share of the run, drawn from the test's name.

    Another name gives another moment. A repeated test has the same one.
    """
    return random.Random(request.node.name).uniform(0.05, 0.4)


def checkpoints(sweep: Sweep) -> int:
    return len(list((sweep.place / "checkpoints").glob("*/*.safetensors")))


def test_killed(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Kills every kind of process but the driver, in this order.

    - A producer at its first shard, and a trainer before its first checkpoint.
    - The queue at a random moment, and again while consumers rejoin.
    - The handles of both trials, and the one that takes their place.
    - A producer and a trainer, and their successors as soon as they are there.
    """
    ours = sweep(**LONG, train__checkpoint_seconds=2)
    ours.kill("producer")
    trainer = ours.wait_for("trainer")
    assert not checkpoints(ours)
    ours.kill("trainer", trainer)
    ours.until_share(moment)
    queue = ours.kill("queue")
    again = ours.kill("queue", ours.wait_for("queue", {queue}))
    ours.wait_for("queue", {queue, again})
    ours.wait_for("trial")
    trials = {ours.kill("trial", pid) for pid in ours.pids("trial")}
    ours.kill("trial", ours.wait_for("trial", trials))
    producer = ours.kill("producer")
    next_producer = ours.kill("producer", ours.wait_for("producer", {producer}))
    ours.wait_for("producer", {producer, next_producer})
    before = set(ours.pids("trainer"))
    trainer = ours.kill("trainer", min(before))
    next_trainer = ours.kill("trainer", ours.wait_for("trainer", before))
    ours.wait_for("trainer", {*before, next_trainer})
    ours.finish()
    assert_same(ours, undisturbed(**LONG))


@pytest.mark.long
def test_hung(sweep: Start, undisturbed: Start, moment: float) -> None:
    """Stopped processes are alive and silent.

    The producer is replaced and its process does not stay. The queue is restarted. The trainer restarts from its
    checkpoints.
    """
    ours = sweep(**LONG, faults__hang_seconds=8)
    ours.until_share(moment)
    hung = ours.wait_for("producer")
    os.kill(hung, signal.SIGSTOP)
    ours.wait_for("producer", {hung}, seconds=60)
    ours.until(lambda: not os.path.exists(f"/proc/{hung}"), 30, "the hung process is still there")
    queue = ours.wait_for("queue")
    os.kill(queue, signal.SIGSTOP)
    ours.wait_for("queue", {queue}, seconds=60)
    before = set(ours.pids("trainer"))
    os.kill(min(before), signal.SIGSTOP)
    ours.wait_for("trainer", before, seconds=60)
    ours.finish()
    assert_same(ours, undisturbed(**LONG))


def test_driver(sweep: Start, undisturbed: Start, moment: float) -> None:
    """The driver is killed four times. Each time `--resume` goes on at once.

    It dies before the first checkpoint and at a random moment. Its successor dies as soon as it trains. The last one
    dies when all SAEs have ended and their evaluation in the language model begins.
    """
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


def test_a_trainer_dead_for_good_is_not_waited_for(sweep: Start, undisturbed: Start) -> None:
    """Its SAEs have failed, and the others are what they would have been.

    While a study runs, nobody else can resume it.
    """
    ours = sweep(**LONG, faults__trainer_restarts=0)
    ours.until_share(0.05)
    command = [
        sys.executable,
        str(REPOSITORY / "jobs" / "scaling_sweep.py"),
        "--output",
        str(ours.folder / "runs"),
        "--resume",
        ours.study,
    ]
    second = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 2
    assert "study is 'study', which still runs: wait for its end, or stop it first" in " ".join(second.stderr.split())
    ours.kill("trainer")
    assert ours.driver.wait(PATIENCE) == 1, ours.log()
    calm = result_of(undisturbed(**LONG)).saes
    ended = {path.parent.name: load_file(path) for path in (ours.place / "saes").glob("*/sae_weights.safetensors")}
    assert len(ended) == 2
    assert all(torch.equal(bits, ended[name][key]) for name in ended for key, bits in calm[name].items())
    assert "SAEs that have not come to their end go on with" in " ".join(ours.log().split())


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "sentence"), [("producer", "room for a language model"), ("trainer", "room for the trainer resid_post.0-")]
)
def test_no_room_is_said_within_bounded_time(kind: str, sentence: str, sweep: Start) -> None:
    """Somebody else has taken the place that a producer or a trainer needs.

    The sweep ends and says what is missing. (What could never fit is refused before anything starts.)
    """
    blocker = ray.remote(num_cpus=3.5)(Blocker).remote()
    ray.get(blocker.here.remote())
    needs = {"resources__producer_cpus": 0.1, "resources__trainer_cpus": 0.1} | {f"resources__{kind}_cpus": 1.5}
    ours = sweep(**needs, faults__start_seconds=12)
    assert ours.driver.wait(PATIENCE) == 1, ours.log()
    ray.kill(blocker)
    words = " ".join(ours.log().split())
    assert f"no machine has had {sentence}" in words
    assert "for 12 s: 1.5 CPUs on one machine are needed, free are 0." in words
    assert "of 4 CPUs" in words
    assert "python jobs/scaling_sweep.py --output" in words


class Blocker:
    """Takes CPUs that others need."""

    def here(self) -> None:
        pass
