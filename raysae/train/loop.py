"""The training loop of one process: a bank of SAEs, one reader, evaluations, checkpoints. It knows nothing of Ray.

The bank has one reader. An SAE trains on the reader's batch if that batch begins at its next row.

An SAE may stand further ahead, because the process was killed between two checkpoints. It waits until the reader gets
there.

An SAE that was added late stands behind. It waits until the present pass ends. Then the reader goes back to the
smallest unfinished row. If the loop served it in between, the stream would produce or keep every shard twice. The other
SAEs would also lose their company.

The same rule brings back a restarted process. It begins at the smallest row of its checkpoints.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from raysae.config import EvaluationConfig, SAEConfig, TrainConfig
from raysae.determinism import Seen, together, told
from raysae.stream.spec import ActivationSpec
from raysae.stream.state import StreamError, SupersededError
from raysae.train.bank import Bank, Member
from raysae.train.checkpoint import Checkpoint, CheckpointStore, check_fingerprint, fingerprint
from raysae.train.evaluation import HeldOut, reconstruction_metrics
from raysae.train.outcome import Outcome, Outcomes
from raysae.train.progress import Cadence, Progress
from raysae.train.schedule import report_steps

log = logging.getLogger(__name__)

BLOCKED_SECONDS = 0.5  # An SAE counts as waiting once its reader has waited this long


class Reader(Protocol):
    """Batches of raw rows in order. See `raysae.stream.reader.BatchReader`."""

    waited_seconds: float

    def next(self) -> torch.Tensor | None:
        """Wait for the next `(batch, d)` and return it, or None where one of its rows is skipped."""

    def close(self) -> None:
        """Drop everything, so that nobody waits for this reader. A `next` that waits in another thread raises."""


class Source(Protocol):
    """Where a loop's rows come from."""

    numerics: Seen
    """What the bits of the rows depend on beside the spec.

    It covers everything the present reader has read, which may include rows read ahead.
    """

    def open(self, row: int) -> Reader:
        """A reader of the training stream that stands at `row`."""

    def first_rows(self) -> torch.Tensor:
        """The first raw rows of the training stream, `(r, d)`. They are always the same.

        SAEs are initialised from them. The loop calls this right after `open(0)`.
        """

    def evaluation(self, rows: int) -> Iterator[torch.Tensor]:
        """The first `rows` held-out raw rows in chunks `(r, d)`."""

    def leave(self) -> None:
        """Tell the stream that this loop reads nothing for now, so that nobody waits for it."""


