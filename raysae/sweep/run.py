"""The main job's driver: one stream, a few trainers, one light Ray Tune trial per SAE, everything in MLflow.

Top to bottom: settle the plan, connect, start the stream and the trainers, let Ray Tune follow them, evaluate in the language model, summarise.
The driver holds no state that a restart needs: checkpoints, ended SAEs and the outbox lie in the study's folder.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import FIFOScheduler
from rich.console import Console

from raysae.cli import command
from raysae.config import SweepConfig, error_kind
from raysae.stream.queue import patiently, start_stream
from raysae.stream.relay import CONSUMERS, start_relays
from raysae.stream.room import machine_of
from raysae.stream.state import StreamError
from raysae.sweep.cluster import connect
from raysae.sweep.handle import Leave, Over, Rungs, follow, track
from raysae.sweep.place import Place, check_writable, driving, new_place, with_absolute_paths
from raysae.sweep.preflight import Bank, Plan, check_cluster, pack, plan
from raysae.sweep.summary import summary_table, write_summary
from raysae.sweep.table import ENDED
from raysae.sweep.watch import StuckError, Watch
from raysae.tracking.client import import_ahead
from raysae.tracking.find import URL_TAG
from raysae.tracking.outbox import refusal
from raysae.tracking.runs import Study
from raysae.train.actor import start_trainer

MIB = 2**20
SECONDS = 1.0  # between two questions to an actor that is starting
START_SECONDS = 60.0  # at most, that Ray Tune waits for the training: its processes would take the cores that trainers and producers start with
INTERRUPTED = 130
EVALUATED_BYTES = 2 << 30  # of the largest SAEs that a producer evaluates together
RUNGS = "rungs.jsonl"  # what ASHA has decided
TRIALS, TRIAL_BYTES = 1, 128 * MIB  # trials at a time where no scheduler compares them, and the memory that the process of one takes


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
    connect(settled.config.resources.address, _store_bytes(settled))
    banks = pack(settled.saes, check_cluster(settled), settled.widths)
    settled = _fixed(settled, len(banks))
    place = new_place(settled.config, resume)
    with driving(place):
        return _drive(settled, banks, place, allow, made_for, began)


def _drive(settled: Plan, banks: list[Bank], place: Place, allow: frozenset[str], made_for: str | None, began: float) -> int:
    """The exit code."""
    study = Study(place.local / "outbox.db", settled.config.tracking, place.name, settled.config.model_dump(), made_for=made_for)
    for sae in settled.saes:
        study.child(sae.name, sae.model_dump(exclude_none=True) | {"model": settled.config.model.name})
    print(f"Study {place.name}: {_counted(len(settled.saes), 'SAE')} in {_counted(len(banks), 'bank')}, {place.folder}", flush=True)
    with _interruptible() as interruptions:
        try:
            results, unmeasured, stream = _train_and_evaluate(settled, banks, study, place, allow, interruptions)
            return _finish(settled, results, unmeasured, stream, study, place, time.monotonic() - began)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            told = "Interrupted" if interrupted else "The sweep broke off"
            print(f"\n{told}; checkpoints are kept. To go on: {go_on(settled.config, place)}", file=sys.stderr)
            _close(study, "KILLED" if interrupted else "FAILED")
            if interrupted:
                return INTERRUPTED
            if isinstance(error, StuckError):
                print(f"error: {error}", file=sys.stderr)
                return 1
            raise


def _close(study: Study, status: str) -> None:
    """End the study's runs in MLflow. Nothing is heard meanwhile, half a minute at most: broken off, it would leave them open."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    study.end(None, status)
    study.flush(20)
    study.close()


