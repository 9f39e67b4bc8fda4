"""Relays between the queue of `test_queue.py` and its consumers."""
# ruff: noqa: F811 (the fixtures of test_queue.py)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import ray
from ray.exceptions import GetTimeoutError

from raysae.config import FaultsConfig
from raysae.stream.blocks import cut
from raysae.stream.client import StreamClient
from raysae.stream.relay import Relay, start_relays
from raysae.stream.state import Life, NotJoinedError, StreamError, SupersededError
from tests.stream.fake_producer import BLOCK_MIB, CONTEXTS, ROWS, SHARD_MIB, SPEC, WIDTHS, rows_of
from tests.stream.test_queue import TIMEOUT, Passing, Trainer, local_ray, process, say_late, stats, stream  # noqa: F401


@pytest.fixture
def relays():
    """Starts relays of a queue and kills them after the test."""
    started = []

    def start(queue, number: int = 1) -> list:
        name = ray.get(queue.__ray_call__.remote(lambda self: ray.get_runtime_context().get_actor_name()))
        some = [ray.remote(Relay).options(num_cpus=0, max_restarts=-1).remote(name) for _ in range(number)]
        started.extend(some)
        return some

    yield start
    for relay in started:
        ray.kill(relay)


def test_every_consumer_gets_every_row_once_and_no_more_is_in_flight(stream, relays):
    queue = stream(shards_of_room=2)
    first, second = relays(queue, 2)
    names = [f"{i}" for i in range(7)]
    ray.get(queue.expect.remote(names))
    trainers = [
        Trainer(first, "0"), Trainer(first, "1", pause=0.05), Trainer(first, "2", batch=77),
        Trainer(first, "3", "mlp_out.1"), Trainer(second, "4", "mlp_out.1", batch=512), Trainer(second, "5"),
        Trainer(queue, "6"),
    ]  # fmt: skip
    most = 0
    while any(t.is_alive() for t in trainers):
        most = max(most, stats(queue)["bytes_in_flight"])
        time.sleep(0.02)
    for trainer in trainers:
        trainer.check()
    total = stats(queue)
    assert 0 < most <= total["peak_bytes_in_flight"] <= total["bound_bytes"] == 2 * SHARD_MIB * 2**20
    assert total["contexts_forwarded"] == SPEC.shards * CONTEXTS
    while stats(queue)["consumers"]:
        time.sleep(0.02)
    assert stats(queue)["bytes_in_flight"] == 0


