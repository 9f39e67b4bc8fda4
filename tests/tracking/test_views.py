"""MLflow has the saved views as its UI reads them. The UI's command refuses what cannot work."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient

from raysae.commands.ui import check
from raysae.config import SweepConfig, TrackingConfig, UserError
from raysae.sweep.watch import METRICS
from raysae.tracking.runs import Study
from raysae.tracking.views import WIDTHS, view_tags, view_url

ALL, LATEST = "mlflow.sharedViewState.raysae-all", "mlflow.sharedViewState.raysae-latest"
KNOBS = set(SweepConfig().model_dump()) | {"architecture", "hook_point", "width", "k", "sparsity"}


def state(tag: str) -> dict:
    """Reads a view's state as the UI does.

    An envelope has a name and times. In it is the page's state, as base64 of zlib's format.
    """
    envelope = json.loads(tag)
    assert isinstance(envelope["name"], str)
    assert isinstance(envelope["createdAt"], int)
    head, packed = envelope["state"].split(";", 1)
    assert head == "deflate"
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_columns_and_charts_show_what_is_tracked():
    tags = view_tags("it's s1")
    assert set(tags) == {ALL, LATEST}
    # Every MLflow server takes this much as an experiment's tag
    assert max(map(len, tags.values())) < 5000
    every, latest = state(tags[ALL]), state(tags[LATEST])
    assert every["searchFilter"] == "tags.`raysae.kind` = 'sae'"
    assert latest["searchFilter"] == "tags.`raysae.kind` = 'sae' and tags.`raysae.study` = \"it's s1\""
    expected = {
        "params.`width`",
        "params.`k`",
        "metrics.`fvu`",
        "metrics.`l0`",
        "metrics.`ce_recovered`",
        "metrics.`kl`",
    }
    assert expected < set(latest["selectedColumns"])
    assert set(every["selectedColumns"]) - set(latest["selectedColumns"]) == {"tags.`raysae.study`"}
    metrics = set(re.findall(r"metrics\.`(\w+)`", " ".join(WIDTHS)))
    knobs = set(re.findall(r"params\.`(\w+)`", " ".join(WIDTHS)))
    for chart in latest["compareRunCharts"]:
        if chart["type"] == "SCATTER":
            for axis in (chart["xaxis"], chart["yaxis"]):
                (metrics if axis["type"] == "METRIC" else knobs).add(axis["key"])
        elif chart["type"] == "PARALLEL":
            metrics.update(chart["selectedMetrics"])
            knobs.update(chart["selectedParams"])
        else:
            metrics.update({chart["metricKey"], chart.get("selectedXAxisMetricKey", "tokens")})
    assert metrics <= {*METRICS, "ce_recovered", "kl"}, "reports of an SAE on its way, and its evaluation downstream"
    assert knobs <= KNOBS
    sections = {section["uuid"] for section in latest["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in latest["compareRunCharts"]} < sections
    assert len({chart["uuid"] for chart in latest["compareRunCharts"]}) == len(latest["compareRunCharts"])


def test_a_new_study_saves_the_views_and_leaves_a_changed_one_alone(tracking: TrackingConfig, tmp_path: Path):
    client, changed = MlflowClient(tracking.uri), "changed in the UI"

    def tags_after(study: str) -> dict[str, str]:
        opened = Study(tmp_path / f"{study}.db", tracking, study, {})
        assert opened.flush(60) == 0
        opened.close()
        return client.get_experiment_by_name(tracking.experiment).tags

    tags = tags_after("s1")
    assert "'s1'" in state(tags[LATEST])["searchFilter"]
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    assert len(client.search_runs([experiment], state(tags[ALL])["searchFilter"].replace("'sae'", "'study'"))) == 1, (
        "MLflow takes the filter"
    )
    for key in (ALL, LATEST):
        client.set_experiment_tag(experiment, key, changed)
    assert tags_after("s1")[LATEST] == changed, "no new study"
    tags = tags_after("s2")
    assert tags[ALL] == changed
    assert "'s2'" in state(tags[LATEST])["searchFilter"]


def test_the_url_names_the_view():
    parts = urlsplit(urlsplit(view_url("http://h:1", "7", "raysae-all", "CHART")).fragment)
    assert parts.path == "/experiments/7/runs"
    assert parse_qs(parts.query) == {
        "workflowType": ["machine_learning"],
        "compareRunsMode": ["CHART"],
        "viewStateShareKey": ["raysae-all"],
    }


def test_ui_refuses_what_cannot_work(tmp_path: Path):
    database = tmp_path / "elsewhere.db"
    with pytest.raises(UserError, match=r"no such database yet\. Train SAEs first"):
        check(f"sqlite:///{database}", 5000)
    database.touch()
    with pytest.raises(UserError, match="a server already"):
        check("http://127.0.0.1:5000", 5000)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port is {port}: another program has it"):
            check(f"sqlite:///{database}", port)
    check(f"sqlite:///{database}", port)
    with pytest.raises(UserError, match="--port is 70000: it cannot be used"):
        check(f"sqlite:///{database}", 70000)


def test_ui_says_so_in_one_sentence(tmp_path: Path):
    command = [sys.executable, "-m", "raysae.commands.ui", "--uri", f"sqlite:///{tmp_path}/none.db"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert process.returncode == 2
    assert re.fullmatch(r"error: --uri is sqlite:.*none\.db: there is no such database yet\. .*\n", process.stderr)
    assert process.stdout == ""
