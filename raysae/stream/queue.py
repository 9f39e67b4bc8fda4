"""The activation stream as a service: one async actor between producers and consumers.

It calls producers, owns what they return, and hands references to consumers. It awaits only the small meta of a shard.
Blocks stay in the object store. They outlive the producer that made them, because the caller of an actor's method owns
its results. `state.StreamState` decides what to produce, hold and hand out. The process imports neither torch nor
transformers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.metrics import Counter, Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysae.cluster.actor_log import Heard, one_line
from raysae.config import FaultsConfig, UserError
from raysae.processes import ENVIRONMENT
from raysae.stream.blocks import blocks_per_shard, bytes_per_shard, shards_in_flight
from raysae.stream.pool import Job, ProducerPool
from raysae.stream.producer import Producer, Production, nonfinite
from raysae.stream.skipped import Skipped
from raysae.stream.state import Attempts, Life, NotJoinedError, StreamError, StreamState
from raysae.stream.task import Streaming

log = logging.getLogger(__name__)

TRAIN, EVALUATION = "train", "evaluation"  # Names of the two streams
TEND_SECONDS = 1.0
# A producer may take PATIENCE times as long as for the longest shard so far, and at least LEAST_PATIENCE seconds.
PATIENCE, LEAST_PATIENCE = 10, 30.0
RETRY_PAUSE = 0.5  # Seconds between two calls of a queue that is being restarted
CONTEXTS_NAMED = 8  # Contexts of a bad shard that a message names
CALLS = 10_000  # Concurrent calls. Waiting fetches occupy slots, so leave room for the calls that end their wait

COUNTERS = {
    "contexts_forwarded": "Contexts the language model has read for training",
    "rows_left_out": "Positions of these that yield no row, and whose places other rows take",
    "evaluation_contexts_forwarded": "Contexts the language model has read for held-out activations",
    "shards_produced": "Shards of the training stream produced, by the language model or from the cache",
    "shards_from_cache": "Shards of the training stream that were read from the cache",
    "shards_failed": "Attempts to produce a shard that failed: an error, a producer that died or hung, NaN or infinite "
    "activations",
    "blocks_served": "Blocks handed to consumers",
    "consumer_wait_seconds": "Seconds that consumers waited for blocks, summed over consumers",
    "producer_wait_seconds": "Seconds that producers waited for work, summed over producers",
}
GAUGES = {
    "bytes_in_flight": "Bytes of activations held or in production for consumers",
    "producers": "Language models running",
    "consumers_waiting": "Consumers waiting for a block. A relay counts once for each shard that it waits for",
}


def start_stream(streaming: Streaming, name: str | None = None, producer_class: type = Producer) -> ActorHandle:
    """Start the queue, and with it the producers. Returns the queue's handle at once.

    The queue lives on the caller's machine and dies with the caller. The producers die with the queue. Ray restarts a
    queue that crashes, with nothing in it. `client.StreamClient` then joins again by itself.

    Args:
        streaming: what is streamed, from where. Its contexts go to the object store.
        name: the name by which `ray.get_actor` finds the queue.
        producer_class: for tests.

    Raises:
        UserError: `stream.mib_in_flight` has no room for a single shard.
    """
    stream, training, evaluation, widths = streaming.stream, streaming.training, streaming.evaluation, streaming.widths
    references = {split: ray.put(streaming.contexts[split]) for split in (TRAIN, EVALUATION)}
    production = Production(
        model=streaming.model,
        stream=stream,
        specs={TRAIN: training, EVALUATION: evaluation},
        contexts={split: ray.cloudpickle.dumps(reference) for split, reference in references.items()},
        widths=dict(widths),
        threads=streaming.threads,
    )
    # With soft=True, Ray would now and then place the queue elsewhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": CALLS, "scheduling_strategy": here}
    reserved = {"num_cpus": streaming.resources.producer_cpus, "num_gpus": streaming.resources.producer_gpus}
    queue = ray.remote(StreamQueue).options(name=name, **options).remote(
        production,
        cap=shards_in_flight(stream, training, widths),
        shards=training.shards if streaming.shards is None else min(streaming.shards, training.shards),
        held_out=streaming.held_out,
        blocks={hook: blocks_per_shard(training, width, stream.block_mib) for hook, width in widths.items()},
        evaluation_blocks={
            hook: blocks_per_shard(evaluation, width, stream.block_mib) for hook, width in widths.items()
        },
        actor_options=reserved | {"runtime_env": ENVIRONMENT},
        faults=streaming.faults,
        skipped=streaming.skipped,
        producer_class=producer_class,
    )  # fmt: skip
    queue.start.remote()
    return queue


def patiently(call: Callable[[], Any], seconds: float, wanted: Callable[[], bool] = lambda: True) -> Any:
    """The result of a call of the queue, or of a relay.

    While its process is being restarted, the call is tried again for `seconds`, as long as it is `wanted`. The queue's
    own errors come without Ray's stack traces.
    """
    give_up = None
    while True:
        began = time.monotonic()
        try:
            return call()
        except (NotJoinedError, RayActorError):
            # Before the call failed, it may have waited long for a shard. Then the time starts anew.
            if give_up is None or time.monotonic() - began > seconds:
                give_up = time.monotonic() + seconds
            time.sleep(RETRY_PAUSE)
            # A call without a running Ray would end the process.
            if time.monotonic() > give_up or not wanted() or not ray.is_initialized():
                raise
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, StreamError) else error) from None


@dataclass(eq=False)
class _Wait:
    """A fetch that waits for its shard."""

    life: Life
    shard: int
    over: asyncio.Event = field(default_factory=asyncio.Event)


class StreamQueue:
    """The queue's actor: see the module and `start_stream`.

    `blocks` and `evaluation_blocks` give the blocks per shard of each hook point, in the order in which producers
    return them.
    """

    def __init__(
        self,
        production: Production,
        *,
        cap: int,
        shards: int,
        held_out: int,
        blocks: Mapping[str, int],
        evaluation_blocks: Mapping[str, int],
        actor_options: Mapping[str, float],
        faults: FaultsConfig,
        skipped: str | None,
        producer_class: type,
    ):
        config = production.stream
        self._heard = Heard()
        self.production = production
        self.faults = faults
        self.skipped = Skipped(skipped)
        self.state = StreamState(shards, cap, config.lag, faults.shard_attempts, self.skipped.of(TRAIN))
        # Later reading processes have greater numbers, also when this process is restarted: the clock goes on. On a
        # machine whose clock is behind, the readers that join again tell their numbers.
        self._last_process = time.time_ns()
        self.held_out = held_out
        self.shard_bytes = bytes_per_shard(production.specs[TRAIN], production.widths.values())
        self._blocks = blocks
        self._offsets = {TRAIN: _offsets(blocks), EVALUATION: _offsets(evaluation_blocks)}
        self._returns = {TRAIN: 1 + sum(blocks.values()), EVALUATION: 1 + sum(evaluation_blocks.values())}
        self._hook_point: dict[str, str] = {}  # Hook point of each consumer
        # Meta and blocks of the training shards held
        self._shards: dict[int, tuple[Mapping[str, object], list[ray.ObjectRef]]] = {}
        self._evaluation: dict[int, asyncio.Future] = {}  # Blocks of the held-out shards, kept to the end
        # All jobs except training shards. They come first, because someone waits for each of them.
        self._errands: list[Job] = []
        self._waits: set[_Wait] = set()
        self._work = asyncio.Event()  # Set by whatever may give a producer something to do
        self._next = asyncio.Lock()  # One idle producer looks for the next job, the others stand in line
        self._answered = asyncio.Event()  # Set once when an errand is answered, then replaced by a new event
        self._tending: asyncio.Task | None = None
        self._totals = dict.fromkeys(COUNTERS, 0.0)
        # Totals that Ray's metrics have been told. Telling them costs more than the rest of serving a block.
        self._told = dict(self._totals)
        self._counters = {name: Counter(f"raysae_{name}", description=text) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(f"raysae_{name}", description=text) for name, text in GAUGES.items()}
        self._peak_bytes = 0
        self._longest = 0.0  # Seconds that the language model took for its slowest shard
        actor_class = ray.remote(producer_class).options(max_restarts=0, **actor_options)
        self.pool = ProducerPool(
            create=lambda: actor_class.remote(production),
            take=self._take,
            least=config.producers_min,
            most=config.producers_max,
            needs={key: actor_options[key] for key in ("num_cpus", "num_gpus")},
            faults=faults,
            waited=lambda seconds: self._count("producer_wait_seconds", seconds),
            changed=self._gave_up,
        )

    async def start(self) -> None:
        """Start the producers. Other calls do so too, so a restarted queue goes on."""
        if self._tending is None:
            self._tending = asyncio.get_running_loop().create_task(self._tend())

    # ---------------------------------------------------------------- consumers

    async def expect(self, consumers: Iterable[str]) -> None:
        """Keep the first shards for these consumers until they have joined, for at most `stream.hold_seconds`."""
        await self.start()
        self.state.expect(consumers, time.monotonic() + self.production.stream.hold_seconds)

    async def new_process(self) -> int:
        """A number for a process that is to read the stream, greater than all before. Its lives have it, see `Life`."""
        self._last_process += 1
        return self._last_process

    async def join(self, life: Life, hook_point: str, row: int, until_shard: int | None = None) -> None:
        """Register a reader of the training stream at `hook_point`, from global row `row` on.

        It reads to the end of shard `until_shard` − 1. Unset: to the end of the stream. A consumer that has restarted
        joins in a later life, and goes on from the new row.

        Raises:
            SupersededError: the life is over.
            StreamError: the hook point is not streamed, or the stream has no such shards.
        """
        await self.start()
        if hook_point not in self.production.widths:
            raise StreamError(f"hook point {hook_point} is not streamed: {', '.join(self.production.widths)} are")
        self._last_process = max(self._last_process, life.process)
        self.state.join(life, row // self.production.specs[TRAIN].rows_per_shard, until_shard)
        self._hook_point[life.consumer] = hook_point
        self._wake_consumer(life.consumer)

    async def leave(self, life: Life) -> None:
        """End the life. Nobody waits for it any more."""
        self.state.leave(life)
        self._wake_consumer(life.consumer)

    async def dismiss(self, consumer: str) -> None:
        """Wait for `consumer` no more. The driver says so of a trainer that has ended. One that lives joins again."""
        self.state.dismiss(consumer)
        self._wake_consumer(consumer)

    async def acknowledge(self, life: Life, done_shards: int) -> None:
        """The reader has completely consumed the shards below `done_shards`."""
        if self.state.advance(life, done_shards):
            self._settle()

    async def fetch(
        self, life: Life, shard: int, block: int, done_shards: int
    ) -> tuple[list[ray.ObjectRef], Mapping[str, object]]:
        """Wait for a shard of the training stream. Returns its blocks from `block` on, and their numerics.

        The blocks are those at the consumer's hook point. There are none if the shard is skipped. `done_shards` is as
        in `acknowledge`. One call does all this, because a queue of many consumers spends its time on calls.

        A consumer must drop the references once it has consumed the shard, or when it leaves. Then it pins no more than
        the queue holds for it anyway. The exception is a shard that is given up for a late joiner, or lost, while the
        consumer reads it.

        Raises:
            NotJoinedError: the life has not joined.
            SupersededError: the life is over.
            StreamError: the shard is none of the consumer's, it could not be produced, or no producers are left.
        """
        await self.acknowledge(life, done_shards)
        while not self.state.ready(life, shard):
            await self._arrival(life, shard)
        if shard in self.state.skipped:
            return [], {}
        meta, refs = self._shards[shard]
        hook_point = self._hook_point[life.consumer]
        self._check_finite(meta, TRAIN, shard, hook_point)
        first = self._offsets[TRAIN][hook_point]
        blocks = refs[first + block : first + self._blocks[hook_point]]
        self._count("blocks_served", len(blocks))
        return blocks, meta["numerics"]

    async def evaluation_block(self, hook_point: str, shard: int, block: int) -> list[ray.ObjectRef | None]:
        """A block of the held-out stream, in a list. The list is [None] if the shard is skipped.

        Each shard is produced once, at the latest when someone first asks for it, and kept.
        """
        await self.start()
        if shard in self.skipped.of(EVALUATION):
            return [None]
        meta, refs = await self._result(self._held_out(shard))
        if not refs:
            return [None]
        self._check_finite(meta, EVALUATION, shard, hook_point)
        self._count("blocks_served", 1)
        return [refs[self._offsets[EVALUATION][hook_point] + block]]

    async def exchange(
        self, news: Sequence[tuple], counts: Mapping[str, float]
    ) -> tuple[dict[int, StreamError], dict[int, bytes]]:
        """Take the news of a relay, which speaks for many consumers, and answer at once.

        Args:
            news: what consumers said since the relay's last call, in order. Each is a method (`join`, `acknowledge` or
                `leave`) and its arguments.
            counts: what the relay has counted, see COUNTERS.

        Returns:
            the errors by their place in `news`, and the Ray task ids by shard held. A task id is that of the task that
            produced the shard. The relay drops its references to any other shard.
        """
        await self.start()
        errors = {}
        for i, (method, *arguments) in enumerate(news):
            try:
                await getattr(self, method)(*arguments)
            except StreamError as error:
                errors[i] = error
        for name, value in counts.items():
            self._count(name, value)
        return errors, {shard: refs[0].task_id().binary() for shard, (_, refs) in self._shards.items()}

    async def leave_node(self, node: str) -> None:
        """Move the producers of a machine that is being drained."""
        await self.start()
        self.pool.leave(node)

    async def lost(self, stream: str, shard: int, ref: str) -> None:
        """Produce a shard again, because a consumer could not read one of its blocks: the block's machine is gone.

        `ref` is the hexadecimal id of the reference to that block.
        """
        if stream == TRAIN:
            _, refs = self._shards.get(shard, (None, []))
        else:
            future = self._evaluation.get(shard)
            refs = future.result()[1] if future and future.done() and not future.exception() else []
        if any(held.hex() == ref for held in refs):  # Otherwise another consumer has said so before
            log.warning("shard %d of the %s stream is lost: it is produced again", shard, stream)
            if stream == TRAIN:
                self.state.lose(shard)
            else:
                del self._evaluation[shard]
            self._settle()

    async def evaluate(
        self, hook_point: str, saes: Mapping[str, str], mean: np.ndarray, predicted_tokens: int, at_once: int
    ) -> dict[str, dict]:
        """Metrics in the language model of saved SAEs (name → folder), computed by all producers.

        See `Producer.evaluate`. A producer takes at most `at_once` SAEs on one clean pass. They are in its memory
        together, beside the model.
        """
        await self.start()
        at_once = min(at_once, -(-len(saes) // max(1, len(self.pool.producers))))
        names = list(saes)
        groups = [{name: saes[name] for name in names[i : i + at_once]} for i in range(0, len(names), at_once)]
        errands = [
            self._errand("evaluate", (EVALUATION, hook_point, group, mean, predicted_tokens), 1) for group in groups
        ]
        return {name: metrics for errand in errands for name, metrics in (await self._result(errand))[0].items()}

    async def stats(self) -> dict[str, object]:
        """Totals (see COUNTERS), bytes in flight, producers and consumers.

        Bytes in flight are given as they are now, at their peak so far, and as allowed. Each consumer has its position
        and its end in shards, and whether it waits.
        """
        whole = {name: value if name.endswith("seconds") else int(value) for name, value in self._totals.items()}
        waiting = {wait.life.consumer for wait in self._waits}
        consumers = {
            name: {"position": consumer.position, "until": consumer.until, "waiting": name in waiting}
            for name, consumer in self.state.consumers.items()
            if consumer.real
        }
        return whole | {
            "bytes_in_flight": self._bytes,
            "peak_bytes_in_flight": self._peak_bytes,
            "bound_bytes": self.state.cap * self.shard_bytes,
            "producers": len(self.pool.pids),
            "producer_pids": self.pool.pids,
            "producers_replaced": self.pool.replaced,
            "shards_skipped": self.skipped.shards,
            "consumers": consumers,
        }

    async def warnings(self) -> list[str]:
        """The warnings since the last call. See `Heard.take`."""
        return self._heard.take()

    # ---------------------------------------------------------------- producers

    async def _take(self) -> Job:
        """The next job for a producer.

        Nothing is awaited between the decision and the return, so a cancelled producer takes no job with it.
        """
        async with self._next:
            while True:
                if self._errands:
                    return self._errands.pop(0)
                if (shard := self.state.lease()) is not None:
                    self._settle()
                    self._peak_bytes = max(self._peak_bytes, self._bytes)
                    return Job(
                        "produce", (TRAIN, shard, self._tolerant(self.state.last_attempt(shard))), self._returns[TRAIN],
                        done=lambda meta, refs: self._produced(shard, meta, refs),
                        failed=lambda error, died: self._failed(shard, error, died),
                        seconds=self._patience(),
                    )  # fmt: skip
                if (shard := self._held_out_ahead()) is not None:
                    self._held_out(shard)
                    continue
                self._work.clear()
                await self._work.wait()

    def _held_out_ahead(self) -> int | None:
        """A held-out shard to produce before anyone asks for it, or None.

        The first one comes once training has begun, because SAEs in training are evaluated on it. The others take
        memory, so they come when no training shard is left to produce.
        """
        wanted = [shard for shard in range(self.held_out) if shard not in self.skipped.of(EVALUATION)]
        missing = next((shard for shard in wanted if shard not in self._evaluation), None)
        if missing is None or not self._totals["shards_produced"]:
            return None
        return missing if missing == wanted[0] or self.state.all_there() else None

    def _held_out(self, shard: int) -> asyncio.Future:
        """Meta and blocks of the held-out shard. Their production is queued now if it was not before."""
        future = self._evaluation.get(shard)
        if future is None or (future.done() and future.exception()):
            future = self._evaluation[shard] = self._errand("produce", (EVALUATION, shard), self._returns[EVALUATION])
            # Retrieve an exception, because nobody may have asked yet. Whoever asks next has the shard tried again.
            future.add_done_callback(asyncio.Future.exception)
        return future

    def _produced(self, shard: int, meta: Mapping[str, object], refs: list[ray.ObjectRef]) -> None:
        self._count("shards_produced", 1)
        self._count("shards_from_cache", int(meta["from_cache"]))
        self._count("contexts_forwarded", meta["contexts_forwarded"])
        self._count("rows_left_out", meta["rows_left_out"])
        self._note_seconds(meta)
        if meta["nonfinite"]:
            self._note_failure(TRAIN, shard, ValueError(nonfinite(meta)))
        if self.state.produced(shard):
            self._shards[shard] = meta, refs
            self._wake(lambda wait: wait.shard == shard)
        self._settle()

    def _failed(self, shard: int, error: Exception, died: bool) -> None:
        reason = self._note_failure(TRAIN, shard, error)
        if self.state.fail(shard, reason, died):
            if self._skip(TRAIN, shard, reason):
                self.state.skip(shard)
            self._wake(lambda wait: wait.shard == shard)
        self._settle()

    def _tolerant(self, last_attempt: bool) -> bool:
        """Whether activations that are not finite are taken as they are.

        They are at the last attempt, so that the other hook points go on. They are not if bad shards are skipped,
        because all SAEs skip these alike.
        """
        return last_attempt and self.production.stream.bad_shards == "stop"

    def _check_finite(self, meta: Mapping[str, object], stream: str, shard: int, hook_point: str) -> None:
        if hook_point in meta["nonfinite"]:
            reason = self._reason(stream, shard, ValueError(nonfinite(meta)))
            raise StreamError(f"shard {shard} of the {stream} stream cannot be used: {reason}")

    def _note_seconds(self, meta: Mapping[str, object]) -> None:
        if meta["contexts_forwarded"]:
            self._longest = max(self._longest, meta["seconds"])

    def _patience(self) -> float:
        """Seconds after which a producer of a shard counts as hung."""
        if not self._longest:
            return self.faults.hang_seconds
        return min(self.faults.hang_seconds, max(LEAST_PATIENCE, PATIENCE * self._longest))

    def _note_failure(self, stream: str, shard: int, error: Exception) -> str:
        """Count and log a failed attempt. Returns what went wrong, in words."""
        self._count("shards_failed", 1)
        if isinstance(error, TimeoutError):
            self._longest *= 2  # The producer may be slow and not hung: doubling soon gives it time enough
        reason = self._reason(stream, shard, error)
        log.warning("shard %d of the %s stream: %s", shard, stream, reason)
        return reason

    def _reason(self, stream: str, shard: int, error: Exception) -> str:
        contexts = self.production.specs[stream].contexts_of(shard)
        named = ", ".join(map(str, contexts[:CONTEXTS_NAMED]))
        return f"{one_line(error)}. Its contexts are {named} and {max(0, len(contexts) - CONTEXTS_NAMED)} more"

    def _skip(self, stream: str, shard: int, reason: str) -> bool:
        """Skip a bad shard from now on, if it may be skipped. Returns whether it is."""
        if self.production.stream.bad_shards == "stop":
            return False
        spec = self.production.specs[stream]
        shards = self.state.shards if stream == TRAIN else spec.shards
        try:
            return self.skipped.add(stream, shard, shards, reason, spec.contexts_of(shard).tolist())
        except (UserError, OSError) as error:
            # A shard that is not written down is not skipped: after a restart it might be trained on.
            log.error("shard %d of the %s stream cannot be skipped: %s", shard, stream, one_line(error))
            return False

    def _errand(self, method: str, args: tuple, returns: int) -> asyncio.Future:
        """Queue a call of a producer. The future gives (first result, references to the others).

        There are no references if a held-out shard is skipped. A job whose producer died is tried again, and so is a
        shard that failed, while it has attempts left (see `Attempts`).
        """
        future = asyncio.get_running_loop().create_future()
        attempts = Attempts(self.faults.shard_attempts)
        produce = method == "produce"

        def patience() -> float:
            return self._patience() if produce else self.faults.hang_seconds

        def arguments() -> tuple:
            return (*args, self._tolerant(attempts.last)) if produce else args

        def done(result: object, refs: list[ray.ObjectRef]) -> None:
            if produce:
                self._count("evaluation_contexts_forwarded", result["contexts_forwarded"])
                self._note_seconds(result)
            future.set_result((result, refs))
            self._notify()

        def failed(error: Exception, died: bool) -> None:
            reason = self._note_failure(*args, error) if produce else one_line(error)
            # A death in an evaluation counts whole: the memory that its SAEs take may be the cause.
            if (died or produce) and not attempts.fail(died and produce):
                self._send(replace(job, args=arguments(), seconds=patience()))
            elif produce and self._skip(*args, reason):
                future.set_result((None, []))
            elif produce:
                future.set_exception(
                    StreamError(
                        f"held-out shard {args[1]} could not be produced in "
                        f"{self.faults.shard_attempts} attempts: {reason}"
                    )
                )
            else:
                future.set_exception(error)
            self._notify()

        job = Job(method, arguments(), returns, done, failed, seconds=patience())
        self._send(job)
        return future

    def _send(self, errand: Job) -> None:
        self._errands.append(errand)
        self._work.set()

    async def _result(self, future: asyncio.Future) -> tuple:
        while not future.done():
            self._check_pool()
            await self._answered.wait()
        return future.result()

    # ---------------------------------------------------------------- bookkeeping

    async def _tend(self) -> None:
        while True:
            try:
                self._tend_once()
            except Exception:  # The stream must be tended further, whatever went wrong
                log.exception("the stream could not be tended")
            await asyncio.sleep(TEND_SECONDS)

    def _tend_once(self) -> None:
        if self.state.expire(time.monotonic()):
            self._settle()
        waiting = self._waits and len(self.state.leased) + len(self.state.held) < self.state.cap
        idle = any(producer.idle_since is not None for producer in self.pool.producers)
        self.pool.tend(pressed=bool(waiting or self._errands) and not idle)
        for name, total in self._totals.items():
            if total > self._told[name]:
                self._counters[name].inc(total - self._told[name])
        self._told = dict(self._totals)
        self._gauges["bytes_in_flight"].set(self._bytes)
        self._gauges["producers"].set(len(self.pool.pids))
        self._gauges["consumers_waiting"].set(len({wait.life.consumer for wait in self._waits}))

    @property
    def _bytes(self) -> int:
        return (len(self.state.held) + len(self.state.leased)) * self.shard_bytes

    def _settle(self) -> None:
        """Act on a change of state: drop the references to shards it no longer holds, and wake producers."""
        for shard in self._shards.keys() - self.state.held:
            del self._shards[shard]
        self._work.set()

    async def _arrival(self, life: Life, shard: int) -> None:
        """Wait until something has happened to the shard or the consumer.

        Nothing else ends the wait, because many fetches wait for each shard.
        """
        self._check_pool()
        wait, began = _Wait(life, shard), time.monotonic()
        self._waits.add(wait)
        try:
            await wait.over.wait()
        finally:
            self._waits.remove(wait)
            self._count("consumer_wait_seconds", time.monotonic() - began)

    def _wake(self, whom: Callable[[_Wait], bool]) -> None:
        for wait in filter(whom, self._waits):
            wait.over.set()

    def _wake_consumer(self, consumer: str) -> None:
        """Have the consumer's fetches look again, because it has joined or left."""
        self._wake(lambda wait: wait.life.consumer == consumer)
        self._settle()

    def _notify(self) -> None:
        self._answered.set()
        self._answered = asyncio.Event()

    def _gave_up(self) -> None:
        """Tell everyone who waits that the pool has given up."""
        self._wake(lambda wait: True)
        self._notify()

    def _check_pool(self) -> None:
        """
        Raises:
            StreamError: the pool has given up, so what a call waits for will not come.
        """
        if self.pool.failure:
            raise StreamError(f"the activation stream has no producers: {self.pool.failure}")

    def _count(self, name: str, value: float) -> None:
        self._totals[name] += value


def _offsets(blocks: Mapping[str, int]) -> dict[str, int]:
    """Index of each hook point's first block among a shard's blocks."""
    return dict(zip(blocks, itertools.accumulate(blocks.values(), initial=0), strict=False))
