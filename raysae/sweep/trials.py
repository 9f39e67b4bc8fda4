"""Ray Tune's side of a sweep: one trial per SAE, a light handle on an SAE of a trainer's bank.

A trial tells Tune the SAE's reports. When the scheduler stops it, it has the SAE leave its bank. Trials hold no state:
trainers keep every report, so a trial that starts late or again replays them from the beginning.
"""

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
LOST = "lost"  # Key in a trial's last report: its trainer is gone
RUNGS = "rungs.jsonl"  # File of ASHA's decisions
TRIALS = 1  # Concurrent trials where no scheduler compares them
TRIAL_BYTES = 128 * MIB  # Memory of a trial's process


def follow(config: dict, trainers: dict[str, ActorHandle]) -> None:
    """The trainable: report what the SAE's trainer reports, from the beginning, until the SAE has ended.

    A trial that starts late or again misses nothing: the trainer keeps every report. The outbox drops what it has seen.
    """
    name, seen = config["sae"], 0
    while True:
        try:
            reports, ended = ray.get(trainers[name].reports.remote(name, seen))
        except ray.exceptions.RayError:
            # The trainer is dead for good, or has failed. The driver finds out why. Starting again would not help.
            tune.report({"fvu": math.nan, LOST: True})
            return
        seen += len(reports)
        for report in reports:
            tune.report({key: value for key, value in report.items() if isinstance(value, (int, float, str))})
        if ended:
            return


class Leave(Callback):
    """In the driver: has the SAE of a trial that the scheduler ends leave its bank."""

    def __init__(self, trainers: Mapping[str, ActorHandle]):
        self.trainers = trainers

    def __getstate__(self) -> dict:
        return {}  # Tune writes its callbacks to disk. A resumed sweep makes its own.

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        last = trial.last_result or {}
        if last.get(LOST):
            return  # Nobody has decided that this SAE should end
        name, tokens = trial.config["sae"], int(last.get("tokens", 0))
        self.trainers[name].leave.remote(name, "stopped early by the scheduler", tokens)


class Over(Stopper):
    """Ends Tune's loop when the driver's watch says that there is nothing left to wait for."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def __getstate__(self) -> dict:
        return {}  # Tune writes its stopper to disk. A resumed sweep makes its own.

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.watch.ended


class Rungs(ASHAScheduler):
    """ASHA that writes its decisions to a file, one line of JSON for each SAE at each rung.

    A decision depends on the scores that ASHA has seen and on their order. The order differs when processes die, so
    the file is the only record. What an SAE is after so many tokens does not depend on decisions.
    """

    def __init__(self, file: Path, rows: int, first: int, reduction: float):
        super().__init__(time_attr="tokens", max_t=rows, grace_period=first, reduction_factor=reduction)
        self.file = str(file)
        self.rungs = [first * reduction**k for k in range(int(math.log(rows / first, reduction)) + 1)]
        self.decided: set[tuple[str, int]] = set()

    def on_trial_result(self, tune_controller, trial, result: dict) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        tokens = result.get("tokens", 0)
        passed = sum(rung <= tokens for rung in self.rungs)
        if passed and (trial.trial_id, passed) not in self.decided:
            self.decided.add((trial.trial_id, passed))
            line = {"rung": passed, "tokens": tokens, "sae": trial.config["sae"], "fvu": result["fvu"]}
            line["decision"] = decision
            log.info("asha: %s", line)
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return decision


def make_tuner(settled: Plan, trainer_of: Mapping[str, ActorHandle], place: Place, watch: Watch) -> tune.Tuner:
    """A Tuner with one trial per SAE.

    Trials run one after another. The trainers train all SAEs whether or not their trials run yet, and a trial that
    begins late replays what it missed. A scheduler that compares trials needs them all at once.

    Trials reserve memory and no cores. Any share of a core could be the one that a producer lacks.

    A resumed study gets a new Tuner rather than a restored one. Its trials replay all reports, so checkpoints stay the
    one truth about a study's progress.
    """
    config = settled.config
    room = tune.PlacementGroupFactory([{"memory": TRIAL_BYTES}])
    trainable = tune.with_resources(tune.with_parameters(follow, trainers=trainer_of), room)
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
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}", storage_path=place.folder, verbose=0,
            callbacks=[Leave(trainer_of)], stop=Over(watch),
            failure_config=tune.FailureConfig(max_failures=config.faults.trainer_restarts),
        ),
    )  # fmt: skip
