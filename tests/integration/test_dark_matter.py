"""All analyses of a small sweep, as a user runs them.

They are separate processes, on the small real language model.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from tests.integration.job import ENVIRONMENT, REPOSITORY, arguments, run


def analyse(job: str, folder: Path, *more: str, timeout: float = 800) -> subprocess.CompletedProcess:
    words = ["--output", str(folder / "runs"), "--tracking.uri", f"sqlite:///{folder}/mlflow.db", *more]
    command = [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def analysed(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dark")
    done = run(arguments(shared_data, folder, widths="96,128,192,256", k="8,16", train__tokens=60_000), timeout=500)
    assert done.returncode == 0, done.stderr
    more = ["--tokens", "45000", "--predicted_tokens", "2000", "--target_l0", "16", "--replicates", "30"]
    done = analyse("dark_matter", folder, *more)
    assert done.returncode == 0, done.stderr
    assert "(raylet)" not in done.stdout + done.stderr, "no call was cut off by the end of its actor"
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_report_has_every_figure_and_a_verdict_per_claim(analysed: Path) -> None:
    page = (analysed / "runs/test/analysis/report.html").read_text()
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64,[A-Za-z0-9+/=]{10000,}"', page)) >= 11
    verdicts = re.findall(r'class="verdict"[^>]*>([^<]+)<', page)
    assert len(verdicts) == 11
    assert set(verdicts) <= {"holds", "does not hold", "cannot be told here"}
    assert not re.search(r"(src|href)=.https?:", page), "the page loads something from elsewhere"
    assert "was not measured" not in page
    for number in (
        "nonlinear FVU",
        "cross-entropy recovered",
        "encoder error",
        "groups of documents in C",
        "The breakdown of the errors that pursuit leaves",
        "Estimates on the synthetic model beside their closed form",
    ):
        assert number in page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_numbers_agree_with_the_sweep_and_among_themselves(analysed: Path) -> None:
    results = analysed / "runs/test/analysis"
    regressions = pd.read_parquet(results / "error_regression/regressions.parquet").set_index("sae")
    swept = pd.read_csv(analysed / "runs/test/summary/summary.csv").set_index("name")
    assert set(regressions.index) == set(swept.index)
    assert (regressions["fvu"] / swept["fvu"].reindex(regressions.index)).between(0.9, 1.1).all(), (
        "both read held-out rows of the same text, but other ones"
    )
    assert (regressions["nonlinear_fvu"] < regressions["fvu"]).all()
    assert regressions["r2_error_weighted"].between(0, 1).all()
    pursuit = pd.read_parquet(results / "pursuit/pursuit.parquet").set_index("sae")
    breakdown = pd.read_parquet(results / "breakdown/breakdown.parquet").set_index("width")
    assert breakdown["encoder"].to_dict() == pytest.approx(pursuit.set_index("width")["encoder_error"].to_dict())
    assert (pursuit["fvu"] - regressions["fvu"].reindex(pursuit.index)).abs().max() < 1e-6
    assert (pursuit["nonlinear_fvu"] - regressions["nonlinear_fvu"].reindex(pursuit.index)).abs().max() < 1e-6
    downstream = pd.read_parquet(results / "downstream_loss/downstream.parquet").set_index("sae")
    assert len(downstream) == 8
    assert (downstream["ce_sae"] > downstream["ce_clean"]).all()
    assert (downstream["ce_nonlinear"] < downstream["ce_sae"]).all()
    errors = pd.read_parquet(results / "error_saes/error_saes.parquet").set_index("kind")
    assert set(errors.index) == {"error", "linear", "nonlinear"}
    assert errors["fvu"].between(0, 1).all()
    seeds = pd.read_parquet(results / "error_saes/seeds.parquet")
    assert seeds.groupby("kind").size().to_dict() == {"error": 3, "linear": 3, "nonlinear": 3}
    earlier = pd.read_parquet(results / "earlier_layers/earlier_layers.parquet")
    assert set(earlier.groupby("source")["part"].nunique()) == {5}, "there is an SAE at every source, attn_z too"
    (beyond,) = pd.read_parquet(results / "earlier_layers/beyond_pursuit.parquet").to_dict("records")
    assert any(beyond["encoder_share"] == pytest.approx(share) for share in pursuit["encoder_share"])
    assert {"resid_post.2", "resid_post.1", "mlp_out.2", "attn_out.2", "attn_z.2"} == set(earlier["source"])
    tables = list((results / "per_token").glob("*.parquet"))
    assert len(tables) == 4
    table = pd.read_parquet(tables[0])
    assert (table["l0"] == table["latents"].map(len)).all()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mlflow_has_a_run_per_analysis_and_one_per_sae_it_read(analysed: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{analysed}/mlflow.db")
    experiment = client.get_experiment_by_name("raysae")
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id])
        if run.data.tags["raysae.kind"].startswith("analys")
    ]
    parents = {run.data.params["analysis"]: run for run in runs if run.data.tags["raysae.kind"] == "analysis"}
    names = {
        "error_regression",
        "breakdown",
        "per_token_scaling",
        "introduced_error",
        "downstream_loss",
        "error_saes",
        "pursuit",
        "earlier_layers",
        "dark_matter",
    }
    assert set(parents) == names
    assert all(run.info.status == "FINISHED" for run in runs)
    regression = parents["error_regression"]
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == regression.info.run_id]
    assert len(below) == 8
    assert {"fvu", "l0", "nonlinear_fvu", "r2_error", "r2_error_norm"} <= set(below[0].data.metrics)
    assert below[0].data.params["width"] in ("96", "128", "192", "256")
    assert below[0].data.tags["raysae.source_run"] in regression.data.tags["raysae.saes"]
    breakdown = parents["breakdown"]
    assert {"fit/c", "fit/m", "level/value", "level/slope"} <= set(breakdown.data.metrics)
    for parent, figure in ((regression, "norms"), (breakdown, "breakdown")):
        figures = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, "figures")}
        assert f"figures/{figure}.png" in figures
    assert [artifact.path for artifact in client.list_artifacts(parents["dark_matter"].info.run_id)] == ["report.html"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_another_job_reads_what_is_there_and_the_latest_sweep_is_the_users(analysed: Path) -> None:
    tasks = analysed / "runs/test/analysis/tasks"
    before = {file: file.stat().st_mtime_ns for file in tasks.iterdir()}
    more = ["--tokens", "45000", "--predicted_tokens", "2000", "--target_l0", "16", "--replicates", "30"]
    done = analyse("downstream_loss", analysed, *more)
    assert done.returncode == 0, done.stderr
    assert "Study test:" in done.stdout, "a sweep that an analysis trained is not the user's"
    assert {file: file.stat().st_mtime_ns for file in tasks.iterdir()} == before
