"""How a sweep is interrupted: it closes its runs, and nothing breaks that off."""

from __future__ import annotations

import os
import signal

import pytest

from raysae.sweep.run import close_runs, interruptible


class ImpatientlyInterrupted:
    """A study during whose end somebody presses Ctrl-C and something sends SIGTERM."""

    def __init__(self) -> None:
        self.done: list[object] = []

    def _do(self, what: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        self.done.append(what)

    def end(self, sae_name: None, status: str) -> None:
        self._do(status)

    def flush(self, timeout: float) -> None:
        self._do("flushed")

    def close(self) -> None:
        self._do("closed")


def test_nothing_breaks_off_the_end_of_the_runs() -> None:
    study, before = ImpatientlyInterrupted(), signal.getsignal(signal.SIGINT)
    with interruptible() as interruptions:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        close_runs(study, "KILLED")
    assert study.done == ["KILLED", "flushed", "closed"]
    assert len(interruptions) == 1
    assert signal.getsignal(signal.SIGINT) == before
