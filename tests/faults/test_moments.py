"""A trainer is killed while it evaluates, writes a checkpoint, or writes a finished SAE."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from raysae.sae.files import load_sae
from raysae.storage import PARTIAL
from tests.train.synthetic import config
from tests.train.test_actor import SPEC, ArrayQueue, array_queue, cluster, trainer_on, until_ended, wait_for  # noqa: F401 (cluster: a fixture)

pytestmark = pytest.mark.fault
WIDE = config(width=4096, seed=2)  # Its checkpoints take long enough to be hit while they are written
TRIES = 6


def bits(folder: Path) -> dict[str, torch.Tensor]:
    return load_sae(folder / "saes" / WIDE.name).state_dict()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed")
    queue = array_queue()
    trainer = trainer_on(folder, queue, saes=(WIDE,))
    until_ended(trainer, WIDE.name)
    ray.kill(trainer)
    return folder


def assert_undisturbed(trainer: ray.actor.ActorHandle, folder: Path, undisturbed: Path) -> None:
    reports = until_ended(trainer, WIDE.name)
    assert [report["step"] for report in reports] == [5, 10, 15, 20]
    ray.kill(trainer)
    ours, theirs = bits(folder), bits(undisturbed)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def partial(folder: Path) -> list[str]:
    """Files in `folder` that are being written, or that a dead process left half written."""
    try:
        return [name for name in os.listdir(folder) if name.endswith(PARTIAL)]
    except FileNotFoundError:
        return []


def kill_while(true: Callable[[], object], pid: int, seconds: float = 60) -> None:
    """Sends SIGKILL at the first moment at which `true()`. It looks without pause."""
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up
    os.kill(pid, signal.SIGKILL)


class SlowEvaluation(ArrayQueue):
    """Withholds held-out blocks while `evaluations` is False."""

    evaluations = False

    async def evaluation_block(self, hook_point, shard, block):
        import asyncio

        while not self.evaluations:
            await asyncio.sleep(0.02)
        return await super().evaluation_block(hook_point, shard, block)

    async def evaluate_on(self):
        self.evaluations = True


def test_during_an_evaluation(tmp_path: Path, undisturbed: Path) -> None:
    queue = ray.remote(SlowEvaluation).options(name=f"queue-{time.time_ns()}").remote()
    trainer = trainer_on(tmp_path, queue, saes=(WIDE,))
    wait_for(lambda: ray.get(trainer.status.remote())[0]["state"] == "evaluating")
    os.kill(ray.get(trainer.process.remote()), signal.SIGKILL)
    ray.get(queue.evaluate_on.remote())
    assert_undisturbed(trainer, tmp_path, undisturbed)


def test_while_a_checkpoint_is_written(tmp_path: Path, undisturbed: Path) -> None:
    queue = array_queue(paused=True)
    trainer = trainer_on(tmp_path, queue, saes=(WIDE,))
    folder = tmp_path / "checkpoints" / WIDE.name
    for _ in range(TRIES):
        wait_for(lambda: ray.get(trainer.status.remote())[0]["tokens"] == SPEC.rows_per_shard)
        pid = ray.get(trainer.process.remote())
        trainer.stop.remote()  # The trainer writes a checkpoint
        kill_while(lambda: partial(folder), pid)
        wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
        if partial(folder):
            break
        # Too late: try again from the beginning
        pid = ray.get(trainer.process.remote())
        shutil.rmtree(folder)
        os.kill(pid, signal.SIGKILL)
    else:
        pytest.fail("no checkpoint was caught while it was written")
    ray.get(queue.resume.remote())
    assert_undisturbed(trainer, tmp_path, undisturbed)


def test_while_the_finished_sae_is_written(tmp_path: Path, undisturbed: Path) -> None:
    queue = array_queue()  # Keep the handle: an actor lives only as long as somebody knows it
    trainer = trainer_on(tmp_path, queue, saes=(WIDE,))
    pid = ray.get(trainer.process.remote())
    kill_while((tmp_path / "saes" / WIDE.name).exists, pid)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not (tmp_path / "saes" / WIDE.name / "outcome.json").exists()
    assert_undisturbed(trainer, tmp_path, undisturbed)
