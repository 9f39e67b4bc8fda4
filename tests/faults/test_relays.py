"""A sweep with more banks than one relay serves. Here a relay serves one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults import harness
from tests.faults.harness import Sweep, assert_same

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]


def test_relays_killed_and_hung(
    sweep: Callable[..., Sweep], undisturbed: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the two dies. The other is stopped, so that it is alive and silent. Then the queue dies.

    At the end nothing is left of them.
    """
    theirs = undisturbed()
    job = (
        "import runpy, raysae.sweep.run as run; run.CONSUMERS = 1; "
        f"runpy.run_path({harness.JOB[0]!r}, run_name='__main__')"
    )
    monkeypatch.setattr(harness, "JOB", ("-c", job))
    ours = sweep(faults__hang_seconds=8)
    ours.until(lambda: len(ours.pids("relay")) == 2)
    before = set(ours.pids("relay"))
    ours.until_share(0.1)
    killed = ours.kill("relay")
    (other,) = before - {killed}
    # Stop it at once: its trainer must not have read everything yet
    os.kill(other, signal.SIGSTOP)
    ours.wait_for("relay", before)
    ours.kill("queue")
    ours.until(lambda: not set(ours.pids("relay")) & before and len(ours.pids("relay")) == 2, 60)
    ours.finish()
    assert_same(ours, theirs)
    assert (
        "relay 0: its process had ended, and was restarted" in ours.log()
        or "relay 1: its process had ended" in ours.log()
    )
    assert "has been silent for 8 s: it is restarted" in ours.log()
