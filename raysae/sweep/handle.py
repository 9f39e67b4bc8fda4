"""A Ray Tune trial is a light handle on one SAE of a trainer's bank: it tells Tune its reports, and leaves when the scheduler stops it."""

from __future__ import annotations

import ray
from ray import tune
from ray.tune.callback import Callback

from raysae.tracking.runs import Study

METRICS = (
    "fvu", "l0", "loss", "dead_fraction", "cosine", "norm_ratio", "tokens", "tokens_per_second", "learning_rate",
    "ce_recovered", "ce_recovered_zero", "kl",
)  # fmt: skip


def track(study: Study, name: str, report: dict) -> None:
    """Into the outbox; what it has already is dropped there."""
    metrics = {key: report[key] for key in METRICS if report.get(key) is not None}
    study.metrics(name, metrics, step=int(report["tokens"]), time=report["time"])


def follow(config: dict, trainers: dict[str, ray.actor.ActorHandle]) -> None:
    """The trainable: report what the SAE's trainer reports, from the beginning, until the SAE is finished.

    The trainer keeps every report, so a handle that starts late or again misses nothing; the outbox drops what it has seen.
    """
    name, seen = config["sae"], 0
    while True:
        reports, ended = ray.get(trainers[name].reports.remote(name, seen))
        seen += len(reports)
        for report in reports:
            tune.report({key: value for key, value in report.items() if isinstance(value, (int, float, str))})
        if ended:
            return


class Leave(Callback):
    """In the driver: a trial that the scheduler ends leaves its bank."""

    def __init__(self, trainers: dict[str, ray.actor.ActorHandle]):
        self.trainers = trainers

    def __getstate__(self) -> dict:
        return {}  # Tune writes its callbacks to disk; a resumed sweep makes its own

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        self.trainers[trial.config["sae"]].leave.remote(trial.config["sae"], "stopped early by the scheduler")
