"""Training steps, ours against every peer's: tokens per second, share of the least-work bound, memory.

    python benchmarks/steps.py [--threads 2] [--batch 4096] [--k 32] [--repeats 11] [--only topk-d256-n4096]
                               [--json FILE]

Each side of a row is a process of its own. All hold the same batches and take turns. In a turn each does a step that is
not timed. Then it does enough for about a second. So a disturbance of the machine meets all.

Before that, each side tries the allocator settings below, alone and one after another. It takes about a second of steps
with each. It keeps its best.

After three turns of all, the peer with the least median continues alone against ours. The ratio to it is taken in every
alternation. The output has its median, least and greatest.

The bound is the time of one dense product in float32, 2·b·d·n operations. Its rate is that of the best matrix product
measured between the turns. TopK can be above it. It computes few of that product's elements
(`raysae/kernels/screening.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from options import at_least, writable

REPOSITORY = Path(__file__).parents[1]
PEERS = REPOSITORY / ".venv-peers" / "bin" / "python"
WORKER = REPOSITORY / "benchmarks" / "step_worker.py"
ROWS = {  # Name → architecture, d, n
    f"{architecture}-d{d}-n{n}": (architecture, d, n)
    for architecture, d, n in [
        ("topk", 256, 4096), ("topk", 256, 16384), ("topk", 768, 24576), ("batchtopk", 256, 4096),
        ("matryoshka", 256, 4096), ("jumprelu", 256, 4096), ("relu", 256, 4096), ("gated", 256, 4096),
        ("gated-start", 256, 4096), ("tied", 256, 4096),
    ]
}  # fmt: skip
HAVE = {
    "topk": ("raysae", "sparsify", "saelens", "saelens_sparse", "dictionary_learning"),
    "batchtopk": ("raysae", "saelens", "dictionary_learning"),
    "jumprelu": ("raysae", "saelens", "dictionary_learning"),
    "relu": ("raysae", "saelens", "dictionary_learning"),
    "matryoshka": ("raysae", "saelens", "dictionary_learning"),
    "gated": ("raysae", "saelens", "dictionary_learning"),
    "gated-start": ("raysae", "saelens", "dictionary_learning"),
    "tied": ("raysae",),
}
NO_TRITON = {"SPARSIFY_DISABLE_TRITON": "1"}  # sparsify finds Triton, which has nothing to run on without a GPU
KEEP = 4 << 30
KEEPS = f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:glibc.malloc.mmap_max=0"
ALLOCATORS = {
    "default": {},
    "keeps memory": {"GLIBC_TUNABLES": KEEPS},
    "keeps memory, huge pages": {"GLIBC_TUNABLES": f"{KEEPS}:glibc.malloc.hugetlb=1"},
}
WARM = 2  # Steps of a process before it is timed
TURNS_OF_ALL = 3
PEAK = """
import sys, time, torch
a, b = torch.randn(4096, 2048), torch.randn(2048, 4096); out = torch.empty(4096, 4096)
for line in sys.stdin:
    best = 1e9
    for _ in range(5):
        began = time.perf_counter(); torch.mm(a, b, out=out); best = min(best, time.perf_counter() - began)
    print(best, flush=True)
"""


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    values = list(values)
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def refuse_other_torch(peers: str) -> None:
    """Exit where the peers' environment has another torch than this one. The comparison would be one of torches."""
    versions = []
    for python in (sys.executable, peers):
        try:
            versions.append(
                subprocess.run(
                    [python, str(WORKER), "torch"], check=True, capture_output=True, text=True
                ).stdout.strip()
            )
        except (OSError, subprocess.CalledProcessError):
            sys.exit(f'error: {python} has no torch: `make bench ARGS="steps"` has the peers\' environment made')
    if len(set(versions)) > 1:
        sys.exit(
            f"error: raysae has torch {versions[0]} and the peers have {versions[1]}: "
            'remove .venv-peers, `make bench ARGS="steps"` has it made anew'
        )


class Worker:
    """A process that waits for lines and answers each."""

    def __init__(self, command: list[str], environment: dict[str, str], threads: int) -> None:
        environment = (
            os.environ
            | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **NO_TRITON}
            | environment
        )
        # A pipe that nobody empties would fill, so errors go to a file. It is closed with the process.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def ask(self, line: object) -> object:
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{' '.join(self.process.args)} has ended:\n{self.errors.read()[-2000:]}") from None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()


