"""Every claim about speed, measured anew, in one table: `make bench`.

    python benchmarks/bench.py                 all parts, about two hours on two cores
    python benchmarks/bench.py steps producer  some of them

Every part is a script of its own in this folder and writes its numbers to build/bench/PART.json; the table is made of what lies there, so parts may
be measured on different days, though not on different machines. Run it on a quiet machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "build" / "bench"
Row = tuple[str, str, str]  # what, goal, found
STEP_GOALS = {"topk d256 n4096": 3, "topk d256 n16384": 2.5, "topk d768 n24576": 1.8, "batchtopk d256 n4096": 3, "jumprelu d256 n4096": 2,
              "relu d256 n4096": 1.5}  # fmt: skip
BOUND_GOALS = {"topk d256 n4096": 0.4, "topk d256 n16384": 0.5, "topk d768 n24576": 0.6}


def of_steps(results: list[dict]) -> Iterator[Row]:
    for result in results:
        name, ours = f"{result['architecture']} d{result['d']} n{result['n']}", result["sides"]["raysae"]
        if result["ratio"]:
            best = max((side for side in result["sides"] if side != "raysae"), key=lambda side: result["sides"][side]["tokens_per_second"])
            yield f"{name}: step against {best}", f"≥ {STEP_GOALS[name]} ×", f"{result['ratio']:.2f} ×"
        if name in BOUND_GOALS:
            yield f"{name}: share of the least-work bound", f"≥ {BOUND_GOALS[name]:.0%}", f"{ours['share_of_bound']:.0%}"
        others = ", ".join(f"{side} {found['extra_mib']:,.0f}" for side, found in result["sides"].items() if side != "raysae")
        goal = "≤ 256 MiB" if "topk" in name else "–"
        yield f"{name}: memory of a step beyond weights, gradients, Adam", goal, f"{ours['extra_mib']:,.0f} MiB" + (f" ({others})" if others else "")


def of_producer(result: dict) -> Iterator[Row]:
    yield "a producer against a bare forward pass", "≥ 0.95", f"{result['ratio']:.3f}"


def of_sweep(result: dict) -> Iterator[Row]:
    yield "make sweep", "≤ 8 min", f"{result['wall'] / 60:.1f} min"
    yield "its steady state against one LM pass + isolated steps", "≤ 1.15", f"{result['ratio']:.2f}"
    yield "time that its trainers waited", "≤ 3 %", f"{result['waited_share']:.1%}"
    yield "its evaluations, summary and shutdown, share of the wall time", "≤ 10 %", f"{result['rest'] / result['wall']:.0%}"
    yield "from start to first training step", "≤ 25 s", f"{result['start_up']:.0f} s"


def of_many(results: dict[str, dict]) -> Iterator[Row]:
    found = ", ".join(f"N = {number}: {result['ratio']:.2f}" for number, result in results.items())
    yield "steady state of N SAEs against one LM pass + isolated steps", "≤ 1.10", found


def of_whole_job(medians: dict[str, dict]) -> Iterator[Row]:
    for side in ("saelens", "sparsify"):
        ratio = medians[side]["seconds"] / medians["raysae"]["seconds"]
        memory = f"{medians['raysae']['gib']:.1f} GiB against {medians[side]['gib']:.1f}"
        yield f"whole job of 8 SAEs against {side}", "≥ 4 ×, less memory", f"{ratio:.2f} ×, {memory}"


def of_control_plane(result: dict) -> Iterator[Row]:
    yield "queue: consumers of 10,000 blocks a minute each, 32 blocks a shard", "≥ 64", f"{result['queue'][0]['limit_consumers']:.0f}"


PARTS = {  # name → its rows of the table, its script and what that is told
    "steps": (of_steps, "steps.py"),
    "producer": (of_producer, "producer.py"),
    "sweep": (of_sweep, "one_pass.py"),
    "many": (of_many, "many.py", "--figure", str(RESULTS / "many.png")),
    "whole_job": (of_whole_job, "whole_job.py"),
    "control_plane": (of_control_plane, "control_plane.py", "--consumers", "64", "--blocks", "32"),
}


def main() -> None:
    wanted = sys.argv[1:] or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        sys.exit(f"error: {unknown[0]!r} is none of {', '.join(PARTS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        _, script, *arguments = PARTS[part]
        json_first = ["--json", str(RESULTS / f"{part}.json"), *arguments]
        subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / script), *json_first], check=True)
    print("\n| what | goal | found |\n| --- | --- | --- |")
    for part, (rows, *_) in PARTS.items():
        if (path := RESULTS / f"{part}.json").exists():
            for row in rows(json.loads(path.read_text())):
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
