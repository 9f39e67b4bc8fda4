"""The driver is told to end: by SIGTERM, by Ctrl-C in a terminal, by an impatient second Ctrl-C.

What comes out in the end is the same.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

from tests.faults.harness import LONG, PATIENCE, Sweep, assert_same

pytestmark = pytest.mark.fault
INTERRUPTED = 130


def statuses(sweep: Sweep) -> set[str]:
    client = mlflow.MlflowClient(f"sqlite:///{sweep.folder}/mlflow.db")
    return {run.info.status for run in client.search_runs([client.get_experiment_by_name("raysae").experiment_id])}


def assert_interrupted(sweep: Sweep) -> None:
    """Asserts that the driver has ended and has said how to go on.

    Every SAE has a checkpoint or has ended. Nothing half-written is left. The runs are closed.
    """
    assert sweep.driver.wait(PATIENCE) == INTERRUPTED, sweep.log()
    assert f"--resume {sweep.study}" in sweep.log()
    assert "Traceback" not in sweep.log()
    kept = [*sweep.place.glob("checkpoints/*/*.safetensors"), *sweep.place.glob("saes/*/outcome.json")]
    assert len({path.parent.name for path in kept}) == 4
    assert not list(sweep.place.rglob("*.partial"))
    assert statuses(sweep) == {"KILLED"}


def test_sigterm_and_a_second_ctrl_c(sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep]) -> None:
    one = sweep(**LONG, faults__stop_seconds=2 * PATIENCE)
    one.until_share(0.2)
    one.driver.send_signal(signal.SIGTERM)
    assert_interrupted(one)

    one.start()
    one.until_share(0.5)
    silent = one.wait_for("trainer")
    os.kill(silent, signal.SIGSTOP)  # No checkpoint comes, and the driver waits for it
    try:
        one.driver.send_signal(signal.SIGINT)
        time.sleep(8)
        assert one.driver.poll() is None, one.log()
        one.driver.send_signal(signal.SIGINT)
        assert_interrupted(one)  # This takes less time than trainers have
    finally:
        with suppress(ProcessLookupError):  # Ray has ended it with its driver
            os.kill(silent, signal.SIGKILL)

    one.start()
    one.finish()
    assert_same(one, undisturbed(**LONG))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_whole_group_hears_it(
    number: signal.Signals, made: Path, tmp_path: Path, undisturbed: Callable[..., Sweep]
) -> None:
    """The driver and all that it has started in its group of processes get the signal.

    A terminal sends SIGINT. `timeout` and batch systems send SIGTERM. A Ray that the driver started is not in the
    group.
    """
    one = Sweep("local", made, tmp_path, LONG)
    one.start()
    try:
        one.until_share(0.2)
        os.killpg(one.driver.pid, number)
        assert_interrupted(one)
        one.start()
        one.finish()
    finally:
        one.close()
    assert_same(one, undisturbed(**LONG))
