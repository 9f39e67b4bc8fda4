"""TopK training steps on a GPU, ours against sparsify's.

    python benchmarks/gpu_steps.py [--peers .venv-peers/bin/python] [--repeats 5] [--only d2304-n65536-k64-b8192]
                                   [--json FILE]

It measures tokens per second, share of the GPU's matrix rate, and memory.

Both environments need the same PyTorch for CUDA. As in `steps.py`, each side is a process of its own. Both hold the
same batches and take turns, and the ratio is taken in every turn. Both train float32 weights with Adam and multiply in
bfloat16. No latent is dead, so AuxK is idle on both sides.

The share compares a step's least work with the rate of a large bfloat16 product. The least work is one dense product,
2·b·d·n operations. The rate is measured between the turns. Rows whose name ends in `alone` leave sparsify out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from options import at_least, writable
from step_worker import BATCHES
from steps import PEERS, WORKER, Worker, refuse_other_torch, spread

ROWS = {  # Name → d, n, k, batch, with sparsify
    "d2304-n65536-k64-b8192": (2304, 65536, 64, 8192, True),
    "d2304-n65536-k64-b32768-alone": (2304, 65536, 64, 32768, False),
    "d768-n24576-k32-b8192": (768, 24576, 32, 8192, True),
}
PEAK = """
import sys, torch
a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)); out = torch.empty_like(a)
for line in sys.stdin:
    for _ in range(3): torch.mm(a, b, out=out)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20): torch.mm(a, b, out=out)
    end.record(); end.synchronize()
    print(begin.elapsed_time(end) / 20e3, flush=True)
"""
NAME = "import json, torch; print(json.dumps(torch.cuda.get_device_name() if torch.cuda.is_available() else None))"
SECONDS = 0.5  # Seconds of steps in a turn


def measure(row: str, options: argparse.Namespace) -> dict:
    d, n, k, batch, with_sparsify = ROWS[row]
    sizes = [str(number) for number in (d, n, k, batch)]
    pythons = {"raysae": sys.executable} | ({"sparsify": options.peers} if with_sparsify else {})
    peak = Worker([sys.executable, "-c", PEAK], {}, 1)
    workers = {
        side: Worker([python, str(WORKER), side, "topk", *sizes, "cuda"], {"SPARSIFY_DISABLE_TRITON": "0"}, 1)
        for side, python in pythons.items()
    }
    steps = {
        side: max(1, round(SECONDS / (worker.ask(BATCHES) and worker.ask(1)["seconds"])))
        for side, worker in workers.items()
    }
    rates, seconds = [], {side: [] for side in workers}
    for _ in range(options.repeats):
        rates.append(2 * 8192**3 / float(peak.ask("go")))
        for side, worker in workers.items():
            worker.ask(1)
            seconds[side].append(worker.ask(steps[side])["seconds"] / steps[side])
    rate = statistics.median(rates)
    result = {"name": row, "d": d, "n": n, "k": k, "batch": batch, "bf16_tflops": rate / 1e12, "sides": {}}
    for side, worker in workers.items():
        median = statistics.median(seconds[side])
        result["sides"][side] = {
            "tokens_per_second": batch / median,
            "milliseconds": 1e3 * median,
            "share_of_peak": 2 * batch * d * n / median / rate,
            "extra_mib": worker.ask("memory")["bytes"] / 2**20,
        }
    for worker in (peak, *workers.values()):
        worker.close()
    if with_sparsify:
        result["ratio"] = spread(theirs / ours for ours, theirs in zip(*seconds.values(), strict=True))
    return result


def show(result: dict) -> None:
    ratio = (
        ", {median:.2f} × sparsify ({least:.2f} to {greatest:.2f})".format(**result["ratio"])
        if "ratio" in result
        else ""
    )
    print(f"\n{result['name']}: {result['bf16_tflops']:.0f} TFLOP/s in bfloat16{ratio}")
    for name, side in result["sides"].items():
        print(
            f"  {name:10} {side['tokens_per_second']:11,.0f} tokens/s   {side['milliseconds']:7.2f} ms   "
            f"{side['share_of_peak']:5.1%} of the rate   "
            f"{side['extra_mib']:7,.0f} MiB beside weights, gradients, Adam",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=str(PEERS), help="Python of the peers' environment.")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    parser.add_argument(
        "--only",
        action="append",
        choices=ROWS,
        metavar="ROW",
        help=f"Row to measure. It may be repeated. Rows: {', '.join(ROWS)}",
    )
    parser.add_argument("--json", type=writable, metavar="FILE")
    options = parser.parse_args()
    worker = Worker([sys.executable, "-c", NAME], {}, 1)
    device = json.loads(worker.process.stdout.readline())
    worker.close()
    if device is None:
        sys.exit("error: PyTorch finds no GPU here")
    rows = options.only or list(ROWS)
    if any(ROWS[row][-1] for row in rows):
        refuse_other_torch(options.peers)
    print(device)
    results = []
    for row in rows:
        results.append(measure(row, options) | {"device": device})
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