def test_a_shard_is_asked_for_once_and_counted_for_everyone(stream, relays):
    queue = stream()
    (relay,) = relays(queue)

    def listen(self):
        ask, self.asked = self._ask, []
        self._ask = lambda *what: self.asked.append(what) or ask(*what)

    ray.get(relay.__ray_call__.remote(listen))
    names = ["a", "b", "c", "d"]
    ray.get(queue.expect.remote(names))
    for trainer in [Trainer(relay, name, batch=ROWS // 2, pause=0.02 * i) for i, name in enumerate(names)]:
        trainer.check()
    assert [shard for _, _, shard in ray.get(relay.__ray_call__.remote(lambda self: self.asked))] == list(
        range(SPEC.shards)
    )
    blocks = SPEC.shards * len(cut(rows_of("train", "resid_post.0", 0), "float32", BLOCK_MIB))
    # The relay tells the queue with its next news
    while (total := stats(queue))["consumers"] or total["blocks_served"] < len(names) * blocks:
        time.sleep(0.02)
    assert total["blocks_served"] == len(names) * blocks
    assert total["contexts_forwarded"] == SPEC.shards * CONTEXTS


def test_a_single_place_is_enough_for_consumers_of_two_relays(stream, relays):
    queue = stream(shards_of_room=1)
    first, second = relays(queue, 2)
    ray.get(queue.expect.remote(["a", "b", "c", "d"]))
    for trainer in [
        Trainer(first, "a"),
        Trainer(first, "b", "mlp_out.1", pause=0.02),
        Trainer(second, "c", batch=512),
        Trainer(queue, "d"),
    ]:
        trainer.check()
    assert stats(queue)["peak_bytes_in_flight"] == SHARD_MIB * 2**20
    assert stats(queue)["contexts_forwarded"] == SPEC.shards * CONTEXTS


def kill(actor) -> None:
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


def test_relays_and_the_queue_die_and_consumers_go_on(stream, relays):
    queue = stream()
    first, second = relays(queue, 2)
    trainers = [
        Trainer(first, "a", pause=0.1),
        Trainer(first, "b", "mlp_out.1", pause=0.12),
        Trainer(second, "c", pause=0.1),
    ]

    def until(batches: int) -> None:
        while any(len(trainer.batches) < batches and trainer.is_alive() for trainer in trainers):
            time.sleep(0.02)

    until(4)
    kill(first)
    until(9)
    kill(queue)
    until(14)
    kill(second)
    kill(queue)
    for trainer in trainers:
        trainer.check()


def test_a_restarted_queue_lets_go_of_what_relays_held(stream, relays):
    queue = stream()
    (relay,) = relays(queue)
    client = StreamClient(relay, "a", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    reader = client.open(0, 16)
    reader.next()
    assert held(relay) == [0]
    kill(queue)
    while held(relay):
        time.sleep(0.05)
    reader.close()


def held(relay) -> list[int]:
    """The shards whose blocks the relay has references to."""
    return sorted(ray.get(relay.__ray_call__.remote(lambda self: [shard for _, shard in self._shards])))


def test_a_shard_that_all_here_have_consumed_is_let_go_of_before_the_queue_is_told(stream, relays):
    (relay,) = relays(stream())
    clients = [StreamClient(relay, name, "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB) for name in "ab"]
    readers = [client.open(0, ROWS // 2) for client in clients]
    for reader in readers:
        reader.next()
    for client in clients:
        client.block(1, 0)
    # The relay tells the queue nothing any more
    ray.get(relay.__ray_call__.remote(lambda self: self._exchanging.cancel()))
    readers[0].next()
    assert held(relay) == [0, 1]
    readers[1].next()
    # Readers do not wait for acknowledgements
    while 0 in held(relay):
        time.sleep(0.02)
    assert held(relay) == [1]
    for reader in readers:
        reader.close()


def test_a_late_joiner_and_what_is_given_up_for_it(stream, relays):
    queue = stream(shards_of_room=2)
    first, second = relays(queue, 2)
    client = StreamClient(first, "early", "resid_post.0", SPEC, WIDTHS["resid_post.0"], BLOCK_MIB)
    reader = client.open(0, 16)
    reader.next()
    client.block(1, 0)
    assert held(first) == [0, 1]
    late = Trainer(second, "late", row=5 * ROWS)
    # The late consumer now has the place of shard 1
    while held(first) != [0]:
        time.sleep(0.05)
    late.check()
    reader.close()
    while held(first):
        time.sleep(0.05)
    follower = Trainer(first, "follower", pause=0.05)
    while len(follower.batches) < 10:
        time.sleep(0.02)
    latest = Trainer(first, "latest")
    for trainer in (follower, latest):
        trainer.check()
    assert stats(queue)["peak_bytes_in_flight"] <= stats(queue)["bound_bytes"]


def test_an_error_reaches_the_consumer_that_it_concerns(stream, relays):
    queue = stream(shards_of_room=1)  # Shard 1 is produced only once shard 0 is consumed
    (relay,) = relays(queue)
    ray.get(
        [
            relay.join.remote(Life("short"), "mlp_out.1", 0, 1),
            relay.join.remote(Life("gone"), "mlp_out.1", 0),
            relay.join.remote(Life("long"), "mlp_out.1", 0),
        ]
    )
    fetches = {name: relay.fetch.remote(Life(name), 1, 0, 0) for name in ("short", "gone", "long", "stranger")}
    relay.leave.remote(Life("gone"))
    with pytest.raises(StreamError, match="consumer short asks for shard 1, outside its shards 0 to 1"):
        ray.get(fetches["short"])
    with pytest.raises((NotJoinedError, SupersededError), match="gone"):  # The queue or the relay hears of it first
        ray.get(fetches["gone"], timeout=TIMEOUT)
    with pytest.raises(NotJoinedError, match="stranger"):
        ray.get(fetches["stranger"], timeout=TIMEOUT)
    with pytest.raises(StreamError, match="hook point none is not streamed"):
        ray.get(relay.join.remote(Life("lost"), "none", 0))
    ray.get([relay.acknowledge.remote(Life(name), 1) for name in ("short", "long")])
    blocks, _ = ray.get(fetches["long"], timeout=TIMEOUT)
    assert np.array_equal(np.concatenate(ray.get(blocks)).ravel(), rows_of("train", "mlp_out.1", 1).ravel())


def test_who_is_unknown_to_the_queue_alone_joins_again(stream, relays):
    queue = stream()
    (relay,) = relays(queue)
    trainers = [Trainer(relay, "a", pause=0.05), Trainer(relay, "b", pause=0.05)]
    while any(len(trainer.batches) < 5 for trainer in trainers):
        time.sleep(0.02)
    # The driver does so for a trainer that seems dead
    ray.get(queue.dismiss.remote("a"))
    for trainer in trainers:
        trainer.check()


def test_what_an_earlier_life_says_late_changes_nothing(stream, relays):
    """The earlier life spoke through the relay, or through one that was killed with its last call on the way."""
    queue = stream()
    (relay,) = relays(queue)
    earlier, present = process(queue), process(queue)
    ray.get(relay.join.remote(earlier, "resid_post.0", 0))
    ray.get(relay.join.remote(present, "resid_post.0", ROWS))

    def read(shard: int) -> np.ndarray:
        blocks, _ = ray.get(relay.fetch.remote(present, shard, 0, shard), timeout=TIMEOUT)
        return np.concatenate(ray.get(blocks))

    for shard in range(1, 4):
        say_late(relay, earlier)
        ray.get(relay.acknowledge.remote(earlier, 7))
        late = [("join", earlier, "resid_post.0", 0, None), ("join", present, "resid_post.0", ROWS, None)]
        errors, _ = ray.get(queue.exchange.remote([*late, ("acknowledge", earlier, 7), ("leave", earlier)], {}))
        assert [type(error) for error in errors.values()] == [SupersededError, SupersededError]
        assert np.array_equal(read(shard).ravel(), rows_of("train", "resid_post.0", shard).ravel())
    with pytest.raises(SupersededError):
        ray.get(relay.fetch.remote(earlier, 1, 0, 0), timeout=TIMEOUT)
    ray.get(relay.leave.remote(present))
    while stats(queue)["consumers"]:
        time.sleep(0.02)
    with pytest.raises(SupersededError):
        ray.get(relay.join.remote(present, "resid_post.0", 0))


def test_bad_shards_stop_those_that_come_to_them(stream, relays):
    (relay,) = relays(stream(model="nan:2"))
    sound, broken, other = (
        Trainer(relay, "sound"),
        Trainer(relay, "broken", "mlp_out.1"),
        Trainer(relay, "other", "mlp_out.1", end=2 * ROWS),
    )
    with pytest.raises(StreamError, match=r"shard 2 of the train stream .*mlp_out.1 are NaN or infinite in contexts 7"):
        broken.check()
    sound.check()
    other.check()
    (relay,) = relays(stream(model="poison:2"))
    victims = [Trainer(relay, name) for name in ("first", "second")]
    for victim, name in zip(victims, ("first", "second"), strict=True):
        with pytest.raises(StreamError, match=rf"shard 2 .*consumer {name} needs it: ValueError: bad shard"):
            victim.check()


def test_a_bad_shard_is_skipped_by_everyone_alike(stream, relays, tmp_path):
    queue = stream(model="poison:2", bad_shards="skip", skipped=str(tmp_path / "skipped.json"), shards_of_room=1)
    first, second = relays(queue, 2)
    ray.get(queue.expect.remote(["a", "b", "c"]))
    for consumer in [Passing(first, "a"), Passing(first, "b", batch=512), Passing(second, "c", "mlp_out.1")]:
        consumer.check()
    assert stats(queue)["contexts_forwarded"] == 7 * CONTEXTS


def test_a_block_that_does_not_come_is_produced_again(stream, relays, monkeypatch):
    queue = stream()
    (relay,) = relays(queue)
    real, late = ray.get, []

    def get(wanted, *, timeout=None):
        if timeout == FaultsConfig().block_seconds and len(late) < 1:
            late.append(wanted)
            raise GetTimeoutError("late")
        return real(wanted, timeout=timeout)

    monkeypatch.setattr(ray, "get", get)
    Trainer(relay, "a", end=2 * ROWS).check()
    assert stats(queue)["shards_produced"] == 2 + 1


def test_the_held_out_stream_comes_through_once_and_survives_the_queue(stream, relays):
    queue = stream()
    (relay,) = relays(queue)
    clients = [StreamClient(relay, str(i), "mlp_out.1", SPEC, WIDTHS["mlp_out.1"], BLOCK_MIB) for i in range(2)]
    expected = cut(rows_of("evaluation", "mlp_out.1", 1), "float32", BLOCK_MIB)

    def read() -> None:
        for client in clients:
            assert all(np.array_equal(client.evaluation_block(1, b), block) for b, block in enumerate(expected))

    read()
    assert stats(queue)["blocks_served"] == len(expected)
    assert stats(queue)["evaluation_contexts_forwarded"] == CONTEXTS
    kill(queue)
    read()


def test_consumers_are_dealt_out_to_relays(stream):
    name = ray.get(stream().__ray_call__.remote(lambda self: ray.get_runtime_context().get_actor_name()))
    names = [f"bank {i}" for i in range(5)]
    assert start_relays(name, names, of_each=5) == ([], dict.fromkeys(names, name))
    relays, speaks_to = start_relays(name, names, of_each=2)
    assert [speaks_to[bank][-1] for bank in names] == list("00112")
    trainers = [Trainer(ray.get_actor(speaks_to[bank]), bank) for bank in names]
    for trainer in trainers:
        trainer.check()
    for relay in relays:
        ray.kill(relay)


def test_a_relay_is_light():
    heavy = (
        "import sys, raysae.stream.relay; print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