class Loop:
    """Trains SAEs of one hook point to their end and saves them.

    Args:
        folder: folder of the study, local or a URL. It contains `checkpoints/<name>` and `saes/<name>`.
        d, spec: width of the activations and the stream they come from.
        train, evaluation: how to train and how to evaluate.
        source: see `Source`.
        device: device of the bank.
        metadata: what an SAE's file says about its origin.
        allow: facts of the fingerprint that may differ from a checkpoint's. See `check_fingerprint`.
        on_change: the loop's thread calls it whenever a report or a state is new.
        clock: seconds that only grow.

    `run` works in one thread. Any other thread may call `add`, `leave`, `stop`, `status` and `reports`. They read what
    the loop shows, or leave a request that it takes up between two steps.
    """

    def __init__(
        self,
        folder: str,
        d: int,
        spec: ActivationSpec,
        train: TrainConfig,
        evaluation: EvaluationConfig,
        source: Source,
        device: torch.device | str = "cpu",
        metadata: dict | None = None,
        allow: set[str] = frozenset(),
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = str(folder).rstrip("/")
        self.spec, self.train, self.evaluation = spec, train, evaluation
        self.source, self.metadata, self.allow = source, metadata or {}, set(allow)
        self.on_change, self.clock = on_change, clock
        self.bank = Bank(d, train, device)
        self.outcomes = Outcomes(f"{self.folder}/saes")
        self.progress: dict[str, Progress] = {}
        self.cadence = Cadence(train.checkpoint_seconds, clock)
        self.report_steps = set(report_steps(train))
        # Held while an ending SAE's files are removed, so that no wish to leave is written among them.
        self._ending = threading.Lock()
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._reader: Reader | None = None
        self._blocked_since: float | None = None  # Set while the loop waits for rows or requests
        self._sign = clock()  # Time of the last sign of life
        # Rows, seconds and seconds waited in the present pass, without evaluations and checkpoints.
        self._pace = (0, 0.0, 0.0)
        self._held_out: dict[int, HeldOut] = {}  # Number of held-out rows → what they are like

    # ---------------------------------------------------------------- requests, from any thread

    def add(self, config: SAEConfig) -> None:
        """Take in an SAE.

        One that has ended is only shown. An unfinished one continues from its newest checkpoint. Any other begins at
        row 0.
        """
        self.progress.setdefault(config.name, Progress(config))
        self._requests.put(lambda: self._add(config.name))

    def leave(self, name: str, reason: str, tokens: int = 0) -> None:
        """End an SAE early, at its next step or once it has seen `tokens`.

        It is evaluated on all held-out rows and saved. One that has ended stays as it is. The present step is too
        early: it may have a report already, and there is one report per step.

        The wish is on disk once this returns, so it survives any crash.
        """
        with self._ending:
            progress = self.progress.get(name)
            if progress is not None and not progress.ended:
                self._store(name).wish_leave(
                    {"reason": reason, "tokens": max(tokens, progress.tokens + bool(progress.tokens))}
                )
                self._requests.put(lambda: self._leave(name))

    def stop(self) -> None:
        """End `run` after the present step, with checkpoints of all SAEs. A later `run` ends at once."""
        self._stopping = True
        if (reader := self._reader) is not None:
            reader.close()
        self._requests.put(lambda: None)

    def silent_seconds(self) -> float:
        """Seconds that the loop has spent on one thing of its own. It is 0 while the loop waits for others.

        Such a thing is a step, a chunk of an evaluation or a checkpoint.
        """
        return 0.0 if self._blocked_since is not None else self.clock() - self._sign

    def status(self) -> list[dict]:
        """One row per SAE, in the order in which they were added.

        A row has name, state, tokens, tokens_per_second, fvu, l0, waited_share and message.
        """
        since = self._blocked_since  # Read once, because the loop's thread clears it
        blocked = since is not None and self.clock() - since > BLOCKED_SECONDS
        rate, waited = self._rates()
        rows = []
        for name, progress in list(self.progress.items()):
            working = progress.state == "working"
            last = progress.reports[-1] if progress.reports else {}
            rows.append(
                {
                    "name": name,
                    "state": "waiting" if working and blocked else progress.state,
                    "tokens": progress.tokens,
                    "tokens_per_second": rate if working else last.get("tokens_per_second", 0.0),
                    "fvu": last.get("fvu"),
                    "l0": last.get("l0"),
                    "waited_share": waited if working else last.get("waited_share", 0.0),
                    "message": progress.message,
                }
            )
        return rows

    def reports(self, name: str, since: int = 0) -> tuple[list[dict], bool]:
        """The reports of `name` from number `since` on, and whether it has ended. Then no more will come."""
        progress = self.progress.get(name)
        if progress is None:
            return [], False
        ended = progress.ended  # Read first, because the last report comes before the end
        return progress.reports[since:], ended

    def mean(self, name: str) -> list[float]:
        """Mean `(d,)` of the raw rows that the ended SAE `name` was trained on.

        Raises:
            KeyError: the SAE is unknown.
            ValueError: it has not ended.
        """
        mean = self.progress[name].mean
        if mean is None:
            raise ValueError(f"{name} has not ended")
        return mean

    # ---------------------------------------------------------------- the loop

    def run(self, until_idle: bool = True) -> None:
        """Train until every SAE has ended, or until `stop`.

        With `until_idle=False` it does not return then. It waits for more SAEs.
        """
        while not self._stopping:
            self._take_requests()
            rows = [progress.member.next_row for progress in self._in_training()]
            if rows and not self._stopping:
                self._pass(min(rows))
            elif until_idle:
                return
            else:
                self.source.leave()
                with self._blocked():
                    request = self._requests.get()
                request()
        self._checkpoint()

    def _pass(self, row: int) -> None:
        """Read on from `row` while an SAE stands at the next row."""
        reader = self._reader = self.source.open(row)
        try:
            self._initialise(row)
            self._pace = (0, 0.0, 0.0)
            began = self.clock()
            while not self._stopping and (cohort := self.bank.at(row)):
                self._sign = self.clock()
                self._show(cohort)
                x = self._next(reader, cohort)
                if x is not None:
                    self.bank.step(x, row)
                elif self._stopping:
                    break
                else:
                    self.bank.skip(row)
                row += self.train.batch
                rows, seconds, _ = self._pace
                self._pace = (rows + self.train.batch, seconds + self.clock() - began, reader.waited_seconds)
                self._after_step(cohort)
                if self.cadence.due():
                    self._checkpoint()
                self._take_requests()
                began = self.clock()
        finally:
            self._reader = None
            reader.close()

    def _next(self, reader: Reader, cohort: list[Member]) -> torch.Tensor | None:
        """The next batch. None means that it is skipped, or that `stop` has closed the reader."""
        try:
            with self._blocked():
                x = reader.next()
            self._note_numerics(cohort)
            return x
        except Exception as error:
            if self._stopping:
                return None
            if isinstance(error, SupersededError):
                raise  # Another process trains these SAEs now, and writes their files
            self._checkpoint()  # The stream is broken, the SAEs are not
            if isinstance(error, StreamError):
                raise StreamError(f"at step {cohort[0].steps_done}: {error}") from None
            raise

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        """Marks the loop as waiting for others while the body runs."""
        self._blocked_since = self.clock()
        try:
            yield
        finally:
            self._sign = self.clock()
            self._blocked_since = None

    def _note_numerics(self, cohort: list[Member]) -> None:
        """Add what produced the rows to the record of every SAE trained on them.

        Raises:
            UserError: it is not what it was, and `allow` does not name the difference.
        """
        for progress in (self.progress[member.name] for member in cohort):
            numerics = together(progress.numerics, self.source.numerics)
            if progress.numerics and numerics is not progress.numerics:
                check_fingerprint(
                    f"the activation stream of {progress.config.name}",
                    told(progress.numerics),
                    told(numerics),
                    self.allow,
                )
            progress.numerics = numerics

    def _initialise(self, row: int) -> None:
        new = [member for member in self.bank.at(row) if not member.initialised]
        if new:
            with self._blocked():
                rows = self.source.first_rows()
            self.bank.initialise(new, rows)
            for member in new:
                if member.failed:
                    log.warning("%s", member.failed)
                    self._end(self.progress[member.name], "failed", member.failed)

    def _show(self, cohort: list[Member]) -> None:
        for progress in self._in_training():
            progress.state = "working" if progress.member in cohort else "waiting"

    def _in_training(self) -> list[Progress]:
        return [progress for progress in list(self.progress.values()) if progress.member is not None]

    def _after_step(self, cohort: list[Member]) -> None:
        for member in cohort:
            progress = self.progress[member.name]
            progress.tokens = member.next_row
            if member.failed:
                log.warning("%s; it is stopped, the others go on", member.failed)
                self._end(progress, "failed", member.failed)
            elif member.finished:
                self._finish(progress, "done")
            else:
                if progress.leave_at is not None and member.next_row >= progress.leave_at:
                    self._leave_now(progress)
                elif member.steps_done in self.report_steps:
                    self._report(progress, final=False)

    def _report(self, progress: Progress, final: bool) -> None:
        """Evaluate on held-out rows.

        A final report uses all of them and has the density histogram.
        """
        member, reached, began = progress.member, time.time(), self.clock()
        progress.state = "evaluating"
        self.on_change()
        member.calibrate()
        rows = self.evaluation.rows if final else min(self.evaluation.interim_rows, self.evaluation.rows)
        metrics = reconstruction_metrics(member.sae.folded(), self._evaluation(rows), self._rows_like(rows))
        rate, waited = self._rates()
        report = {
            "name": member.name,
            "step": member.steps_done,
            "tokens": member.next_row,
            "final": final,
            "time": reached,
            "learning_rate": member.learning_rate,
            **member.take_means(),
            **metrics.scalars(),
            "evaluation_rows": metrics.rows,
            "dead_in_training": float((member.quiet >= member.dead_after).double().mean()),
            "tokens_per_second": rate,
            "waited_share": waited,
            "step_seconds": member.seconds / max(1, member.timed),
            "evaluation_seconds": self.clock() - began,
        }
        if final:
            report["density"] = metrics.density
        progress.reports.append(report)
        progress.state = "working"
        self.on_change()

    def _rows_like(self, rows: int) -> HeldOut:
        """What the first `rows` held-out rows are like."""
        if rows not in self._held_out:
            self._held_out[rows] = HeldOut(
                lambda: self._evaluation(rows), self.bank.d, self.evaluation.outlier_norm, self.bank.device
            )
        return self._held_out[rows]

    def _evaluation(self, rows: int) -> Iterator[torch.Tensor]:
        chunks = iter(self.source.evaluation(rows))
        while True:
            with self._blocked():
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _finish(self, progress: Progress, state: str, message: str | None = None) -> None:
        """Evaluate for the last time, write the files and end the SAE."""
        self._report(progress, final=True)
        self._end(progress, state, message)

    def _end(self, progress: Progress, state: str, message: str | None = None) -> None:
        """Record the outcome and drop member and checkpoints. An evaluated SAE's files are saved as well."""
        member = progress.member
        sae, metadata = None, None
        if progress.reports and state != "failed":
            sae = member.sae
            facts = {key: progress.reports[-1][key] for key in ("tokens", "fvu", "l0", "dead_fraction")}
            facts["fingerprint"] = self._fingerprint(progress.config) | told(progress.numerics)
            metadata = self.metadata | facts
        mean = member.mean.tolist()
        self.outcomes.save(member.name, Outcome(state, member.next_row, mean, message, progress.reports), sae, metadata)
        del self.bank.members[member.name]
        with self._ending:
            self._store(member.name).clear()
            progress.member, progress.mean, progress.message, progress.state = None, mean, message, state
        self.on_change()

    def _rates(self) -> tuple[float, float]:
        """Tokens per second in the present pass, and the share of its time spent waiting for the stream."""
        rows, seconds, waited = self._pace
        return (rows / seconds, min(1.0, waited / seconds)) if seconds > 0 else (0.0, 0.0)

    # ---------------------------------------------------------------- state on disk

    def _store(self, name: str) -> CheckpointStore:
        return CheckpointStore(f"{self.folder}/checkpoints/{name}")

    def _fingerprint(self, config: SAEConfig) -> dict:
        return fingerprint(self.spec, config, self.train, self.bank.device)

    def _checkpoint(self) -> None:
        began = self.clock()
        for progress in self._in_training():
            if progress.member.initialised and progress.member.next_row != progress.saved_row:
                self._save(progress)
                self._sign = self.clock()
        self.cadence.written(began)

    def _save(self, progress: Progress) -> None:
        tensors, scalars = progress.member.state()
        header = {"member": scalars, "reports": progress.reports, "numerics": progress.numerics}
        self._store(progress.member.name).save(Checkpoint(tensors, header, self._fingerprint(progress.config)))
        progress.saved_row = progress.member.next_row

    # ---------------------------------------------------------------- requests, in the loop's thread

    def _take_requests(self) -> None:
        while not self._requests.empty():
            self._requests.get()()

    def _add(self, name: str) -> None:
        progress = self.progress[name]
        if progress.member is not None or progress.ended:
            return
        if outcome := self.outcomes.load(name):
            progress.tokens, progress.mean = outcome.tokens, outcome.mean
            progress.message, progress.reports = outcome.message, outcome.reports
            with self._ending:
                self._store(name).clear()  # A process that died right after the outcome may have left these files
                progress.state = outcome.state
        elif checkpoint := self._store(name).load(self._fingerprint(progress.config), self.allow):
            progress.member = self.bank.add(name, progress.config, (checkpoint.tensors, checkpoint.header["member"]))
            progress.tokens = progress.saved_row = progress.member.next_row
            progress.reports, progress.numerics = checkpoint.header["reports"], checkpoint.header["numerics"]
            if progress.member.finished:
                self._finish(progress, "done")
        else:
            progress.member = self.bank.add(name, progress.config)
        self._leave(name)
        self.on_change()

    def _leave(self, name: str) -> None:
        """Take up the wish that the SAE end early, if there is one."""
        progress = self.progress[name]
        if progress.member is not None and (wish := self._store(name).wished_leave()):
            progress.message, progress.leave_at = wish["reason"], wish["tokens"]
            reported = bool(progress.reports) and progress.reports[-1]["tokens"] == progress.tokens
            if progress.member.next_row >= progress.leave_at and not reported:
                self._leave_now(progress)

    def _leave_now(self, progress: Progress) -> None:
        if not progress.member.initialised:  # It has seen no row, so there is nothing to evaluate or save
            self._end(progress, "stopped", progress.message)
            return
        self._save(progress)  # A process killed from here on ends the SAE at the same row after its restart
        self._finish(progress, "stopped", progress.message)
