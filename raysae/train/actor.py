"""The trainer: a thin Ray actor around `loop.Loop`.

The loop runs in a thread of its own. The actor's methods ask it questions or leave it requests.

Importing this module does not import torch. Ray imports it in every process that is handed a trainer, such as a
sweep's trials.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import ray
from ray.actor import ActorHandle

from raysae.cluster.actor_log import Heard
from raysae.config import error_kind
from raysae.processes import ENVIRONMENT
from raysae.train.progress import ENDED
from raysae.train.task import Training

log = logging.getLogger(__name__)

END_SECONDS = 5.0  # Longest wait for a trainer's last answers, before it is killed
ARRIVE_SECONDS = 0.5  # Then its answers to others have this long to arrive
POLL_SECONDS = 30.0  # `reports` answers after this long even when nothing is new
SPARE_CALLS = 16  # Extra threads for methods. Two more per SAE may wait for its reports.


def start_trainer(training: Training) -> ActorHandle:
    """Start a trainer and return its handle at once.

    The trainer continues from what the study's folder holds. Ended SAEs are only shown, and the others train on.
    """
    config = training.config
    return ray.remote(Trainer).options(
        num_cpus=config.resources.trainer_cpus,
        num_gpus=config.resources.trainer_gpus,
        runtime_env=ENVIRONMENT,
        max_restarts=config.faults.trainer_restarts,
        max_task_retries=-1,  # Every method may be repeated
        max_concurrency=2 * len(training.saes) + SPARE_CALLS,
    ).remote(training)  # fmt: skip


def end_trainers(trainers: Sequence[ActorHandle], calls: Sequence[ray.ObjectRef] = ()) -> None:
    """Kill the trainers once no call on them is waiting. Ray prints a line for every call that a kill cuts off.

    Args:
        trainers: those that are alive. They are asked to answer everybody who waits for a report.
        calls: other calls that have no answer yet.

    A trainer that has not answered after END_SECONDS is killed all the same.
    """
    try:
        waiting = [*calls, *(trainer.dismiss.remote() for trainer in trainers)]
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=END_SECONDS)
            time.sleep(ARRIVE_SECONDS)
    finally:
        for trainer in trainers:
            ray.kill(trainer)


class Trainer:
    """Trains a bank of SAEs on the device Ray gave this process.

    After a crash Ray restarts the process, and it continues from its checkpoints.

    Some errors belong to no single SAE, such as an ended stream or another run's checkpoint. Such an error stops the
    loop. Every unfinished SAE has then failed, and `reports` raises the error for it.
    """

    def __init__(self, task: Training):
        import torch

        from raysae.determinism import be_deterministic
        from raysae.stream.client import StreamClient
        from raysae.train.errors import ErrorOf
        from raysae.train.loop import Loop
        from raysae.train.rows import StreamSource

        cuda = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        if cuda:
            be_deterministic()
        device = torch.device("cuda" if cuda else "cpu")
        self.task = task
        self._heard = Heard()
        self._changed = threading.Condition()
        self._waiting = 0  # Calls that wait for a change
        self._dismissed = False
        queue = ray.get_actor(task.queue)
        kind, streamed = error_kind(task.hook_point)
        transform = ErrorOf(task.hook_point, task.config.errors, task.width, device) if kind else None
        client = StreamClient(
            queue, task.consumer, streamed, task.training, task.width, task.config.stream.block_mib, task.config.faults
        )
        self.source = StreamSource(task, client, device, transform)
        self.loop = Loop(
            task.folder,
            task.width,
            task.training,
            task.config.train,
            task.config.evaluation,
            self.source,
            device=device,
            metadata=self._metadata(),
            allow=task.allow,
            on_change=self._notify,
        )
        for sae in task.saes:
            self.loop.add(sae)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- methods

    def process(self) -> int:
        """The process id."""
        return os.getpid()

    def status(self) -> list[dict]:
        """See `Loop.status`."""
        rows = self.loop.status()
        if self.error is not None:
            # Ray's errors carry a whole traceback in their text. Show the cause alone.
            message = str(getattr(self.error, "cause", self.error))
            rows = [row if row["state"] in ENDED else row | {"state": "failed", "message": message} for row in rows]
        return rows

    def warnings(self) -> list[str]:
        """See `Heard.take`."""
        return self._heard.take()

    def silent_seconds(self) -> float:
        """See `Loop.silent_seconds`. It is 0 once the loop has ended."""
        return self.loop.silent_seconds() if self._thread.is_alive() else 0.0

    def reports(self, name: str, since: int = 0) -> tuple[list[dict], bool]:
        """The reports of `name` from number `since` on, and whether it has ended.

        Waits for a new report, at most `POLL_SECONDS`.
        """
        self._wait(lambda: any(self.loop.reports(name, since)))
        reports, ended = self.loop.reports(name, since)
        if not reports and not ended:
            self._check()
        return reports, ended or self._dismissed

    def news(self, since: dict[str, int]) -> dict[str, list[dict]]:
        """The reports of every SAE here from number `since[name]` on. Does not wait."""
        return {sae.name: self.loop.reports(sae.name, since[sae.name])[0] for sae in self.task.saes}

    def leave(self, name: str, reason: str = "stopped early by the scheduler", tokens: int = 0) -> None:
        """See `Loop.leave`."""
        self.loop.leave(name, reason, tokens)

    def mean(self, name: str) -> np.ndarray:
        """Mean of the raw rows that the ended SAE `name` was trained on, `(d,)` float32.

        Waits at most `POLL_SECONDS`, because a restarted process first reads its files.
        """
        self._wait(lambda: self.loop.reports(name)[1])
        return np.array(self.loop.mean(name), dtype=np.float32)

    @ray.method(max_task_retries=0)  # A repeat after a restart would stop the new process
    def stop(self) -> bool:
        """Write checkpoints, end the training and leave the stream.

        Returns whether that took no longer than `faults.stop_seconds`.
        """
        self.loop.stop()
        self._thread.join(self.task.config.faults.stop_seconds)
        return not self._thread.is_alive()

    @ray.method(max_task_retries=0)  # A process that is restarted has no waiting calls
    def dismiss(self) -> None:
        """Answer the calls that wait, and later ones at once: `reports` says that its SAE has ended.

        Returns when they have been answered, or after END_SECONDS. See `end_trainers`.
        """
        self._dismissed = True
        self._notify()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, END_SECONDS)

    def _wait(self, until: Callable[[], bool]) -> None:
        """Wait for a change that brings `until` about, or for an error or the dismissal. Waits POLL_SECONDS at most."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self.error or self._dismissed or until(), POLL_SECONDS)
            self._waiting -= 1
            if self._dismissed:
                self._changed.notify_all()

    # ---------------------------------------------------------------- the thread

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self.task.threads)  # Set in this thread, because OpenMP keeps one number per thread
        try:
            self.loop.run(until_idle=False)
        except BaseException as error:
            log.exception("training stops")
            self.error = error
        finally:
            self._notify()

    def _notify(self) -> None:
        """Called by the training thread. Wakes the calls that wait, so that they look again."""
        with self._changed:
            self._changed.notify_all()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _metadata(self) -> dict:
        """What SAELens records about a file's origin."""
        config, spec = self.task.config, self.task.training
        return {
            "model_name": config.model.name,
            "dataset_path": config.text.source,
            "context_size": spec.context_length,
            "prepend_bos": True,
            "skipped_positions": spec.skip_positions,
            "activation_spec": spec.hash,
            "model_digest": spec.model,
        }
