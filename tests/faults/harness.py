"""A small sweep as a user runs it: a driver process on a Ray cluster of the tests' own.

Here are ways to kill its processes and to compare what comes out. The language model is random and the text made up.
Both are made here, in a second.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pandas as pd
import torch
from ray._private import state
from safetensors.torch import load_file

from raysae.lm.facts import EMBEDDED

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "160",
}
CONTEXT, SKIPPED, BATCH = 64, 8, 64
SHARD_ROWS = 256 * (CONTEXT - SKIPPED)
JOB = (str(REPOSITORY / "jobs" / "scaling_sweep.py"),)  # Arguments of a driver's interpreter
ACTORS = {  # Kind of process → class of its Ray actor
    "producer": "Producer", "trainer": "Trainer", "queue": "StreamQueue", "relay": "Relay", "trial": "ImplicitFunc",
}  # fmt: skip
# Values that depend on the clock: no two runs agree
MEASURED = ("time", "tokens_per_second", "waited_share", "step_seconds", "evaluation_seconds")
# Metrics of a study that count the work done, repeated work included
WORK = (
    "stream/contexts_forwarded", "stream/evaluation_contexts_forwarded", "stream/shards_from_cache",
    "stream/consumer_wait_seconds", "stream/producer_wait_seconds", "stream/evaluation_seconds",
    "stream/peak_mib_in_flight", "minutes",
)  # fmt: skip
# Counters of the stream that are the same whatever dies
SAME = ("stream/contexts_needed", "stream/shards_skipped", "stream/rows_consumed")
# Knobs of a sweep that outlasts several faults, also on a fast machine
LONG = {"train__tokens": 36 * SHARD_ROWS, "stream__epochs": 4}
# Seconds that a busy machine may need. Nothing takes nearly as long on a quiet one.
PATIENCE = 600.0


def materials(folder: Path) -> None:
    """Makes `model` and `text.txt` in `folder`.

    The model is a random two-layer language model with the embedded one's tokenizer. The text is documents of random
    words.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(EMBEDDED, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.from_pretrained(folder / "model", **small, dtype="float32")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(500)]
    documents = (" ".join(rng.choices(words, k=60)) for _ in range(3000))
    (folder / "text.txt").write_text("\n<|end|>\n".join(documents))


