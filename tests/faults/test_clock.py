"""The clock of one process goes backwards while it trains, checkpoints and tracks.

After a SIGKILL the process restarts with a clock that is further behind. The machine's clock stays as it is: a few
lines of C change it within the process. libfaketime 0.9.10 does that too, but it breaks Python's `time.sleep`.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from raysae.tracking.outbox import SENT
from tests.tracking.conftest import migrated  # noqa: F401 (a fixture)
from tests.train.synthetic import TRAIN, ArraySource, config
from tests.train.test_loop import assert_same_sae, lasting, trained

pytestmark = pytest.mark.fault
ROOT = Path(__file__).parents[2]
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    FILE *file = id == CLOCK_REALTIME ? fopen(getenv("CLOCK_FILE"), "r") : NULL;
    long seconds = 0;
    if (file && fscanf(file, "%ld", &seconds) == 1) t->tv_sec += seconds;
    if (file) fclose(file);
    return result;
}
"""
SAE = config(seed=0)
RUN = TRAIN.model_copy(update={"tokens": 64 * 300, "reports": 30, "checkpoint_seconds": 0.3})
PROGRAM = """
import sys, torch
from raysae.config import TrackingConfig
from raysae.sweep.watch import track
from raysae.tracking.runs import Study
from tests.faults.test_clock import RUN, SAE
from tests.train.synthetic import ArraySource
from tests.train.test_loop import loop_on
torch.set_num_threads(1)
folder, database = sys.argv[1:]
study = Study(folder + "/outbox.db", TrackingConfig(uri="sqlite:///" + database), "s", {})
study.child(SAE.name, {})
loop = loop_on(folder, ArraySource(RUN, delay=0.05), train=RUN)
tracked = 0
def told():
    global tracked
    reports, _ = loop.reports(SAE.name)
    for report in reports[tracked:]:
        track(study, SAE.name, report)
        print(report["tokens"], flush=True)
    tracked = len(reports)
loop.on_change = told
loop.add(SAE)
loop.run()
study.end(SAE.name, "FINISHED")
study.end(None, "FINISHED")
assert study.flush(200) == 0
study.close()
print("opened", loop.source.opened, flush=True)
"""


class Clock:
    """The clock of processes started with `environment`: the machine's, moved by some seconds."""

    def __init__(self, folder: Path):
        if shutil.which("gcc") is None:
            pytest.skip("gcc is not here: no process can have a clock of its own")
        self.file, source, library = folder / "clock", folder / "clock.c", folder / "clock.so"
        source.write_text(SOURCE)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.environment = os.environ | {"LD_PRELOAD": str(library), "CLOCK_FILE": str(self.file)}
        self.move(0)

    def move(self, seconds: int) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}\n")
        fresh.replace(self.file)


def steps_in(checkpoint: Path) -> int:
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["raysae"])["header"]["member"]["steps_done"]


def newest(folder: Path) -> int:
    """Steps in the checkpoint with the highest number, or 0 where there is none."""
    while True:
        paths = sorted((folder / "checkpoints" / SAE.name).glob("*.safetensors"))
        try:
            return steps_in(paths[-1]) if paths else 0
        except FileNotFoundError:  # A newer one has replaced it meanwhile
            continue


def test_the_clock_goes_backwards(tmp_path: Path, migrated: Path) -> None:  # noqa: F811
    folder, whole, database = tmp_path / "study", tmp_path / "whole", tmp_path / "mlflow.db"
    folder.mkdir()
    shutil.copy(migrated, database)
    clock = Clock(tmp_path)

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, str(folder), str(database)]
        return subprocess.Popen(
            command, cwd=ROOT, env=clock.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    process = start()
    first = [line for line in (process.stdout.readline() for _ in range(5)) if line]
    assert len(first) == 5, process.stderr.read()
    before = newest(folder)
    clock.move(-3600)
    give_up = time.monotonic() + 120
    while newest(folder) <= max(before, 80) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = newest(folder)
    assert kept > max(before, 80), "checkpoints went on being written, and the newest has the highest number"
    assert kept < RUN.steps
    clock.move(-7200)
    again = start()
    out, err = again.communicate(timeout=250)
    assert again.returncode == 0, err
    assert f"opened [{64 * kept}]" in out

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    undisturbed = trained(whole, SAE, source=ArraySource(RUN), train=RUN)
    torch.set_num_threads(threads)
    assert_same_sae(whole, folder, SAE.name)
    reports = json.loads((folder / "saes" / SAE.name / "outcome.json").read_text())["reports"]
    assert lasting(reports) == lasting(undisturbed.reports(SAE.name)[0])
    assert [report["tokens"] for report in reports][:5] == [int(line) for line in first]
    jumps = [later["time"] - earlier["time"] for earlier, later in itertools.pairwise(reports)]
    assert sum(jump < -3000 for jump in jumps) == 2, "the clock did go backwards, twice"

    box = sqlite3.connect(folder / "outbox.db")
    told = set(box.execute("SELECT key, step, value, time FROM metrics WHERE run = ?", (SAE.name,)))
    assert box.execute("SELECT count(*) FROM metrics WHERE state != ?", (SENT,)).fetchone() == (0,)
    assert {step for key, step, *_ in told if key == "fvu"} == {report["tokens"] for report in reports}
    assert {(step, value) for key, step, value, _ in told if key == "fvu"} == {
        (report["tokens"], report["fvu"]) for report in reports
    }
    arrived = sqlite3.connect(database).execute("SELECT key, step, value, timestamp FROM metrics").fetchall()
    assert len(arrived) == len(told)
    assert set(arrived) == told
