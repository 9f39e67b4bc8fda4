"""Training steps, ours against every peer's: tokens per second, share of the least-work bound, memory.

    python benchmarks/steps.py [--threads 2] [--batch 4096] [--k 32] [--repeats 5] [--only topk:256:4096] [--json FILE]

The sides of a row are processes of their own that hold the same batches and take turns; each does enough steps for about a second at a time, so that
a disturbance of the machine meets all. Every side first tries the allocator settings below and keeps its best. The bound is the time of one dense
product, 2·b·d·n operations, at the rate of the best matrix product measured in the same alternation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ROWS = [("topk", 256, 4096), ("topk", 256, 16384), ("topk", 768, 24576), ("batchtopk", 256, 4096), ("jumprelu", 256, 4096), ("relu", 256, 4096),
        ("tied", 256, 4096)]  # fmt: skip
HAVE = {
    "topk": ("raysae", "sparsify", "saelens", "saelens_sparse", "dictionary_learning"),
    "batchtopk": ("raysae", "saelens", "dictionary_learning"),
    "jumprelu": ("raysae", "saelens", "dictionary_learning"),
    "relu": ("raysae", "saelens", "dictionary_learning"),
    "tied": ("raysae",),
}
NO_TRITON = {"SPARSIFY_DISABLE_TRITON": "1"}  # it finds Triton, which has nothing to run on without a GPU
KEEP = 4 << 30
ALLOCATORS = {
    "default": {},
    "keeps memory": {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:glibc.malloc.mmap_max=0"},
    "keeps memory, huge pages": {
        "GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={KEEP}:glibc.malloc.trim_threshold={KEEP}:glibc.malloc.mmap_max=0:glibc.malloc.hugetlb=1"
    },
}
PEAK = """
import sys, time, torch
a, b = torch.randn(4096, 2048), torch.randn(2048, 4096); out = torch.empty(4096, 4096)
for line in sys.stdin:
    best = 1e9
    for _ in range(5):
        began = time.perf_counter(); torch.mm(a, b, out=out); best = min(best, time.perf_counter() - began)
    print(best, flush=True)
"""


class Worker:
    """A process that waits for lines and answers each."""

    def __init__(self, command: list[str], environment: dict[str, str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **NO_TRITON} | environment
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def ask(self, line: object) -> object:
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"{self.process.args} has ended:\n{self.process.stderr.read()[-2000:]}") from None

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Side:
    """One library in one row: its steps, under the allocator that suits it best."""

    def __init__(self, name: str, row: tuple[str, int, int], options: argparse.Namespace) -> None:
        self.name, self.row, self.options = name, row, options
        trials = {allocator: self._start(allocator) for allocator in ALLOCATORS}
        times = {}
        for allocator, worker in trials.items():
            worker.ask(2)
            times[allocator] = worker.ask(2)["seconds"] / 2
        self.allocator = min(times, key=times.get)
        self.worker = trials.pop(self.allocator)
        for worker in trials.values():
            worker.close()
        self.steps = max(1, round(1 / times[self.allocator]))
        self.seconds: list[float] = []
        self.bytes = 0

    def _start(self, allocator: str) -> Worker:
        python = sys.executable if self.name == "raysae" else self.options.peers
        words = [self.name, *map(str, self.row), str(self.options.k), str(self.options.batch)]
        return Worker([python, str(REPOSITORY / "benchmarks" / "step_worker.py"), *words], ALLOCATORS[allocator], self.options.threads)

    def take_turn(self) -> None:
        self.seconds.append(self.worker.ask(self.steps)["seconds"] / self.steps)

    def close(self) -> None:
        self.worker.close()
        lean = self._start("default")  # memory without an allocator that keeps what it has
        lean.ask(2)
        self.bytes = lean.ask("memory")["bytes"]
        lean.close()


def measure(row: tuple[str, int, int], options: argparse.Namespace) -> dict:
    architecture, d, n = row
    peak = Worker([sys.executable, "-c", PEAK], {}, options.threads)
    sides = [Side(name, row, options) for name in HAVE[architecture]]
    rates = []
    for _ in range(options.repeats):
        rates.append(2 * 4096 * 2048 * 4096 / float(peak.ask("go")))
        for side in sides:
            side.take_turn()
    peak.close()
    for side in sides:
        side.close()
    least = 2 * options.batch * d * n / max(rates)
    result = {"architecture": architecture, "d": d, "n": n, "batch": options.batch, "k": options.k, "threads": options.threads}
    result |= {"gemm_gflops": max(rates) / 1e9, "sides": {}}
    for side in sides:
        median = statistics.median(side.seconds)
        result["sides"][side.name] = {
            "tokens_per_second": options.batch / median,
            "spread": (max(side.seconds) - min(side.seconds)) / median,
            "share_of_bound": least / median,
            "extra_mib": side.bytes / 2**20,
            "allocator": side.allocator,
        }
    ours, *peers = (result["sides"][side.name]["tokens_per_second"] for side in sides)
    result["ratio"] = ours / max(peers) if peers else None
    return result


def show(result: dict) -> None:
    ratio = f", {result['ratio']:.2f} × the best peer" if result["ratio"] else ""
    print(f"\n{result['architecture']} d{result['d']} n{result['n']}: GEMM peak {result['gemm_gflops']:.0f} GFLOP/s{ratio}")
    for name, side in result["sides"].items():
        print(
            f"  {name:20} {side['tokens_per_second']:9,.0f} tokens/s ± {side['spread']:4.0%}   {side['share_of_bound']:5.1%} of the bound   "
            f"{side['extra_mib']:7,.0f} MiB   {side['allocator']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(REPOSITORY / ".venv-peers" / "bin" / "python"), help="Python of the peers' environment")
    for name, default in {"threads": 2, "batch": 4096, "k": 32, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", action="append", help="ARCHITECTURE[:D:N], may be given several times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.only or any(":".join(map(str, row)).startswith(only) for only in options.only)]
    results = []
    for row in rows:
        results.append(measure(row, options))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
