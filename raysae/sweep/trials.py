"""A Ray Tune trial is a light handle on one SAE of a trainer's bank: it tells Tune its reports, and leaves when the scheduler stops it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune import Callback, Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from raysae.study.place import Place
from raysae.study.plan import MIB, Plan
from raysae.sweep.watch import Watch

log = logging.getLogger(__name__)
LOST = "lost"  # in a trial's last report: its trainer is gone
RUNGS = "rungs.jsonl"  # what ASHA has decided
TRIALS, TRIAL_BYTES = 1, 128 * MIB  # trials at a time where no scheduler compares them, and the memory that the process of one takes


def follow(config: dict, trainers: dict[str, ray.actor.ActorHandle]) -> None:
    """The trainable: report what the SAE's trainer reports, from the beginning, until the SAE is finished.

    The trainer keeps every report, so a handle that starts late or again misses nothing; the outbox drops what it has seen.
    """
    name, seen = config["sae"], 0
    while True:
        try:
            reports, ended = ray.get(trainers[name].reports.remote(name, seen))
        except ray.exceptions.RayError:  # the trainer is dead for good, or has failed: the driver finds out why, and starting again would not help
            tune.report({"fvu": math.nan, LOST: True})
            return
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
        last = trial.last_result or {}
        if last.get(LOST):
            return  # nobody has decided that this SAE should end
        seen = last.get("tokens", 0)
        self.trainers[trial.config["sae"]].leave.remote(trial.config["sae"], "stopped early by the scheduler", int(seen))


class Over(Stopper):
    """Ends Tune's loop when the driver's watch says that there is nothing left to wait for."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def __getstate__(self) -> dict:
        return {}  # as above

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.watch.ended


class Rungs(ASHAScheduler):
    """ASHA that writes its decisions down, a line of JSON for each SAE at each rung: the scores it saw and in which order decide what it does, and
    they arrive in another order when processes die. What an SAE is at a number of tokens does not depend on them."""

    def __init__(self, file: Path, rows: int, first: int, reduction: float):
        super().__init__(time_attr="tokens", max_t=rows, grace_period=first, reduction_factor=reduction)
        self.file = str(file)
        self.rungs = [first * reduction**k for k in range(int(math.log(rows / first, reduction)) + 1)]
        self.decided: set[tuple[str, int]] = set()

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        passed = sum(rung <= result.get("tokens", 0) for rung in self.rungs)
        if passed and (trial.trial_id, passed) not in self.decided:
            self.decided.add((trial.trial_id, passed))
            line = {"rung": passed, "tokens": result["tokens"], "sae": trial.config["sae"], "fvu": result["fvu"], "decision": decision}
            log.info("asha: %s", line)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return decision


def make_tuner(settled: Plan, trainer_of: Mapping[str, ActorHandle], place: Place, watch: Watch) -> tune.Tuner:
    """One trial per SAE, one after another. The trainers train all SAEs whether or not their trials run yet; a trial that begins late replays what
    it missed. A scheduler that compares trials needs them all at once. They reserve memory alone: a share of a core, however small, could be the one
    that a producer lacks.

    A resumed study gets a new Tuner rather than a restored one: trainers keep every report, the handles replay them from the beginning, and so
    the one truth about a study's progress is its checkpoints.
    """
    config = settled.config
    trainable = tune.with_resources(tune.with_parameters(follow, trainers=trainer_of), tune.PlacementGroupFactory([{"memory": TRIAL_BYTES}]))
    rows = config.train.steps * config.train.batch
    if config.scheduler == "asha":
        at_once = config.resources.trials or len(settled.saes)
        scheduler = Rungs(place.local / RUNGS, rows, rows // config.train.reports, config.asha_reduction)
    else:
        at_once = config.resources.trials or TRIALS
        scheduler = FIFOScheduler()
    return tune.Tuner(
        trainable,
        param_space={"sae": tune.grid_search([sae.name for sae in settled.saes])},
        tune_config=tune.TuneConfig(
            metric="fvu", mode="min", scheduler=scheduler, max_concurrent_trials=at_once, reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["sae"],
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}", storage_path=place.folder, verbose=0, callbacks=[Leave(trainer_of)],
            failure_config=tune.FailureConfig(max_failures=config.faults.trainer_restarts), stop=Over(watch),
        ),
    )  # fmt: skip
