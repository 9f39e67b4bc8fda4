"""Ray's object store has less room than the blocks in flight take.

Blocks go to disk and come back, every bit of them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary

from raysae.config import ModelConfig, ResourcesConfig, StreamConfig
from raysae.stream.blocks import cut
from raysae.stream.client import StreamClient
from raysae.stream.producer import Production
from raysae.stream.queue import start_stream
from raysae.stream.spec import ActivationSpec
from raysae.stream.task import Streaming

pytestmark = pytest.mark.fault
MIB = 2**20
STORE = 80 * MIB  # Ray takes no less than 75 MiB
HOOK, WIDTH, CONTEXTS = "resid_post.0", 2048, 256
SPEC = ActivationSpec(
    model="m", text="t", contexts=CONTEXTS * 24, context_length=10, skip_positions=2, dtype="float32", seed=0, epochs=1,
    shard_contexts=CONTEXTS, batch_contexts=CONTEXTS,
)  # fmt: skip
BLOCK_MIB = 4.0
SHARD_MIB = SPEC.rows_per_shard * WIDTH * 4 / MIB  # 16
IN_FLIGHT = 12  # Shards that take more than twice the store


def rows_of(stream: str, shard: int) -> np.ndarray:
    return np.random.default_rng([len(stream), shard]).standard_normal((SPEC.rows_per_shard, WIDTH), np.float32)


class Producer:
    def __init__(self, production: Production):
        pass

    def ping(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool) -> list:
        meta = {
            "index": shard,
            "contexts_forwarded": CONTEXTS,
            "rows_left_out": 0,
            "seconds": 0.1,
            "from_cache": False,
            "nonfinite": [],
            "numerics": {},
        }
        return [meta, *cut(rows_of(stream, shard), "float32", BLOCK_MIB)]


@pytest.fixture
def small_store() -> Iterator[None]:
    ray.init(
        "local",
        include_dashboard=False,
        num_cpus=2,
        object_store_memory=STORE,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def spilled_mib() -> int:
    """MiB that Ray has written from the store to disk so far."""
    address = ray.get_runtime_context().gcs_address
    found = re.search(r"Spilled (\d+) MiB", memory_summary(address, stats_only=True))
    return int(found[1]) if found else 0


def test_blocks_beyond_the_stores_room_are_spilled_and_not_lost(small_store: None) -> None:
    queue = start_stream(
        Streaming(
            model=ModelConfig(),
            stream=StreamConfig(block_mib=BLOCK_MIB, mib_in_flight=IN_FLIGHT * SHARD_MIB),
            resources=ResourcesConfig(producer_cpus=0.5),
            training=SPEC,
            evaluation=SPEC,
            contexts={"train": None, "evaluation": None},
            widths={HOOK: WIDTH},
        ),
        producer_class=Producer,
    )
    clients = [StreamClient(queue, name, HOOK, SPEC, WIDTH, BLOCK_MIB) for name in ("one", "two")]
    readers = [client.open(0, SPEC.rows_per_shard) for client in clients]

    def stats() -> dict:
        return ray.get(queue.stats.remote())

    give_up = time.monotonic() + 120
    # All that may be in flight is produced before anybody reads
    while stats()["shards_produced"] < IN_FLIGHT and time.monotonic() < give_up:
        time.sleep(0.2)
    held = stats()
    assert held["bytes_in_flight"] == IN_FLIGHT * SHARD_MIB * MIB > 2 * STORE
    assert spilled_mib() * MIB >= held["bytes_in_flight"] - STORE, "what does not fit is on disk"
    for shard in range(SPEC.shards):
        expected = rows_of("train", shard)
        for reader in readers:
            assert np.array_equal(reader.next().numpy(), expected), f"shard {shard}"
    after = stats()
    assert after["shards_produced"] == SPEC.shards, "none was lost and produced again"
    assert after["peak_bytes_in_flight"] <= after["bound_bytes"]
    assert after["producers_replaced"] == 0
