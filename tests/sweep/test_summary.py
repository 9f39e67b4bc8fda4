"""The table and figures at the end of a sweep."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from raysae.config import SweepConfig
from raysae.sweep.figures import figure_of, short
from raysae.sweep.summary import split, summary_table, write_summary

ROOT = Path(__file__).parents[2]


def results_of(config: SweepConfig) -> pd.DataFrame:
    rows = []
    for sae in config.saes():
        level = sae.k or 3 / sae.sparsity**0.4
        fvu = 0.9 * level**-0.42 * sae.width**-0.14 * (1 + 30 * abs(sae.learning_rate - 1e-3)) * (1 + 0.01 * sae.seed)
        knobs = {
            key: getattr(sae, key)
            for key in ("name", "architecture", "width", "k", "sparsity", "hook_point", "learning_rate", "seed")
        }
        metrics = {
            "fvu": fvu,
            "l0": float(level),
            "dead_fraction": 0.1,
            "ce_recovered": 1 - fvu,
            "kl": fvu**2,
            "cosine": 0.9,
            "norm_ratio": 0.95,
        }
        rows.append(knobs | metrics | {"tokens": 1_000_448, "status": "done", "reason": None})
    return pd.DataFrame(rows)


@pytest.fixture
def results() -> pd.DataFrame:
    return results_of(SweepConfig(hook_points=["resid_post.2"], widths=[256, 512, 1024], k=[8, 16]))


def text(results: pd.DataFrame) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(summary_table(results, "SAEs of embedded"))
    return console.file.getvalue()


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_the_table_has_what_varies_and_tells_the_rest_once(results: pd.DataFrame):
    told = text(results)
    assert told.count("\n") == 1 + 1 + 6 + 1
    assert "kind topk · hook point resid_post.2 · lr 0.001 · seed 0 · tokens 1,000,448" in told
    assert told.splitlines()[1].split() == [
        "width",
        "k",
        "FVU",
        "L0",
        "dead",
        "CE",
        "recovered",
        "KL,",
        "nats",
        "cosine",
        "norm",
        "ratio",
    ]
    assert told.splitlines()[2].split()[:5] == ["256", "8", f"{results['fvu'][0]:.4f}", "8.0", "10.0%"]


def test_those_without_a_result_are_listed_with_the_reason(results: pd.DataFrame):
    results.loc[0, ["status", "reason", "fvu"]] = ["failed", "loss is nan at step 40", np.nan]
    results.loc[1, ["status", "reason"]] = ["stopped early", None]
    finished, others = split(results)
    assert (len(finished), len(others)) == (4, 2)
    told = text(results)
    assert "2 SAEs without a final result:" in told
    assert f"  {results['name'][0]}: failed, loss is nan at step 40\n" in told
    assert f"  {results['name'][1]}: stopped early\n" in told


def test_metrics_that_no_sae_has_are_left_out(results: pd.DataFrame, tmp_path: Path):
    told = text(results.drop(columns="kl").assign(ce_recovered=np.nan))
    assert "KL" not in told
    assert "CE recovered" not in told
    files = write_summary(results.drop(columns="kl").assign(ce_recovered=np.nan), tmp_path, "embedded")
    assert [file.name for file in files] == [
        "summary.csv", "summary.md", "frontier.png", "frontier.pdf", "fvu_width.png", "fvu_width.pdf",
    ]  # fmt: skip


def test_files(results: pd.DataFrame, tmp_path: Path):
    results.loc[0, ["status", "reason"]] = ["failed", "why"]
    files = write_summary(results, tmp_path / "new", "embedded")
    assert [file.name for file in files] == [
        "summary.csv", "summary.md", "frontier.png", "frontier.pdf", "fvu_width.png", "fvu_width.pdf",
        "ce_frontier.png", "ce_frontier.pdf",
    ]  # fmt: skip
    assert all(file.stat().st_size for file in files)
    assert min(png_size(tmp_path / "new" / "frontier.png")) > 700
    assert len(pd.read_csv(files[0])) == 6
    markdown = files[1].read_text()
    assert markdown.count("\n| ") == 1 + 1 + 5
    assert "failed, why" in markdown


@pytest.mark.parametrize(
    "every", [pytest.param(SweepConfig(hook_points=["resid_post.2"], widths=[64], k=[8]), id="one SAE"), None]
)
def test_nothing_to_draw(results: pd.DataFrame, tmp_path: Path, every: SweepConfig | None):
    table = results.assign(status="failed", reason="x", fvu=np.nan) if every is None else results_of(every)
    assert [file.name for file in write_summary(table, tmp_path, "embedded")] == ["summary.csv", "summary.md"]
    assert text(table)


def test_a_line_per_width_through_the_best_of_the_learning_rates():
    results = results_of(
        SweepConfig(
            hook_points=["resid_post.2"], widths=[256, 512], k=[8, 16, 32], learning_rates=[1e-3, 3e-3], seeds=[0, 1]
        )
    )
    figure = figure_of(results, "t", "l0", "fvu", "width", "embedded")
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines() if not line.get_label().startswith("_")}
    best = results[(results["learning_rate"] == 1e-3) & (results["seed"] == 0)]
    for width in (256, 512):
        np.testing.assert_allclose(lines[f"{width}"], best[best["width"] == width][["l0", "fvu"]])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "best of the learning rates and seeds" in figure.get_suptitle()
    assert "embedded · resid_post.2 · topk · 1M tokens" in figure.get_suptitle()
    assert figure.get_supxlabel() == "active latents per token (L0)"


def test_a_panel_per_hook_point_and_architecture():
    config = SweepConfig(
        hook_points=["resid_post.2", "mlp_out.1"], architectures=["topk", "jumprelu"], widths=[256, 512]
    )
    figure = figure_of(results_of(config), "t", "width", "fvu", "level", "embedded")
    assert [ax.get_title() for ax in figure.axes] == [
        "mlp_out.1 · jumprelu",
        "mlp_out.1 · topk",
        "resid_post.2 · jumprelu",
        "resid_post.2 · topk",
    ]
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["k = 8", "k = 16", "k = 32", *(f"coefficient {x}" for x in (0.0003, 0.001, 0.003))]


def test_importing_the_summary_imports_no_matplotlib():
    code = (
        "import sys, raysae.sweep.summary, raysae.sweep.live_table; "
        "assert not {'matplotlib', 'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_short_numbers():
    assert [short(n) for n in (950, 40_000, 1_000_448, 2.5e9)] == ["950", "40k", "1M", "2.5B"]


def test_a_sweep_of_which_no_sae_has_a_number(tmp_path: Path) -> None:
    """For example, the activation stream of the sweep never began."""
    metrics = ["fvu", "l0", "dead_fraction", "ce_recovered", "kl", "cosine", "norm_ratio"]
    results = (
        results_of(SweepConfig(hook_points=["resid_post.2"]))
        .drop(columns=metrics)
        .assign(status="failed", reason="no producers")
    )
    files = write_summary(results, tmp_path, "m")
    assert [file.name for file in files] == ["summary.csv", "summary.md"]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(summary_table(results))
    assert "18 SAEs without a final result" in console.export_text()


def test_the_fvu_without_outliers_is_shown_where_it_differs(results, tmp_path):
    assert "no outliers" not in text(results.assign(fvu_inliers=results["fvu"] * 1.04))
    shown = results.assign(fvu_inliers=results["fvu"] * 30)
    assert "FVU, no outliers" in text(shown)
    markdown = next(file for file in write_summary(shown, tmp_path, "embedded", ["Beware."]) if file.suffix == ".md")
    assert "FVU, no outliers" in markdown.read_text()
    assert "\nBeware.\n" in markdown.read_text()
