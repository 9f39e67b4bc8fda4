"""What a sweep costs beyond its parts: steady-state training time against one LM pass + the SAEs' isolated steps.

    python benchmarks/one_pass.py                     the default sweep of the embedded model
    python benchmarks/one_pass.py --widths 256,512    any other: the arguments are those of jobs/scaling_sweep.py
    python benchmarks/one_pass.py --json FILE …       writes the numbers there too

Run it on a quiet machine. The parts are measured in a process that has all cores to itself:

- The language model's pass over the shards after the first: the median of a few, times their number. The clock below
  starts when the first shard is there.
- Every SAE's step, alone, with all cores: the median, times the number of steps. No latent has died by then. If AuxK is
  on, the sweep does more.

Then the sweep runs as a user runs it, without the activation cache. Its steady-state time is that of the slowest bank,
from its first step to its last. It includes waiting. It leaves out evaluations and checkpoints.

    ratio         steady state / (LM pass + isolated steps)
    ratio_best    steady state / (LM pass + isolated_steps_best)

An SAE's step in isolated_steps_best takes the less of two times. One is with all cores. The other is with one core,
over the number of cores. Banks of a core each use cores better than one step spread over them. That makes `ratio` look
good. Without that gain, `ratio_best` is what company, waiting and scheduling cost. One bank alone (a single SAE) cannot
reach 1.

Both are ranges. When the clock starts, the producer may be ahead by the shards that `stream.mib_in_flight` allows. The
`most` leaves these out of the LM pass.

The language model's pass over held-out rows takes cores from the steps. It is not counted. Reported apart are:

- `start_up`: from the command to the first step.
- `evaluation`: the time of cross-entropy and KL, plus that of interim and final evaluations on held-out rows. The
  latter is summed over all SAEs, waiting for rows included, and divided by the number of banks.
- `rest`: all wall time but start-up and steady state. It is evaluation, initialising, checkpoints, summary, shutdown.
- `peak_gib`: the peak memory of all the sweep's processes (proportional set sizes).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from options import writable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # The sweep's processes set this too. Importing torch reads it.

from raysae.commands.parse import main, parse
from raysae.config import SAEConfig, SweepConfig, TrainConfig, UserError

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).parents[1]
STEPS, WARM = 33, 3  # Steps timed of an SAE, and how many of them are left out
SHARDS = 3  # Shards timed


def measure_parts(argv: list[str]) -> dict[str, float]:
    """Seconds of one LM pass and of all SAEs' isolated steps."""
    import torch

    from raysae.lm.model import LanguageModel
    from raysae.stream.blocks import as_tensor, shards_in_flight
    from raysae.stream.shard import ShardMaker
    from raysae.study.plan import plan

    cores = os.cpu_count()
    torch.set_num_threads(cores)
    settled = plan(parse(SweepConfig, argv, "")[0])
    config = settled.config
    if (rows_there := settled.training.rows_per_shard) <= config.train.batch:
        raise UserError(
            f"a shard has {rows_there} rows, but more than train.batch ({config.train.batch}) are measured. "
            "Raise stream.shard_contexts."
        )
    lm = LanguageModel.load(config.model)
    maker = ShardMaker(lm, settled.contexts["train"], settled.training, settled.hook_points, config.stream.block_mib)
    times, rows = [], {}
    for shard in range(SHARDS):
        began = time.perf_counter()
        _, blocks = maker.make(shard)
        times.append(time.perf_counter() - began)
        rows = {
            hook: torch.cat([as_tensor(block, settled.training.dtype).float() for block in blocks[hook]])
            for hook in settled.hook_points
        }
    with_all = [step_seconds(sae, rows[sae.hook_point], config.train, cores) for sae in settled.saes]
    with_one = [step_seconds(sae, rows[sae.hook_point], config.train, 1) for sae in settled.saes]
    best = (min(all_cores, one / cores) for all_cores, one in zip(with_all, with_one, strict=True))
    ahead = min(settled.shards, shards_in_flight(config.stream, settled.training, settled.streamed_widths)) - 1
    return {
        "lm_pass": statistics.median(times) * (settled.shards - 1),
        "lm_ahead": statistics.median(times) * ahead,  # Seconds of `lm_pass` that may have been spent before
        "isolated_steps": sum(with_all) * config.train.steps,
        "isolated_steps_best": sum(best) * config.train.steps,
    }


