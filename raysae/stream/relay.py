"""Between the queue and a group of consumers: an actor with the methods of the queue that a consumer calls, which does not know the difference.

A queue of many consumers spends its time on their calls and on handing over references. A relay bundles both. What its consumers say (that they join,
have consumed a shard, leave) goes to the queue in one call, as soon as the call before it has returned; the queue answers such a call at once, so
nothing waits behind a shard that is not there yet. A shard is asked for once for each hook point, in the name of whichever consumer comes first.

The queue keeps the only truth. What a relay knows may be lost: restarted, it knows nobody, and consumers join again; when the queue's process has
died, the relay says so to its consumers, and they join again too. It lets go of a shard before it tells the queue that the last of its consumers has
consumed it. What the queue gives up or loses it lets go of too: each answer to its news says what the queue holds, and as long as it holds anything
it asks once a second at least. The process imports neither torch nor transformers.
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
from raysae.stream.state import NotJoinedError, StreamError

log = logging.getLogger(__name__)

CONSUMERS = 16  # of a relay at most; so few in all talk to the queue itself


def start_relays(queue: str, consumers: Sequence[str], of_each: int) -> tuple[list[ActorHandle], dict[str, str]]:
    """Start relays of `of_each` consumers at most, none where one would do; returns them, and for each consumer the name of the actor that it talks
    to, the queue's (`queue`) or its relay's. Neighbours share a relay: those of one hook point should be neighbours."""
    number = -(-len(consumers) // of_each)
    if number < 2:
        return [], dict.fromkeys(consumers, queue)
    names = [f"{queue}-relay-{i}" for i in range(number)]
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": "SPREAD"}
    relays = [ray.remote(Relay).options(name=name, **options).remote(queue) for name in names]
    return relays, {consumer: names[i * number // len(consumers)] for i, consumer in enumerate(consumers)}


@dataclass(eq=False)
class _Reader:
    """A consumer that has joined here. `over` is set when it has joined again, left, or is unknown to the queue."""

    hook_point: str
    done: int = 0  # shards that it has said to have consumed
    over: asyncio.Future = field(default_factory=asyncio.Future)


class Relay:
    """See the module. `queue` is the queue's name: an actor that may be restarted should depend on nothing in the object store."""

    def __init__(self, queue: str):
        self._heard = Heard()
        self.queue = ray.get_actor(queue)
        self._readers: dict[str, _Reader] = {}
        self._news: list[tuple[tuple, asyncio.Future]] = []  # for the queue: a method and its arguments; and for the error or None that it answers
        self._told = asyncio.Event()  # there are news
        self._exchanging: asyncio.Task | None = None
        self._shards: dict[tuple[str, int], asyncio.Task] = {}  # what the queue answered, or will, by hook point and shard
        self._evaluation: dict[tuple[str, int, int], asyncio.Task] = {}  # the same of held-out blocks, which the queue keeps to the end
        self._counts = {"blocks_served": 0, "consumer_wait_seconds": 0.0}  # of the consumers in whose name nothing was asked; not told yet

    # ---------------------------------------------------------------- consumers: see the methods of `queue.StreamQueue`

    async def join(self, consumer: str, hook_point: str, row: int, until_shard: int | None = None) -> None:
        if error := await self._tell("join", consumer, hook_point, row, until_shard):
            raise error

    async def leave(self, consumer: str) -> None:
        self._tell("leave", consumer)

    async def acknowledge(self, consumer: str, done_shards: int) -> None:
        reader = self._readers.get(consumer)
        if reader is None or done_shards > reader.done:
            self._tell("acknowledge", consumer, done_shards)
        if reader and done_shards > reader.done:
            reader.done = done_shards
            self._let_go(reader.hook_point)

    async def fetch(self, consumer: str, shard: int, block: int, done_shards: int) -> tuple[list[ray.ObjectRef], Mapping[str, object]]:
        await self.acknowledge(consumer, done_shards)
        while True:
            if (reader := self._readers.get(consumer)) is None:
                raise NotJoinedError(f"consumer {consumer} has not joined the stream")
            key = reader.hook_point, shard
            mine = key not in self._shards
            if mine:
                self._shards[key] = _task(self._ask(consumer, *key))
            asked = self._shards[key]
            began = time.monotonic()
            if not asked.done():
                await asyncio.wait([asked, reader.over], return_when=asyncio.FIRST_COMPLETED)
            if not mine:
                self._counts["consumer_wait_seconds"] += time.monotonic() - began
            if asked.done() and (mine or not asked.exception()):  # an error is that of the consumer who asked: the next one asks for itself
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
        """See `Heard.take`."""
        return self._heard.take()

    # ---------------------------------------------------------------- the queue

    async def _ask(self, consumer: str, hook_point: str, shard: int) -> tuple[list[ray.ObjectRef], Mapping[str, object]]:
        """The whole shard. What `consumer` has consumed is told apart, in the order of its other news."""
        try:
            return await _answer(self.queue.fetch.remote(consumer, shard, 0, 0))
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
        """Have the queue told; the future gives the error that it answers, or None."""
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
            except Exception:  # whatever it is, consumers must go on being heard
                log.exception("the queue could not be told")

    async def _exchange_once(self) -> None:
        news, self._news = self._news, []
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        before = _answered(self._shards)  # what comes meanwhile may be newer than the answer
        try:
            errors, held = await _answer(self.queue.exchange.remote([said for said, _ in news], counts))
        except Exception as error:  # whatever it is, mostly the end of its process: nobody can be sure to be known any more
            errors, held = dict.fromkeys(range(len(news)), error), {}
            for consumer in list(self._readers):
                self._place(consumer, None)
            for key in _answered(self._evaluation):
                del self._evaluation[key]
        for i, ((method, consumer, *arguments), answer) in enumerate(news):
            error = errors.get(i)
            if method == "join" and not error:
                self._place(consumer, _Reader(arguments[0]))
            elif method == "leave" or isinstance(error, NotJoinedError):
                self._place(consumer, None)
            if not answer.done():  # who waited for it may be gone
                answer.set_result(error)
        for key, asked in before.items():
            refs, _ = asked.result()
            if self._shards.get(key) is asked and not (refs and refs[0].task_id().binary() == held.get(key[1])):
                del self._shards[key]

    def _let_go(self, hook_point: str) -> None:
        """Of the shards that all consumers here have consumed: the queue may count their places as free once it is told so."""
        done = min(reader.done for reader in self._readers.values() if reader.hook_point == hook_point)
        for key in _answered(self._shards):
            if key[0] == hook_point and key[1] < done:
                del self._shards[key]

    def _place(self, consumer: str, reader: _Reader | None) -> None:
        """`consumer` is this reader from now on, or unknown."""
        if old := self._readers.pop(consumer, None):
            old.over.set_result(None)
        if reader:
            self._readers[consumer] = reader


def _task(work: Coroutine) -> asyncio.Task:
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(asyncio.Task.exception)  # takes note of it: whom it was for may be gone
    return task


def _answered(asked: Mapping[tuple, asyncio.Task]) -> dict[tuple, asyncio.Task]:
    """Those that have their answer; errors are not kept."""
    return {key: task for key, task in asked.items() if task.done()}


async def _answer(call: ray.ObjectRef) -> Any:
    """What the queue answers, its errors as it raised them. One whose process has died knows nobody any more."""
    try:
        return await call
    except RayActorError:
        raise NotJoinedError("the stream's queue is being restarted") from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, StreamError) else error) from None
