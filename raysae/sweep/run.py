"""The main job's driver: one stream, a few trainers, one light Ray Tune trial per SAE, everything in MLflow.

Read it from top to bottom. `run_sweep` settles the plan and connects. `_train_and_evaluate` starts the stream and the
trainers, has Ray Tune follow them (`trials.py`) under the eyes of the watch (`watch.py`), and collects results
(`ending.py`). `finish` there summarises them.

The driver holds no state that a restart needs. Checkpoints, ended SAEs and the outbox lie in the study's folder.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import pandas as pd
import ray
from ray.actor import ActorHandle

from raysae.cluster.connect import connect
from raysae.cluster.room import machine_of
from raysae.config import SweepConfig, error_kind
from raysae.processes import INTERRUPTED
from raysae.stream.queue import patiently, start_stream
from raysae.stream.relay import CONSUMERS, start_relays
from raysae.stream.task import Streaming
from raysae.study.place import CONFIG, Place, check_writable, driving, new_place, with_absolute_paths
from raysae.study.plan import Plan, plan, store_bytes
from raysae.sweep.capacity import BankPlan, check_cluster, pack
from raysae.sweep.ending import (
    collect_results,
    counted,
    downstream_questions,
    evaluate_downstream,
    finish,
    resume_command,
)
from raysae.sweep.trials import make_tuner
from raysae.sweep.watch import StuckError, Watch
from raysae.tracking.client import import_ahead
from raysae.tracking.runs import Study
from raysae.train.actor import start_trainer
from raysae.train.task import Training

# Longest wait of Ray Tune for the training. Its processes would take the cores that trainers and producers start with.
START_SECONDS = 60.0
STOP_SPARE_SECONDS = 15.0  # After faults.stop_seconds, trainers have this long to say that they have stopped
CLOSE_SECONDS = 20.0  # Longest wait for MLflow when the sweep breaks off


def run_sweep(
    config: SweepConfig, resume: str | None = None, allow: frozenset[str] = frozenset(), made_for: str | None = None
) -> int:
    """Train and evaluate every SAE of the sweep. Returns the exit code.

    It is 0, or 1 when an SAE failed or was not measured, or 130 when the sweep was interrupted.

    Args:
        resume: a study to go on with. `config` is then its config (`place.saved_config`).
        allow: facts in which this run may differ from the one that wrote the study's checkpoints.
        made_for: the study whose analysis needs these SAEs. Jobs that look for the latest sweep pass over this one.

    Raises:
        UserError: a knob has a value that does not fit the model, the text, the cluster or the storage.
    """
    began = time.monotonic()
    config = with_absolute_paths(config)
    check_writable(config)
    settled = plan(config)
    import_ahead()  # Meanwhile Ray starts, which is mostly waiting
    connect(settled.config.resources.address, store_bytes(settled))
    bank_plans = pack(settled.saes, check_cluster(settled), settled.widths)
    settled = _fixed(settled, len(bank_plans))
    place = new_place(settled.config, resume)
    with driving(place):
        return _drive(settled, bank_plans, place, allow, made_for, began)


def _drive(
    settled: Plan,
    bank_plans: list[BankPlan],
    place: Place,
    allow: frozenset[str],
    made_for: str | None,
    began: float,
) -> int:
    """Run the study and close it, whatever happens. Returns the exit code."""
    knobs = settled.config.model_dump()
    study = Study(place.local / "outbox.db", settled.config.tracking, place.name, knobs, made_for=made_for)
    if not place.remote:
        study.artifact(None, place.local / CONFIG)  # Analyses read the settings there where the folder is out of reach
    for sae in settled.saes:
        study.child(sae.name, sae.model_dump(exclude_none=True) | {"model": settled.config.model.name})
    what = f"{counted(len(settled.saes), 'SAE')} in {counted(len(bank_plans), 'bank')}"
    print(f"Study {place.name}: {what}, {place.folder}", flush=True)
    with interruptible() as interruptions:
        try:
            results, unmeasured, stream = _train_and_evaluate(settled, bank_plans, study, place, allow, interruptions)
            return finish(settled, results, unmeasured, stream, study, place, time.monotonic() - began)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            told = "Interrupted" if interrupted else "The sweep broke off"
            going_on = resume_command(settled.config, place)
            print(f"\n{told}; checkpoints are kept. To go on: {going_on}", file=sys.stderr)
            close_runs(study, "KILLED" if interrupted else "FAILED")
            if interrupted:
                return INTERRUPTED
            if isinstance(error, StuckError):
                print(f"error: {error}", file=sys.stderr)
                return 1
            raise


def close_runs(study: Study, status: str) -> None:
    """End the study's runs in MLflow. Takes half a minute at most.

    Signals are ignored until the process ends. Breaking off here would leave the runs open.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    study.end(None, status)
    study.flush(CLOSE_SECONDS)
    study.close()


