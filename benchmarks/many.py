"""What N SAEs of equal size cost in one sweep: steady-state wall time against one LM pass + the sum of the isolated steps, for N = 1, 2, 4, 8, 16.

    python benchmarks/many.py [--numbers 1,2,4,8,16] [--width 1024] [--shards 32] [--json FILE] [--figure FILE]

Each point is a run of `one_pass.py`, whose text says how the times are taken; the SAEs differ by their seeds. So that what happens at both ends
weighs little, shards are small (256 contexts of 64 tokens, 14,336 rows) and many, at most three of them are in flight, and evaluations take few rows.
AuxK is off: how much it does depends on how many latents have died, of which a few isolated steps know nothing. With one SAE there is one bank, which
has all cores but for what the language model takes. FILE is written anew after each number, so that a run that breaks off keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from options import at_least, numbers, writable

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from raysae.commands.parse import USAGE_ERROR

CONTEXT, SKIPPED, SHARD_CONTEXTS = 64, 8, 256
K = 16  # of every SAE
ROWS = SHARD_CONTEXTS * (CONTEXT - SKIPPED)  # of a shard
MIB = ROWS * 256 * 4 / 2**20  # of a shard: the embedded model has 256 dimensions


def measure(number: int, options: argparse.Namespace) -> dict[str, float]:
    knobs = {
        "widths": options.width, "k": K, "seeds": ",".join(map(str, range(number))), "train.tokens": options.shards * ROWS,
        "train.aux_coefficient": 0, "train.reports": 2, "evaluation.rows": ROWS, "evaluation.predicted_tokens": 0,
        "stream.context_length": CONTEXT, "stream.skip_positions": SKIPPED, "stream.shard_contexts": SHARD_CONTEXTS, "stream.mib_in_flight": 3 * MIB,
    }  # fmt: skip
    with tempfile.NamedTemporaryFile() as out:
        words = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, str(Path(__file__).with_name("one_pass.py")), "--json", out.name, *words]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == USAGE_ERROR:
            sys.exit(done.stderr.strip().rpartition("\n")[2])  # one sentence
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(out.name).read_text())


def draw(results: dict[int, dict[str, float]], path: Path) -> None:
    numbers = sorted(results)
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    axes.plot(numbers, [results[n]["steady_state"] for n in numbers], "o-", color="#0072B2", label="the sweep, steady state")
    axes.plot(numbers, [results[n]["ideal"] for n in numbers], "s--", color="#D55E00", label="one LM pass + isolated steps")
    axes.plot(numbers, [results[n]["ideal_best"] for n in numbers], ":", color="#D55E00", label="… each step on the better number of cores")
    axes.plot(numbers, [results[n]["start_up"] for n in numbers], "^:", color="#999999", label="start-up")
    axes.set(xlabel="SAEs in the sweep", ylabel="seconds", ylim=(0, None))
    axes.set_xticks(numbers)
    figure.legend(loc="outside upper left", frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def figure_file(word: str) -> Path:
    path = writable(word)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(f"{word!r} is no figure that can be drawn: its name must end in one of {', '.join(sorted(kinds))}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=numbers, default="1,2,4,8,16")
    parser.add_argument("--width", type=at_least(K), default=1024)
    parser.add_argument("--shards", type=at_least(10), default=32, help="of these one_pass.py times 33 steps of 4,096 rows")
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument("--figure", type=figure_file, metavar="FILE")
    options = parser.parse_args()
    results = {}
    for number in options.numbers:
        result = results[number] = measure(number, options)
        print(
            "{:2} SAEs: steady state {steady_state:.1f} s; parts {ideal:.1f} s, ratio {ratio_least:.2f} to {ratio_most:.2f}; "
            "parts with each step on the better number of cores {ideal_best:.1f} s, ratio {ratio_best_least:.2f} to {ratio_best_most:.2f}; "
            "start-up {start_up:.1f} s, waiting {waited_share:.0%}".format(number, **result),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
