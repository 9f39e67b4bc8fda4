"""The queue's producers: started, given jobs, replaced when they die or hang, more of them when consumers wait, fewer when they idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

log = logging.getLogger(__name__)

DEATHS, DEATHS_SECONDS = 12, 600.0  # more deaths within that time are no bad luck: the pool gives up
FAILED_STARTS = 3  # in a row: the model does not load
FAILED_JOBS = 2  # in a row: the process may be damaged (a broken CUDA context, say) and is replaced
PRESSURE_SECONDS = 10  # the pool grows when consumers waited for producers in more than half of that time
IDLE_SECONDS = 60.0  # a producer above the minimum that idles longer is let go


@dataclass(frozen=True)
class Job:
    """A call of a producer. Of its `returns` results only the first, which is small, is awaited.

    One of `done(first result, references to the others)` and `failed(error, whether the producer died or hung)` is called.
    """

    method: str
    args: tuple
    returns: int
    done: Callable[[Any, list[ray.ObjectRef]], None]
    failed: Callable[[Exception, bool], None]


class Producing:
    """One producer: its actor and the task that serves it with jobs."""

    def __init__(self, actor: ActorHandle):
        self.actor = actor
        self.pid: int | None = None  # set once its model is loaded
        self.idle_since: float | None = None  # set while it waits for a job
        self.task: asyncio.Task | None = None


class ProducerPool:
    """Keeps between `least` and `most` producers at work.

    Args:
        create: starts a producer's actor. Ray places it when there are resources.
        take: waits for the next job; must not lose a job when it is cancelled.
        hang_seconds: a job that takes longer means a hung producer.
        waited: told the seconds that producers were without a job.
        changed: called when the pool has given up.
    """

    def __init__(
        self,
        create: Callable[[], ActorHandle],
        take: Callable[[], Awaitable[Job]],
        least: int,
        most: int,
        hang_seconds: float,
        waited: Callable[[float], None],
        changed: Callable[[], None],
    ):
        self.create, self.take, self.waited, self.changed = create, take, waited, changed
        self.least, self.most, self.hang_seconds = least, most, hang_seconds
        self.producers: list[Producing] = []
        self.replaced = 0
        self.failure: str | None = None  # set: the pool has given up, and why
        self._deaths: deque[float] = deque()
        self._failed_starts = 0
        self._pressure: deque[bool] = deque(maxlen=PRESSURE_SECONDS)

    @property
    def pids(self) -> list[int]:
        """Process ids of the producers that are ready."""
        return [producer.pid for producer in self.producers if producer.pid is not None]

    def tend(self, pressed: bool) -> None:
        """Called every second from the event loop: `pressed` says that consumers wait for work that no producer has taken up."""
        if self.failure:
            return
        self._pressure.append(pressed)
        while len(self.producers) < self.least:
            self._add()
        now = time.monotonic()
        if sum(self._pressure) > PRESSURE_SECONDS / 2 and len(self.producers) < self.most and len(self.pids) == len(self.producers):
            log.info("consumers wait: a producer is added to %d", len(self.producers))
            self._add()
            self._pressure.clear()
        for producer in list(self.producers):
            if len(self.producers) > self.least and producer.idle_since is not None and now - producer.idle_since > IDLE_SECONDS:
                self._remove(producer)

    def close(self) -> None:
        """Let all producers go, for good."""
        self.failure = self.failure or "the stream is closed"
        for producer in list(self.producers):
            self._remove(producer)

    def _add(self) -> None:
        producer = Producing(self.create())
        self.producers.append(producer)
        producer.task = asyncio.get_running_loop().create_task(self._serve(producer))

    def _remove(self, producer: Producing) -> None:
        self.producers.remove(producer)
        producer.task.cancel()
        ray.kill(producer.actor)

    async def _serve(self, producer: Producing) -> None:
        try:
            producer.pid = await producer.actor.ping.remote()
        except Exception as error:
            self._failed_starts += 1
            self._bury(producer, error)
            return
        self._failed_starts = 0
        failures = 0
        while failures < FAILED_JOBS:
            producer.idle_since = began = time.monotonic()
            try:
                job = await self.take()
            finally:
                producer.idle_since = None
                self.waited(time.monotonic() - began)
            error, died = await self._do(job, producer)
            if died:
                self._bury(producer, error)
                return
            failures = failures + 1 if error else 0
        self._bury(producer, error)

    async def _do(self, job: Job, producer: Producing) -> tuple[Exception | None, bool]:
        """The job's error, if any, and whether the producer is gone."""
        try:
            refs = getattr(producer.actor, job.method).options(num_returns=job.returns).remote(*job.args)
            first, *others = refs if job.returns > 1 else [refs]
            async with asyncio.timeout(self.hang_seconds):
                result = await first
        except Exception as error:
            if isinstance(error, TimeoutError) and not isinstance(error, RayTaskError):
                error = TimeoutError(f"a producer was silent for {self.hang_seconds:g} s")
            died = not isinstance(error, RayTaskError)
            job.failed(error, died)
            return error, died
        job.done(result, others)
        return None, False

    def _bury(self, producer: Producing, error: Exception) -> None:
        """Kill what is left of a producer and let `tend` start another, unless it keeps happening."""
        if producer not in self.producers:
            return
        self.producers.remove(producer)
        ray.kill(producer.actor)
        log.warning("a producer is replaced: %s", one_line(error))
        self.replaced += 1
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - DEATHS_SECONDS:
            self._deaths.popleft()
        if self._failed_starts >= FAILED_STARTS:
            self.failure = f"the language model could not be started in {FAILED_STARTS} attempts: {one_line(error)}"
        elif len(self._deaths) > DEATHS:
            self.failure = f"{len(self._deaths)} producers died within {DEATHS_SECONDS:g} s, the last one: {one_line(error)}"
        else:
            self.tend(False)
        if self.failure:
            self.changed()


def one_line(error: BaseException) -> str:
    """An error in one line. Ray's messages may hold whole stack traces, whose last line is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1] if any(line.startswith('File "') for line in lines) else f"{type(error).__name__}: {lines[0]}"
