"""The queue's producers: the pool starts them and gives them jobs.

It replaces a producer that dies or hangs, or whose machine is about to go. It adds producers when consumers wait and
removes producers that idle.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from raysae.cluster.actor_log import one_line
from raysae.cluster.room import missing, placed
from raysae.config import FaultsConfig, UserError

log = logging.getLogger(__name__)

# The pool gives up when more than `faults.producer_deaths` per producer die within this time. That is not bad luck.
DEATHS_SECONDS = 600.0
# A producer is replaced after this many failures in a row. Its process may be damaged, e.g. by a broken CUDA context.
FAILED_JOBS = 2
PRESSURE_SECONDS = 10  # The pool grows when consumers waited for producers in more than half of this time
IDLE_SECONDS = 60.0  # The pool removes a producer above the minimum that idles longer


@dataclass(frozen=True)
class Job:
    """A call of a producer with `returns` results. Only the first, which is small, is awaited.

    The pool calls either `done(first result, references to the others)` or
    `failed(error, whether the producer died or hung)`. A producer that is silent for `seconds` has hung.
    """

    method: str
    args: tuple
    returns: int
    done: Callable[[Any, list[ray.ObjectRef]], None]
    failed: Callable[[Exception, bool], None]
    seconds: float


class Producing:
    """One producer: its actor and the asyncio task that gives it jobs."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor
        self.pid: int | None = None  # Set once its model is loaded
        self.node: str | None = None
        self.leaving = False  # Its machine is about to go. It works on until another producer can
        self.idle_since: float | None = None  # Set while it waits for a job
        self.task: asyncio.Task | None = None


