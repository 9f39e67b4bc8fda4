"""What the stream's control plane costs per block and consumer, and where it breaks.

    python benchmarks/control_plane.py [--simulated 8,64,512] [--consumers 1,8,64,512] [--blocks 8] [--seconds 10] [--json FILE]

Two measurements, without a language model and with next to no data; eight shards are in flight. Both are taken with each of the `--blocks` a shard.

1. The state machine alone, with producers and `--simulated` consumers in this process: CPU time per block and consumer, and the share of a core that
   10,000 blocks a minute take, each read by all consumers.
2. The real queue actor, on a local Ray with a producer of small blocks and `--consumers` that do not even read them (threads of a few processes), as
   fast as it goes: blocks handed over per second, summed over consumers, and the CPU time that the queue's process spends on each. Those of its
   threads that run Python share one lock: when together they fill a core, the queue is saturated. That point is computed from the CPU time, because
   the consumers of this benchmark share the machine with the queue and slow it down before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray

from raysae.config import ActivationSpec, ModelConfig, ResourcesConfig, StreamConfig
from raysae.stream.blocks import cut
from raysae.stream.client import StreamClient
from raysae.stream.producer import Production
from raysae.stream.queue import patiently, start_stream
from raysae.stream.state import StreamState

GOAL = 10_000 / 60  # blocks per second
CAP = 8  # shards in flight
HOOK, ROWS, WIDTH = "resid_post.0", 32, 1024  # rows of a block
BLOCK_MIB = ROWS * WIDTH * 4 / 2**20  # 128 KiB: what is smaller than 100 KiB does not go through Ray's object store
PROCESSES = 4  # that hold the consumers


def spec_of(blocks: int) -> ActivationSpec:
    """A stream with shards of so many blocks."""
    contexts = ROWS * blocks
    return ActivationSpec(
        model="m", text="t", contexts=contexts * 10**6, context_length=4, skip_positions=3, dtype="float32", seed=0, epochs=1,
        shard_contexts=contexts, batch_contexts=contexts,
    )  # fmt: skip


# ---------------------------------------------------------------- the state machine alone


def simulate(consumers: int, blocks: int, seconds: float) -> dict[str, float]:
    """Consumers read in random order, up to a window apart. As in the queue, whatever is news is followed by the question what to produce next."""
    state = StreamState(shards=10**9, cap=CAP)
    done = {f"consumer {i}": 0 for i in range(consumers)}
    for name in done:
        state.join(name, 0)
    rng = random.Random(0)
    orders = itertools.cycle([rng.choices(list(done), k=consumers) for _ in range(64)])
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        state.lease()
        for shard in list(state.leased):
            state.produced(shard)
        for name in next(orders):
            if state.ready(name, done[name]):
                done[name] += 1
                state.advance(name, done[name])
                state.lease()
    each = spent / (blocks * sum(done.values()))
    return {"consumers": consumers, "blocks": blocks, "microseconds": 1e6 * each, "share_of_core": each * GOAL * consumers}


# ---------------------------------------------------------------- the queue


class SmallProducer:
    def __init__(self, production: Production):
        self.blocks = cut(np.zeros((production.specs["train"].rows_per_shard, WIDTH), np.float32), "float32", BLOCK_MIB)

    def ping(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool) -> list:
        return [{"index": shard, "contexts_forwarded": 0, "seconds": 0.0, "from_cache": False, "numerics": {}, "nonfinite": []}, *self.blocks]


class Taker(StreamClient):
    """Takes references to blocks and does not read these."""

    def _get(
        self, stream: str, shard: int, block: int, fetch: Callable[[], ray.ObjectRef], forget: Callable[[], None], wanted: Callable[[], bool]
    ) -> ray.ObjectRef:
        return patiently(fetch, self.faults.queue_seconds, wanted)


@ray.remote(num_cpus=0)
class Readers:
    """Consumers that take block after block, each in a thread."""

    def __init__(self, queue: ray.actor.ActorHandle, names: list[str], blocks: int):
        self.read = [0] * len(names)  # blocks
        self.spec, self.blocks = spec_of(blocks), blocks
        for i, name in enumerate(names):
            threading.Thread(target=self._read, args=(i, Taker(queue, name, HOOK, self.spec, WIDTH, BLOCK_MIB)), daemon=True).start()

    def _read(self, i: int, client: Taker) -> None:
        client._joined = True
        client._join()
        for shard in range(self.spec.shards):
            for block in range(self.blocks):
                client.block(shard, block)
                self.read[i] += 1
            client._acknowledge(shard + 1)

    def progress(self) -> list[int]:
        return self.read


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a process of Ray's, and of it that of the threads that may run Python: their name is the process's, Ray names the others."""
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    seconds = [sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") for stat in stats]
    return sum(seconds), sum(itertools.compress(seconds, ("(ray::" in stat for stat in stats)))


def saturate(consumers: int, blocks: int, seconds: float) -> dict[str, float]:
    queue = start_stream(
        model=ModelConfig(),
        stream=StreamConfig(mib_in_flight=CAP * blocks * BLOCK_MIB, block_mib=BLOCK_MIB, cache="off"),
        resources=ResourcesConfig(producer_cpus=0.01),
        training=spec_of(blocks),
        evaluation=spec_of(blocks),
        contexts={"train": None, "evaluation": None},
        widths={HOOK: WIDTH},
        producer_class=SmallProducer,
    )
    pid = ray.get(queue.__ray_call__.remote(lambda self: os.getpid()))
    names = [f"consumer {i}" for i in range(consumers)]
    ray.get(queue.expect.remote(names))
    readers = [Readers.remote(queue, names[i::PROCESSES], blocks) for i in range(min(PROCESSES, consumers))]

    def read_by_each() -> list[int]:
        return list(itertools.chain.from_iterable(ray.get([reader.progress.remote() for reader in readers])))

    while min(read_by_each()) < 2 * blocks:  # all have joined, and read at their pace
        time.sleep(0.2)
    before, cpu_before, began = sum(read_by_each()), cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    read, cpu, spent = sum(read_by_each()) - before, cpu_seconds(pid), time.perf_counter() - began
    for actor in (*readers, queue):
        ray.kill(actor)
    whole, python = (after - before for after, before in zip(cpu, cpu_before, strict=True))
    return {
        "consumers": consumers,
        "blocks": blocks,
        "blocks_per_second": read / spent,
        "microseconds": 1e6 * whole / read,
        "python_microseconds": 1e6 * python / read,
        "python_load": python / spent,
        "limit_per_second": read / python,
        "limit_consumers": read / python / GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", default="8,64,512")
    parser.add_argument("--consumers", default="1,8,64,512")
    parser.add_argument("--blocks", default="8", help="of a shard")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    simulated, consumers, blocks = ([int(word) for word in words.split(",")] for words in (options.simulated, options.consumers, options.blocks))
    found = {"state": [], "queue": []}
    print("the state machine alone\n  blocks a shard   consumers   µs per block and consumer   share of a core")
    for each, number in itertools.product(blocks, simulated):
        found["state"].append(row := simulate(number, each, options.seconds / 2))
        print(f"  {each:14}   {number:9}   {row['microseconds']:25.2f}   {row['share_of_core']:15.1%}", flush=True)
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False, logging_level="error")
    print("the queue\n  blocks a shard   consumers   blocks/s   µs of CPU a block   of it Python   share of a core   saturated: blocks/s   consumers")
    for each, number in itertools.product(blocks, consumers):
        found["queue"].append(row := saturate(number, each, options.seconds))
        print(
            f"  {each:14}   {number:9}   {row['blocks_per_second']:8,.0f}   {row['microseconds']:17.0f}   {row['python_microseconds']:12.0f}   "
            f"{row['python_load']:15.0%}   {row['limit_per_second']:19,.0f}   {row['limit_consumers']:9.1f}",
            flush=True,
        )
    ray.shutdown()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
