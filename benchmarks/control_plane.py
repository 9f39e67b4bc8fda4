"""What the stream's control plane costs per block and consumer, and where it breaks.

    python benchmarks/control_plane.py [--simulated 8,64,512] [--consumers 1,8,64,512] [--relayed 64] [--blocks 8]
                                       [--seconds 10] [--json FILE]

There are four measurements, without a language model and with next to no data. Eight shards are in flight. Each
measurement is taken with each number of `--blocks` a shard. An empty list of consumers leaves its measurements out.

1. The state machine alone. Producers and the `--simulated` consumers are in this process. It measures CPU time per
   block and consumer. At 10,000 blocks a minute, each read by all consumers, that gives a share of a core.
2. The real queue actor, on a local Ray. A producer makes small blocks, and the `--consumers` do not even read them.
   They are threads of a few processes, and take blocks as fast as they can. It measures blocks handed over per second,
   summed over consumers, and the CPU time of the queue's process per block. The queue's Python threads share one lock.
   When together they fill a core, the queue is saturated. That point is computed from the CPU time, because the
   consumers share the machine and slow the queue down before.
3. The same with `--relayed` consumers through relays, as in a sweep of that many banks. It measures the queue and the
   busiest relay.
4. The queue near that rate on a small machine. The consumers live in the processes of their relays. Each reads 10,000
   blocks a minute, give or take half of the time between two shards. What consumers say is bundled as it is at that
   rate. In measurement 3 the queue has little to do, so few of its calls are bundles.
"""

from __future__ import annotations

import argparse
import asyncio
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
from options import numbers, positive, writable

from raysae.config import ModelConfig, ResourcesConfig, StreamConfig
from raysae.stream.blocks import cut
from raysae.stream.client import StreamClient
from raysae.stream.producer import Production
from raysae.stream.queue import patiently, start_stream
from raysae.stream.relay import CONSUMERS, Relay, start_relays
from raysae.stream.spec import ActivationSpec
from raysae.stream.state import Life, StreamState
from raysae.stream.task import Streaming

GOAL = 10_000 / 60  # Blocks per second
CAP = 8  # Shards in flight
HOOK, ROWS, WIDTH = "resid_post.0", 32, 1024  # Hook point, rows and width of a block
BLOCK_MIB = ROWS * WIDTH * 4 / 2**20  # 128 KiB. Ray's object store takes nothing smaller than 100 KiB.
PROCESSES = 4  # Processes that hold the consumers


def spec_of(blocks: int) -> ActivationSpec:
    """A stream with this number of blocks a shard."""
    contexts = ROWS * blocks
    return ActivationSpec(
        model="m", text="t", contexts=contexts * 10**6, context_length=4, skip_positions=3, dtype="float32", seed=0,
        epochs=1, shard_contexts=contexts, batch_contexts=contexts,
    )  # fmt: skip


# ---------------------------------------------------------------- the state machine alone


def simulate(consumers: int, blocks: int, seconds: float) -> dict[str, float]:
    """Consumers read in random order, up to a window apart.

    As in the queue, each piece of news is followed by the question what to produce next.
    """
    state = StreamState(shards=10**9, cap=CAP)
    done = {Life(f"consumer {i}"): 0 for i in range(consumers)}
    for life in done:
        state.join(life, 0)
    rng = random.Random(0)
    orders = itertools.cycle([rng.choices(list(done), k=consumers) for _ in range(64)])
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        state.lease()
        for shard in list(state.leased):
            state.produced(shard)
        for life in next(orders):
            if state.ready(life, done[life]):
                done[life] += 1
                state.advance(life, done[life])
                state.lease()
    each = spent / (blocks * sum(done.values()))
    return {
        "consumers": consumers,
        "blocks": blocks,
        "microseconds": 1e6 * each,
        "share_of_core": each * GOAL * consumers,
    }


# ---------------------------------------------------------------- the queue


class SmallProducer:
    def __init__(self, production: Production):
        self.blocks = cut(np.zeros((production.specs["train"].rows_per_shard, WIDTH), np.float32), "float32", BLOCK_MIB)

    def ping(self) -> tuple[int, str]:
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def produce(self, stream: str, shard: int, tolerant: bool) -> list:
        return [
            {
                "index": shard,
                "contexts_forwarded": 0,
                "seconds": 0.0,
                "from_cache": False,
                "numerics": {},
                "nonfinite": [],
            },
            *self.blocks,
        ]


