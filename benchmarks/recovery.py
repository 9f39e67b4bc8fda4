"""How long a sweep takes to recover: the median of five, for each fault.

    python benchmarks/recovery.py            all faults
    python benchmarks/recovery.py trainer    some of them

Two times are taken from the moment of the kill:

- Until a process takes the dead one's place. For a machine, everything on it must be alive elsewhere.
- Until every SAE has a new number in the outbox, beyond those from before. The driver looks once a second, which adds
  up to a second. This time is the shorter one where enough activations were in flight.

A process that hangs is stopped (SIGSTOP). It counts as hung after `faults.hang_seconds` of silence. Here that is ten.
Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)

from tests.faults.harness import SHARD_ROWS, Sweep, materials  # noqa: E402
from tests.faults.test_nodes import NEEDS, drain, machines_of  # noqa: E402

TIMES = 5
KNOBS = {
    "train.tokens": 60 * SHARD_ROWS,
    "stream.epochs": 3,
    "train.reports": 600,
    "evaluation.interim_rows": 256,
    "train.checkpoint_seconds": 2,
}
FAULTS = {"faults.hang_seconds": 10, "faults.producer_deaths": 1000, "faults.shard_attempts": 20}
PROCESSES = ("producer", "hung producer", "trainer", "hung trainer", "queue", "hung queue", "trial", "driver")
MACHINES = ("machine with producers and trainers", "drained machine")


def trained_on(sweep: Sweep) -> Callable[[], bool]:
    """A function that says whether every SAE has a number beyond those it has now."""
    before = sweep.progress()
    return lambda: all(step > before[name] for name, step in sweep.progress().items())


def strike(sweep: Sweep, fault: str) -> tuple[float, float]:
    """Seconds until the process is back, and until every SAE goes on."""
    kind = fault.split()[-1]
    known = set(sweep.pids(kind))
    goes_on = trained_on(sweep)
    began = time.monotonic()
    if fault.startswith("hung"):
        os.kill(min(known), signal.SIGSTOP)
    else:
        sweep.kill(kind, min(known))
    if kind == "driver":
        sweep.start()
    sweep.wait_for("trainer" if kind == "driver" else kind, known)
    back = time.monotonic() - began
    sweep.until(goes_on)
    return back, time.monotonic() - began


@contextmanager
def running(address: str, made: Path, folder: Path, knobs: dict) -> Iterator[Sweep]:
    sweep = Sweep(address, made, folder, KNOBS | FAULTS | knobs)
    sweep.start()
    try:
        sweep.until_share(0.01)
        yield sweep
    finally:
        sweep.close()


def of_processes(fault: str, made: Path, folder: Path) -> list[tuple[float, float]]:
    ray.init(
        "local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        with running(ray.get_runtime_context().gcs_address, made, folder, {}) as sweep:
            found = []
            for _ in range(TIMES):
                found.append(strike(sweep, fault))
                sweep.until(trained_on(sweep))
            return found
    finally:
        ray.shutdown()


def of_machines(fault: str, made: Path, folder: Path) -> list[tuple[float, float]]:
    with machines_of() as machines:
        there = machines.add("both")
        machines.cluster.wait_for_nodes()
        with running(machines.cluster.address, made, folder, NEEDS) as sweep:
            found = []
            for _ in range(TIMES):
                new = machines.add("both")
                machines.cluster.wait_for_nodes()
                goes_on, began = trained_on(sweep), time.monotonic()
                if fault == "drained machine":
                    drain(there, 120)
                else:
                    machines.kill(there)
                sweep.until(
                    lambda new=new: (
                        sweep.nodes("trainer") == sweep.nodes("producer") == {new} and len(sweep.pids("trainer")) == 2
                    )
                )
                back = time.monotonic() - began
                sweep.until(goes_on)
                found.append((back, time.monotonic() - began))
                if fault == "drained machine":
                    machines.kill(there)
                there = new
                sweep.until(trained_on(sweep))
            return found


def main() -> None:
    faults = (*PROCESSES, *MACHINES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "faults", nargs="*", metavar="FAULT", help=f"Faults to measure: {', '.join(faults)}. None means all."
    )
    wanted = parser.parse_args().faults or faults
    if unknown := [fault for fault in wanted if fault not in faults]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(faults)} (write those of several words in quotes)")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "materials"
        made.mkdir()
        materials(made)
        print("fault | process back, s | every SAE goes on, s (medians of five)\n--- | ---: | ---:", flush=True)
        for number, fault in enumerate(wanted):
            measure = of_machines if fault in MACHINES else of_processes
            found = measure(fault, made, Path(folder) / str(number))
            back, on = (statistics.median(times) for times in zip(*found, strict=True))
            print(f"{fault} | {back:.1f} | {on:.1f}", flush=True)


if __name__ == "__main__":
    main()
