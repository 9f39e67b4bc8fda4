"""How a sweep ends: it says what to do about failed SAEs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from raysae.config import SweepConfig
from raysae.study.place import Place
from raysae.sweep.ending import what_next
from raysae.train.outcome import Outcome, Outcomes

CONFIG = SweepConfig(output="out")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """The place of a study whose SAE "nan" has failed for good."""
    Outcomes(str(tmp_path / "saes")).save("nan", Outcome("failed", 640, [0.0], "nan: loss is nan at step 10"))
    return Place("s", str(tmp_path), tmp_path)


def said(place: Place, statuses: dict[str, str], unmeasured: list[str]) -> list[str]:
    results = pd.DataFrame({"name": list(statuses), "status": list(statuses.values())})
    return list(what_next(results, unmeasured, CONFIG, place))


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
