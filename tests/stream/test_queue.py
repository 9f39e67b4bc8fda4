"""The queue on a real local Ray, with producers that need no language model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError

from raysae.config import FaultsConfig, ModelConfig, ResourcesConfig, StreamConfig, UserError
from raysae.storage import unsealed
from raysae.stream.blocks import cut, shards_in_flight
from raysae.stream.client import StreamClient, _Reading
from raysae.stream.queue import patiently, start_stream
from raysae.stream.state import Life, NotJoinedError, StreamError, SupersededError
from raysae.stream.task import Streaming
from tests.stream.fake_producer import BLOCK_MIB, CONTEXTS, ROWS, SHARD_MIB, SPEC, WIDTHS, FakeProducer, rows_of

TIMEOUT = 60


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init("local", include_dashboard=False, num_cpus=2, object_store_memory=128 * 2**20, log_to_driver=False)
    yield
    # A thread that calls Ray after its shutdown would end this process
    for thread in threading.enumerate():
        if isinstance(thread, Trainer) or thread.name.startswith("fetch"):
            thread.join(TIMEOUT)
            assert not thread.is_alive(), thread.name
    ray.shutdown()


@pytest.fixture
def stream():
    """Starts queues and kills them after the test."""
    queues = []

    def start(
        model="plain",
        shards_of_room=3,
        faults=None,
        skipped=None,
        held_out=0,
        resources=ResourcesConfig(producer_cpus=0.5),  # noqa: B008
        **config,
    ):
        queue = start_stream(
            Streaming(
                model=ModelConfig(name=model),
                stream=StreamConfig(block_mib=BLOCK_MIB, mib_in_flight=shards_of_room * SHARD_MIB, **config),
                resources=resources,
                training=SPEC,
                evaluation=SPEC,
                contexts={"train": None, "evaluation": None},
                widths=WIDTHS,
                held_out=held_out,
                faults=faults or FaultsConfig(),
                skipped=skipped,
            ),
            producer_class=FakeProducer,
            name=f"queue-{time.time_ns()}",
        )
        queues.append(queue)
        return queue

    yield start
    for queue in queues:
        ray.kill(queue)


class Trainer(threading.Thread):
    """A consumer of rows [row, end). It pauses for `pause` seconds after each batch."""

    def __init__(self, queue, name, hook_point="resid_post.0", row=0, end=SPEC.rows, batch=300, pause=0.0):
        super().__init__(daemon=True)
        self.client = StreamClient(queue, name, hook_point, SPEC, WIDTHS[hook_point], BLOCK_MIB)
        self.hook_point, self.row, self.end, self.batch, self.pause = hook_point, row, end, batch, pause
        self.batches: list[torch.Tensor] = []
        self.error: Exception | None = None
        self.start()

    def run(self):
        try:
            reader = self.client.open(self.row, self.batch, self.end)
            for _ in range((self.end - self.row) // self.batch):
                self.batches.append(reader.next().clone())
                time.sleep(self.pause)
        except Exception as error:
            self.error = error
        finally:
            self.client.leave()

    def check(self):
        """Waits for the end. All rows must then have come, in order."""
        self.join(TIMEOUT)
        assert not self.is_alive(), "the consumer still waits"
        if self.error:
            raise self.error
        everything = np.concatenate([rows_of("train", self.hook_point, i) for i in range(SPEC.shards)])
        read = torch.cat(self.batches).numpy()
        assert len(read) == (self.end - self.row) // self.batch * self.batch
        assert np.array_equal(read, everything[self.row : self.row + len(read)])


def stats(queue) -> dict:
    return ray.get(queue.stats.remote(), timeout=TIMEOUT)


def test_consumers_of_different_speeds_share_one_pass_within_the_bound(stream):
    queue = stream(shards_of_room=2)
    ray.get(queue.expect.remote(["fast", "slow", "other"]))
    trainers = [
        Trainer(queue, "fast"),
        Trainer(queue, "slow", pause=0.1),
        Trainer(queue, "other", "mlp_out.1", batch=512),
    ]
    most = 0
    while any(t.is_alive() for t in trainers):
        most = max(most, stats(queue)["bytes_in_flight"])
        time.sleep(0.02)
    for trainer in trainers:
        trainer.check()
    total = stats(queue)
    bound = 2 * SHARD_MIB * 2**20
    assert 0 < most <= total["peak_bytes_in_flight"] <= bound == total["bound_bytes"]
    assert total["contexts_forwarded"] == SPEC.shards * CONTEXTS
    assert total["shards_produced"] == SPEC.shards
    assert total["consumer_wait_seconds"] > 0
    while stats(queue)["consumers"]:
        time.sleep(0.02)
    assert stats(queue)["bytes_in_flight"] == 0


def test_only_the_shards_that_are_needed_are_produced(stream):
    queue = stream()
    Trainer(queue, "a", row=ROWS + 10, end=3 * ROWS + 1, batch=7).check()
    assert stats(queue)["contexts_forwarded"] == 3 * CONTEXTS


def test_a_single_place_is_enough(stream):
    queue = stream(shards_of_room=1)
    Trainer(queue, "a").check()
    assert stats(queue)["peak_bytes_in_flight"] == SHARD_MIB * 2**20


def test_a_shard_is_one_call_and_no_reference_outlives_its_reader(stream):
    queue = stream()
    trainer = Trainer(queue, "a", batch=ROWS // 2)
    trainer.check()
    assert stats(queue)["blocks_served"] == SPEC.shards * len(
        cut(rows_of("train", "resid_post.0", 0), "float32", BLOCK_MIB)
    )
    reader = trainer.client.open(0, 16)
    reader.next()
    assert trainer.client._reading.refs, "the rest of the shard came with its first block"
    reader.close()
    assert trainer.client._reading is None


def test_a_block_that_does_not_come_is_produced_again(stream, monkeypatch):
    queue = stream()
    real, late = ray.get, []

    def get(wanted, *, timeout=None):
        # Ray raises this when a block never comes
        if timeout == FaultsConfig().block_seconds and len(late) < 2:
            late.append(wanted)
            raise GetTimeoutError("late")
        return real(wanted, timeout=timeout)

    monkeypatch.setattr(ray, "get", get)
    Trainer(queue, "a", end=2 * ROWS).check()
    assert late[0] != late[1], "another reference is asked for than the one that did not come"
    assert stats(queue)["shards_produced"] == 2 + 2


def test_a_block_that_never_comes_ends_in_a_sentence(stream, monkeypatch):
    queue, real = stream(), ray.get

    def get(wanted, *, timeout=None):
        if timeout is not None and timeout >= FaultsConfig().block_seconds:
            raise GetTimeoutError("late")
        return real(wanted, timeout=timeout)

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(
        StreamError, match="block 0 of shard 0 of the train stream could not be read by a: GetTimeoutError 4 times"
    ):
        Trainer(queue, "a", end=ROWS).check()


def test_more_consumers_may_wait_than_ray_runs_calls_by_default(stream, tmp_path):
    queue = stream(model=f"hang:{tmp_path}/hung")
    names = [str(i) for i in range(1100)]
    ray.get([queue.join.remote(Life(name), "mlp_out.1", 0) for name in names])
    waiting = [queue.fetch.remote(Life(name), 0, 0, 0) for name in names]
    assert len(stats(queue)["consumers"]) == len(names)
    assert ray.wait(waiting, timeout=0)[0] == []


def test_killed_producers_lose_nothing(stream):
    queue = stream(model="slow", producers_min=2, producers_max=2)
    trainer = Trainer(queue, "a")
    for number in range(3):
        while len(trainer.batches) < 5 * (number + 1) or stats(queue)["producers_replaced"] < number:
            time.sleep(0.02)
        os.kill(stats(queue)["producer_pids"][0], signal.SIGKILL)
    trainer.check()
    total = stats(queue)
    assert total["shards_produced"] == SPEC.shards
    # The last killed producer may have been idle
    while stats(queue)["producers_replaced"] < 3:
        time.sleep(0.02)


def test_a_hung_producer_is_replaced(stream, tmp_path):
    queue = stream(model=f"hang:{tmp_path / 'hung'}", faults=FaultsConfig(hang_seconds=2))
    Trainer(queue, "a").check()
    assert stats(queue)["producers_replaced"] == 1


def test_a_shard_that_cannot_be_produced_is_named(stream):
    trainer = Trainer(stream(model="poison:2"), "victim")
    with pytest.raises(StreamError, match=r"shard 2 .*consumer victim.*ValueError: bad shard"):
        trainer.check()
    assert len(trainer.batches) == 2 * ROWS // 300


def test_nan_at_one_hook_point_stops_its_consumers_alone(stream):
    queue = stream(model="nan:2")
    sound, broken = Trainer(queue, "sound"), Trainer(queue, "broken", "mlp_out.1")
    with pytest.raises(
        StreamError,
        match=r"shard 2 of the train stream .*mlp_out.1 are NaN or infinite in contexts 7\. Its contexts are",
    ):
        broken.check()
    sound.check()
    assert len(broken.batches) == 2 * ROWS // 300
    assert stats(queue)["shards_failed"] == 4
    assert (
        StreamClient(queue, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB).evaluation_block(2, 0)
        is not None
    )
    with pytest.raises(StreamError, match=r"shard 2 of the evaluation stream .*mlp_out.1 are NaN"):
        StreamClient(queue, "b", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB).evaluation_block(2, 0)


class Passing(Trainer):
    """A consumer that notes which batches it gets and which it skips."""

    def run(self):
        try:
            reader = self.client.open(self.row, self.batch, self.end)
            for _ in range((self.end - self.row) // self.batch):
                batch = reader.next()
                self.batches.append(None if batch is None else batch.clone())
        except Exception as error:
            self.error = error
        finally:
            self.client.leave()

    def check(self):
        self.join(TIMEOUT)
        assert not self.is_alive(), "the consumer still waits"
        if self.error:
            raise self.error
        everything = torch.from_numpy(
            np.concatenate([rows_of("train", self.hook_point, i) for i in range(SPEC.shards)])
        )
        for number, batch in enumerate(self.batches):
            first = self.row + number * self.batch
            touches = first // ROWS <= 2 <= (first + self.batch - 1) // ROWS
            assert (batch is None) == touches, number
            assert touches or torch.equal(batch, everything[first : first + self.batch])


def test_a_bad_shard_is_skipped_by_everyone_alike_also_after_a_restart(stream, tmp_path):
    record = tmp_path / "study" / "skipped.json"
    queue = stream(model="poison:2", bad_shards="skip", skipped=str(record), shards_of_room=1)
    consumers = [Passing(queue, "a"), Passing(queue, "b", "mlp_out.1", batch=512)]
    for consumer in consumers:
        consumer.check()
    noted = unsealed(record.read_bytes(), str(record))
    assert list(noted) == ["train"]
    assert list(noted["train"]) == ["2"]
    assert noted["train"]["2"]["contexts"] == SPEC.contexts_of(2).tolist()
    assert "ValueError: bad shard" in noted["train"]["2"]["reason"]
    assert stats(queue)["shards_skipped"] == noted
    assert stats(queue)["contexts_forwarded"] == 7 * CONTEXTS
    # The shard would be fine now
    again = stream(model="plain", bad_shards="skip", skipped=str(record))
    consumer = Passing(again, "late", row=ROWS)
    consumer.check()
    assert None in consumer.batches


def test_more_bad_shards_than_a_tenth_are_not_skipped(stream, tmp_path):
    trainer = Passing(stream(model="poison", bad_shards="skip", skipped=str(tmp_path / "skipped.json")), "victim")
    with pytest.raises(
        StreamError, match=r"shard 1 .*victim.*ValueError: bad shard\. Its contexts are \d+, .* and 248 more"
    ):
        trainer.check()


def test_a_bad_held_out_shard_is_named_or_skipped(stream):
    queue = stream(model="poison:1")
    with pytest.raises(StreamError, match=r"held-out shard 1 .*4 attempts: .*ValueError: bad shard\. Its contexts are"):
        StreamClient(queue, "a", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB).evaluation_block(1, 0)
    queue = stream(model="poison:1", bad_shards="skip")
    client = StreamClient(queue, "a", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB)
    assert client.evaluation_block(1, 0) is None
    assert client.evaluation_block(2, 0) is not None


@pytest.mark.parametrize(("died", "failures"), [(True, 6), (False, 2)])
def test_the_death_of_a_producer_weighs_the_same_for_held_out_shards(stream, died, failures):
    """`test_state.py` has the same numbers for training shards. No producer has a place, so the test answers."""
    queue = stream(faults=FaultsConfig(shard_attempts=2), resources=ResourcesConfig(producer_cpus=64))

    def fail(self):
        future, failures = self._held_out(0), 0
        while not future.done():
            self._errands.pop().failed(RuntimeError("out of luck"), died)
            failures += 1
        return failures

    assert ray.get(queue.__ray_call__.remote(fail)) == failures


def test_a_producer_that_has_no_place_is_told_to_consumers(stream):
    queue = stream(faults=FaultsConfig(start_seconds=1), resources=ResourcesConfig(producer_cpus=64))
    trainer = Trainer(queue, "a")
    with pytest.raises(
        StreamError,
        match=r"no producers: no machine has had room .* 1 s: 64 CPUs on one machine are needed, free are 2 of 2 CPUs",
    ):
        trainer.check()


def test_a_model_that_does_not_load_is_told_to_consumers(stream):
    trainer = Trainer(stream(model="broken"), "a")
    with pytest.raises(
        StreamError,
        match=r"^the activation stream has no producers: "
        r".*could not be started in 3 attempts: OSError: no such weights",
    ):
        trainer.check()


def test_the_queue_itself_dies_and_consumers_go_on(stream):
    queue = stream()
    trainer = Trainer(queue, "a", pause=0.05)
    while len(trainer.batches) < 8:
        time.sleep(0.02)
    ray.kill(queue, no_restart=False)
    trainer.check()


def test_patience_begins_when_a_call_fails_however_long_that_one_has_waited():
    called = []

    def call(failures: int) -> int:
        called.append(time.monotonic())
        if len(called) == 1:
            time.sleep(1.5)
        if len(called) <= failures:
            raise NotJoinedError("restarted")
        return len(called)

    assert patiently(lambda: call(1), 0.7) == 2
    called.clear()
    with pytest.raises(NotJoinedError):
        patiently(lambda: call(100), 0.7)
    assert len(called) < 5


def test_nobody_waits_for_a_consumer_that_has_closed_its_reader(stream):
    queue = stream(shards_of_room=1)
    quitter = StreamClient(queue, "quitter", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB)
    reader = quitter.open(0, 16)
    reader.next()
    trainer = Trainer(queue, "a")
    while stats(queue)["consumers"].get("a", {}).get("position") != 1:
        time.sleep(0.02)
    assert trainer.is_alive()
    reader.close()
    trainer.check()


def test_a_consumer_restarts_from_its_row(stream):
    queue = stream()
    Trainer(queue, "a", end=2 * ROWS, batch=64).check()
    Trainer(queue, "a", row=640, batch=64).check()


def process(actor, name: str = "a") -> Life:
    """The first life of a new process that reads as consumer `name`."""
    return Life(name, ray.get(actor.new_process.remote()), 1)


def test_a_queue_whose_clock_is_behind_gives_later_processes_greater_numbers(stream):
    """A queue that was restarted on another machine hears of earlier processes only from those that join again."""
    actor = stream()
    before = Life("a", ray.get(actor.new_process.remote()) + 10**18, 1)
    ray.get(actor.join.remote(before, "resid_post.0", 0))
    assert process(actor) > before


def say_late(actor, life: Life) -> None:
    """Says what a killed process may have on its way: an acknowledgement, its leaving, its joining."""
    for call in (
        actor.acknowledge.remote(life, 5),
        actor.leave.remote(life),
        actor.join.remote(life, "resid_post.0", 6 * ROWS),
    ):
        with suppress(SupersededError):
            ray.get(call)


def test_what_an_earlier_life_says_late_changes_nothing(stream):
    queue = stream()
    earlier = process(queue)
    ray.get(queue.join.remote(earlier, "resid_post.0", 0))
    client = StreamClient(queue, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    reader = client.open(ROWS, ROWS // 2)
    say_late(queue, earlier)
    consumers = stats(queue)["consumers"]
    for half in range(4):
        expected = rows_of("train", "resid_post.0", 1 + half // 2)[half % 2 * ROWS // 2 :][: ROWS // 2]
        assert np.array_equal(reader.next().numpy(), expected)
        say_late(queue, earlier)
    reader.close()
    assert {name: found["position"] for name, found in consumers.items()} == {"a": 1}


def test_a_process_whose_consumer_was_started_again_ends(stream):
    """Its fetch may wait in the queue meanwhile. It may also join again, because it does not know."""
    queue = stream(shards_of_room=1)
    earlier = StreamClient(queue, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    earlier.open(0, ROWS)
    waiting = queue.fetch.remote(earlier._reading.life, 1, 0, 0)
    present = StreamClient(queue, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    reader = present.open(3 * ROWS, ROWS)
    for ends in (lambda: ray.get(waiting, timeout=TIMEOUT), lambda: earlier.block(1, 0), lambda: earlier.open(0, ROWS)):
        with pytest.raises(SupersededError, match="consumer a has left the stream or was started again"):
            ends()
    assert np.array_equal(reader.next().numpy(), rows_of("train", "resid_post.0", 3))
    reader.close()


def test_processes_that_begin_after_the_queue_has_died_are_later_ones(stream):
    queue = stream()
    before = process(queue)
    ray.kill(queue, no_restart=False)
    assert patiently(lambda: process(queue), TIMEOUT) > before


def test_the_held_out_stream_is_produced_once_and_kept(stream):
    queue = stream()
    clients = [StreamClient(queue, str(i), "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB) for i in range(2)]
    expected = cut(rows_of("evaluation", "mlp_out.1", 1), "float32", BLOCK_MIB)
    for _ in range(2):
        for client in clients:
            assert all(np.array_equal(client.evaluation_block(1, b), block) for b, block in enumerate(expected))
    total = stats(queue)
    assert total["evaluation_contexts_forwarded"] == CONTEXTS
    assert total["contexts_forwarded"] == 0


def test_held_out_shards_are_produced_when_there_is_nothing_else_to_do(stream):
    """The first comes once training has begun and the window is full.

    The second comes when the whole training stream has been produced.
    """
    queue = stream(shards_of_room=2, held_out=2)
    trainer = StreamClient(queue, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    while not stats(queue)["producers"]:
        time.sleep(0.02)
    time.sleep(0.5)
    assert stats(queue)["evaluation_contexts_forwarded"] == 0
    reader = trainer.open(0, ROWS)

    def forwarded(contexts: int) -> bool:
        give_up = time.monotonic() + TIMEOUT
        while stats(queue)["evaluation_contexts_forwarded"] < contexts and time.monotonic() < give_up:
            time.sleep(0.02)
        time.sleep(0.5)
        return stats(queue)["evaluation_contexts_forwarded"] == contexts

    assert forwarded(CONTEXTS)
    for _ in range(SPEC.shards - 2):
        reader.next()
    assert forwarded(2 * CONTEXTS)
    assert all(trainer.evaluation_block(shard, 0) is not None for shard in range(2))
    assert stats(queue)["evaluation_contexts_forwarded"] == 2 * CONTEXTS
    assert stats(queue)["peak_bytes_in_flight"] <= 2 * SHARD_MIB * 2**20
    reader.close()


def test_held_out_shards_that_are_skipped_are_not_produced_ahead(stream, tmp_path):
    record = tmp_path / "skipped.json"
    queue = stream(model="poison:1", bad_shards="skip", skipped=str(record))
    assert StreamClient(queue, "a", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB).evaluation_block(1, 0) is None
    again = stream(model="poison:1", bad_shards="skip", skipped=str(record), held_out=3)
    trainer = Passing(again, "b", end=ROWS)
    trainer.join(TIMEOUT)
    while stats(again)["evaluation_contexts_forwarded"] < 2 * CONTEXTS:
        time.sleep(0.02)
    time.sleep(0.5)
    assert stats(again)["evaluation_contexts_forwarded"] == 2 * CONTEXTS
    assert stats(again)["shards_failed"] == 0


def test_a_consumer_gives_up_on_a_queue_that_stays_unknown_to_it(monkeypatch):
    """Every call says that the consumer has not joined, as a relay does whose queue is dead for good."""
    calls = []

    def unknown(*arguments):
        calls.append(arguments)
        raise NotJoinedError("the stream's queue is being restarted")

    queue = SimpleNamespace(
        **{method: SimpleNamespace(remote=lambda *arguments: arguments) for method in ("fetch", "join", "leave")}
    )
    monkeypatch.setattr(ray, "get", unknown)
    client = StreamClient(queue, "a", "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB, FaultsConfig(queue_seconds=1))
    client._reading = _Reading(Life("a"), done=0, until=None)
    began = time.monotonic()
    with pytest.raises(NotJoinedError):
        client.block(0, 0)
    assert time.monotonic() - began < 30
    assert len(calls) > 2


def test_evaluate_reaches_a_producer(stream):
    queue = stream()
    saes = {name: f"/saes/{name}" for name in "xyz"}
    found = ray.get(queue.evaluate.remote("mlp_out.1", saes, np.ones(4), 100, 2), timeout=TIMEOUT)
    common = {"sum": 4.0, "tokens": 100, "hook": "mlp_out.1"}
    assert found == {
        name: common | {"folder": folder, "together": 1 if name == "z" else 2} for name, folder in saes.items()
    }


def test_the_pool_grows_when_consumers_wait(stream):
    queue = stream(model="slow", producers_max=2)
    trainer = Trainer(queue, "a")
    while not trainer.batches:
        time.sleep(0.02)
    # Pretend that consumers have waited for ten seconds
    ray.get(queue.__ray_call__.remote(lambda self: self.pool._pressure.extend([True] * 10)))
    trainer.check()
    assert ray.get(queue.__ray_call__.remote(lambda self: len(self.pool.producers))) == 2


def test_the_queue_is_light():
    """Its process imports no library of a language model. They would cost it a quarter of a GiB."""
    heavy = (
        "import sys, raysae.stream.queue; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_bound_below_one_shard_is_refused():
    config = StreamConfig(mib_in_flight=SHARD_MIB / 2)
    with pytest.raises(UserError, match=r"stream\.mib_in_flight is 0\.02"):
        shards_in_flight(config, SPEC, WIDTHS)
