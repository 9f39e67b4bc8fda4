"""What a sweep costs beyond its parts: steady-state training time against one LM pass + the sum of the SAEs' isolated steps.

    python benchmarks/one_pass.py                     the default sweep of the embedded model
    python benchmarks/one_pass.py --widths 256,512    any other: the arguments are those of jobs/scaling_sweep.py
    python benchmarks/one_pass.py --json FILE …       writes the numbers there too; this comes first

Run it on a quiet machine. Each part is measured alone in a process that has all cores to itself: the language model's pass over the shards that the
sweep reads, and every SAE's step (median). Then the sweep runs as a user runs it, without the activation cache. Its steady-state time is that of the
slowest bank from its first step to its last, waiting included, evaluations and checkpoints left out. Start-up (from the command to the first
step) and the rest (evaluations, summary) are reported apart, and so is the peak memory of all the sweep's processes (proportional set sizes).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the sweep's processes; read when torch is imported

from raysae.cli import parse
from raysae.config import SweepConfig

REPOSITORY = Path(__file__).parents[1]
STEPS, WARM = 12, 3
SHARDS = 3


def measure_parts(argv: list[str]) -> dict[str, float]:
    """Seconds of one LM pass and of all SAEs' isolated steps, each with all cores."""
    import torch

    from raysae.lm.model import LanguageModel
    from raysae.stream.blocks import as_tensor
    from raysae.stream.shard import ShardMaker
    from raysae.sweep.preflight import plan
    from raysae.train.bank import Bank

    torch.set_num_threads(os.cpu_count())
    settled = plan(parse(SweepConfig, argv, "")[0])
    config = settled.config
    lm = LanguageModel.load(config.model)
    maker = ShardMaker(lm, settled.contexts["train"], settled.training, settled.hook_points, config.stream.block_mib)
    times, rows = [], {}
    for shard in range(SHARDS):
        began = time.perf_counter()
        _, blocks = maker.make(shard)
        times.append(time.perf_counter() - began)
        rows = {hook: torch.cat([as_tensor(block, settled.training.dtype).float() for block in blocks[hook]]) for hook in settled.hook_points}
    steps = 0.0
    for sae in settled.saes:
        x, batch = rows[sae.hook_point], config.train.batch
        bank = Bank(x.shape[1], config.train)
        bank.add(sae.name, sae).initialise(x[:16_384])
        took = []
        for step in range(STEPS):
            part = x[(step * batch) % (len(x) - batch) :][:batch]
            began = time.perf_counter()
            bank.step(part, step * batch)
            took.append(time.perf_counter() - began)
        steps += sorted(took[WARM:])[len(took[WARM:]) // 2] * config.train.steps
    return {"lm_pass": sorted(times)[len(times) // 2] * settled.shards, "isolated_steps": steps}


def run_sweep(argv: list[str]) -> dict[str, float]:
    """Seconds of the real sweep: steady state, evaluation and all."""
    mark = f"RAYSAE_BENCHMARK={uuid.uuid4().hex}"  # in the environment of the driver and so of every process it starts
    with tempfile.TemporaryDirectory() as folder, peak_memory(mark.encode()) as memory:
        began = time.time()
        own = ["--output", folder, "--study", "bench", "--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--stream.cache", "off"]
        environment = os.environ | dict([mark.split("=")])
        subprocess.run([sys.executable, str(REPOSITORY / "jobs" / "scaling_sweep.py"), *argv, *own], check=True, env=environment)
        wall = time.time() - began
        reports = [json.loads(path.read_text())["reports"] for path in Path(folder).glob("bench/saes/*/outcome.json")]
    first, last = [each[0] for each in reports], [each[-1] for each in reports]
    steady = max(report["tokens"] / report["tokens_per_second"] for report in last)
    start_up = min(report["time"] - report["tokens"] / report["tokens_per_second"] for report in first) - began
    return {
        "wall": wall, "start_up": start_up, "steady_state": steady, "rest": wall - start_up - steady,
        "waited_share": max(report["waited_share"] for report in last), "saes": len(last), "peak_gib": memory[0] / 2**30,
    }  # fmt: skip


@contextmanager
def peak_memory(mark: bytes) -> Iterator[list[int]]:
    """Yields a list of one number: the largest sum of the proportional set sizes, in bytes, of all processes with `mark` in their environment."""
    peak, over = [0], threading.Event()

    def sample() -> None:
        while not over.wait(1.0):
            total = 0
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (process / "environ").read_bytes():
                        total += int(re.search(r"Pss:\s+(\d+) kB", (process / "smaps_rollup").read_text())[1]) * 1024
                except (OSError, TypeError):  # it has ended
                    continue
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] == ["--parts"]:  # in a process of its own, whose memory and threads end with it
        print(json.dumps(measure_parts(argv[1:])))
        return
    out = Path(argv[1]) if argv[:1] == ["--json"] else None
    argv = argv[2:] if out else argv
    parse(SweepConfig, argv, __doc__)
    parts = json.loads(
        subprocess.run([sys.executable, __file__, "--parts", *argv], check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    sweep = run_sweep(argv)
    ideal = parts["lm_pass"] + parts["isolated_steps"]
    result = {**parts, "ideal": ideal, **sweep, "ratio": sweep["steady_state"] / ideal}
    for name, value in result.items():
        print(f"{name:16s} {value:10.3f}")
    if out:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
