"""The trainer as a Ray actor: reports, restart after a kill, leaving, errors. A fake queue serves arrays."""

import os
import signal
import time
from typing import ClassVar

import numpy as np
import pytest
import ray
import torch

from raysae.config import StreamConfig, SweepConfig
from raysae.sae.files import load_sae
from raysae.stream.blocks import cut
from raysae.train.actor import end_trainers, start_trainer
from raysae.train.loop import Loop
from raysae.train.rows import StreamSource
from raysae.train.task import Training
from tests.train import synthetic
from tests.train.synthetic import EVALUATION, TRAIN, D, config, rows

A, B = config(seed=0), config("batchtopk", width=40, seed=1)
BLOCK_MIB = 0.0625  # A block has 512 rows
SPEC = synthetic.SPEC.model_copy(update={"shard_contexts": 64})  # 960 rows per shard, so training ends in the second
CONFIG = SweepConfig(stream=StreamConfig(block_mib=BLOCK_MIB), train=TRAIN, evaluation=EVALUATION)


class ArrayQueue:
    """Looks to a consumer like `stream.queue.StreamQueue`. If `paused`, it withholds shard 1 until `resume`."""

    def __init__(self, paused: bool = False):
        shards = [rows(SPEC.rows_per_shard, seed=seed).numpy() for seed in range(2)]
        self.blocks = [[ray.put(block) for block in cut(shard, SPEC.dtype, BLOCK_MIB)] for shard in shards]
        self.held_out = [
            ray.put(block) for block in cut(rows(SPEC.rows_per_shard, seed=9).numpy(), SPEC.dtype, BLOCK_MIB)
        ]
        self.paused = paused

    async def new_process(self):
        return 1

    async def join(self, life, hook_point, row, until_shard=None):
        pass

    async def leave(self, life):
        pass

    async def acknowledge(self, life, done):
        pass

    async def fetch(self, life, shard, block, done):
        import asyncio

        while self.paused and shard == 1:
            await asyncio.sleep(0.02)
        return self.blocks[shard][block:], {"threads": 1}

    async def evaluation_block(self, hook_point, shard, block):
        return [self.held_out[block]]

    async def resume(self):
        self.paused = False

    async def name(self):
        return ray.get_runtime_context().get_actor_name()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def array_queue(**arguments):
    return ray.remote(ArrayQueue).options(name=f"queue-{time.time_ns()}").remote(**arguments)


def trainer_on(folder, queue, saes=(A, B), **changes):
    arguments = {
        "queue": ray.get(queue.name.remote()), "consumer": "bank", "folder": str(folder), "hook_point": "resid_post.0",
        "width": D, "saes": saes, "training": SPEC, "evaluation": SPEC, "config": CONFIG, "threads": 1,
    }  # fmt: skip
    return start_trainer(Training(**arguments | changes))


