"""How a sweep ends, once Ray Tune has followed every SAE.

In the order of their use: `collect_results` asks trainers how each SAE ended. `downstream_questions` and
`evaluate_downstream` have the producers measure cross-entropy and KL. `finish` closes the runs and prints the summary.

Everything here reads and reports. What an SAE is was settled by its trainer.
"""

from __future__ import annotations

import sys
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

from raysae.borders import reason
from raysae.config import SweepConfig, error_kind
from raysae.processes import command, job_script
from raysae.stream.queue import patiently
from raysae.stream.state import StreamError
from raysae.study.place import Place
from raysae.study.plan import MIB, Plan
from raysae.sweep.notes import held_out_notes, left_out_note
from raysae.sweep.summary import EVALUATED, summary_table, write_summary
from raysae.sweep.trials import RUNGS
from raysae.sweep.watch import Watch, track
from raysae.tracking.database import database_file
from raysae.tracking.find import URL_TAG
from raysae.tracking.outbox import refusal
from raysae.tracking.runs import Study
from raysae.train.progress import ENDED

WIDE = 140  # Columns of the summary where no terminal limits them
ASK_SECONDS = 1.0  # Time between two questions to an actor that is starting
FLUSH_SECONDS = 60.0  # Longest wait for MLflow at the end
EVALUATED_BYTES = 2 << 30  # Bytes of the SAEs that a producer evaluates together, were all as large as the largest


def resume_command(config: SweepConfig, place: Place) -> str:
    """The command that goes on with the study."""
    return command(job_script("scaling_sweep.py"), "--output", config.output, "--resume", place.name)


def counted(number: int, noun: str) -> str:
    """`1 SAE`, `2 SAEs`."""
    return f"{number} {noun}{'s' * (number != 1)}"


# ---------------------------------------------------------------- how the SAEs ended


def collect_results(settled: Plan, trainer_of: Mapping[str, ActorHandle], study: Study, watch: Watch) -> pd.DataFrame:
    """One row per SAE: its knobs, the numbers of its last report, and how it ended.

    Waits until all SAEs have ended. A trial ends before its SAE is saved, and an SAE that the scheduler stops makes
    its final report after its trial.

    Raises:
        StuckError: the sweep cannot go on.
    """
    rows = []
    for sae in settled.saes:
        numbers, ended = _outcome(trainer_of[sae.name], sae.name, study, watch)
        rows.append({**numbers, "name": sae.name, **sae.model_dump(), **ended})
    return pd.DataFrame(rows)


def _outcome(trainer: ActorHandle, name: str, study: Study, watch: Watch) -> tuple[dict, dict]:
    """The numbers of the SAE's last report, and its tokens, status and reason once it has ended."""
    last: dict = {}
    seen, over = 0, False
    try:
        while not over:
            reports, over = _answer(trainer.reports.remote(name, seen), watch)
            seen += len(reports)
            for last in reports:
                track(study, name, last)
    except ray.exceptions.RayTaskError:
        pass  # The whole trainer has failed. Its status says why.
    except ray.exceptions.RayError as error:
        return {}, {"tokens": 0, "status": "failed", "reason": f"its trainer died: {reason(error)}"}
    ended = None
    while ended is None or ended["state"] not in ENDED:  # A process just restarted looks into its files first
        time.sleep(ASK_SECONDS if ended else 0)
        ended = next(row for row in _answer(trainer.status.remote(), watch) if row["name"] == name)
    numbers = {key: value for key, value in last.items() if isinstance(value, (int, float))}
    return numbers, {"tokens": ended["tokens"], "status": ended["state"], "reason": ended["message"]}


def _answer(question: ray.ObjectRef, watch: Watch) -> Any:
    """What an actor answers, also after its restart. StuckError: the sweep cannot go on."""
    while True:
        watch.check()
        with suppress(ray.exceptions.GetTimeoutError):
            return ray.get(question, timeout=ASK_SECONDS)


# ---------------------------------------------------------------- cross-entropy and KL


