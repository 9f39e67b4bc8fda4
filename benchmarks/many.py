"""What N SAEs of equal size cost in one sweep, for N = 1, 2, 4, 8, 16.

    python benchmarks/many.py [--numbers 1,2,4,8,16] [--width 1024] [--shards 32] [--json FILE] [--figure FILE]

It compares the steady-state wall time with one LM pass + the isolated steps. Each point is a run of `one_pass.py`. Its
text says how the times are taken. The SAEs differ by their seeds.

What happens at both ends should weigh little. So shards are many and small (256 contexts of 64 tokens, 14,336 rows).
At most three are in flight, and evaluations take few rows.

AuxK is off. Its work depends on how many latents have died. A few isolated steps cannot know that.

One SAE makes one bank. It has all cores that the language model does not take. The JSON file is written again after
each number, so a run that breaks off keeps what it has.
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
K = 16  # Active latents of every SAE
ROWS = SHARD_CONTEXTS * (CONTEXT - SKIPPED)  # Rows of a shard
MIB = ROWS * 256 * 4 / 2**20  # Size of a shard. The embedded model has 256 dimensions.


def measure(number: int, options: argparse.Namespace) -> dict[str, float]:
    knobs = {
        "widths": options.width, "k": K, "seeds": ",".join(map(str, range(number))),
        "train.tokens": options.shards * ROWS, "train.aux_coefficient": 0, "train.reports": 2, "evaluation.rows": ROWS,
        "evaluation.predicted_tokens": 0, "stream.context_length": CONTEXT, "stream.skip_positions": SKIPPED,
        "stream.shard_contexts": SHARD_CONTEXTS, "stream.mib_in_flight": 3 * MIB,
    }  # fmt: skip
    with tempfile.NamedTemporaryFile() as out:
        words = [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, str(Path(__file__).with_name("one_pass.py")), "--json", out.name, *words]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == USAGE_ERROR:
            sys.exit(done.stderr.strip().rpartition("\n")[2])  # The last line is one sentence
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return json.loads(Path(out.name).read_text())


def draw(results: dict[int, dict[str, float]], path: Path) -> None:
    numbers = sorted(results)
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    axes.plot(
        numbers, [results[n]["steady_state"] for n in numbers], "o-", color="#0072B2", label="the sweep, steady state"
    )
    axes.plot(
        numbers, [results[n]["ideal"] for n in numbers], "s--", color="#D55E00", label="one LM pass + isolated steps"
    )
    axes.plot(
        numbers,
        [results[n]["ideal_best"] for n in numbers],
        ":",
        color="#D55E00",
        label="… each step on the better number of cores",
    )
    axes.plot(numbers, [results[n]["start_up"] for n in numbers], "^:", color="#999999", label="start-up")
    axes.set(xlabel="SAEs in the sweep", ylabel="seconds", ylim=(0, None))
    axes.set_xticks(numbers)
    figure.legend(loc="outside upper left", frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def figure_file(word: str) -> Path:
    path = writable(word)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise argparse.ArgumentTypeError(
            f"{word!r} is no figure that can be drawn: its name must end in one of {', '.join(sorted(kinds))}"
        )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=numbers, default="1,2,4,8,16")
    parser.add_argument("--width", type=at_least(K), default=1024)
    parser.add_argument(
        "--shards",
        type=at_least(10),
        default=32,
        help="Shards of a sweep. Of their rows, one_pass.py times 33 steps of 4,096.",
    )
    parser.add_argument("--json", type=writable, metavar="FILE")
    parser.add_argument("--figure", type=figure_file, metavar="FILE")
    options = parser.parse_args()
    results = {}
    for number in options.numbers:
        result = results[number] = measure(number, options)
        print(
            "{:2} SAEs: steady state {steady_state:.1f} s; "
            "parts {ideal:.1f} s, ratio {ratio_least:.2f} to {ratio_most:.2f}; "
            "parts with each step on the better number of cores {ideal_best:.1f} s, "
            "ratio {ratio_best_least:.2f} to {ratio_best_most:.2f}; "
            "start-up {start_up:.1f} s, waiting {waited_share:.0%}".format(number, **result),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
