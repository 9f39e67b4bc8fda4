"""What N SAEs of equal size cost in one sweep: steady-state wall time against one LM pass + the sum of the isolated steps, for N = 1, 2, 4, 8, 16.

    python benchmarks/many.py [--numbers 1,2,4,8,16] [--width 1024] [--tokens 200000] [--json FILE] [--figure FILE]

Each point is a run of `one_pass.py`, whose text says how the times are taken; the SAEs differ by their seeds. With one SAE there is one bank, which
has all cores but for what the language model takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def measure(number: int, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.NamedTemporaryFile() as out:
        knobs = ["--widths", options.width, "--k", "16", "--seeds", ",".join(map(str, range(number))), "--train.tokens", options.tokens]
        command = [sys.executable, str(Path(__file__).with_name("one_pass.py")), "--json", out.name, *map(str, knobs)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(Path(out.name).read_text())


def draw(results: dict[int, dict[str, float]], path: Path) -> None:
    numbers = sorted(results)
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    axes.plot(numbers, [results[n]["steady_state"] for n in numbers], "o-", color="#0072B2", label="the sweep, steady state")
    axes.plot(numbers, [results[n]["ideal"] for n in numbers], "s--", color="#D55E00", label="one LM pass + isolated steps")
    axes.plot(numbers, [results[n]["start_up"] for n in numbers], "^:", color="#999999", label="start-up")
    axes.set(xscale="log", yscale="log", xlabel="SAEs in the sweep", ylabel="seconds")
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", default="1,2,4,8,16")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    results = {}
    for number in map(int, options.numbers.split(",")):
        result = results[number] = measure(number, options)
        print(
            f"{number:2} SAEs: steady state {result['steady_state']:6.1f} s, parts {result['ideal']:6.1f} s, ratio {result['ratio']:.2f}; "
            f"start-up {result['start_up']:.1f} s, waiting {result['waited_share']:.0%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.figure:
        draw(results, options.figure)


if __name__ == "__main__":
    main()