def downstream_questions(
    settled: Plan, trainer_of: Mapping[str, ActorHandle], results: pd.DataFrame, place: Place, watch: Watch
) -> Iterator[tuple]:
    """The arguments of `StreamQueue.evaluate` for each hook point that has SAEs to evaluate.

    An SAE of an error is not evaluated: the model has no place where its reconstruction could go.
    """
    predicted = settled.config.evaluation.predicted_tokens
    if not predicted:
        return
    for hook, group in results[results["status"].isin(EVALUATED)].groupby("hook_point"):
        if error_kind(hook)[0]:
            continue
        longest = group.loc[group["tokens"].idxmax(), "name"]  # It has seen the rows of all the others
        mean = _answer(trainer_of[longest].mean.remote(longest), watch)
        widest = max(sae.width for sae in settled.saes)
        largest = 8 * widest * settled.streamed_widths[hook]  # Bytes of both weight matrices
        yield hook, {n: place.sae(n) for n in group["name"]}, mean, predicted, max(1, EVALUATED_BYTES // largest)


def evaluate_downstream(
    settled: Plan, queue: ActorHandle, calls: list[tuple[tuple, list]], results: pd.DataFrame, study: Study
) -> list[str]:
    """Add cross-entropy and KL to `results`.

    The producers make one clean pass per hook point, then one partial pass per SAE.

    Args:
        calls: the questions, each with a list that holds the reference of its answer.

    Returns:
        A sentence for each hook point at which the measurement failed.
    """
    unmeasured = []
    for question, begun in calls:
        try:
            answer = partial(_evaluated, queue, question, begun)
            evaluated = patiently(answer, settled.config.faults.queue_seconds)
        except (ray.exceptions.RayError, StreamError) as error:
            cause = str(error).strip().splitlines()[-1]
            unmeasured.append(f"Cross-entropy and KL at {question[0]} could not be measured: {cause}")
            continue
        for name, metrics in evaluated.items():
            known = {key: value for key, value in metrics.items() if value is not None}
            row = results.index[results["name"] == name][0]
            results.loc[row, list(known)] = list(known.values())
            study.metrics(name, known, step=int(results.loc[row, "tokens"]))
    return unmeasured


def _evaluated(queue: ActorHandle, question: tuple, begun: list[ray.ObjectRef]) -> dict:
    """The answer to the call that was made. A second try asks anew: the queue's process died with the first call."""
    return ray.get(begun.pop() if begun else queue.evaluate.remote(*question))


# ---------------------------------------------------------------- the end


def finish(
    settled: Plan,
    results: pd.DataFrame,
    unmeasured: list[str],
    stream: dict,
    study: Study,
    place: Place,
    seconds: float,
) -> int:
    """Close the runs, write and print the summary. Returns the exit code.

    Args:
        unmeasured: the sentences of `evaluate_downstream`.
        stream: the queue's statistics.
        seconds: how long the sweep took.
    """
    failed = int((~results["status"].isin(EVALUATED)).sum())
    _close_saes(results, study, place)
    notes = [*left_out_note(stream, settled.training), *held_out_notes(results, settled.config.evaluation)]
    for path in write_summary(results, place.local / "summary", Path(settled.config.model.name).name, notes):
        study.artifact(None, path, "summary")
    if (rungs := place.local / RUNGS).exists():
        study.artifact(None, rungs, "summary")
    if skipped := stream["shards_skipped"]:
        told = "; ".join(f"{of}: {', '.join(shards)}" for of, shards in skipped.items())
        study.tag(None, {"raysae.skipped_shards": told})
    if unmeasured:
        study.tag(None, {"raysae.unmeasured": "; ".join(unmeasured)})
    if notes:
        study.tag(None, {"raysae.notes": " ".join(notes)})
    needed = settled.shards * settled.training.shard_contexts
    counts = {"saes": len(results), "saes_failed": failed, "minutes": seconds / 60}
    study.metrics(None, _headlines(results, stream, needed) | counts, step=0)
    study.end(None, "FAILED" if failed == len(results) else "FINISHED")
    console = Console(width=None if sys.stdout.isatty() else WIDE, markup=False)  # Paths may have brackets
    console.print(summary_table(results, f"Study {place.name}"))
    console.print(_told_of_the_stream(stream, needed, settled.shards, seconds), highlight=False)
    told = (*_told_of_skipped(skipped), *notes, *unmeasured)
    for sentence in (*told, *what_next(results, unmeasured, settled.config, place)):
        console.print(sentence, highlight=False, soft_wrap=True)
    for sentence in _where_it_is(settled.config, place, study):
        console.print(sentence, highlight=False, soft_wrap=True)
    study.close()
    return 1 if failed or unmeasured else 0


def _close_saes(results: pd.DataFrame, study: Study, place: Place) -> None:
    """End the SAEs' runs, each with the SAE or its URL, or with the reason why there is none."""
    for row in results.itertuples():
        ended = row.status in EVALUATED
        if ended and place.remote:
            study.tag(row.name, {URL_TAG: place.sae(row.name)})
        elif ended:
            study.artifact(row.name, place.sae(row.name), "sae")
        else:
            study.tag(row.name, {"raysae.reason": row.reason or "it did not come to its end"})
        study.end(row.name, "FINISHED" if ended else "FAILED")


def _told_of_the_stream(stream: dict, needed: int, shards: int, seconds: float) -> str:
    """What the language model and the queue did. `needed` contexts and `shards` are those of an undisturbed run."""
    return (
        f"Language model: {stream['contexts_forwarded']:,} contexts forwarded for training ({needed:,} needed, "
        f"{stream['shards_from_cache']} of {shards} shards from the cache), "
        f"{stream['evaluation_contexts_forwarded']:,} for held-out rows. "
        f"{stream['blocks_served']} blocks served, at most {stream['peak_bytes_in_flight'] / MIB:.0f} MiB in flight. "
        f"Consumers waited {stream['consumer_wait_seconds']:.0f} s, "
        f"producers {stream['producer_wait_seconds']:.0f} s. {seconds / 60:.1f} minutes in all, "
        f"{stream['evaluation_seconds']:.0f} s of these for cross-entropy and KL."
    )


def _told_of_skipped(skipped: Mapping[str, Mapping[str, dict]]) -> Iterator[str]:
    for of, shards in skipped.items():
        for shard, noted in shards.items():
            yield f"Skipped: shard {shard} of the {of} stream, {noted['reason']}"


def _where_it_is(config: SweepConfig, place: Place, study: Study) -> Iterator[str]:
    """Where the SAEs and numbers lie. Waits for MLflow to take the numbers, FLUSH_SECONDS at most."""
    unsent = study.flush(FLUSH_SECONDS)
    yield f"SAEs:    {place.folder}/saes\nSummary: {place.local / 'summary'}"
    if not unsent:
        tracking = config.tracking
        yield f"MLflow:  experiment '{tracking.experiment}' at {tracking.uri}: {_how_to_open(tracking.uri)}"
    if refused := refusal(study.outbox):
        yield f"         {refused}"


def what_next(results: pd.DataFrame, unmeasured: list[str], config: SweepConfig, place: Place) -> Iterator[str]:
    """What the user can do about what has failed.

    An SAE with an outcome on disk is not trained again, even if the outcome is that its loss was NaN.
    """
    failed = results.loc[~results["status"].isin(EVALUATED), "name"]
    if len(failed):
        from raysae.train.outcome import Outcomes  # Imports torch, which the driver does not need otherwise

        outcomes = Outcomes(f"{place.folder}/saes")
        for_good = [name for name in failed if outcomes.load(name)]
        if for_good:
            yield (
                f"{counted(len(for_good), 'SAE')} failed for good: trained again, the same would come out. "
                "A new study with other settings may do better: where a loss was nan, a lower learning rate."
            )
        if len(for_good) < len(failed):
            yield f"SAEs that have not come to their end go on with: {resume_command(config, place)}"
            return
    if unmeasured:
        yield f"It is tried again with: {resume_command(config, place)}"


def _headlines(results: pd.DataFrame, stream: dict, needed: int) -> dict[str, float]:
    """The study's own numbers. Their prefixes make sections of MLflow's page.

    They belong to step 0: MLflow draws a line of what has several steps. Contexts needed, shards skipped and rows
    consumed (by all SAEs) are the same whatever died. The others count all work done, repeated work included.
    """
    picks = (("fvu", "min"), ("ce_recovered", "max"))
    best = {key: results[key].agg(pick) for key, pick in picks if key in results}
    shown = (
        "contexts_forwarded", "evaluation_contexts_forwarded", "shards_from_cache", "consumer_wait_seconds",
        "producer_wait_seconds", "evaluation_seconds",
    )  # fmt: skip
    flow = {key: stream[key] for key in shown} | {"peak_mib_in_flight": stream["peak_bytes_in_flight"] / MIB}
    flow["contexts_needed"] = needed
    flow["shards_skipped"] = sum(map(len, stream["shards_skipped"].values()))
    flow["rows_consumed"] = results["tokens"].sum()
    numbers = {f"best/{key}": value for key, value in best.items() if pd.notna(value)}
    return numbers | {f"stream/{key}": value for key, value in flow.items()}


def _how_to_open(uri: str) -> str:
    """What to type or do to see the tracked study."""
    file = database_file(uri)
    if file == Path.cwd() / "mlflow.db":
        return "`make ui` opens it"
    return command("-m", "raysae.commands.ui", "--uri", uri) if file else "open it in a browser"