class Taker(StreamClient):
    """Takes references to blocks and does not read the blocks."""

    def _get(
        self,
        stream: str,
        shard: int,
        block: int,
        fetch: Callable[[], ray.ObjectRef],
        forget: Callable[[], None],
        wanted: Callable[[], bool],
    ) -> ray.ObjectRef:
        return patiently(fetch, self.faults.queue_seconds, wanted)


@ray.remote(num_cpus=0)
class Readers:
    """Consumers that take block after block, each in a thread."""

    def __init__(self, speaks_to: dict[str, str], blocks: int):
        self.read = dict.fromkeys(speaks_to, 0)  # Blocks read by each
        self.spec, self.blocks = spec_of(blocks), blocks
        for consumer, name in speaks_to.items():
            client = Taker(ray.get_actor(name), consumer, HOOK, self.spec, WIDTH, BLOCK_MIB)
            threading.Thread(target=self._read, args=(client,), daemon=True).start()

    def _read(self, client: Taker) -> None:
        reading = client._begin(0, None)
        for shard in range(self.spec.shards):
            for block in range(self.blocks):
                client.block(shard, block)
                self.read[client.consumer] += 1
            client._acknowledge(reading, shard + 1)

    def progress(self) -> dict[str, int]:
        return self.read


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of a Ray process, and that of its threads that may run Python alone.

    Such threads have the name of the process. Ray names the others.
    """
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    seconds = [sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") for stat in stats]
    return sum(seconds), sum(itertools.compress(seconds, ("(ray::" in stat for stat in stats)))


class Load:
    """What an actor's process does from now on: CPU time for each block that its consumers take."""

    def __init__(self, actor: ray.actor.ActorHandle, consumers: list[str], read: dict[str, int]):
        self.pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
        self.consumers, self.read, self.cpu = consumers, read, cpu_seconds(self.pid)
        self.began = time.perf_counter()

    def measured(self, read: dict[str, int]) -> dict[str, float]:
        blocks = sum(read[name] - self.read[name] for name in self.consumers)
        spent = time.perf_counter() - self.began
        whole, python = (after - before for after, before in zip(cpu_seconds(self.pid), self.cpu, strict=True))
        return {
            "blocks_per_second": blocks / spent,
            "microseconds": 1e6 * whole / blocks,
            "python_microseconds": 1e6 * python / blocks,
            "python_load": python / spent,
            "limit_per_second": blocks / python,
            "limit_consumers": blocks / python / GOAL,
        }


def start(consumers: int, blocks: int) -> tuple[ray.actor.ActorHandle, str, list[str]]:
    """Starts a queue. Returns it, its name, and the consumers that it expects."""
    name = f"queue-{time.time_ns()}"
    queue = start_stream(
        Streaming(
            model=ModelConfig(),
            stream=StreamConfig(mib_in_flight=CAP * blocks * BLOCK_MIB, block_mib=BLOCK_MIB, cache="off"),
            resources=ResourcesConfig(producer_cpus=0.01),
            training=spec_of(blocks),
            evaluation=spec_of(blocks),
            contexts={"train": None, "evaluation": None},
            widths={HOOK: WIDTH},
        ),
        producer_class=SmallProducer,
        name=name,
    )
    names = [f"consumer {i}" for i in range(consumers)]
    ray.get(queue.expect.remote(names))
    return queue, name, names


def read_by_each(readers: list[ray.actor.ActorHandle]) -> dict[str, int]:
    return {
        name: read for some in ray.get([reader.progress.remote() for reader in readers]) for name, read in some.items()
    }


def under_way(readers: list[ray.actor.ActorHandle], blocks: int) -> dict[str, int]:
    """Waits until all consumers have joined and read at their pace. Returns the blocks read by each."""
    while min((read := read_by_each(readers)).values()) < 2 * blocks:
        time.sleep(0.2)
    return read


def saturate(consumers: int, blocks: int, seconds: float, relayed: bool = False) -> list[dict[str, float]]:
    """The queue's load. With relays, the load of the busiest of them follows."""
    queue, name, names = start(consumers, blocks)
    relays, speaks_to = start_relays(name, names, CONSUMERS if relayed else consumers)
    readers = [
        Readers.remote({name: speaks_to[name] for name in names[i::PROCESSES]}, blocks)
        for i in range(min(PROCESSES, consumers))
    ]
    read = under_way(readers, blocks)
    served = zip(relays, sorted({*speaks_to.values()}, key=list(speaks_to.values()).index), strict=False)
    loads = [
        Load(relay, [consumer for consumer in names if speaks_to[consumer] == relay_name], read)
        for relay, relay_name in served
    ]
    of_queue = Load(queue, names, read)
    time.sleep(seconds)
    read = read_by_each(readers)
    rows = [
        of_queue.measured(read),
        *sorted((load.measured(read) for load in loads), key=lambda row: -row["python_load"])[:1],
    ]
    for actor in (*readers, *relays, queue):
        ray.kill(actor)
    return [{"consumers": consumers, "blocks": blocks, "relays": len(relays)} | row for row in rows]


