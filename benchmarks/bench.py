"""Measures anew what the goals for speed ask for, and puts it into one table: `make bench`.

    python benchmarks/bench.py                 all parts, about two hours on two cores
    python benchmarks/bench.py steps producer  some of them

Every part is a script of its own in this folder. It writes its numbers to build/bench/PART.json. The table is made of
the numbers there. It is printed, and written to table.md and table.json in the same folder. So parts may be measured on
different days, but not on different machines. A part that fails leaves its earlier numbers as they are.

Where a part measures several times, the table has the median with the least and the greatest. `sweep`, `many` and
`whole_job` do not. Run it on a quiet machine.

`steps` and `whole_job` need the peers' environment. `make bench ARGS="steps"` makes it before it measures the part.

Scripts without a goal for speed are left out: `pursuit.py`, `recovery.py`, `resume_saelens.py` and `plan.py`. So is
everything on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "build" / "bench"
Row = tuple[str, str, str]  # What, goal, found
STEP_GOALS = {
    "topk-d256-n4096": 3, "topk-d256-n16384": 2.5, "topk-d768-n24576": 1.8,
    "batchtopk-d256-n4096": 3, "jumprelu-d256-n4096": 2, "relu-d256-n4096": 1.5,
    "matryoshka-d256-n4096": 1.5, "gated-d256-n4096": 1.5, "gated-start-d256-n4096": 1,
}  # fmt: skip
BOUND_GOALS = {"topk-d256-n4096": 0.4, "topk-d256-n16384": 0.5, "topk-d768-n24576": 0.6}


def told(found: dict[str, float], form: str = ".2f", unit: str = "") -> str:
    """A median, and the range where there is one."""
    median, least, greatest = (format(found[key], form) for key in ("median", "least", "greatest"))
    return f"{median}{unit}" + (f" ({least} to {greatest})" if least != greatest else "")


def of_steps(results: list[dict]) -> Iterator[Row]:
    for result in results:
        name, ours = result["name"], result["sides"]["raysae"]
        if "ratio" in result:
            yield (
                f"{name}: step against {result['best_peer']}",
                f"≥ {STEP_GOALS[name]} ×",
                told(result["ratio"], unit=" ×"),
            )
        if name in BOUND_GOALS:
            yield (
                f"{name}: share of the least-work bound",
                f"≥ {BOUND_GOALS[name]:.0%}",
                f"{ours['share_of_bound']:.0%}",
            )
        others = ", ".join(
            f"{side} {found['extra_mib']:,.0f}" for side, found in result["sides"].items() if side != "raysae"
        )
        goal = "≤ 256 MiB" if "topk" in name else "–"
        yield (
            f"{name}: memory of a step beyond weights, gradients, Adam",
            goal,
            f"{ours['extra_mib']:,.0f} MiB" + (f" ({others})" if others else ""),
        )


def of_producer(result: dict) -> Iterator[Row]:
    yield "a producer against a bare forward pass", "≥ 0.95", told(result["ratio"], ".3f")


def of_help(result: dict) -> Iterator[Row]:
    yield "`--help`", "≤ 1 s", told(result, unit=" s")


def of_sweep(result: dict) -> Iterator[Row]:
    yield "make sweep", "≤ 8 min", f"{result['wall'] / 60:.1f} min"
    yield (
        "its steady state against one LM pass + isolated steps",
        "≤ 1.10",
        "{ratio_least:.2f} to {ratio_most:.2f}".format(**result),
    )
    yield (
        "the same, each step on the better number of cores",
        "–",
        "{ratio_best_least:.2f} to {ratio_best_most:.2f}".format(**result),
    )
    yield "time that its trainers waited", "≤ 3 %", f"{result['waited_share']:.1%}"
    yield (
        "its evaluations (FVU, L0, CE recovered, KL; the LM pass over held-out rows is apart)",
        "≤ 10 %",
        f"{result['evaluation_share']:.0%}",
    )
    yield "from start to first training step", "≤ 25 s", f"{result['start_up']:.0f} s"


def of_many(results: dict[str, dict]) -> Iterator[Row]:
    for key, goal, steps in (
        ("ratio", "≤ 1.10", "isolated steps"),
        ("ratio_best", "–", "isolated steps, each on the better number of cores"),
    ):
        found = ", ".join(
            f"N = {number}: {result[f'{key}_least']:.2f} to {result[f'{key}_most']:.2f}"
            for number, result in results.items()
        )
        yield f"steady state of N SAEs against one LM pass + {steps}", goal, found


def of_whole_job(sides: dict[str, dict]) -> Iterator[Row]:
    ours = sides["raysae"]
    for side, theirs in sides.items():
        if side == "raysae":
            continue
        own = (
            f"; against its training alone {told(theirs['own_seconds_ratio'], unit=' ×')}" if side == "sparsify" else ""
        )
        yield f"whole job of 8 SAEs against {side}", "≥ 4 ×", told(theirs["seconds_ratio"], unit=" ×") + own
        yield "its peak memory, GiB", "less", f"{told(ours['gib'], '.1f')} against {told(theirs['gib'], '.1f')}"
        yield "its mean FVU", "–", f"{ours['fvu']:.3f} against {theirs['fvu']:.3f}"


def of_control_plane(result: dict) -> Iterator[Row]:
    for row in result["state"]:
        what = f"{row['consumers']} consumers of 10,000 blocks a minute each, {row['blocks']} blocks a shard"
        yield f"state machine alone, share of a core: {what}", "< 100 %", f"{row['share_of_core']:.0%}"
    for row in result["queue"]:
        yield (
            f"queue alone: consumers of 10,000 blocks a minute each, {row['blocks']} blocks a shard",
            "–",
            f"{row['limit_consumers']:.0f}",
        )
    for row, bundled, relay in zip(result["relayed"], result["crowd"], result["relay"], strict=True):
        what = f"queue through relays: consumers of 10,000 blocks a minute each, {row['blocks']} blocks a shard"
        yield what, "≥ 64", f"{row['limit_consumers']:.0f}; {bundled['limit_consumers']:.0f} at that rate"
        yield "of these a relay serves", f"≥ {relay['consumers'] // relay['relays']}", f"{relay['limit_consumers']:.0f}"


PARTS = {  # Name → its rows of the table, its script and the script's arguments
    "help": (of_help, "help.py"),
    "steps": (of_steps, "steps.py"),
    "producer": (of_producer, "producer.py"),
    "sweep": (of_sweep, "one_pass.py"),
    "many": (of_many, "many.py", "--figure", str(RESULTS / "many.png")),
    "whole_job": (of_whole_job, "whole_job.py", "--steps", str(RESULTS / "steps.json")),
    "control_plane": (
        of_control_plane,
        "control_plane.py",
        "--simulated",
        "512",
        "--consumers",
        "64",
        "--relayed",
        "64",
        "--blocks",
        "8,32",
    ),
}


def table(folder: Path) -> list[Row]:
    """The rows of all parts that have been measured."""
    return [
        row
        for part, (rows, *_) in PARTS.items()
        if (path := folder / f"{part}.json").exists()
        for row in rows(json.loads(path.read_text()))
    ]


def write_table(folder: Path) -> str:
    """Writes table.md and table.json into `folder`, and returns the text of table.md."""
    rows = table(folder)
    text = "\n".join(
        ["| what | goal | found |", "| --- | --- | --- |", *("| " + " | ".join(row) + " |" for row in rows)]
    )
    (folder / "table.md").write_text(text + "\n")
    (folder / "table.json").write_text(
        json.dumps(
            [dict(zip(("what", "goal", "found"), row, strict=True)) for row in rows], indent=1, ensure_ascii=False
        )
    )
    return text


def measure(part: str, folder: Path) -> bool:
    """Measures a part and returns whether it ran to its end. Only then its numbers replace the earlier ones."""
    _, script, *arguments = PARTS[part]
    new = folder / f"{part}.json.new"
    if subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / script), "--json", str(new), *arguments]
    ).returncode:
        return False
    new.replace(folder / f"{part}.json")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"Parts to measure: {', '.join(PARTS)}. None means all."
    )
    wanted = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = [part for part in wanted if not measure(part, RESULTS)]
    print(f"\n{write_table(RESULTS)}")
    if failed:
        there = {
            part: "has its earlier numbers" if (RESULTS / f"{part}.json").exists() else "lacks it" for part in failed
        }
        sys.exit("error: " + "; ".join(f"{part} failed, the table {what}" for part, what in there.items()))


if __name__ == "__main__":
    main()
