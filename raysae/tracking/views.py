"""Saved views of MLflow's run page: the runs, columns and charts it shows of a study.

By default that page lists the studies without a number, and draws every metric by itself.

A saved view is a tag of the experiment that holds the page's state. Everybody who opens the experiment finds it in the
menu "Views". Its URL needs the tag's key only.

Names of columns, charts and fields are those of MLflow's UI. They were written for 3.17. A version that does not know a
field ignores it.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import Any, Literal
from urllib.parse import urlencode

from raysae.tracking.tags import KIND_ANALYSED, KIND_SAE, KIND_TAG, STUDY_TAG, condition

VIEW_TAG = "mlflow.sharedViewState."
ALL, LATEST, ANALYSES = "raysae-all", "raysae-latest", "raysae-analyses"  # Keys of the views

# Columns from left to right, with their widths in pixels. The page leaves out those that no run has: sparsity, or k,
# where no architecture has it.
WIDTHS = {
    "attributes.`Run Name`": 270, "runDateAndNestInfo": 130, f"tags.`{STUDY_TAG}`": 130,
    "params.`architecture`": 90, "params.`hook_point`": 100, "params.`width`": 60, "params.`k`": 50,
    "params.`sparsity`": 75, "metrics.`fvu`": 85, "metrics.`l0`": 75, "metrics.`ce_recovered`": 100, "metrics.`kl`": 85,
    "metrics.`dead_fraction`": 105, "metrics.`tokens`": 85, "metrics.`tokens_per_second`": 135, "duration": 80,
}  # fmt: skip
# Metrics of analyses.
ANALYSED = ("l0", "fvu", "nonlinear_fvu", "r2_error", "r2_error_weighted", "r2_error_norm", "encoder_error")
MAIN, REST = "raysae-main", "raysae-rest"  # Sections of the charts
MOST_RUNS = 100  # The page loads this many at first


def view_tags(study: str) -> dict[str, str]:
    """The experiment's tags that hold its views.

    One shows all SAEs, the newest first. The other shows this study's SAEs, the best first.
    """
    # Without `` MLflow would hide the SAEs below their studies.
    newest_first = {"orderByKey": "attributes.`start_time`", "orderByAsc": False}
    best_first = {"orderByKey": "metrics.`fvu`", "orderByAsc": True}
    every = _state({KIND_TAG: KIND_SAE}) | newest_first | {"runsHiddenMode": "FIRST_20_RUNS"}
    latest = _state({KIND_TAG: KIND_SAE, STUDY_TAG: study}) | best_first | {"runsHiddenMode": "SHOW_ALL"}
    latest["selectedColumns"].remove(f"tags.`{STUDY_TAG}`")
    return {VIEW_TAG + ALL: _saved("All SAEs", every), VIEW_TAG + LATEST: _saved("Latest study", latest)}


def analysis_view_tags() -> dict[str, str]:
    """The experiment's tag that holds the view of all SAEs that analyses have read.

    It shows those of every sweep, the newest first.
    """
    columns = {key: value for key, value in WIDTHS.items() if not key.startswith("metrics")}
    columns |= {f"metrics.`{metric}`": 90 for metric in ANALYSED}
    state = _state({KIND_TAG: KIND_ANALYSED}) | {
        "orderByKey": "attributes.`start_time`",
        "orderByAsc": False,
        "runsHiddenMode": "SHOW_ALL",
        "selectedColumns": [column for column in columns if "`" in column],
        "columnOrder": list(columns),
        "columnWidths": columns,
        "compareRunCharts": [_scatter("width", metric, x_type="PARAM") for metric in ANALYSED[1:]]
        + [_scatter("l0", "nonlinear_fvu")],
    }
    return {VIEW_TAG + ANALYSES: _saved("Analysed SAEs", state)}


def view_url(server: str, experiment_id: str, view: str, mode: Literal["TABLE", "CHART"]) -> str:
    """URL where the server shows a view, as table or charts."""
    query = urlencode({"workflowType": "machine_learning", "compareRunsMode": mode, "viewStateShareKey": view})
    return f"{server}/#/experiments/{experiment_id}/runs?{query}"


def _saved(name: str, state: dict[str, Any]) -> str:
    """A view as MLflow saves it."""
    now = round(1000 * time.time())
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"})


def _state(runs: dict[str, str]) -> dict[str, Any]:
    """The page's state: the runs with these tags, their columns and charts."""
    return {
        "searchFilter": condition(runs),
        "selectedColumns": [column for column in WIDTHS if "`" in column],
        "columnOrder": list(WIDTHS),
        "columnWidths": WIDTHS,
        "compareRunSections": [_section(MAIN, "SAEs", display=True), _section(REST, "Model metrics", display=False)],
        "compareRunCharts": [
            _scatter("l0", "fvu"),
            _scatter("l0", "ce_recovered"),
            _curve("fvu"),
            _scatter("width", "fvu", x_type="PARAM"),
            _chart("BAR", "ce_recovered", metricKey="ce_recovered"),
            _curve("dead_fraction"),
            _chart(
                "PARALLEL",
                "knobs",
                selectedParams=["width", "k"],
                selectedMetrics=["fvu", "ce_recovered"],
                showAllRuns=False,
            ),
            _curve("l0"),
            _chart("BAR", "kl", metricKey="kl"),
        ],
        # Keeps the order of the sections. MLflow adds the charts of the other metrics to the second one.
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }


def _section(uuid: str, name: str, display: bool) -> dict[str, Any]:
    return {"uuid": uuid, "name": name, "display": display, "isReordered": True, "deleted": False, "isGenerated": False}


def _chart(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    common = {
        "uuid": f"raysae-{kind}-{name}".lower(),
        "type": kind,
        "metricSectionId": MAIN,
        "runsCountToCompare": MOST_RUNS,
    }
    return common | {"deleted": False, "isGenerated": False} | fields


def _scatter(x: str, y: str, x_type: Literal["METRIC", "PARAM"] = "METRIC") -> dict[str, Any]:
    return _chart("SCATTER", f"{x}-{y}", xaxis={"key": x, "type": x_type}, yaxis={"key": y, "type": "METRIC"})


def _curve(metric: str) -> dict[str, Any]:
    """A metric over the course of training.

    The axis is the metric `tokens` rather than the step, for its title. The two are the same number.
    """
    axis = {
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": "tokens",
        "useGlobalXaxisKey": False,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
    }
    metrics = {"metricKey": metric, "selectedMetricKeys": [metric], "yAxisKey": "metric", "yAxisExpressions": []}
    return _chart(
        "LINE", metric, **metrics, **axis, range={}, lineSmoothness=0, useGlobalLineSmoothing=True, ignoreOutliers=False
    )