def step_seconds(sae: SAEConfig, x: torch.Tensor, train: TrainConfig, threads: int) -> float:
    """Median seconds of a step of the SAE, alone on the rows `x`."""
    import torch

    from raysae.train.bank import Bank

    torch.set_num_threads(threads)
    bank = Bank(x.shape[1], train)
    member = bank.add(sae.name, sae)
    member.initialise(x[:16_384])
    took = []
    for step in range(STEPS):
        part = x[(step * train.batch) % (len(x) - train.batch) :][: train.batch]
        began = time.perf_counter()
        bank.step(part, step * train.batch)
        took.append(time.perf_counter() - began)
    assert member.steps_done == STEPS, member.failed
    return statistics.median(took[WARM:])


def answered(command: list[str], **arguments: object) -> str | None:
    """What a command prints, where `stdout` is a pipe.

    A command that fails has said why. This process then ends with its exit code.
    """
    done = subprocess.run(command, text=True, **arguments)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def run_sweep(argv: list[str]) -> dict[str, float]:
    """Seconds of the real sweep: start-up, steady state and the rest."""
    # The mark is in the environment of the driver, and so of every process it starts.
    mark = f"RAYSAE_BENCHMARK={uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder, peak_memory(mark.encode()) as memory:
        began = time.time()
        own = [
            "--output",
            folder,
            "--study",
            "bench",
            "--tracking.uri",
            f"sqlite:///{folder}/mlflow.db",
            "--stream.cache",
            "off",
        ]
        environment = os.environ | dict([mark.split("=")])
        answered([sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), *argv, *own], env=environment)
        wall = time.time() - began
        reports = [json.loads(path.read_text())["reports"] for path in Path(folder).glob("bench/saes/*/outcome.json")]
        banks = yaml.safe_load((Path(folder) / "bench" / "config.yaml").read_text())["resources"]["banks"]
        downstream = in_model_seconds(f"sqlite:///{folder}/mlflow.db")
    first, last = [each[0] for each in reports], [each[-1] for each in reports]
    steady = max(report["tokens"] / report["tokens_per_second"] for report in last)
    start_up = min(report["time"] - report["tokens"] / report["tokens_per_second"] for report in first) - began
    evaluation = downstream + sum(report["evaluation_seconds"] for each in reports for report in each) / banks
    return {
        "wall": wall, "start_up": start_up, "steady_state": steady, "evaluation": evaluation,
        "evaluation_share": evaluation / wall, "rest": wall - start_up - steady,
        "waited_share": max(report["waited_share"] for report in last), "saes": len(last),
        "peak_gib": memory[0] / 2**30,
    }  # fmt: skip


def in_model_seconds(uri: str) -> float:
    """How long cross-entropy and KL of all SAEs took, as the sweep tells MLflow."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return next(
        run.data.metrics["stream/evaluation_seconds"] for run in runs if "stream/evaluation_seconds" in run.data.metrics
    )


@contextmanager
def peak_memory(mark: bytes) -> Iterator[list[int]]:
    """Yields a list of one number: the peak memory, in bytes, of all processes with `mark` in their environment.

    It is the largest sum of their proportional set sizes.
    """
    peak, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(1.0):
            total = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (process / "environ").read_bytes():
                        total += int(re.search(r"Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text())[1]) * 1024
                except (OSError, TypeError):  # The process has ended
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def job(argv: list[str]) -> None:
    if argv[:1] == ["--parts"]:  # This process is one of its own, whose memory and threads end with it
        print(json.dumps(measure_parts(argv[1:])))
        return
    own = argparse.ArgumentParser(usage="%(prog)s [--json FILE] [--KNOB VALUE ...]", add_help=False, allow_abbrev=False)
    own.add_argument("--json", type=writable, metavar="FILE")
    options, argv = own.parse_known_args(argv)
    if (steps := parse(SweepConfig, argv, __doc__)[0].train.steps) < STEPS:
        raise UserError(f"the sweep has {steps} steps, but {STEPS} are measured. Raise train.tokens.")
    parts = json.loads(answered([sys.executable, __file__, "--parts", *argv], stdout=subprocess.PIPE).splitlines()[-1])
    sweep = run_sweep(argv)
    ideal, best = (parts["lm_pass"] + parts[steps] for steps in ("isolated_steps", "isolated_steps_best"))
    result = {**parts, "ideal": ideal, "ideal_best": best, **sweep}
    for name, of in {"ratio": ideal, "ratio_best": best}.items():
        result |= {
            f"{name}_least": sweep["steady_state"] / of,
            f"{name}_most": sweep["steady_state"] / (of - parts["lm_ahead"]),
        }
    for name, value in result.items():
        print(f"{name:19s} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(job)