def go_on(config: SweepConfig, place: Place) -> str:
    """The command that goes on with the study."""
    return command(f"jobs/scaling_sweep.py --output {config.output} --resume {place.name}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _store_bytes(settled: Plan) -> int:
    """What a Ray of its own needs as object store: activations in flight, the held-out ones, and the contexts."""
    item = 2 if settled.config.model.dtype == "bfloat16" else 4
    held_out = settled.evaluation_shards * settled.evaluation.rows_per_shard * item * sum(settled.streamed_widths.values())
    tokens = sum(contexts.tokens.nbytes for contexts in settled.contexts.values())
    return int(settled.config.stream.mib_in_flight * MIB + 1.2 * held_out + tokens) + 256 * MIB


def _train_and_evaluate(
    settled: Plan, banks: list[Bank], study: Study, place: Place, allow: frozenset[str], interruptions: list[int]
) -> tuple[pd.DataFrame, list[str], dict]:
    """The results of all SAEs, what could not be measured, and the stream's statistics. `interruptions`: see `_interruptible`."""
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
            tuner(settled, trainer_of, place, watch).fit()
            results = _results(settled, trainer_of, study, watch)
            began = time.monotonic()
            calls = [(question, [queue.evaluate.remote(*question)]) for question in _questions(settled, trainer_of, results, place, watch)]
            watch.dismiss_trainers()
            unmeasured = _evaluate(settled, queue, calls, results, study)
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


def tuner(settled: Plan, trainer_of: Mapping[str, ActorHandle], place: Place, watch: Watch) -> tune.Tuner:
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


def _results(settled: Plan, trainer_of: Mapping[str, ActorHandle], study: Study, watch: Watch) -> pd.DataFrame:
    """One row per SAE: its knobs, the numbers of its last report, and how it ended. Waits until all have: a trial ends before its SAE is saved, and
    the final report of one that the scheduler ended comes after its trial."""
    rows = []
    for sae in settled.saes:
        numbers, ended = _outcome(trainer_of[sae.name], sae.name, study, watch)
        rows.append({**numbers, "name": sae.name, **sae.model_dump(), **ended})
    return pd.DataFrame(rows)


def _outcome(trainer: ActorHandle, name: str, study: Study, watch: Watch) -> tuple[dict, dict]:
    """The numbers of the SAE's last report, and its tokens, status and reason once it has ended. StuckError: it never will."""
    last: dict = {}
    seen, over = 0, False
    try:
        while not over:
            reports, over = _answer(trainer.reports.remote(name, seen), watch)
            seen += len(reports)
            for last in reports:
                track(study, name, last)
    except ray.exceptions.RayTaskError:
        pass  # the whole trainer has failed: its status says why
    except ray.exceptions.RayError as error:
        return {}, {"tokens": 0, "status": "failed", "reason": f"its trainer died: {str(error).splitlines()[0]}"}
    ended = None
    while ended is None or ended["state"] not in ENDED:  # a process just restarted looks into its files first
        time.sleep(SECONDS if ended else 0)
        ended = next(row for row in _answer(trainer.status.remote(), watch) if row["name"] == name)
    numbers = {key: value for key, value in last.items() if isinstance(value, (int, float))}
    return numbers, {"tokens": ended["tokens"], "status": ended["state"], "reason": ended["message"]}


def _answer(question: ray.ObjectRef, watch: Watch) -> Any:
    """What an actor answers, be it after its restart. StuckError: the sweep cannot go on."""
    while True:
        watch.check()
        with suppress(ray.exceptions.GetTimeoutError):
            return ray.get(question, timeout=SECONDS)


def _questions(settled: Plan, trainer_of: Mapping[str, ActorHandle], results: pd.DataFrame, place: Place, watch: Watch) -> Iterator[tuple]:
    """What `StreamQueue.evaluate` is to be asked, for each hook point that has SAEs to evaluate."""
    predicted = settled.config.evaluation.predicted_tokens
    if not predicted:
        return
    for hook, group in results[results["status"].isin(("done", "stopped"))].groupby("hook_point"):
        if error_kind(hook)[0]:  # an error has no place in the model that something else could take
            continue
        longest = group.loc[group["tokens"].idxmax(), "name"]  # it has seen the rows of all the others
        mean = _answer(trainer_of[longest].mean.remote(longest), watch)
        largest = 8 * max(sae.width for sae in settled.saes) * settled.streamed_widths[hook]  # bytes of both weight matrices
        yield hook, {name: place.sae(name) for name in group["name"]}, mean, predicted, max(1, EVALUATED_BYTES // largest)


def _evaluate(settled: Plan, queue: ActorHandle, calls: list[tuple[tuple, list]], results: pd.DataFrame, study: Study) -> list[str]:
    """Adds cross-entropy and KL to `results`: one clean pass per hook point, then one partial pass per SAE, in the producers. `calls` are the
    questions with the answers that are on their way. Returns a sentence for each hook point at which that failed."""
    unmeasured = []
    for question, begun in calls:
        try:
            answer = partial(_evaluated, queue, question, begun)
            evaluated = patiently(answer, settled.config.faults.queue_seconds)
        except (ray.exceptions.RayError, StreamError) as error:
            unmeasured.append(f"Cross-entropy and KL at {question[0]} could not be measured: {str(error).strip().splitlines()[-1]}")
            continue
        for name, metrics in evaluated.items():
            known = {key: value for key, value in metrics.items() if value is not None}
            row = results.index[results["name"] == name][0]
            results.loc[row, list(known)] = list(known.values())
            study.metrics(name, known, step=int(results.loc[row, "tokens"]))
    return unmeasured


def _evaluated(queue: ActorHandle, question: tuple, begun: list[ray.ObjectRef]) -> dict:
    """The answer that is on its way; asked anew where the queue's process died with it."""
    return ray.get(begun.pop() if begun else queue.evaluate.remote(*question))


def _finish(settled: Plan, results: pd.DataFrame, unmeasured: list[str], stream: dict, study: Study, place: Place, seconds: float) -> int:
    """Close the runs, write and print the summary; the exit code."""
    console, config = Console(), settled.config
    for row in results.itertuples():
        ended = row.status in ("done", "stopped")
        if ended and place.remote:
            study.tag(row.name, {URL_TAG: place.sae(row.name)})
        elif ended:
            study.artifact(row.name, place.sae(row.name), "sae")
        else:
            study.tag(row.name, {"raysae.reason": row.reason or "it did not come to its end"})
        study.end(row.name, "FINISHED" if ended else "FAILED")
    for path in write_summary(results, place.local / "summary", Path(config.model.name).name):
        study.artifact(None, path, "summary")
    if (rungs := place.local / RUNGS).exists():
        study.artifact(None, rungs, "summary")
    if skipped := stream["shards_skipped"]:
        study.tag(None, {"raysae.skipped_shards": "; ".join(f"{of}: {', '.join(shards)}" for of, shards in skipped.items())})
    if unmeasured:
        study.tag(None, {"raysae.unmeasured": "; ".join(unmeasured)})
    failed = int((~results["status"].isin(("done", "stopped"))).sum())
    needed = settled.shards * settled.training.shard_contexts
    study.metrics(None, _headlines(results, stream, needed) | {"saes": len(results), "saes_failed": failed, "minutes": seconds / 60}, step=0)
    study.end(None, "FAILED" if failed == len(results) else "FINISHED")
    console.print(summary_table(results, f"Study {place.name}"))
    console.print(
        f"Language model: {stream['contexts_forwarded']:,} contexts forwarded for training ({needed:,} needed, "
        f"{stream['shards_from_cache']} of {settled.shards} shards from the cache), {stream['evaluation_contexts_forwarded']:,} for held-out rows. "
        f"{stream['blocks_served']} blocks served, "
        f"at most {stream['peak_bytes_in_flight'] / MIB:.0f} MiB in flight. "
        f"Consumers waited {stream['consumer_wait_seconds']:.0f} s, producers {stream['producer_wait_seconds']:.0f} s. "
        f"{seconds / 60:.1f} minutes in all, {stream['evaluation_seconds']:.0f} s of these for cross-entropy and KL.",
        highlight=False,
    )
    for of, shards in skipped.items():
        for shard, noted in shards.items():
            console.print(f"Skipped: shard {shard} of the {of} stream, {noted['reason']}", highlight=False, soft_wrap=True)
    for sentence in unmeasured:
        console.print(sentence, highlight=False, soft_wrap=True)
    for sentence in _what_next(results, unmeasured, config, place):
        console.print(sentence, highlight=False, soft_wrap=True)
    unsent = study.flush(60)
    console.print(f"SAEs:    {place.folder}/saes\nSummary: {place.local / 'summary'}", highlight=False, soft_wrap=True)
    if not unsent:
        console.print(
            f"MLflow:  experiment '{config.tracking.experiment}' at {config.tracking.uri}: {_how_to_open(config)}", highlight=False, soft_wrap=True
        )
    if refused := refusal(study.outbox):
        console.print(f"         {refused}", highlight=False, soft_wrap=True)
    study.close()
    return 1 if failed or unmeasured else 0


def _what_next(results: pd.DataFrame, unmeasured: list[str], config: SweepConfig, place: Place) -> Iterator[str]:
    """What can be done about what has failed. An SAE that has an outcome, be it that its loss was NaN, is not trained again."""
    failed = results.loc[~results["status"].isin(("done", "stopped")), "name"]
    if len(failed):
        from raysae.train.outcome import Outcomes  # with torch, which the driver does not need otherwise

        outcomes = Outcomes(f"{place.folder}/saes")
        for_good = [name for name in failed if outcomes.load(name)]
        if for_good:
            yield (
                f"{_counted(len(for_good), 'SAE')} failed for good: trained again, the same would come out. A new study with other settings, "
                "such as a lower learning rate, may do better."
            )
        if len(for_good) < len(failed):
            yield f"SAEs that have not come to their end go on with: {go_on(config, place)}"
            return
    if unmeasured:
        yield f"It is tried again with: {go_on(config, place)}"


def _headlines(results: pd.DataFrame, stream: dict, needed: int) -> dict[str, float]:
    """The study's own numbers, in sections of MLflow's page by their prefixes. At step 0: MLflow draws what has steps as a line.

    Contexts needed, shards skipped and rows consumed (by all SAEs) are the same whatever died; the others count what was done, done twice included.
    """
    best = {key: results[key].agg(pick) for key, pick in (("fvu", "min"), ("ce_recovered", "max")) if key in results}
    shown = (
        "contexts_forwarded", "evaluation_contexts_forwarded", "shards_from_cache", "consumer_wait_seconds", "producer_wait_seconds",
        "evaluation_seconds",
    )  # fmt: skip
    flow = {key: stream[key] for key in shown} | {"peak_mib_in_flight": stream["peak_bytes_in_flight"] / MIB}
    flow |= {"contexts_needed": needed, "shards_skipped": sum(map(len, stream["shards_skipped"].values())), "rows_consumed": results["tokens"].sum()}
    return {f"best/{key}": value for key, value in best.items() if pd.notna(value)} | {f"stream/{key}": value for key, value in flow.items()}


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


def _how_to_open(config: SweepConfig) -> str:
    uri = config.tracking.uri
    if uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}":
        return "`make ui` opens it"
    return command(f"-m raysae.tracking.ui --uri {uri}") if uri.startswith("sqlite") else "open it in a browser"


@contextmanager
def _interruptible() -> Iterator[list[int]]:
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