class ProducerPool:
    """Keeps between `least` and `most` producers at work.

    Args:
        create: starts a producer's actor. Ray places it when there are resources.
        take: waits for the next job. It must not lose a job when it is cancelled.
        least, most: bounds on the number of producers.
        needs: what a producer reserves on a machine.
        faults: timeouts and limits.
        waited: receives the seconds that producers were without a job.
        changed: called when the pool has given up.
    """

    def __init__(
        self,
        create: Callable[[], ActorHandle],
        take: Callable[[], Awaitable[Job]],
        least: int,
        most: int,
        needs: Mapping[str, float],
        faults: FaultsConfig,
        waited: Callable[[float], None],
        changed: Callable[[], None],
    ):
        self.create, self.take, self.waited, self.changed = create, take, waited, changed
        self.least, self.most, self.needs, self.faults = least, most, needs, faults
        self.producers: list[Producing] = []
        self.replaced = 0
        self.failure: str | None = None  # Why the pool has given up, if it has
        self._deaths: deque[float] = deque()
        self._failed_starts = 0
        self._pressure: deque[bool] = deque(maxlen=PRESSURE_SECONDS)

    @property
    def pids(self) -> list[int]:
        """Process ids of the producers that are ready."""
        return [producer.pid for producer in self.producers if producer.pid is not None]

    def tend(self, pressed: bool) -> None:
        """Add and remove producers. The event loop calls this every second.

        Args:
            pressed: whether consumers wait for work that no producer has taken up.
        """
        if self.failure:
            return
        self._pressure.append(pressed)
        staying = [producer for producer in self.producers if not producer.leaving]
        for _ in range(self.least - len(staying)):
            self._add()
        now = time.monotonic()
        if (
            sum(self._pressure) > PRESSURE_SECONDS / 2
            and len(self.producers) < self.most
            and len(self.pids) == len(self.producers)
        ):
            log.info("consumers wait: a producer is added to %d", len(self.producers))
            self._add()
            self._pressure.clear()
        others = any(producer.pid is not None for producer in staying)
        for producer in list(self.producers):
            if producer.idle_since is None:
                continue
            if (producer.leaving and others) or (
                len(self.producers) > self.least and now - producer.idle_since > IDLE_SECONDS
            ):
                self._remove(producer)

    def leave(self, node: str) -> None:
        """Replace the producers of a machine that is about to go. They work on until another producer can."""
        for producer in self.producers:
            if producer.node == node and not producer.leaving:
                log.warning("a producer moves: its machine is being drained")
                producer.leaving = True

    def _add(self) -> None:
        producer = Producing(self.create())
        self.producers.append(producer)
        producer.task = asyncio.get_running_loop().create_task(self._serve(producer))
        producer.task.add_done_callback(self._served)

    def _remove(self, producer: Producing) -> None:
        self.producers.remove(producer)
        producer.task.cancel()
        ray.kill(producer.actor)

    async def _serve(self, producer: Producing) -> None:
        try:
            producer.pid, producer.node = await self._start(producer)
        except Exception as error:
            self._failed_starts += 1
            if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
                # A mistake of the user's comes again with every start
                self._failed_starts = self.faults.start_attempts
                error = error.cause
            self._bury(producer, error, died=False)
            return
        self._failed_starts = 0
        failures = 0
        while failures < FAILED_JOBS:
            producer.idle_since = began = time.monotonic()
            if producer.leaving:
                self.tend(False)
                if producer not in self.producers:  # `tend` removed it: a job that it took now would be lost
                    return
            try:
                job = await self.take()
            finally:
                producer.idle_since = None
                self.waited(time.monotonic() - began)
            error, died = await self._do(job, producer)
            if died:
                self._bury(producer, error, died=True)
                return
            failures = failures + 1 if error else 0
        self._bury(producer, error, died=False)

    def _served(self, task: asyncio.Task) -> None:
        """Stop the pool if serving a producer raised.

        That is our bug. Its job is lost, so stop rather than wait for it.
        """
        if not task.cancelled() and (ours := task.exception()):
            log.error("producers can no longer be served", exc_info=ours)
            self._give_up(one_line(ours))

    async def _start(self, producer: Producing) -> tuple[int, str]:
        """The producer's process id and machine, once its model is loaded.

        While other producers work, this waits for one that has no place on the cluster.
        """
        ready = asyncio.ensure_future(producer.actor.ping.remote())
        while not (await asyncio.wait([ready], timeout=self.faults.start_seconds))[0]:
            if placed(producer.actor):
                raise TimeoutError(f"the language model was not loaded after {self.faults.start_seconds:g} s")
            if not self.pids:
                self._give_up(
                    f"no machine has had room for a language model for {self.faults.start_seconds:g} s: "
                    f"{missing(self.needs)}"
                )
        return ready.result()

    async def _do(self, job: Job, producer: Producing) -> tuple[Exception | None, bool]:
        """Run a job. Returns its error, if any, and whether the producer is gone."""
        try:
            refs = getattr(producer.actor, job.method).options(num_returns=job.returns).remote(*job.args)
            first, *others = refs if job.returns > 1 else [refs]
            async with asyncio.timeout(job.seconds):
                result = await first
            job.done(result, others)
        except Exception as error:
            if isinstance(error, TimeoutError) and not isinstance(error, RayTaskError):
                error = TimeoutError(f"a producer was silent for {job.seconds:g} s")
            died = not isinstance(error, RayTaskError)
            job.failed(error, died)
            return error, died
        return None, False

    def _bury(self, producer: Producing, error: Exception, died: bool) -> None:
        """Kill what is left of a producer and let `tend` start another. Give up if this keeps happening."""
        if producer not in self.producers:
            return
        self.producers.remove(producer)
        ray.kill(producer.actor)  # This also ends a stopped process, because Ray kills one that does not end by itself
        log.warning("a producer is replaced: %s", one_line(error))
        self.replaced += 1
        now = time.monotonic()
        if died and not producer.leaving:
            self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - DEATHS_SECONDS:
            self._deaths.popleft()
        if self._failed_starts >= self.faults.start_attempts:
            self._give_up(
                str(error)
                if isinstance(error, UserError)
                else f"the language model could not be started in {self.faults.start_attempts} attempts: "
                f"{one_line(error)}"
            )
        elif len(self._deaths) > self.faults.producer_deaths * max(1, len(self.producers)):
            self._give_up(
                f"{len(self._deaths)} producers died within {DEATHS_SECONDS:g} s, the last one: {one_line(error)}"
            )
        else:
            self.tend(False)

    def _give_up(self, why: str) -> None:
        self.failure = why
        self.changed()
