"""ASHA's decisions are written down, once for each SAE at each rung."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from ray.tune.schedulers import TrialScheduler

from raysae.sweep.trials import Rungs


def test_a_line_for_each_sae_at_each_rung(tmp_path: Path) -> None:
    rungs = Rungs(tmp_path / "rungs.jsonl", rows=800, first=100, reduction=2)
    rungs.set_search_properties("fvu", "min")
    good, bad = (SimpleNamespace(trial_id=name, config={"sae": name}) for name in ("good", "bad"))
    for trial in (good, bad):
        rungs.on_trial_add(None, trial)
    results = [(good, 50, 0.9), (good, 100, 0.2), (good, 150, 0.2), (bad, 110, 0.5), (good, 200, 0.1), (good, 410, 0.1)]
    decisions = [rungs.on_trial_result(None, trial, {"tokens": tokens, "fvu": fvu}) for trial, tokens, fvu in results]
    assert decisions == [TrialScheduler.CONTINUE] * 3 + [TrialScheduler.STOP] + [TrialScheduler.CONTINUE] * 2
    lines = [json.loads(line) for line in (tmp_path / "rungs.jsonl").read_text().splitlines()]
    assert [(line["sae"], line["rung"], line["tokens"], line["decision"]) for line in lines] == [
        ("good", 1, 100, "CONTINUE"), ("bad", 1, 110, "STOP"), ("good", 2, 200, "CONTINUE"),
        ("good", 3, 410, "CONTINUE"),
    ]  # fmt: skip
    assert lines[1]["fvu"] == 0.5
