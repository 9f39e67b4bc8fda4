"""Brings what an outbox holds to MLflow, each thing once.

- Runs are found again by their tags.
- A batch is sent twice when the first answer was lost. Both have the same time stamps, so MLflow stores it once.
- A run may have been begun before, by this outbox or a lost one. The steps it already has are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from raysae.tracking.client import connect, experiment_id
from raysae.tracking.outbox import KILLED, REFUSED, RUNNING, SENT, STUDY, Outbox, Run
from raysae.tracking.tags import (
    KIND_ANALYSED,
    KIND_ANALYSIS,
    KIND_SAE,
    KIND_STUDY,
    KIND_TAG,
    MADE_FOR_TAG,
    PARENT_TAG,
    SAE_TAG,
    STUDY_TAG,
    condition,
)
from raysae.tracking.views import LATEST, VIEW_TAG, analysis_view_tags, view_tags

# MLflow's limits.
METRICS_PER_BATCH = 1000
PAIRS_PER_BATCH = 100
CHILDREN = {KIND_STUDY: KIND_SAE, KIND_ANALYSIS: KIND_ANALYSED}  # Kind of a run → kind of the runs below it
PERMANENT = (
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "BAD_REQUEST",
)

log = logging.getLogger(__name__)
Item = TypeVar("Item")


class Delivery:
    """One connection to the outbox's tracking server.

    Any method may raise when the server is away. Then make a new Delivery and continue.
    """

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.study = outbox.meta("study")
        self.kind = outbox.meta("kind") or KIND_STUDY
        self.made_for = outbox.meta("made_for")
        uri = outbox.meta("uri")
        self.client = connect(uri)
        self.experiment = experiment_id(self.client, uri, outbox.meta("experiment"))
        self._begun: set[str] = set()  # Runs that this delivery has created. Nobody else writes to them.
        self._steps_there: dict[
            tuple[str, str], set[int]
        ] = {}  # (run id, key) → steps that a run begun before already has
        for run in outbox.runs():
            if run.run_id and not self._exists(run.run_id):
                outbox.forget(run.run)

    def deliver(self) -> None:
        """Sends everything that waits. Per run it sends parameters, tags, metrics and artifacts, then the run's end."""
        waiting = self.outbox.unsent_runs()
        for run in self.outbox.runs():
            if run.run in waiting:
                self._deliver_run(run)

    def _deliver_run(self, run: Run) -> None:
        run_id = run.run_id or self._begin(run)
        client, name = self.client, run.run
        for table, record in (("params", "Param"), ("tags", "RunTag")):
            while pairs := self.outbox.unsent_pairs(table, name, PAIRS_PER_BATCH):
                self._send(
                    pairs,
                    lambda part, table=table, record=record: client.log_batch(
                        run_id, **{table: [_entity(record)(*pair) for pair in part]}
                    ),
                    lambda part, state, table=table: self.outbox.mark_pairs(table, name, part, state),
                )
        while metrics := self.outbox.unsent_metrics(name, METRICS_PER_BATCH):
            there = {metric for metric in metrics if metric.step in self._steps(run_id, metric.key)}
            self.outbox.mark_metrics(name, there, SENT)
            self._send(
                [metric for metric in metrics if metric not in there],
                lambda part: client.log_batch(
                    run_id, metrics=[_entity("Metric")(m.key, m.value, m.time, m.step) for m in part]
                ),
                lambda part, state: self.outbox.mark_metrics(name, part, state),
            )
        while pairs := self.outbox.unsent_pairs("artifacts", name, 1):
            self._send(
                pairs,
                lambda part: self._upload(run_id, *part[0]),
                lambda part, state: self.outbox.mark_pairs("artifacts", name, part, state),
            )
        self._send(
            [run], lambda part: self._set_status(run, run_id), lambda part, state: self.outbox.mark_run(run, state)
        )

    def _send(
        self, items: Sequence[Item], send: Callable[[Sequence[Item]], None], mark: Callable[[Sequence[Item], int], None]
    ) -> None:
        """Sends items together, or one by one where the server will never take the batch.

        An item that the server refuses is marked, and a warning names it.
        """
        if not items:
            return
        from mlflow.exceptions import MlflowException

        try:
            send(items)
        except (MlflowException, FileNotFoundError) as error:
            if isinstance(error, MlflowException) and error.error_code not in PERMANENT:
                raise
            if len(items) == 1:
                log.warning("MLflow will not take %s: %s", items[0], " ".join(str(error).split())[:300])
                mark(items, REFUSED)
                return
            for item in items:
                self._send([item], send, mark)
            return
        mark(items, SENT)

    # ------------------------------------------------------------ runs

    def _begin(self, run: Run) -> str:
        """The MLflow run of this study or of one of its SAEs. It is found by its tags, or created."""
        tags = {STUDY_TAG: self.study, KIND_TAG: self.kind if run.run == STUDY else CHILDREN[self.kind]}
        if run.run != STUDY:
            tags[SAE_TAG] = run.run
        found = self._search(tags)
        if run.run != STUDY:
            tags[PARENT_TAG] = parent = next(other.run_id for other in self.outbox.runs() if other.run == STUDY)
        if found:
            run_id = found[0].info.run_id
            if run.run != STUDY:
                self.client.set_tag(run_id, PARENT_TAG, parent)  # The study's run may be a new one
        else:
            if run.run == STUDY and self.made_for:
                tags[MADE_FOR_TAG] = self.made_for
            elif run.run == STUDY:
                self._save_views()
            run_id = self.client.create_run(
                self.experiment, start_time=run.started, tags=tags, run_name=run.run or self.study
            ).info.run_id
            self._begun.add(run_id)
        self.outbox.set_run_id(run.run, run_id)
        return run_id

    def _save_views(self) -> None:
        """Saves the experiment's views for a new study or analysis.

        Views that name no study stay as they are, because somebody may have changed them in the UI.
        """
        known = self.client.get_experiment(self.experiment).tags
        for key, value in (view_tags(self.study) if self.kind == KIND_STUDY else analysis_view_tags()).items():
            if key not in known or key == VIEW_TAG + LATEST:
                self._send(
                    [(key, value)],
                    lambda part: self.client.set_experiment_tag(self.experiment, *part[0]),
                    lambda part, state: None,
                )

    def _search(self, tags: dict[str, str], further: str = "") -> list:
        return self.client.search_runs(
            [self.experiment], condition(tags) + further, order_by=["attributes.start_time ASC"]
        )

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in PERMANENT:
                return False
            raise
        return run.info.lifecycle_stage == "active" and run.info.experiment_id == self.experiment

    def _set_status(self, run: Run, run_id: str) -> None:
        if run.status == RUNNING:
            self.client.update_run(run_id, status=RUNNING)
            return
        self.client.set_terminated(run_id, run.status, run.ended)
        if run.run == STUDY:
            known = {other.run_id for other in self.outbox.runs()}
            for stale in self._search({STUDY_TAG: self.study}, f" and attributes.status = '{RUNNING}'"):
                if stale.info.run_id not in known:  # A driver whose outbox is lost has left it behind
                    self.client.set_terminated(stale.info.run_id, KILLED, run.ended)

    def _steps(self, run_id: str, key: str) -> set[int]:
        """Steps of the metric that the run already has."""
        if run_id in self._begun:
            return set()
        if (run_id, key) not in self._steps_there:
            self._steps_there[run_id, key] = {metric.step for metric in self.client.get_metric_history(run_id, key)}
        return self._steps_there[run_id, key]

    def _upload(self, run_id: str, path: str, artifact_path: str) -> None:
        if Path(path).is_dir():
            self.client.log_artifacts(run_id, path, artifact_path or None)
        elif Path(path).is_file():
            self.client.log_artifact(run_id, path, artifact_path or None)
        else:
            raise FileNotFoundError(f"{path} is not there any more")


def _entity(name: str) -> type:
    from mlflow import entities

    return getattr(entities, name)