def wait_for(predicate, seconds=60):
    end = time.monotonic() + seconds
    while not (value := predicate()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def until_ended(trainer, name: str) -> list[dict]:
    reports, ended = [], False
    while not ended:
        new, ended = ray.get(trainer.reports.remote(name, len(reports)), timeout=60)
        reports += new
    return reports


class LocalClient:
    """Stands in for `StreamClient` and reads the arrays directly."""

    numerics: ClassVar = {"threads": [1]}

    def __init__(self):
        self.shards = [cut(rows(SPEC.rows_per_shard, seed=seed).numpy(), SPEC.dtype, BLOCK_MIB) for seed in range(2)]
        self.held_out = cut(rows(SPEC.rows_per_shard, seed=9).numpy(), SPEC.dtype, BLOCK_MIB)

    def block(self, shard, block):
        return self.shards[shard][block]

    def evaluation_block(self, shard, block):
        return self.held_out[block]

    def open(self, row, batch, end=None, device="cpu"):
        from raysae.stream.reader import BatchReader

        return BatchReader(self.block, SPEC, D, BLOCK_MIB, batch, row, end=end, device=device)

    def leave(self):
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of the same SAEs, trained in this process without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = Training("no queue", "bank", str(folder), "resid_post.0", D, (A, B), SPEC, SPEC, CONFIG, 1)
    source = StreamSource(plan, LocalClient(), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loop = Loop(str(folder), D, SPEC, TRAIN, EVALUATION, source)
    loop.add(A)
    loop.add(B)
    loop.run()
    torch.set_num_threads(threads)
    return folder


def test_killed_in_the_middle_comes_back_and_gives_the_same_bits(tmp_path, undisturbed):
    queue = array_queue(paused=True)
    trainer = trainer_on(tmp_path, queue)
    first, ended = ray.get(trainer.reports.remote(A.name), timeout=60)
    assert first[0]["tokens"] == 320
    assert not ended
    wait_for(
        lambda: all(
            s["tokens"] == SPEC.rows_per_shard and s["state"] == "waiting" for s in ray.get(trainer.status.remote())
        )
    )
    pid = ray.get(trainer.process.remote())
    os.kill(pid, signal.SIGKILL)
    ray.get(queue.resume.remote())
    reports = until_ended(trainer, A.name)
    assert [report["step"] for report in reports] == [5, 10, 15, 20]
    until_ended(trainer, B.name)
    assert ray.get(trainer.process.remote()) != pid
    for name in (A.name, B.name):
        bits, bits_ = (load_sae(folder / "saes" / name).state_dict() for folder in (tmp_path, undisturbed))
        assert all(torch.equal(bits[key], bits_[key]) for key in bits)
    mean = ray.get(trainer.mean.remote(A.name))
    expected = torch.cat([rows(SPEC.rows_per_shard, seed=shard) for shard in range(2)])[: TRAIN.tokens].mean(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)
    assert {s["state"] for s in ray.get(trainer.status.remote())} == {"done"}
    ray.kill(trainer)


def test_stop_while_the_stream_is_slow_leaves_checkpoints_to_go_on_from(tmp_path, undisturbed):
    queue = array_queue(paused=True)
    trainer = trainer_on(tmp_path, queue)
    wait_for(lambda: all(s["tokens"] == SPEC.rows_per_shard for s in ray.get(trainer.status.remote())))
    assert ray.get(trainer.stop.remote(), timeout=30)
    assert len(list((tmp_path / "checkpoints").rglob("*.safetensors"))) == 2
    ray.kill(trainer)
    ray.get(queue.resume.remote())
    again = trainer_on(tmp_path, queue)
    until_ended(again, A.name)
    until_ended(again, B.name)
    bits, bits_ = (load_sae(folder / "saes" / A.name).state_dict() for folder in (tmp_path, undisturbed))
    assert all(torch.equal(bits[key], bits_[key]) for key in bits)
    ray.kill(again)


def test_leaving(tmp_path):
    queue = array_queue(paused=True)
    trainer = trainer_on(tmp_path, queue)
    wait_for(lambda: ray.get(trainer.status.remote())[0]["tokens"] == SPEC.rows_per_shard)
    ray.get([trainer.leave.remote(A.name, "not wanted any more"), queue.resume.remote()])
    assert until_ended(trainer, A.name)[-1]["final"]
    assert until_ended(trainer, B.name)[-1]["tokens"] == TRAIN.tokens
    status = {s["name"]: s for s in ray.get(trainer.status.remote())}
    assert status[A.name]["state"] == "stopped"
    assert status[A.name]["message"] == "not wanted any more"
    assert status[B.name]["state"] == "done"
    ray.kill(trainer)


def test_an_error_of_the_whole_trainer_reaches_its_callers(tmp_path):
    queue = array_queue()
    longer = TRAIN.model_copy(update={"tokens": SPEC.rows_per_shard * 3})
    trainer = trainer_on(
        tmp_path,
        queue,
        training=SPEC.model_copy(update={"contexts": SPEC.shard_contexts * 1000}),
        config=CONFIG.model_copy(update={"train": longer}),
    )
    with pytest.raises(IndexError):
        until_ended(trainer, A.name)
    assert [s["state"] for s in ray.get(trainer.status.remote())] == ["failed", "failed"]
    assert ray.get(trainer.status.remote())[0]["message"] == "list index out of range"
    ray.kill(trainer)


def test_a_trainer_that_ends_answers_who_waits_for_it(tmp_path, capfd):
    """Ray would print a line for each call that is cut off."""
    queue = array_queue(paused=True)
    trainer = trainer_on(tmp_path, queue)
    wait_for(lambda: ray.get(trainer.status.remote())[0]["tokens"] == SPEC.rows_per_shard)
    waiting = [trainer.reports.remote(A.name, 99), trainer.reports.remote(B.name, 99)]  # More than there will be
    assert not ray.wait(waiting, timeout=0.5)[0]
    began = time.monotonic()
    end_trainers([trainer], [trainer.status.remote()])
    assert time.monotonic() - began < 20
    assert ray.get(waiting) == [([], True)] * 2
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(trainer.status.options(max_task_retries=0).remote())
    time.sleep(2)  # Ray's lines come later
    assert "(raylet)" not in "".join(capfd.readouterr())