def _train_and_evaluate(
    settled: Plan,
    bank_plans: list[BankPlan],
    study: Study,
    place: Place,
    allow: frozenset[str],
    interruptions: list[int],
) -> tuple[pd.DataFrame, list[str], dict]:
    """Train and evaluate all SAEs.

    Args:
        interruptions: signals so far, see `interruptible`.

    Returns:
        The results of all SAEs, what could not be measured, and the stream's statistics.
    """
    queue, relays, trainers = _start(settled, bank_plans, place, allow)
    trainer_of = {sae.name: trainers[bank.name] for bank in bank_plans for sae in bank.saes}
    faults = settled.config.faults
    saes = {bank.name: [sae.name for sae in bank.saes] for bank in bank_plans}
    watch = Watch(settled, queue, trainers, saes, study, relays)
    try:
        with watch:
            watch.await_training(START_SECONDS)
            make_tuner(settled, trainer_of, place, watch).fit()
            results = collect_results(settled, trainer_of, study, watch)
            began = time.monotonic()
            questions = downstream_questions(settled, trainer_of, results, place, watch)
            calls = [(question, [queue.evaluate.remote(*question)]) for question in questions]
            watch.dismiss_trainers()
            unmeasured = evaluate_downstream(settled, queue, calls, results, study)
            took = time.monotonic() - began
        stream = patiently(lambda: ray.get(queue.stats.remote()), faults.queue_seconds)
        return results, unmeasured, stream | {"evaluation_seconds": took}
    except (KeyboardInterrupt, StuckError):
        if len(interruptions) < 2:
            _stop(list(trainers.values()), faults.stop_seconds + STOP_SPARE_SECONDS)
        raise
    finally:
        try:
            watch.end_trainers()
        finally:
            for actor in (*relays, queue):  # Ray Tune keeps handles of them: they would outlive the sweep
                ray.kill(actor)


def _start(
    settled: Plan, bank_plans: list[BankPlan], place: Place, allow: frozenset[str]
) -> tuple[ActorHandle, list[ActorHandle], dict[str, ActorHandle]]:
    """Start the stream's queue, its relays, and a trainer for each bank plan. Returns them, trainers by bank."""
    config = settled.config
    name = f"raysae-{place.name}-{time.time_ns()}"
    streaming = Streaming(
        model=config.model, stream=config.stream, resources=config.resources, training=settled.training,
        evaluation=settled.evaluation, contexts=settled.contexts, widths=settled.streamed_widths,
        shards=settled.shards, held_out=settled.evaluation_shards, threads=config.stream.threads,
        faults=config.faults, skipped=place.skipped,
    )  # fmt: skip
    queue = start_stream(streaming, name)
    queue.expect.remote([bank.name for bank in bank_plans])
    by_hook_point = sorted(bank_plans, key=lambda bank: error_kind(bank.hook_point)[1])
    relays, speaks_to = start_relays(name, [bank.name for bank in by_hook_point], CONSUMERS)
    trainers = {
        bank.name: start_trainer(Training(
            queue=speaks_to[bank.name], consumer=bank.name, folder=place.folder, hook_point=bank.hook_point,
            width=settled.widths[bank.hook_point], saes=bank.saes, training=settled.training,
            evaluation=settled.evaluation, config=config, threads=config.train.threads, allow=allow,
        ))
        for bank in bank_plans
    }  # fmt: skip
    return queue, relays, trainers


def _stop(trainers: Sequence[ActorHandle], seconds: float) -> None:
    """Have the trainers write checkpoints. Whatever state they are in, the newest checkpoints count."""
    with suppress(Exception):
        ray.get([trainer.stop.remote() for trainer in trainers if machine_of(trainer)], timeout=seconds)


# ---------------------------------------------------------------- processes


def _fixed(settled: Plan, banks: int) -> Plan:
    """`settled` with the number of banks, and the threads of trainers and producers, in its config.

    Bits depend on the threads, so a resumed study keeps them.
    """
    config, (cores, machines) = settled.config, _cores()
    threads = config.train.threads or max(1, cores // -(-banks // machines))
    update = {
        "resources": config.resources.model_copy(update={"banks": banks}),
        "train": config.train.model_copy(update={"threads": threads}),
        "stream": config.stream.model_copy(update={"threads": config.stream.threads or cores}),
    }
    return replace(settled, config=settled.config.model_copy(update=update))


def _cores() -> tuple[int, int]:
    """CPU cores of the smallest machine that has any for actors, and how many such machines there are."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cores = [count for count in cores if count > 0] or [1]
    return min(cores), len(cores)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Make SIGTERM count as Ctrl-C: trainers write checkpoints and runs are closed.

    Yields the list of such signals so far. At the second one nobody wants to wait for checkpoints any more.
    """
    interruptions: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interruptions.append(number)
        if len(interruptions) == 1:
            print("\nStopping: trainers write checkpoints. Once more, and nobody waits for them.", file=sys.stderr)
        raise KeyboardInterrupt

    # A job in the background of a shell ignores Ctrl-C, and goes on doing so
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interruptions
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
