"""How a sweep ends: it says what to do about failed SAEs, and closes its runs without interruption."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pandas as pd
import pytest

from raysae.config import SweepConfig
from raysae.study.place import Place
from raysae.sweep.ending import _what_next
from raysae.sweep.run import _close, _interruptible
from raysae.train.outcome import Outcome, Outcomes

CONFIG = SweepConfig(output="out")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The place of a study whose SAE "nan" has failed for good."""
    Outcomes(str(tmp_path / "saes")).save("nan", Outcome("failed", 640, [0.0], "nan: loss is nan at step 10"))
    return Place("s", str(tmp_path), tmp_path)


def said(place: Place, statuses: dict[str, str], unmeasured: list[str]) -> list[str]:
    results = pd.DataFrame({"name": list(statuses), "status": list(statuses.values())})
    return list(_what_next(results, unmeasured, CONFIG, place))


def test_what_can_be_done_about_what_failed_is_said_as_it_is(place: Place) -> None:
    assert said(place, {"fine": "done", "early": "stopped"}, []) == []
    (for_good,) = said(place, {"fine": "done", "nan": "failed"}, [])
    assert for_good.startswith("1 SAE failed for good")
    assert "--resume" not in for_good
    (goes_on,) = said(place, {"fine": "done", "lost": "failed"}, [])
    assert goes_on.startswith("SAEs that have not come to their end go on with: ")
    assert goes_on.endswith("--resume s")
    assert said(place, {"nan": "failed", "lost": "failed"}, []) == [for_good, goes_on]
    assert said(place, {"nan": "failed", "lost": "failed"}, ["KL could not be measured"]) == [for_good, goes_on]
    again = goes_on.replace("SAEs that have not come to their end go on", "It is tried again")
    assert said(place, {"fine": "done"}, ["KL could not be measured"]) == [again]
    assert said(place, {"nan": "failed"}, ["KL could not be measured"]) == [for_good, again]


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
    with _interruptible() as interruptions:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        _close(study, "KILLED")
    assert study.done == ["KILLED", "flushed", "closed"]
    assert len(interruptions) == 1
    assert signal.getsignal(signal.SIGINT) == before