class Crowd(Relay):
    """A relay whose consumers live in it, and so cost next to nothing."""

    async def run(self, names: list[str], blocks: int) -> None:
        self.read = dict.fromkeys(names, 0)  # Blocks read by each
        self.tasks = [asyncio.create_task(self.consume(name, blocks)) for name in names]

    async def consume(self, name: str, blocks: int) -> None:
        life = Life(name)
        await self.join(life, HOOK, 0)
        due = time.monotonic()
        for shard in itertools.count():
            await self.fetch(life, shard, 0, shard)
            due = max(due, time.monotonic() - 1) + random.uniform(0.5, 1.5) * blocks / GOAL
            await asyncio.sleep(max(0, due - time.monotonic()))
            self.read[name] += blocks
            await self.acknowledge(life, shard + 1)

    async def progress(self) -> dict[str, int]:
        return self.read


def crowd(consumers: int, blocks: int, seconds: float) -> dict[str, float]:
    """The queue's load with consumers that live in their relays."""
    queue, name, names = start(consumers, blocks)
    relays = [ray.remote(Crowd).options(num_cpus=0).remote(name) for _ in range(-(-consumers // CONSUMERS))]
    ray.get([relay.run.remote(names[i :: len(relays)], blocks) for i, relay in enumerate(relays)])
    read = under_way(relays, blocks)
    load = Load(queue, names, read)
    time.sleep(seconds)
    found = load.measured(read_by_each(relays))
    for actor in (*relays, queue):
        ray.kill(actor)
    return {"consumers": consumers, "blocks": blocks, "relays": len(relays)} | found


HEAD = (
    "blocks a shard   consumers   relays   blocks/s   "
    "µs of CPU a block   of it Python   share of a core   saturated: blocks/s   consumers"
)


def show(what: str, row: dict[str, float]) -> None:
    counts = f"{row['blocks']:13}   {row['consumers']:9}   {row['relays']:6}   {row['blocks_per_second']:8,.0f}"
    times = f"{row['microseconds']:17.0f}   {row['python_microseconds']:12.0f}   {row['python_load']:15.0%}"
    print(
        f"  {what:14}   {counts}   {times}   {row['limit_per_second']:19,.0f}   {row['limit_consumers']:9.1f}",
        flush=True,
    )


def numbers_or_none(words: str) -> list[int]:
    return numbers(words) if words else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated", type=numbers_or_none, default="8,64,512")
    parser.add_argument("--consumers", type=numbers_or_none, default="1,8,64,512")
    parser.add_argument("--relayed", type=numbers_or_none, default="64", help="Numbers of consumers through relays.")
    parser.add_argument("--blocks", type=numbers, default="8", help="Numbers of blocks in a shard.")
    parser.add_argument("--seconds", type=positive, default=10)
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args()
    simulated, consumers, relayed, blocks = options.simulated, options.consumers, options.relayed, options.blocks
    found = {"state": [], "queue": [], "relayed": [], "relay": [], "crowd": []}
    print("the state machine alone\n  blocks a shard   consumers   µs per block and consumer   share of a core")
    for each, number in itertools.product(blocks, simulated):
        found["state"].append(row := simulate(number, each, options.seconds / 2))
        print(f"  {each:14}   {number:9}   {row['microseconds']:25.2f}   {row['share_of_core']:15.1%}", flush=True)
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    print("the queue\n  measured        " + HEAD)
    for each, number in itertools.product(blocks, consumers):
        found["queue"] += saturate(number, each, options.seconds)
        show("queue", found["queue"][-1])
    for each, number in itertools.product(blocks, relayed):
        for of, row in zip(("relayed", "relay"), saturate(number, each, options.seconds, relayed=True), strict=True):
            found[of].append(row)
            show({"relayed": "through relays", "relay": "busiest relay"}[of], row)
        found["crowd"].append(crowd(number, each, options.seconds))
        show("at that rate", found["crowd"][-1])
    ray.shutdown()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
