"""What the driver does beside Ray Tune while trainers work: a thread that looks at every actor once a second.

- It shows the progress and tracks reports.
- It shows what actors warn of.
- It restarts an actor that is alive and silent.
- It moves trainers and producers off a machine that is being drained (a spot notice).
- It says what is missing where the sweep cannot go on.

The thread never waits long for an actor. A call that has no answer yet is looked at again a second later.
"""

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
from raysae.sweep.live_table import LiveTable
from raysae.sweep.notes import outliers_told
from raysae.tracking.runs import Study
from raysae.train.actor import end_trainers
from raysae.train.progress import ENDED

log = logging.getLogger(__name__)
LOOK_SECONDS = 1.0  # Time between two looks
ANSWER_SECONDS = 10.0  # The last look waits this long for answers
JOIN_SECONDS = 30.0  # The driver waits this long for the last look
# Numbers of a report that go to MLflow
TRACKED = (
    "fvu", "fvu_inliers", "l0", "loss", "dead_fraction", "cosine", "norm_ratio", "outlier_fraction",
    "largest_rows_share", "tokens", "tokens_per_second", "learning_rate",
)  # fmt: skip
# Of these, the numbers that depend on how many held-out rows were read: the fewer rows, the more latents look dead
BY_ROWS = ("dead_fraction",)
INTERIM = "interim/"  # Prefix of a BY_ROWS metric in MLflow while an SAE trains


class StuckError(RuntimeError):
    """The sweep cannot go on. The sentence says what is missing."""


@dataclass
class WatchedTrainer:
    """A trainer as the watch sees it: what it was last asked, and what it last said."""

    actor: ActorHandle
    asked: list[ray.ObjectRef] | None = None  # Calls without an answer: status, news, seconds of silence, warnings
    since: float = 0.0  # Time of these calls
    starts_since: float | None = None  # Set while the trainer starts or has no place
    stopping: ray.ObjectRef | None = None  # Set while it writes checkpoints, to be restarted on another machine
    stop_on: str | None = None  # The machine that it is to leave
    stop_by: float = 0.0  # Time at which it is restarted, whether they are written or not
    status: list[dict] = field(default_factory=list)


@dataclass
class WatchedRelay:
    """A relay as the watch sees it."""

    actor: ActorHandle
    asked: ray.ObjectRef | None = None  # Call without an answer: warnings
    since: float = 0.0  # Time of this call