class Side:
    """One library in one row: its steps, under the allocator that suits it best."""

    def __init__(self, name: str, row: str, options: argparse.Namespace) -> None:
        self.name, self.row, self.options = name, row, options
        times = {allocator: self._try(allocator) for allocator in ALLOCATORS}
        self.allocator = min(times, key=times.get)
        self.steps = max(1, round(1 / times[self.allocator]))
        self.worker = self._start(self.allocator)
        self.seconds: list[float] = []
        self.bytes = 0

    def _start(self, allocator: str) -> Worker:
        """A process that has done its first steps."""
        python = sys.executable if self.name == "raysae" else self.options.peers
        words = [self.name, *map(str, ROWS[self.row]), str(self.options.k), str(self.options.batch)]
        worker = Worker([python, str(WORKER), *words], ALLOCATORS[allocator], self.options.threads)
        worker.ask(WARM)
        return worker

    def _try(self, allocator: str) -> float:
        """Seconds of a step, averaged over about a second of steps."""
        worker = self._start(allocator)
        steps = max(1, round(1 / worker.ask(1)["seconds"]))
        seconds = worker.ask(steps)["seconds"]
        worker.close()
        return seconds / steps

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    def take_turn(self) -> None:
        self.worker.ask(1)  # Other sides have had the caches meanwhile
        self.seconds.append(self.worker.ask(self.steps)["seconds"] / self.steps)

    def close(self) -> None:
        self.worker.close()
        lean = self._start("default")  # Measures memory without an allocator that keeps what it has
        self.bytes = lean.ask("memory")["bytes"]
        lean.close()


def measure(row: str, options: argparse.Namespace) -> dict:
    architecture, d, n = ROWS[row]
    sides = [Side(name, row, options) for name in HAVE[architecture]]
    ours, *peers = sides
    peak = Worker([sys.executable, "-c", PEAK], {}, options.threads)
    rates, contenders = [], sides
    for turn in range(options.repeats):
        rates.append(2 * 4096 * 2048 * 4096 / float(peak.ask("go")))
        for side in contenders:
            side.take_turn()
        if turn == TURNS_OF_ALL - 1:
            contenders = [ours, *sorted(peers, key=lambda side: side.median)[:1]]
    peak.close()
    for side in sides:
        side.close()
    least = 2 * options.batch * d * n / max(rates)
    result = {
        "name": row,
        "batch": options.batch,
        "k": options.k,
        "threads": options.threads,
        "gemm_gflops": max(rates) / 1e9,
        "sides": {},
    }
    for side in sides:
        result["sides"][side.name] = {
            "tokens_per_second": options.batch / side.median,
            "spread": (max(side.seconds) - min(side.seconds)) / side.median,
            "share_of_bound": least / side.median,
            "extra_mib": side.bytes / 2**20,
            "allocator": side.allocator,
        }
    if peers:
        best = contenders[1]
        result |= {
            "best_peer": best.name,
            "ratio": spread(theirs / our for our, theirs in zip(ours.seconds, best.seconds, strict=True)),
        }
    return result


def show(result: dict) -> None:
    ratio = (
        ", {median:.2f} × {best} ({least:.2f} to {greatest:.2f})".format(best=result["best_peer"], **result["ratio"])
        if "ratio" in result
        else ""
    )
    print(f"\n{result['name']}: GEMM peak {result['gemm_gflops']:.0f} GFLOP/s{ratio}")
    for name, side in result["sides"].items():
        print(
            f"  {name:20} {side['tokens_per_second']:9,.0f} tokens/s ± {side['spread']:4.0%}   "
            f"{side['share_of_bound']:5.1%} of the bound   {side['extra_mib']:7,.0f} MiB   {side['allocator']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(PEERS), help="Python of the peers' environment.")
    for name, default in {"threads": 2, "batch": 4096, "k": 32, "repeats": 11}.items():
        parser.add_argument(f"--{name}", type=at_least(TURNS_OF_ALL if name == "repeats" else 1), default=default)
    parser.add_argument(
        "--only",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"Row to measure. It may be repeated. Rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args()
    rows = options.only or list(ROWS)
    if options.k > (least := min(n for _, _, n in map(ROWS.get, rows))):
        parser.error(f"argument --k: {options.k} is more than the {least} latents of the smallest SAE")
    if any(HAVE[ROWS[row][0]] != ("raysae",) for row in rows):
        refuse_other_torch(options.peers)
    results = []
    for row in rows:
        results.append(measure(row, options))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
