"""The trainer: a thin Ray actor around `loop.Loop`.

The loop runs in a thread of its own. The actor's methods ask it questions or leave it requests.

Importing this module does not import torch. Ray imports it in every process that is handed a trainer, such as a
sweep's trials.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray
from ray.actor import ActorHandle

from raysae.cluster.actor_log import Heard
from raysae.config import SAEConfig, SweepConfig, error_kind
from raysae.processes import ENVIRONMENT
from raysae.stream.spec import ActivationSpec
from raysae.train.task import Training

log = logging.getLogger(__name__)

POLL_SECONDS = 30.0  # `reports` answers after this long even when nothing is new
SPARE_CALLS = 16  # Extra threads for methods. Two more per SAE may wait for its reports.


def start_trainer(
    *,
    queue: str,
    consumer: str,
    folder: str | Path,
    hook_point: str,
    width: int,
    saes: Sequence[SAEConfig],
    training: ActivationSpec,
    evaluation: ActivationSpec,
    config: SweepConfig,
    threads: int,
    allow: frozenset[str] = frozenset(),
) -> ActorHandle:
    """Start a trainer of `saes` and return its handle at once.

    The trainer continues from what `folder` holds. Ended SAEs are only shown, and the others train on.

    Args:
        queue: name given to `stream.queue.start_stream`, or the name of one of its relays.
        consumer: the trainer's name on the stream. It must differ from every other trainer's name.
        folder: folder of the study, local or any URL fsspec knows. A local one must be reachable from every machine
            that may run a trainer.
        hook_point, width: hook point of the activations and their number of dimensions.
        training, evaluation: specs of the two streams.
        config: the sweep's configuration.
        threads: CPU threads. Bits depend on them, so resume a study with the same number.
        allow: facts in which the run may differ from its checkpoints. `checkpoint.fingerprint` has their names.
    """
    local = str(Path(folder).absolute()) if "://" not in str(folder) else str(folder)
    plan = Training(
        queue, consumer, local, hook_point, width, tuple(saes), training, evaluation, config, threads, frozenset(allow)
    )
    return ray.remote(Trainer).options(
        num_cpus=config.resources.trainer_cpus,
        num_gpus=config.resources.trainer_gpus,
        runtime_env=ENVIRONMENT,
        max_restarts=config.faults.trainer_restarts,
        max_task_retries=-1,  # Every method may be repeated
        max_concurrency=2 * len(plan.saes) + SPARE_CALLS,
    ).remote(plan)  # fmt: skip


class Trainer:
    """Trains a bank of SAEs on the device Ray gave this process.

    After a crash Ray restarts the process, and it continues from its checkpoints.

    Some errors belong to no single SAE, such as an ended stream or another run's checkpoint. Such an error stops the
    loop. Every unfinished SAE has then failed, and `reports` raises the error for it.
    """

    def __init__(self, plan: Training):
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
        self.plan = plan
        self._heard = Heard()
        self._changed = threading.Condition()
        queue = ray.get_actor(plan.queue)
        kind, streamed = error_kind(plan.hook_point)
        transform = ErrorOf(plan.hook_point, plan.config.errors, plan.width, device) if kind else None
        client = StreamClient(
            queue, plan.consumer, streamed, plan.training, plan.width, plan.config.stream.block_mib, plan.config.faults
        )
        self.source = StreamSource(plan, client, device, transform)
        self.loop = Loop(
            plan.folder,
            plan.width,
            plan.training,
            plan.config.train,
            plan.config.evaluation,
            self.source,
            device=device,
            metadata=self._metadata(),
            allow=plan.allow,
            on_change=self._notify,
        )
        for sae in plan.saes:
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
            from raysae.train.loop import ENDED

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
        with self._changed:
            self._changed.wait_for(lambda: self.error or any(self.loop.reports(name, since)), POLL_SECONDS)
        reports, ended = self.loop.reports(name, since)
        if not reports and not ended:
            self._check()
        return reports, ended

    def news(self, since: dict[str, int]) -> dict[str, list[dict]]:
        """The reports of every SAE here from number `since[name]` on. Does not wait."""
        return {sae.name: self.loop.reports(sae.name, since[sae.name])[0] for sae in self.plan.saes}

    def leave(self, name: str, reason: str = "stopped early by the scheduler", tokens: int = 0) -> None:
        """See `Loop.leave`."""
        self.loop.leave(name, reason, tokens)

    def mean(self, name: str) -> np.ndarray:
        """Mean of the raw rows that the ended SAE `name` was trained on, `(d,)` float32.

        Waits at most `POLL_SECONDS`, because a restarted process first reads its files.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.error or self.loop.reports(name)[1], POLL_SECONDS)
        return np.array(self.loop.mean(name), dtype=np.float32)

    @ray.method(max_task_retries=0)  # A repeat after a restart would stop the new process
    def stop(self) -> bool:
        """Write checkpoints, end the training and leave the stream.

        Returns whether that took no longer than `faults.stop_seconds`.
        """
        self.loop.stop()
        self._thread.join(self.plan.config.faults.stop_seconds)
        return not self._thread.is_alive()

    # ---------------------------------------------------------------- the thread

    def _work(self) -> None:
        import torch

        torch.set_num_threads(self.plan.threads)  # Set in this thread, because OpenMP keeps one number per thread
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
        config, spec = self.plan.config, self.plan.training
        return {
            "model_name": config.model.name,
            "dataset_path": config.text.source,
            "context_size": spec.context_length,
            "prepend_bos": True,
            "skipped_positions": spec.skip_positions,
            "activation_spec": spec.hash,
            "model_digest": spec.model,
        }
