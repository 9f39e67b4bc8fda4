"""The main job's driver: one stream, a few trainers, one light Ray Tune trial per SAE, everything in MLflow.

Top to bottom: settle the plan, connect, start the stream and the trainers, let Ray Tune follow them, evaluate in the language model, summarise.
The driver holds no state that a restart needs: checkpoints, ended SAEs and the outbox lie in the study's folder.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pandas as pd
import ray

from raysae.cluster.connect import connect
from raysae.cluster.room import machine_of
from raysae.config import SweepConfig, error_kind
from raysae.processes import INTERRUPTED
from raysae.stream.queue import patiently, start_stream
from raysae.stream.relay import CONSUMERS, start_relays
from raysae.study.place import Place, check_writable, driving, new_place, with_absolute_paths
from raysae.study.plan import Plan, plan, store_bytes
from raysae.sweep.capacity import BankPlan, check_cluster, pack
from raysae.sweep.ending import collect_results, counted, downstream_questions, evaluate_downstream, finish, resume_command
from raysae.sweep.trials import make_tuner
from raysae.sweep.watch import StuckError, Watch
from raysae.tracking.client import import_ahead
from raysae.tracking.runs import Study
from raysae.train.actor import start_trainer

START_SECONDS = 60.0  # at most, that Ray Tune waits for the training: its processes would take the cores that trainers and producers start with


def run_sweep(config: SweepConfig, resume: str | None = None, allow: frozenset[str] = frozenset(), made_for: str | None = None) -> int:
    """Train and evaluate every SAE of the sweep; returns the exit code: 0, or 1 when an SAE failed, or 130 when interrupted.

    `resume` names a study to go on with, whose config (`place.saved_config`) this is, `allow` the facts in which this run may differ from the one
    that wrote its checkpoints. `made_for` names the study whose analysis needs these SAEs: jobs that look for the latest sweep pass over this one.
    """
    began = time.monotonic()
    config = with_absolute_paths(config)
    check_writable(config)
    settled = plan(config)
    import_ahead()  # while Ray starts, which is mostly waiting
    connect(settled.config.resources.address, store_bytes(settled))
    banks = pack(settled.saes, check_cluster(settled), settled.widths)
    settled = _fixed(settled, len(banks))
    place = new_place(settled.config, resume)
    with driving(place):
        return _drive(settled, banks, place, allow, made_for, began)


def _drive(settled: Plan, banks: list[BankPlan], place: Place, allow: frozenset[str], made_for: str | None, began: float) -> int:
    """The exit code."""
    study = Study(place.local / "outbox.db", settled.config.tracking, place.name, settled.config.model_dump(), made_for=made_for)
    for sae in settled.saes:
        study.child(sae.name, sae.model_dump(exclude_none=True) | {"model": settled.config.model.name})
    print(f"Study {place.name}: {counted(len(settled.saes), 'SAE')} in {counted(len(banks), 'bank')}, {place.folder}", flush=True)
    with interruptible() as interruptions:
        try:
            results, unmeasured, stream = _train_and_evaluate(settled, banks, study, place, allow, interruptions)
            return finish(settled, results, unmeasured, stream, study, place, time.monotonic() - began)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            told = "Interrupted" if interrupted else "The sweep broke off"
            print(f"\n{told}; checkpoints are kept. To go on: {resume_command(settled.config, place)}", file=sys.stderr)
            close_runs(study, "KILLED" if interrupted else "FAILED")
            if interrupted:
                return INTERRUPTED
            if isinstance(error, StuckError):
                print(f"error: {error}", file=sys.stderr)
                return 1
            raise


def close_runs(study: Study, status: str) -> None:
    """End the study's runs in MLflow. Nothing is heard meanwhile, half a minute at most: broken off, it would leave them open."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    study.end(None, status)
    study.flush(20)
    study.close()


def _train_and_evaluate(
    settled: Plan, banks: list[BankPlan], study: Study, place: Place, allow: frozenset[str], interruptions: list[int]
) -> tuple[pd.DataFrame, list[str], dict]:
    """The results of all SAEs, what could not be measured, and the stream's statistics. `interruptions`: see `interruptible`."""
    config = settled.config
    name = f"raysae-{place.name}-{time.time_ns()}"
    queue = start_stream(
        model=config.model, stream=config.stream, resources=config.resources, training=settled.training, evaluation=settled.evaluation,
        contexts=settled.contexts, widths=settled.streamed_widths, shards=settled.shards,
        held_out=settled.evaluation_shards, threads=config.stream.threads, name=name, faults=config.faults, skipped=place.skipped,
    )  # fmt: skip
    queue.expect.remote([bank.name for bank in banks])
    by_hook_point = sorted(banks, key=lambda bank: error_kind(bank.hook_point)[1])
    relays, speaks_to = start_relays(name, [bank.name for bank in by_hook_point], CONSUMERS)
    trainers = {
        bank.name: start_trainer(
            queue=speaks_to[bank.name], consumer=bank.name, folder=place.folder, hook_point=bank.hook_point,
            width=settled.widths[bank.hook_point], saes=bank.saes, training=settled.training,
            evaluation=settled.evaluation, config=config, threads=config.train.threads, allow=allow,
        )
        for bank in banks
    }  # fmt: skip
    trainer_of = {sae.name: trainers[bank.name] for bank in banks for sae in bank.saes}
    try:
        with Watch(settled, queue, trainers, study, relays) as watch:
            watch.await_training(START_SECONDS)
            make_tuner(settled, trainer_of, place, watch).fit()
            results = collect_results(settled, trainer_of, study, watch)
            began = time.monotonic()
            calls = [(question, [queue.evaluate.remote(*question)]) for question in downstream_questions(settled, trainer_of, results, place, watch)]
            watch.dismiss_trainers()
            unmeasured = evaluate_downstream(settled, queue, calls, results, study)
            took = time.monotonic() - began
        return results, unmeasured, patiently(lambda: ray.get(queue.stats.remote()), config.faults.queue_seconds) | {"evaluation_seconds": took}
    except (KeyboardInterrupt, StuckError):
        if len(interruptions) < 2:
            with suppress(Exception):  # whatever state the actors are in, the newest checkpoints count
                ray.get([trainer.stop.remote() for trainer in trainers.values() if machine_of(trainer)], timeout=config.faults.stop_seconds + 15)
        raise
    finally:
        for actor in (*trainers.values(), *relays, queue):  # Ray Tune keeps handles of them: they would outlive the sweep where its process goes on
            ray.kill(actor)


# ---------------------------------------------------------------- processes


def _fixed(settled: Plan, banks: int) -> Plan:
    """`settled` with the number of banks and the threads of trainers and producers in its config: bits depend on the threads, so a resumed study
    keeps them."""
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
    """SIGTERM counts as Ctrl-C: trainers checkpoint and runs are closed. Yields the list of such signals so far: at the second nobody wants to wait
    for checkpoints any more."""
    interruptions: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        interruptions.append(number)
        if len(interruptions) == 1:
            print("\nStopping: trainers write checkpoints. Once more, and nobody waits for them.", file=sys.stderr)
        raise KeyboardInterrupt

    # A job in the background of a shell ignores Ctrl-C, and goes on doing so.
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield interruptions
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