@dataclass
class Sweep:
    """One study in `folder`, run by driver processes on the cluster at `address`.

    Names of knobs may have `__` for their dot.
    """

    address: str
    materials: Path
    folder: Path
    knobs: dict[str, object] = field(default_factory=dict)
    study: str = "study"
    driver: subprocess.Popen | None = None
    drivers: int = 0

    def __post_init__(self) -> None:
        self.knobs = {name.replace("__", "."): value for name, value in self.knobs.items()}

    @property
    def place(self) -> Path:
        return self.folder / "runs" / self.study

    def arguments(self) -> list[str]:
        settings = {
            "model.name": self.materials / "model",
            "text.source": self.materials / "text.txt",
            "text.delimiter": "<|end|>",
            "text.cache": self.materials / "tokens",
            "stream.context_length": CONTEXT,
            "stream.skip_positions": SKIPPED,
            "stream.cache": "off",
            "stream.threads": 1,
            "stream.mib_in_flight": 8,
            "hook_points": "resid_post.0",
            "widths": "64,128",
            "k": "4,8",
            "train.tokens": 6 * SHARD_ROWS,
            "train.batch": BATCH,
            "train.reports": 20,
            "train.threads": 1,
            "train.checkpoint_seconds": 0.5,
            "evaluation.rows": 10_000,
            "evaluation.interim_rows": 2_000,
            "evaluation.predicted_tokens": 2_000,
            "resources.banks": 2,
            "resources.address": self.address,
            "resources.shared_storage": True,
            "output": self.folder / "runs",
            "tracking.uri": f"sqlite:///{self.folder}/mlflow.db",
            "study": self.study,
        } | self.knobs
        return [word for key, value in settings.items() for word in (f"--{key}", str(value))]

    def start(self) -> None:
        """Starts a driver. If the study has begun already, the driver resumes it."""
        resume = (self.place / "config.yaml").exists()
        words = ["--output", str(self.folder / "runs"), "--resume", self.study] if resume else self.arguments()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drivers += 1
        with (self.folder / f"driver-{self.study}-{self.drivers}.log").open("w") as log:
            command = [sys.executable, *JOB, *words]
            self.driver = subprocess.Popen(
                command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def log(self) -> str:
        return (self.folder / f"driver-{self.study}-{self.drivers}.log").read_text()

    def finish(self, seconds: float = PATIENCE) -> None:
        """Waits for the driver to end well."""
        try:
            code = self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the sweep still runs after {seconds:g} s:\n{self.log()[-3000:]}") from None
        assert code == 0, self.log()[-5000:]

    def close(self) -> None:
        if self.driver and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()

    # ---------------------------------------------------------------- its processes

    def pids(self, kind: str) -> list[int]:
        """Process ids of the sweep's live processes of a kind: `driver` or one of ACTORS."""
        if kind == "driver":
            return [self.driver.pid] if self.driver.poll() is None else []
        return sorted(actor["Pid"] for actor in self._actors(kind))

    def _actors(self, kind: str) -> list[dict]:
        jobs = {job["JobID"] for job in state.jobs() if job["DriverPid"] == self.driver.pid and not job["IsDead"]}
        alive = (a for a in state.actors().values() if a["JobID"] in jobs and a["State"] == "ALIVE")
        # A trial's class may be "wrap_function.<locals>.ImplicitFunc"
        return [a for a in alive if a["ActorClassName"].rpartition(".")[2] == ACTORS[kind]]

    def nodes(self, kind: str) -> set[str]:
        """Ids (hexadecimal) of the machines of the sweep's live processes of a kind."""
        return {actor["Address"]["NodeID"] for actor in self._actors(kind)}

    def wait_for(self, kind: str, other_than: set[int] = frozenset(), seconds: float = PATIENCE) -> int:
        """Waits for a live process of the kind that is none of the others. Returns its process id."""
        return self.until(
            lambda: next((pid for pid in self.pids(kind) if pid not in other_than), None),
            seconds,
            f"there is no {kind}",
        )

    def kill(self, kind: str, pid: int | None = None) -> int:
        """Sends SIGKILL to a process of the kind and returns its process id. Waits for the end of a driver."""
        pid = pid or self.wait_for(kind)
        os.kill(pid, signal.SIGKILL)
        if kind == "driver":
            self.driver.wait()
        return pid

    def until(
        self, true: Callable[[], object], seconds: float = PATIENCE, otherwise: str = "nothing happened"
    ) -> object:
        give_up = time.monotonic() + seconds
        while not (value := true()):
            assert self.driver.poll() is None, (
                f"the driver has ended with {self.driver.returncode} before that:\n{self.log()[-3000:]}"
            )
            assert time.monotonic() < give_up, f"{otherwise} after {seconds:g} s:\n{self.log()[-3000:]}"
            time.sleep(0.02)
        return value

    def progress(self) -> dict[str, int]:
        """The step of each SAE's newest number in the outbox."""
        if not (self.place / "outbox.db").exists():
            return {}
        with suppress(sqlite3.OperationalError):  # The database is still being made
            return dict(self.numbers("SELECT run, max(step) FROM metrics WHERE run != '' AND key = 'fvu' GROUP BY run"))
        return {}

    def until_share(self, share: float) -> None:
        """Waits until every SAE has reported from beyond this share of its tokens."""
        rows = int(self.knobs.get("train.tokens", 6 * SHARD_ROWS))
        saes = len(str(self.knobs.get("widths", "64,128")).split(",")) * len(str(self.knobs.get("k", "4,8")).split(","))
        self.until(
            lambda: len(steps := self.progress()) == saes and min(steps.values()) >= share * rows,
            otherwise=f"not at {share:.0%}",
        )

    def number(self, key: str) -> float:
        """The largest value of a metric over all runs and steps."""
        return self.numbers(f"SELECT max(value) FROM metrics WHERE key = '{key}'")[0][0]

    def numbers(self, query: str) -> list[tuple]:
        db = sqlite3.connect(f"file:{self.place / 'outbox.db'}?mode=ro", uri=True, timeout=10)
        try:
            return db.execute(query).fetchall()
        finally:
            db.close()


# ---------------------------------------------------------------- what came out


@dataclass
class Result:
    """All that a finished study leaves. None of it may depend on what died."""

    saes: dict[str, dict[str, torch.Tensor]]
    descriptions: dict[str, dict]  # Contents of cfg.json
    outcomes: dict[str, dict]  # Tokens, mean of the rows trained on, every report
    outbox: set[tuple]  # (run, key, step, value)
    mlflow: dict[str, dict]  # Run → status, parameters, and metrics as lists of (step, value)
    summary: pd.DataFrame


def result_of(sweep: Sweep) -> Result:
    folders = sorted(path for path in (sweep.place / "saes").iterdir())
    outcomes = {}
    for folder in folders:
        outcome = json.loads((folder / "outcome.json").read_text())
        outcome.pop("sha256")
        outcome["reports"] = [
            {key: value for key, value in report.items() if key not in MEASURED} for report in outcome["reports"]
        ]
        outcomes[folder.name] = outcome
    outbox = {row for row in sweep.numbers("SELECT run, key, step, value FROM metrics") if not _varies(row[1])}
    client = mlflow.MlflowClient(f"sqlite:///{sweep.folder}/mlflow.db")
    runs = {}
    found = client.search_runs(
        [client.get_experiment_by_name("raysae").experiment_id], f"tags.`raysae.study` = '{sweep.study}'"
    )
    assert len(found) == len({run.info.run_name for run in found}), "a run was created twice"
    for run in found:
        histories = {
            key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        kept = {key: sorted(history) for key, history in histories.items() if not _varies(key)}
        runs[run.info.run_name] = {"status": run.info.status, "params": run.data.params, "metrics": kept}
    summary = (
        pd.read_csv(sweep.place / "summary" / "summary.csv")
        .drop(columns=list(MEASURED), errors="ignore")
        .sort_values("name", ignore_index=True)
    )
    return Result(
        saes={folder.name: load_file(folder / "sae_weights.safetensors") for folder in folders},
        descriptions={folder.name: json.loads((folder / "cfg.json").read_text()) for folder in folders},
        outcomes=outcomes, outbox=outbox, mlflow=runs, summary=summary,
    )  # fmt: skip


def _without_own(params: dict[str, str]) -> dict[str, str]:
    """The parameters that the bits of an SAE depend on.

    Left out are where things lie and run, and how often they are saved or tried.
    """
    own = ("output", "tracking.", "study", "faults.", "resources.", "train.checkpoint_seconds", "stream.cache")
    return {key: value for key, value in params.items() if not key.startswith(own)}


def _varies(key: str) -> bool:
    return key in MEASURED or key in WORK


def assert_same(disturbed: Sweep, undisturbed: Sweep) -> None:
    """Asserts that both have the same SAEs bit for bit, from the same rows.

    The outbox and MLflow must hold the same numbers, each once. All of them must have been sent.
    """
    ours, theirs = result_of(disturbed), result_of(undisturbed)
    assert ours.saes.keys() == theirs.saes.keys()
    for name, bits in theirs.saes.items():
        assert bits.keys() == ours.saes[name].keys()
        assert all(torch.equal(bits[key], ours.saes[name][key]) for key in bits), f"{name} differs"
        assert ours.outcomes[name] == theirs.outcomes[name]  # Tokens, mean of the rows, reports
        tokens = [report["tokens"] for report in ours.outcomes[name]["reports"]]
        assert tokens == sorted(set(tokens))
    assert ours.descriptions == theirs.descriptions
    assert ours.outbox == theirs.outbox
    assert set(SAME) <= {key for _, key, _, _ in theirs.outbox}
    assert ours.mlflow.keys() == {name if name != undisturbed.study else disturbed.study for name in theirs.mlflow}
    for name, run in theirs.mlflow.items():
        mine = ours.mlflow[disturbed.study if name == undisturbed.study else name]
        assert mine["status"] == run["status"] == "FINISHED"
        assert mine["metrics"] == run["metrics"], name
        for history in mine["metrics"].values():
            assert len(history) == len({step for step, _ in history}), f"{name}: a number is there twice"
        assert _without_own(mine["params"]) == _without_own(run["params"])
    pd.testing.assert_frame_equal(ours.summary, theirs.summary, check_exact=True)
    for table in ("metrics", "params", "tags", "artifacts", "runs"):
        assert disturbed.numbers(f"SELECT count(*) FROM {table} WHERE state != 1") == [(0,)], (
            f"not all {table} were sent"
        )


# ---------------------------------------------------------------- the killer


class Killer(threading.Thread):
    """Strikes `sweep` every few seconds until it ends or `seconds` are over.

    It draws kinds, victims and pauses from `seed`, so a failure can be replayed as well as the machine allows. It
    starts a killed driver again. A stopped producer stays silent until it is replaced.
    """

    KINDS = ("producer", "trainer", "queue", "trial", "producer hangs", "driver")
    WEIGHTS = (4, 4, 3, 2, 2, 1)

    def __init__(self, sweep: Sweep, seed: int, seconds: float, pauses: tuple[float, float] = (3.0, 8.0)) -> None:
        super().__init__(daemon=True, name="killer")
        self.sweep, self.seed, self.seconds, self.pauses = sweep, seed, seconds, pauses
        self.random = random.Random(seed)
        self.strikes: list[tuple[float, str, int]] = []
        self.outlived = False  # Whether the sweep still ran when the time was over
        self.error: BaseException | None = None

    def run(self) -> None:
        began = time.monotonic()
        try:
            while (now := time.monotonic() - began) < self.seconds and self.sweep.driver.poll() is None:
                time.sleep(self.random.uniform(*self.pauses))
                kind = self.random.choices(self.KINDS, self.WEIGHTS)[0]
                chosen = self.random.random()
                pids = self.sweep.pids(kind.split()[0])
                if not pids:
                    continue
                pid = pids[int(chosen * len(pids))]
                self.strikes.append((round(now, 1), kind, pid))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP if kind.endswith("hangs") else signal.SIGKILL)
                if kind == "driver" and self.sweep.driver.wait() == -signal.SIGKILL:
                    self.sweep.start()
            self.outlived = self.sweep.driver.poll() is None
        except BaseException as error:
            self.error = error

    def check(self) -> None:
        """Waits for the end of the strikes and prints them."""
        self.join(self.seconds + PATIENCE)
        assert not self.is_alive()
        kinds = [kind for _, kind, _ in self.strikes]
        print(
            f"seed {self.seed}: {len(kinds)} strikes: "
            + ", ".join(f"{kinds.count(kind)} × {kind}" for kind in self.KINDS),
            flush=True,
        )
        if self.error:
            raise self.error
