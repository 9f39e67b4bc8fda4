"""An actor between the queue and a group of consumers.

It has the methods of the queue that a consumer calls, so a consumer sees no difference.

A queue of many consumers spends its time on their calls and on handing over references. A relay bundles both. Its
consumers say that they join, have consumed a shard, or leave. The relay sends this news to the queue in one call, as
soon as the call before it has returned. The queue answers such a call at once, so no news waits behind a shard that is
not there yet. The relay asks for a shard once per hook point, in the name of whichever consumer comes first.

Only the queue's knowledge counts, also of which life of a consumer is the present one. What a relay knows may be lost.
A restarted relay knows nobody, and consumers join again. When the queue's process has died, the relay says so to its
consumers, and they join again too.

A relay drops a shard before it tells the queue that the last of its consumers has consumed it. It also drops what the
queue gives up or loses. Each answer to its news says what the queue holds. While the relay holds anything, it asks at
least once a second. The process imports neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from raysae.cluster.actor_log import Heard
from raysae.stream.queue import TEND_SECONDS
from raysae.stream.state import Life, NotJoinedError, StreamError, SupersededError

log = logging.getLogger(__name__)

CONSUMERS = 16  # Most consumers that share a relay. If there are no more in all, they talk to the queue itself


def start_relays(queue: str, consumers: Sequence[str], of_each: int) -> tuple[list[ActorHandle], dict[str, str]]:
    """Start relays for at most `of_each` consumers each, or none if one would do.

    Neighbours in `consumers` share a relay, so those of one hook point should be neighbours.

    Returns:
        the relays, and for each consumer the name of the actor that it talks to. That is `queue` or its relay's name.
    """
    number = -(-len(consumers) // of_each)
    if number < 2:
        return [], dict.fromkeys(consumers, queue)
    names = [f"{queue}-relay-{i}" for i in range(number)]
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    relays = [ray.remote(Relay).options(name=name, **options).remote(queue) for name in names]
    return relays, {consumer: names[i * number // len(consumers)] for i, consumer in enumerate(consumers)}


@dataclass(eq=False)
class _Reader:
    """A life that has joined here.

    `over` is set when a later life has joined or this one has left, or when the queue does not know it.
    """

    life: Life
    hook_point: str
    done: int = 0  # Shards that it has reported as consumed
    over: asyncio.Future = field(default_factory=asyncio.Future)


class Relay:
    """See the module.

    `queue` is the queue's name. An actor that may be restarted should depend on nothing in the object store.
    """

    def __init__(self, queue: str):
        self._heard = Heard()
        self.queue = ray.get_actor(queue)
        self._readers: dict[str, _Reader] = {}
        # News for the queue: a method and its arguments. The future is for the error, or None, that the queue answers.
        self._news: list[tuple[tuple, asyncio.Future]] = []
        self._told = asyncio.Event()  # Set while there is news
        self._exchanging: asyncio.Task | None = None
        self._shards: dict[tuple[str, int], asyncio.Task] = {}  # The queue's answers or calls, by hook point and shard
        # The same for held-out blocks. The queue keeps these to the end.
        self._evaluation: dict[tuple[str, int, int], asyncio.Task] = {}
        # Counts that the queue has not been told yet. It counts by itself for the consumers in whose name we ask.
        self._counts = {"blocks_served": 0, "consumer_wait_seconds": 0.0}

    # ---------------------------------------------------------------- consumers: see the methods of `queue.StreamQueue`

    async def new_process(self) -> int:
        return await _answer(self.queue.new_process.remote())

    async def join(self, life: Life, hook_point: str, row: int, until_shard: int | None = None) -> None:
        if error := await self._tell("join", life, hook_point, row, until_shard):
            raise error

    async def leave(self, life: Life) -> None:
        self._tell("leave", life)

    async def acknowledge(self, life: Life, done_shards: int) -> None:
        reader = self._readers.get(life.consumer)
        if reader and reader.life == life and done_shards > reader.done:
            self._tell("acknowledge", life, done_shards)
            reader.done = done_shards
            self._let_go(reader.hook_point)

    async def fetch(
        self, life: Life, shard: int, block: int, done_shards: int
    ) -> tuple[list[ray.ObjectRef], Mapping[str, object]]:
        await self.acknowledge(life, done_shards)
        while True:
            reader = self._reader(life)
            key = reader.hook_point, shard
            mine = key not in self._shards
            if mine:
                self._shards[key] = _task(self._ask(life, *key))
            asked = self._shards[key]
            began = time.monotonic()
            if not asked.done():
                await asyncio.wait([asked, reader.over], return_when=asyncio.FIRST_COMPLETED)
            if not mine:
                self._counts["consumer_wait_seconds"] += time.monotonic() - began
            # An error belongs to the consumer who asked. The next consumer asks for itself.
            if asked.done() and (mine or not asked.exception()):
                blocks, numerics = asked.result()
                if not mine:
                    self._counts["blocks_served"] += len(blocks[block:])
                return blocks[block:], numerics

    async def evaluation_block(self, hook_point: str, shard: int, block: int) -> list[ray.ObjectRef | None]:
        key = hook_point, shard, block
        mine = key not in self._evaluation
        if mine:
            self._evaluation[key] = _task(self._ask_held_out(*key))
        asked = self._evaluation[key]
        await asyncio.wait([asked])
        found, _ = asked.result()
        self._counts["blocks_served"] += not mine
        return found

    async def lost(self, stream: str, shard: int, ref: str) -> None:
        for asked in (self._shards, self._evaluation):
            for key in _answered(asked):
                if any(held and held.hex() == ref for held in asked[key].result()[0]):
                    del asked[key]
        await _answer(self.queue.lost.remote(stream, shard, ref))

    async def warnings(self) -> list[str]:
        """The warnings since the last call. See `Heard.take`."""
        return self._heard.take()

    # ---------------------------------------------------------------- the queue

    async def _ask(self, life: Life, hook_point: str, shard: int) -> tuple[list[ray.ObjectRef], Mapping[str, object]]:
        """Fetch the whole shard. `_tell` reports separately what the life has consumed, in the order of its news."""
        try:
            return await _answer(self.queue.fetch.remote(life, shard, 0, 0))
        except Exception:
            del self._shards[hook_point, shard]
            raise

    async def _ask_held_out(self, *key: Any) -> tuple[list[ray.ObjectRef | None], Mapping[str, object]]:
        try:
            return await _answer(self.queue.evaluation_block.remote(*key)), {}
        except Exception:
            del self._evaluation[key]
            raise

    def _tell(self, *said: Any) -> asyncio.Future:
        """Add news for the queue. The future gives the error that the queue answers, or None."""
        if self._exchanging is None:
            self._exchanging = asyncio.get_running_loop().create_task(self._exchange())
        answer = asyncio.get_running_loop().create_future()
        self._news.append((said, answer))
        self._told.set()
        return answer

    async def _exchange(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TEND_SECONDS):
                    await self._told.wait()
            self._told.clear()
            try:
                if self._news or self._shards:
                    await self._exchange_once()
            except Exception:  # The relay must keep hearing its consumers, whatever went wrong
                log.exception("the relay could not pass its consumers' news to the queue")

    async def _exchange_once(self) -> None:
        news, self._news = self._news, []
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        before = _answered(self._shards)  # A shard that comes meanwhile may be newer than the answer
        try:
            errors, held = await _answer(self.queue.exchange.remote([said for said, _ in news], counts))
        except Exception as error:
            # Mostly the queue's process has ended. Whatever it is, the queue may know none of the consumers any more.
            errors, held = dict.fromkeys(range(len(news)), error), {}
            for reader in list(self._readers.values()):
                self._remove(reader.life)
            for key in _answered(self._evaluation):
                del self._evaluation[key]
        for i, ((method, life, *arguments), answer) in enumerate(news):
            error = errors.get(i)
            if method == "join" and not error:
                self._place(_Reader(life, arguments[0]))
            elif method == "leave" or isinstance(error, NotJoinedError | SupersededError):
                self._remove(life)
            if not answer.done():  # The caller who waited for it may be gone
                answer.set_result(error)
        for key, asked in before.items():
            refs, _ = asked.result()
            if self._shards.get(key) is asked and not (refs and refs[0].task_id().binary() == held.get(key[1])):
                del self._shards[key]

    def _let_go(self, hook_point: str) -> None:
        """Drop the shards that all consumers here have consumed.

        The queue may count their places as free once it is told.
        """
        done = min(reader.done for reader in self._readers.values() if reader.hook_point == hook_point)
        for key in _answered(self._shards):
            if key[0] == hook_point and key[1] < done:
                del self._shards[key]

    def _reader(self, life: Life) -> _Reader:
        """The life's entry.

        Raises:
            SupersededError: a later life of its consumer has joined here.
            NotJoinedError: the life has not joined here, or it has left. Only the queue knows which.
        """
        reader = self._readers.get(life.consumer)
        if reader and reader.life > life:
            raise SupersededError(f"consumer {life.consumer} was started again: its earlier reading is over")
        if reader is None or reader.life != life:
            raise NotJoinedError(f"consumer {life.consumer} has not joined the stream")
        return reader

    def _place(self, reader: _Reader) -> None:
        """Make `reader` its consumer's entry, unless that life or a later one has joined before."""
        known = self._readers.get(reader.life.consumer)
        if known is None or known.life < reader.life:
            if known:
                self._remove(known.life)
            self._readers[reader.life.consumer] = reader

    def _remove(self, life: Life) -> None:
        """Forget the life and its consumer's earlier ones."""
        known = self._readers.get(life.consumer)
        if known and known.life <= life:
            del self._readers[life.consumer]
            known.over.set_result(None)


def _task(work: Coroutine) -> asyncio.Task:
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(asyncio.Task.exception)  # Retrieve an exception, because whoever asked may be gone
    return task


def _answered(asked: Mapping[tuple, asyncio.Task]) -> dict[tuple, asyncio.Task]:
    """The requests that have their answer. A request that failed is not kept."""
    return {key: task for key, task in asked.items() if task.done()}


async def _answer(call: ray.ObjectRef) -> Any:
    """The queue's answer, with its errors as it raised them.

    A queue whose process has died knows nobody any more, which is a NotJoinedError.
    """
    try:
        return await call
    except RayActorError:
        raise NotJoinedError("the stream's queue is being restarted") from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, StreamError) else error) from None
