"""Relays between the queue of `test_queue.py` and its consumers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectLostError

from raysae.stream import relay as module
from raysae.stream.client import StreamClient
from raysae.stream.relay import Relay, start_relays
from raysae.stream.state import StreamError
from tests.stream.fake_producer import BLOCK_MIB, CONTEXTS, ROWS, SHARD_MIB, SPEC, WIDTHS, rows_of
from tests.stream.test_queue import TIMEOUT, Passing, Trainer, local_ray, stats, stream  # noqa: F401 (fixtures)


@pytest.fixture
def relays():
    """Starts relays of a queue, and takes them down after the test."""
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
        Trainer(first, "0"), Trainer(first, "1", pause=0.05), Trainer(first, "2", batch=77), Trainer(first, "3", "mlp_out.1"),
        Trainer(second, "4", "mlp_out.1", batch=512), Trainer(second, "5"), Trainer(queue, "6"),
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
