"""What a sweep says of outliers, of rows left out, and of too few held-out rows."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pandas as pd
import pytest

from raysae.config import EvaluationConfig, SweepConfig
from raysae.sweep.notes import held_out_notes, left_out_note, outliers_told
from raysae.sweep.watch import Watch
from tests.train.synthetic import SPEC

EVALUATION = EvaluationConfig(rows=200_000)


def results(**changes: object) -> pd.DataFrame:
    report = {"hook_point": "resid_post.3", "final": True, "evaluation_rows": 200_000, "largest_rows_share": 0.004}
    return pd.DataFrame([report, report | changes, {"hook_point": "resid_post.3", "final": None}])


def test_nothing_is_said_of_sound_rows() -> None:
    assert list(held_out_notes(results(), EVALUATION)) == []
    assert list(held_out_notes(pd.DataFrame([{"hook_point": "a", "status": "failed"}]), EVALUATION)) == []
    assert list(left_out_note({"rows_left_out": 0, "contexts_forwarded": 0}, SPEC)) == []


def test_outliers_are_told_by_hook_point_with_what_to_do() -> None:
    (note,) = held_out_notes(results(hook_point="mlp_out.1", largest_rows_share=0.97), EVALUATION)
    assert note.startswith("mlp_out.1: the largest 0.1 % of the rows hold 97% of the variance")
    assert "--stream.leave_out_norm 10 " in note
    assert outliers_told("a", {"largest_rows_share": 0.099}, 10) is None


def test_fewer_held_out_rows_than_wanted_are_told_with_what_they_do() -> None:
    (note,) = held_out_notes(results(evaluation_rows=128_000), EVALUATION)
    assert note.startswith("resid_post.3: 128,000 held-out rows of the 200,000 wanted")
    assert "larger by about 25%" in note


def test_the_share_of_rows_left_out_counts_rows_that_were_made() -> None:
    made = {"rows_left_out": 96.0, "contexts_forwarded": 512.0}  # 512 contexts of 15 rows each
    (note,) = left_out_note(made, SPEC)
    assert note.startswith("1.25% of the rows were left out")


def test_the_watch_tells_of_outliers_once_per_hook_point(caplog: pytest.LogCaptureFixture) -> None:
    config = SweepConfig(hook_points=["resid_post.0", "resid_post.1"], widths=[64], k=[8])
    watch = Watch(SimpleNamespace(config=config, saes=config.saes()), None, {}, {}, study=None)
    with caplog.at_level(logging.WARNING):
        for share in (0.01, 0.5, 0.6):
            for hook in watch.hook_point.values():
                watch._note_outliers(hook, {"largest_rows_share": share})
    assert [record.message.split(":")[0] for record in caplog.records] == ["resid_post.0", "resid_post.1"]
