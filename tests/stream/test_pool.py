"""The pool without Ray: its producers are coroutines of this process. No job may be lost."""

from __future__ import annotations

import asyncio

import pytest

from raysae.config import FaultsConfig
from raysae.stream import pool as pool_module
from raysae.stream.pool import Job, ProducerPool
from raysae.stream.state import Life, StreamState

SHARDS = 40

LIFE = Life("a")


class Method:
    """Stands for an actor's method."""

    def __init__(self, function):
        self.function = function

    def options(self, **_):
        return self

    def remote(self, *args):
        return asyncio.ensure_future(self.function(*args))


class Producer:
    started = 0

    def __init__(self):
        self.node = f"machine {Producer.started}"
        Producer.started += 1
        self.ping, self.produce = Method(self._ping), Method(self._produce)

    async def _ping(self):
        await asyncio.sleep(0.02)
        return 1, self.node

    async def _produce(self, shard):
        await asyncio.sleep(0.01)
        return shard


class Stream:
    """A state machine, one consumer, and a pool that serves them."""

    def __init__(self, **limits):
        Producer.started = 0
        self.state, self.changed, self.trouble = StreamState(SHARDS, cap=4), asyncio.Event(), set()
        self.state.join(LIFE, 0)
        self.pool = ProducerPool(
            Producer, self.take, 1, 2, {}, FaultsConfig(**limits), lambda seconds: None, self.notify
        )

    def notify(self):
        self.changed.set()
        self.changed = asyncio.Event()

    async def take(self):
        while (shard := self.state.lease()) is None:
            await self.changed.wait()
        return Job(
            "produce",
            (shard,),
            1,
            lambda *_: self.produced(shard),
            lambda error, died: self.failed(shard, error),
            seconds=5,
        )

    def produced(self, shard):
        if shard in self.trouble:
            self.trouble.remove(shard)
            raise KeyError("of the kind that nobody thought of")
        self.state.produced(shard)
        self.notify()

    def failed(self, shard, error):
        if "failure too" in self.trouble:
            raise OSError("no room to write it down")
        self.state.fail(shard, str(error))
        self.notify()

    async def consume(self):
        for shard in range(SHARDS):
            while not self.state.ready(LIFE, shard):
                if self.pool.failure:
                    raise RuntimeError(self.pool.failure)
                await self.changed.wait()
            self.state.advance(LIFE, shard + 1)
            self.notify()


@pytest.fixture(autouse=True)
def killed(monkeypatch):
    actors = []
    monkeypatch.setattr(pool_module.ray, "kill", actors.append)
    return actors


def run(stream_and_more):
    asyncio.run(asyncio.wait_for(stream_and_more(), 20))


def test_a_producer_whose_machine_goes_takes_no_shard_with_it(killed):
    """A replacement starts at once. At any moment there are shards to produce."""

    async def scenario():
        stream = Stream()
        stream.pool.tend(False)
        consumer = asyncio.ensure_future(stream.consume())
        while stream.state.consumers["a"].position < 5:
            await asyncio.sleep(0.001)
        stream.pool.leave("machine 0")
        while not consumer.done():
            stream.pool.tend(False)
            await asyncio.sleep(0.01)
        await consumer
        assert [producer.actor.node for producer in stream.pool.producers] == ["machine 1"]
        assert [actor.node for actor in killed] == ["machine 0"]

    run(scenario)


def test_trouble_with_a_result_is_a_failure_of_its_job():
    async def scenario():
        stream = Stream()
        stream.trouble = {3}
        stream.pool.tend(False)
        await stream.consume()

    run(scenario)


def test_where_not_even_the_failure_can_be_noted_the_pool_gives_up():
    async def scenario():
        stream = Stream()
        stream.trouble = {3, "failure too"}
        stream.pool.tend(False)
        with pytest.raises(RuntimeError, match="OSError: no room to write it down"):
            await stream.consume()

    run(scenario)
