"""What the driver does beside Ray Tune while trainers work, once a second, in a thread of its own: show the progress and track the reports; move
what sits on a machine that is being drained (a spot notice), trainers after a checkpoint; restart an actor that is alive and silent; show what
actors warn of; and say what is missing where a sweep cannot go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from raysae.cluster.room import machine_of, missing, placed
from raysae.config import FaultsConfig
from raysae.study.plan import Plan
from raysae.sweep.live_table import ENDED, LiveTable
from raysae.tracking.runs import Study

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # between two looks
ANSWER_SECONDS = 10.0  # the last look waits so long for its answers
TRACKED = ("fvu", "l0", "loss", "dead_fraction", "cosine", "norm_ratio", "tokens", "tokens_per_second", "learning_rate")


class StuckError(RuntimeError):
    """The sweep cannot go on; the sentence says what is missing."""


@dataclass
class WatchedTrainer:
    """A trainer as the watch sees it: what it was last asked and what it last said."""

    actor: ActorHandle
    asked: list[ray.ObjectRef] | None = None  # status, news, seconds of silence and warnings, not answered yet
    since: float = 0.0  # when it was asked
    starts_since: float | None = None  # set while it has no place or starts
    stopping: ray.ObjectRef | None = None  # it writes checkpoints, to be restarted on another machine
    stop_by: float = 0.0
    status: list[dict] = field(default_factory=list)


@dataclass
class WatchedRelay:
    """A relay as the watch sees it."""

    actor: ActorHandle
    asked: ray.ObjectRef | None = None  # warnings, not answered yet
    since: float = 0.0  # when it was asked


class Watch:
    """Watches the `trainers` (by bank), the queue and its relays while it is entered. `failure` says why the sweep cannot go on, None while it
    can."""

    def __init__(
        self, settled: Plan, queue: ActorHandle, trainers: Mapping[str, ActorHandle], study: Study, relays: Sequence[ActorHandle] = ()
    ) -> None:
        self.faults: FaultsConfig = settled.config.faults
        self.needs = {"num_cpus": settled.config.resources.trainer_cpus, "num_gpus": settled.config.resources.trainer_gpus}
        self.rows = settled.config.train.steps * settled.config.train.batch
        self.queue, self.study = queue, study
        self.trainers = {bank: WatchedTrainer(actor) for bank, actor in trainers.items()}
        self.relays = [WatchedRelay(actor) for actor in relays]
        self.tracked = dict.fromkeys((sae.name for sae in settled.saes), 0)
        self.failure: str | None = None
        self._ended_since: float | None = None
        self._dismissed = False
        self.abandoned = False
        self._draining: set[str] = set()
        self._stream: list[ray.ObjectRef] | None = None  # the queue's statistics and warnings, not answered yet
        self._stream_since = 0.0  # when it was asked for them
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        try:
            self._thread.join(30)
        finally:  # an impatient second Ctrl-C: who still waits for answers then writes nothing more, the study is about to be closed
            self.abandoned = True

    @property
    def ended(self) -> bool:
        """Whether nothing is left to wait for: the sweep cannot go on, or all SAEs have ended long ago and trials still wait for a place."""
        return self.failure is not None or (self._ended_since is not None and time.monotonic() - self._ended_since > self.faults.start_seconds)

    def check(self) -> None:
        """StuckError where the sweep cannot go on."""
        if self.failure:
            raise StuckError(self.failure)

    def await_training(self, seconds: float) -> None:
        """Return when an SAE is in training, or was before its study was resumed, or has ended; when the sweep cannot go on; and after so many
        seconds at the latest."""
        give_up = time.monotonic() + seconds
        while not self.failure and time.monotonic() < give_up:
            if any(row["state"] != "waiting" or row["tokens"] for trainer in self.trainers.values() for row in trainer.status):
                return
            time.sleep(LOOK_SECONDS / 10)

    def dismiss_trainers(self) -> None:
        """End the trainers' processes, now that nobody will ask them anything: they take more memory than all others together. Waits until the watch
        knows that their SAEs have ended."""
        give_up = time.monotonic() + ANSWER_SECONDS
        while self._ended_since is None and time.monotonic() < give_up:
            time.sleep(LOOK_SECONDS / 10)
        self._dismissed = True
        for trainer in self.trainers.values():
            ray.kill(trainer.actor)

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        with LiveTable(self.rows) as table:
            stream: dict | None = None
            while True:
                last = self._over.wait(LOOK_SECONDS)
                try:
                    self._move()
                    for bank, trainer in self.trainers.items():
                        self.look(bank, trainer, ANSWER_SECONDS if last else 0)
                    stream = self._stream_stats(ANSWER_SECONDS if last else 0) or stream
                    self._look_at_relays()
                except Exception:  # whatever it is (Ray's head restarts, say), the sweep must go on being watched
                    if not self.abandoned:
                        log.exception("the sweep could not be watched")
                saes = [row for trainer in self.trainers.values() for row in trainer.status]
                if len(saes) == len(self.tracked) and all(row["state"] in ENDED for row in saes):
                    self._ended_since = self._ended_since or time.monotonic()
                if saes and stream and not self.abandoned:
                    table(saes, stream, last=last)
                if last:
                    return

    def look(self, bank: str, trainer: WatchedTrainer, patience: float) -> None:
        """Take in what the trainer answers, or note that it does not."""
        now = time.monotonic()
        if trainer.asked is None:
            actor = trainer.actor
            trainer.since = now
            trainer.asked = [actor.status.remote(), actor.news.remote(self.tracked), actor.silent_seconds.remote(), actor.warnings.remote()]
        try:
            status, news, silent, warnings = ray.get(trainer.asked, timeout=patience)
        except GetTimeoutError:
            self._silent(bank, trainer, now)
            return
        except RayError as error:  # it died too often
            if self._dismissed:
                return
            trainer.status = [row if row["state"] in ENDED else row | {"state": "failed", "message": str(error)} for row in trainer.status]
            trainer.asked = None
            self.queue.leave.remote(bank)  # at every look, for the queue may restart: nobody else is to wait for it
            return
        if self.abandoned:
            return
        trainer.asked = trainer.starts_since = None
        trainer.status = status
        if status and all(row["state"] in ENDED for row in status):
            self.queue.leave.remote(bank)  # it has said so too, perhaps to a relay that died with it
        for line in warnings:
            log.warning("trainer %s: %s", bank, line)
        for name, reports in news.items():
            for report in reports:
                track(self.study, name, report)
            self.tracked[name] += len(reports)
        if silent > self.faults.hang_seconds and trainer.stopping is None:  # it answers, and does not train
            self._restart(bank, trainer, silent)

    def _silent(self, bank: str, trainer: WatchedTrainer, now: float) -> None:
        """A trainer has not answered yet: does it hang, does it still start, or has it no place?"""
        if trainer.stopping is not None or now - trainer.since < LOOK_SECONDS:
            return
        if machine_of(trainer.actor):
            trainer.starts_since = None
            if now - trainer.since > self.faults.hang_seconds:
                self._restart(bank, trainer, now - trainer.since)
                trainer.since = now
            return
        trainer.since = now  # its silence counts from when it is there
        trainer.starts_since = trainer.starts_since or now
        if now - trainer.starts_since > self.faults.start_seconds:
            if placed(trainer.actor):
                self.failure = f"the trainer {bank} has not started within {self.faults.start_seconds:g} s"
            else:
                self.failure = f"no machine has had room for the trainer {bank} for {self.faults.start_seconds:g} s: {missing(self.needs)}"

    @staticmethod
    def _restart(bank: str, trainer: WatchedTrainer, silent: float) -> None:
        log.warning("trainer %s has been silent for %.0f s: it is restarted from its checkpoints", bank, silent)
        ray.kill(trainer.actor, no_restart=False)

    # ---------------------------------------------------------------- machines that go

    def _move(self) -> None:
        """Have everything leave the machines that are being drained, as long as they are there. Ray places nothing new on them."""
        draining = state.state.get_draining_nodes()  # machine → deadline in ms since 1970, 0 for none
        for node in draining.keys() - self._draining:
            log.warning("machine %s is being drained: trainers and producers leave it", node)
            self.queue.leave_node.remote(node)
        self._draining = set(draining)
        for bank, trainer in self.trainers.items():
            if trainer.stopping is not None:
                self._restart_elsewhere(bank, trainer)
            elif draining and (node := machine_of(trainer.actor)) in draining:
                seconds = self.faults.stop_seconds
                if deadline := draining[node]:
                    seconds = min(seconds, deadline / 1000 - time.time())
                trainer.stopping, trainer.stop_by = trainer.actor.stop.remote(), time.monotonic() + seconds

    def _restart_elsewhere(self, bank: str, trainer: WatchedTrainer) -> None:
        """Once its checkpoints are written, or there is no more time for it."""
        stopped, _ = ray.wait([trainer.stopping], timeout=0)
        if stopped or time.monotonic() > trainer.stop_by:
            log.warning("trainer %s leaves its machine%s", bank, "" if stopped else " before its checkpoints were written")
            ray.kill(trainer.actor, no_restart=False)
            trainer.stopping, trainer.since = None, time.monotonic()

    def _stream_stats(self, patience: float) -> dict | None:
        """The queue's newest answer; None while there is none."""
        now = time.monotonic()
        if self._stream is None:
            self._stream, self._stream_since = [self.queue.stats.remote(), self.queue.warnings.remote()], now
        try:
            stream, warnings = ray.get(self._stream, timeout=patience)
        except GetTimeoutError:
            if now - self._stream_since > self.faults.hang_seconds:
                log.warning("the queue has been silent for %.0f s: it is restarted", now - self._stream_since)
                ray.kill(self.queue, no_restart=False)
                self._stream = None
            return None
        except RayError:  # its process is being restarted
            self._stream = None
            return None
        self._stream = None
        for line in warnings:
            log.warning("stream: %s", line)
        return stream

    def _look_at_relays(self) -> None:
        """Behind one that is alive and silent, trainers would wait for ever."""
        now = time.monotonic()
        for number, relay in enumerate(self.relays):
            if relay.asked is None:
                relay.asked, relay.since = relay.actor.warnings.remote(), now
            try:
                for line in ray.get(relay.asked, timeout=0):
                    log.warning("relay %d: %s", number, line)
            except GetTimeoutError:
                if now - relay.since <= self.faults.hang_seconds:
                    continue
                log.warning("relay %d has been silent for %.0f s: it is restarted", number, now - relay.since)
                ray.kill(relay.actor, no_restart=False)
            except RayError:  # its process is being restarted
                pass
            relay.asked = None


def track(study: Study, name: str, report: dict) -> None:
    """Into the outbox; what it has already is dropped there."""
    metrics = {key: report[key] for key in TRACKED if report.get(key) is not None}
    study.metrics(name, metrics, step=int(report["tokens"]), time=report["time"])
