"""TODO docstring."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray.actor import ActorHandle
from rich.console import Console

from raysae.config import SweepConfig, error_kind
from raysae.processes import command
from raysae.stream.queue import patiently
from raysae.stream.state import StreamError
from raysae.study.place import Place
from raysae.study.plan import MIB, Plan
from raysae.sweep.live_table import ENDED
from raysae.sweep.summary import summary_table, write_summary
from raysae.sweep.trials import RUNGS
from raysae.sweep.watch import Watch, track
from raysae.tracking.find import URL_TAG
from raysae.tracking.outbox import refusal
from raysae.tracking.runs import Study

ASK_SECONDS = 1.0  # between two questions to an actor that is starting
EVALUATED_BYTES = 2 << 30  # of the largest SAEs that a producer evaluates together


def resume_command(config: SweepConfig, place: Place) -> str:
    """The command that goes on with the study."""
    return command(f"jobs/scaling_sweep.py --output {config.output} --resume {place.name}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def collect_results(settled: Plan, trainer_of: Mapping[str, ActorHandle], study: Study, watch: Watch) -> pd.DataFrame:
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
        time.sleep(ASK_SECONDS if ended else 0)
        ended = next(row for row in _answer(trainer.status.remote(), watch) if row["name"] == name)
    numbers = {key: value for key, value in last.items() if isinstance(value, (int, float))}
    return numbers, {"tokens": ended["tokens"], "status": ended["state"], "reason": ended["message"]}


def _answer(question: ray.ObjectRef, watch: Watch) -> Any:
    """What an actor answers, be it after its restart. StuckError: the sweep cannot go on."""
    while True:
        watch.check()
        with suppress(ray.exceptions.GetTimeoutError):
            return ray.get(question, timeout=ASK_SECONDS)


def downstream_questions(settled: Plan, trainer_of: Mapping[str, ActorHandle], results: pd.DataFrame, place: Place, watch: Watch) -> Iterator[tuple]:
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


def evaluate_downstream(settled: Plan, queue: ActorHandle, calls: list[tuple[tuple, list]], results: pd.DataFrame, study: Study) -> list[str]:
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


def finish(settled: Plan, results: pd.DataFrame, unmeasured: list[str], stream: dict, study: Study, place: Place, seconds: float) -> int:
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
    for sentence in what_next(results, unmeasured, config, place):
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


def what_next(results: pd.DataFrame, unmeasured: list[str], config: SweepConfig, place: Place) -> Iterator[str]:
    """What can be done about what has failed. An SAE that has an outcome, be it that its loss was NaN, is not trained again."""
    failed = results.loc[~results["status"].isin(("done", "stopped")), "name"]
    if len(failed):
        from raysae.train.outcome import Outcomes  # with torch, which the driver does not need otherwise

        outcomes = Outcomes(f"{place.folder}/saes")
        for_good = [name for name in failed if outcomes.load(name)]
        if for_good:
            yield (
                f"{counted(len(for_good), 'SAE')} failed for good: trained again, the same would come out. A new study with other settings, "
                "such as a lower learning rate, may do better."
            )
        if len(for_good) < len(failed):
            yield f"SAEs that have not come to their end go on with: {resume_command(config, place)}"
            return
    if unmeasured:
        yield f"It is tried again with: {resume_command(config, place)}"


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


def _how_to_open(config: SweepConfig) -> str:
    uri = config.tracking.uri
    if uri == f"sqlite:///{Path.cwd() / 'mlflow.db'}":
        return "`make ui` opens it"
    return command(f"-m raysae.commands.ui --uri {uri}") if uri.startswith("sqlite") else "open it in a browser"