class Watch:
    """Watches the `trainers` (by bank), the queue and its relays while it is entered.

    `saes` are the names of each bank's SAEs. Until its trainer tells of them, they wait and their tokens are unknown.
    `failure` says why the sweep cannot go on. It is None while the sweep can.
    """

    def __init__(
        self,
        settled: Plan,
        queue: ActorHandle,
        trainers: Mapping[str, ActorHandle],
        saes: Mapping[str, Sequence[str]],
        study: Study,
        relays: Sequence[ActorHandle] = (),
    ) -> None:
        resources, train = settled.config.resources, settled.config.train
        self.faults: FaultsConfig = settled.config.faults
        self.needs = {"num_cpus": resources.trainer_cpus, "num_gpus": resources.trainer_gpus}
        self.rows = train.steps * train.batch
        self.queue, self.study = queue, study
        self.trainers = {
            bank: WatchedTrainer(
                actor, status=[{"name": name, "state": "waiting", "tokens": None} for name in saes[bank]]
            )
            for bank, actor in trainers.items()
        }
        self.relays = [WatchedRelay(actor) for actor in relays]
        self.hook_point = {sae.name: sae.hook_point for sae in settled.saes}
        self.outlier_norm = settled.config.evaluation.outlier_norm
        self._spoilt: set[str] = set()  # Hook points with outliers, of which the console has told
        self.tracked = {name: 0 for names in saes.values() for name in names}
        self.failure: str | None = None
        self.abandoned = False  # The driver waits no more: the study is about to be closed, so nothing is written
        self._ended_since: float | None = None
        self._asking = threading.Lock()  # Held while calls go to trainers
        self._dismissed = False  # Nobody asks trainers any more
        self._draining: set[str] = set()
        self._stream: list[ray.ObjectRef] | None = None  # Calls of the queue without an answer: statistics, warnings
        self._stream_since = 0.0  # Time of these calls
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        try:
            self._thread.join(JOIN_SECONDS)
        finally:  # Also after an impatient second Ctrl-C
            self.abandoned = True

    @property
    def ended(self) -> bool:
        """Whether nothing is left to wait for.

        The sweep cannot go on, or all SAEs ended long ago and trials still wait for a place.
        """
        if self.failure is not None:
            return True
        return self._ended_since is not None and time.monotonic() - self._ended_since > self.faults.start_seconds

    def check(self) -> None:
        """Raise StuckError where the sweep cannot go on."""
        if self.failure:
            raise StuckError(self.failure)

    def await_training(self, seconds: float) -> None:
        """Wait until an SAE trains, has trained before its study was resumed, or has ended.

        Returns after `seconds` at the latest, and at once where the sweep cannot go on.
        """
        give_up = time.monotonic() + seconds
        while not self.failure and time.monotonic() < give_up:
            rows = [row for trainer in self.trainers.values() for row in trainer.status]
            if any(row["state"] != "waiting" or row["tokens"] for row in rows):
                return
            time.sleep(LOOK_SECONDS / 10)

    def dismiss_trainers(self) -> None:
        """End the trainers once the watch knows that their SAEs have ended.

        They take more memory than all other processes together, so the evaluation downstream goes on without them.
        """
        give_up = time.monotonic() + ANSWER_SECONDS
        while self._ended_since is None and time.monotonic() < give_up:
            time.sleep(LOOK_SECONDS / 10)
        self.end_trainers()

    def end_trainers(self) -> None:
        """End the trainers' processes, whatever they do. Nobody asks them anything afterwards.

        Ray Tune's processes hold handles of the actors, so no actor ends by itself.
        """
        with self._asking:
            if self._dismissed:
                return
            self._dismissed = True
        try:
            alive = [trainer for trainer in self.trainers.values() if machine_of(trainer.actor)]
            calls = [call for trainer in alive for call in trainer.asked or ()]
            end_trainers([trainer.actor for trainer in alive], calls)
        finally:
            for trainer in self.trainers.values():
                ray.kill(trainer.actor)  # Also one that waits for a place

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        with LiveTable(self.rows) as table:
            stream: dict | None = None
            while True:
                last = self._over.wait(LOOK_SECONDS)
                patience = ANSWER_SECONDS if last else 0
                try:
                    self._move()
                    for bank, trainer in self.trainers.items():
                        self.look(bank, trainer, patience)
                    stream = self._stream_stats(patience) or stream
                    self._look_at_relays()
                except Exception:  # Whatever it is (Ray's head restarts, say), the sweep must go on being watched
                    if not self.abandoned:
                        log.exception("the sweep could not be watched")
                saes = [row for trainer in self.trainers.values() for row in trainer.status]
                if all(row["state"] in ENDED for row in saes):
                    self._ended_since = self._ended_since or time.monotonic()
                if stream and not self.abandoned:
                    table(saes, stream, last=last)
                if last:
                    return

    def look(self, bank: str, trainer: WatchedTrainer, patience: float) -> None:
        """Take in what the trainer answers within `patience` seconds, or note that it does not."""
        now = time.monotonic()
        if not self._ask(trainer, now):
            return
        try:
            status, news, silent, warnings = ray.get(trainer.asked, timeout=patience)
        except GetTimeoutError:
            self._silent(bank, trainer, now)
            return
        except RayError as error:  # It died too often
            if self._dismissed:
                return
            failed = {"state": "failed", "message": str(error)}
            trainer.status = [row if row["state"] in ENDED else row | failed for row in trainer.status]
            trainer.asked = None
            self.queue.dismiss.remote(bank)  # Nobody else may wait for it. Told at every look: the queue may restart.
            return
        if self.abandoned:
            return
        trainer.asked = trainer.starts_since = None
        trainer.status = status
        if status and all(row["state"] in ENDED for row in status):
            self.queue.dismiss.remote(bank)  # The bank has said so, perhaps to a relay that died with the message
        for line in warnings:
            log.warning("trainer %s: %s", bank, line)
        for name, reports in news.items():
            for report in reports:
                track(self.study, name, report)
                self._note_outliers(self.hook_point[name], report)
            self.tracked[name] += len(reports)
        if silent > self.faults.hang_seconds and trainer.stopping is None:  # It answers and does not train
            self._restart(bank, trainer, silent)

    def _note_outliers(self, hook_point: str, report: dict) -> None:
        """Tell once per hook point where outliers spoil its FVU."""
        if hook_point not in self._spoilt and (told := outliers_told(hook_point, report, self.outlier_norm)):
            self._spoilt.add(hook_point)
            log.warning("%s", told)

    def _ask(self, trainer: WatchedTrainer, now: float) -> bool:
        """Ask the trainer, unless a call has no answer yet. False: trainers are not asked any more."""
        with self._asking:
            if self._dismissed:
                return False
            if trainer.asked is None:
                trainer.since = now
                actor = trainer.actor
                trainer.asked = [
                    actor.status.remote(),
                    actor.news.remote(self.tracked),
                    actor.silent_seconds.remote(),
                    actor.warnings.remote(),
                ]
            return True

    def _silent(self, bank: str, trainer: WatchedTrainer, now: float) -> None:
        """Find out why a trainer has not answered: it hangs, it still starts, or it has no place."""
        if trainer.stopping is not None or now - trainer.since < LOOK_SECONDS:
            return
        if machine_of(trainer.actor):
            trainer.starts_since = None
            if now - trainer.since > self.faults.hang_seconds:
                self._restart(bank, trainer, now - trainer.since)
                trainer.since = now
            return
        trainer.since = now  # Its silence counts from when it is there
        trainer.starts_since = trainer.starts_since or now
        limit = self.faults.start_seconds
        if now - trainer.starts_since > limit:
            if placed(trainer.actor):
                self.failure = f"the trainer {bank} has not started within {limit:g} s"
            else:
                self.failure = f"no machine has had room for the trainer {bank} for {limit:g} s: {missing(self.needs)}"

    @staticmethod
    def _restart(bank: str, trainer: WatchedTrainer, silent: float) -> None:
        log.warning("trainer %s has been silent for %.0f s: it is restarted from its checkpoints", bank, silent)
        ray.kill(trainer.actor, no_restart=False)

    # ---------------------------------------------------------------- machines that go

    def _move(self) -> None:
        """Move everything off the machines that are being drained while they are there.

        Ray places nothing new on them. A trainer stops, which writes checkpoints, and is then restarted elsewhere.
        """
        draining = state.state.get_draining_nodes()  # Machine → deadline in ms since 1970, 0 for none
        for node in draining.keys() - self._draining:
            log.warning("machine %s is being drained: trainers and producers leave it", node)
            self.queue.leave_node.remote(node)
        self._draining = set(draining)
        if self._dismissed:
            return
        for bank, trainer in self.trainers.items():
            if trainer.stopping is not None:
                self._restart_elsewhere(bank, trainer)
            elif draining and (node := machine_of(trainer.actor)) in draining:
                seconds = self.faults.stop_seconds
                if deadline := draining[node]:
                    seconds = min(seconds, deadline / 1000 - time.time())
                trainer.stopping, trainer.stop_by = trainer.actor.stop.remote(), time.monotonic() + seconds
                trainer.stop_on = node

    def _restart_elsewhere(self, bank: str, trainer: WatchedTrainer) -> None:
        """Restart the trainer once its checkpoints are written, or its time is up.

        Its process may have died meanwhile. Ray has then restarted it elsewhere, and it trains there.
        """
        stopped, _ = ray.wait([trainer.stopping], timeout=0)
        if stopped or time.monotonic() > trainer.stop_by:
            if machine_of(trainer.actor) == trainer.stop_on:
                without = "" if stopped else " before its checkpoints were written"
                log.warning("trainer %s leaves its machine%s", bank, without)
                ray.kill(trainer.actor, no_restart=False)
            trainer.stopping, trainer.since = None, time.monotonic()

    # ---------------------------------------------------------------- the stream

    def _stream_stats(self, patience: float) -> dict | None:
        """The queue's newest answer within `patience` seconds, or None."""
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
        except RayError:  # Ray is restarting its process
            self._stream = None
            return None
        self._stream = None
        for line in warnings:
            log.warning("stream: %s", line)
        return stream

    def _look_at_relays(self) -> None:
        """Show what relays warn of, and restart silent ones: trainers behind them would wait for ever."""
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
            except RayError:  # Ray is restarting its process
                pass
            relay.asked = None


def track(study: Study, name: str, report: dict) -> None:
    """Put the report's numbers into the outbox. The outbox drops those that it has already."""
    study.metrics(name, metrics_of(report), step=int(report["tokens"]), time=report["time"])


def metrics_of(report: dict) -> dict[str, float]:
    """The report's numbers by their names in MLflow.

    Only the last report reads all held-out rows. In the others, numbers that depend on how many rows were read have
    the prefix `interim/`. A curve would otherwise jump at its last point.
    """
    interim = INTERIM if not report["final"] else ""
    known = {key: report[key] for key in TRACKED if report.get(key) is not None}
    return {interim + key if key in BY_ROWS else key: value for key, value in known.items()}
