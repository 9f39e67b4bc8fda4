"""The report on "Decomposing the dark matter of sparse autoencoders": its words, and the job that makes it.

The page itself is `report/page.py`, which takes the words as a `Paper`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from raysae.analysis.dark_matter.claims import decide
from raysae.analysis.dark_matter.earlier_layers import earlier_places
from raysae.analysis.dark_matter.probes import main_hook_point, model_name
from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.activations import SPLITS
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.recording import Recorded
from raysae.analysis.lab.results import Findings, carry_out, track
from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD, Claim
from raysae.analysis.report.page import Paper, write_report
from raysae.config import AnalysisConfig
from raysae.sweep.notes import OFF

SECTIONS = {  # Analysis: heading, and what it asks.
    "error_regression": (
        "1 and 2. Error regression and norm prediction",
        "How much of the error e = x − Sae(x) a linear map of the activation x predicts, and how well it predicts the "
        "squared norms of e and of its parts. ê is what it predicts, the linear error. ε = e − ê is the nonlinear one.",
    ),
    "breakdown": (
        "1, continued. Breakdown",
        "How the error falls with width, and how much of it is absent features, linear error and nonlinear error. "
        "How much of the nonlinear error is the encoder's.",
    ),
    "per_token_scaling": ("3. Per-token scaling", "Whether SAEs of different widths fail on the same tokens."),
    "introduced_error": (
        "4. Introduced error",
        "Whether the linear and the nonlinear error tell what was put in on purpose: noise of the activation (σ_x), "
        "noise of the output (σ_r), absent features (ablated latents).",
    ),
    "downstream_loss": (
        "5. Downstream loss",
        "How much of the language model's lost cross-entropy returns when a part of the error is put back.",
    ),
    "error_saes": ("6. SAEs on the error", "Whether SAEs of equal size can decompose e, ê and ε equally well."),
    "pursuit": (
        "7. Pursuit",
        "How much of the nonlinear error is the encoder's: what gradient pursuit with the same dictionary and L0 "
        "removes.",
    ),
    "earlier_layers": (
        "8. Earlier layers",
        "How well linear maps of what SAEs see at earlier places predict the error and its parts.",
    ),
}
CAPTIONS = {  # Beginning of a figure's name: what the figure shows.
    "breakdown": "Left: FVU and nonlinear FVU against width with their fits. FVU's goes on to ten times the widest "
    "SAE. Right: what the error consists of. Where a bar is hatched, c does not lie between nonlinear FVU and FVU, so "
    "the fit cannot tell linear error from absent features.",
    "contours": "Nonlinear FVU and both R² over width and L0. Circles are the SAEs, all of one architecture, learning "
    "rate and seed.",
    "norms": "R² of squared norms predicted from x (left), and of ‖e‖² predicted from other things (right). A point is "
    "an SAE.",
    "loadings": "What the probe from Sae(x) − b_dec to its squared norm makes of each decoder row, beside the latent's "
    "mean value when active, by which latents are sorted.",
    "layers": "Both R² against the layer.",
    "baselines": "R² of ‖e‖² from x, the token, the loss of the prediction there, L0 and ‖x‖², against the layer. "
    "Lines are medians over SAEs.",
    "pairs": "R² of the wider SAE's error norm from the narrower one's, what it explains of what ‖x‖ leaves, and what "
    "‖ε‖ adds.",
    "lines": "Error norms along the first held-out context, and a stretch of it with its tokens.",
    "grid": "Estimates under introduced errors, on the central SAE. They are to be those of the closed form. The "
    "correlations judge no SAE: a bad one may have those of a perfect one.",
    "synthetic": "The same on a fully synthetic model, where every error is known: a check of the code.",
    "widths": "Cross-entropy recovered by each part of the error, beside its shares of norm and variance, over widths.",
    "sparsities": "The same over L0 at one width.",
    "error_saes": "SAEs of equal width and k on e, ê and ε. FVU is that at equal L0. A circle is one seed.",
    "pursuit_breakdown": "The breakdown of the errors that pursuit leaves.",
    "pursuit": "FVU and nonlinear FVU before and after pursuit.",
    "earlier_layers": "R² of e, ê and ε from each source. Hatched bars are 1 by definition. The dotted line is the "
    "share of ε that pursuit removes, to compare with reconstructions.",
}
PAPER = (  # Label, analysis, table, column, the paper's value.
    ("R² of e, mean over dimensions", "error_regression", "regressions", col.R2_ERROR, "about 0.5"),
    ("R² of e, variance-weighted", "error_regression", "regressions", col.R2_ERROR_WEIGHTED, "–"),
    ("R² of e after the best rescaling", "error_regression", "regressions", col.R2_ERROR + col.RESCALED, "–"),
    ("R² of e, SAEs on half the tokens", "error_regression", "half_trained", col.R2_ERROR + col.HALF, "–"),
    ("R² of ‖e‖²", "error_regression", "regressions", col.R2_ERROR_NORM, "0.86 to 0.95"),
    ("R² of ‖ε‖²", "error_regression", "regressions", col.R2_NORM_NONLINEAR, "lower than ‖e‖²"),
    ("FVU", "error_regression", "regressions", col.FVU, "–"),
    ("nonlinear FVU", "error_regression", "regressions", col.NONLINEAR_FVU, "flat in width"),
    ("R² of ‖e_large‖ from ‖e_small‖", "per_token_scaling", "pairs", col.R2, "high for all pairs"),
    ("the same, ‖x‖ partialled out", "per_token_scaling", "pairs", col.R2_BEYOND_X_NORM, "–"),
    ("cross-entropy recovered by ê", "downstream_loss", "downstream", col.recovered(col.LINEAR), "–"),
    (
        "cross-entropy recovered by ε",
        "downstream_loss",
        "downstream",
        col.recovered(col.NONLINEAR),
        "about ε's share of the norm",
    ),
    ("ε's share of the error's variance", "downstream_loss", "downstream", col.variance_share(col.NONLINEAR), "–"),
    ("ε's share of the error's norm", "downstream_loss", "downstream", col.norm_share(col.NONLINEAR), "–"),
    ("encoder error (FVU)", "pursuit", "pursuit", col.ENCODER_ERROR, "–"),
    ("encoder error's share of the nonlinear FVU", "pursuit", "pursuit", col.ENCODER_SHARE, "a few %"),
)


# ---------------------------------------------------------------- the job


def run_all(config: AnalysisConfig, given: Mapping[str, Any], analyses: Mapping[str, Callable[[Lab], Findings]]) -> int:
    """The job of all analyses and their report, from its settings to its exit code.

    Args:
        config: the settings.
        given: the knobs that the user has set.
        analyses: the experiments, by name.
    """
    began = time.monotonic()
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    hooks = [*lab.hook_points, *earlier_places(lab, main_hook_point(lab))]
    recorded = lab.record(list(dict.fromkeys(hooks)))  # One pass of the language model serves all analyses.
    found: dict[str, Findings] = {}
    for analysis, experiment in analyses.items():
        started = time.monotonic()
        found[analysis] = carry_out(lab, analysis, experiment)
        print(f"{analysis}: {time.monotonic() - started:.0f} s", flush=True)
    findings, claims = _report(lab, found, recorded)
    track(lab, findings)
    for claim in claims:
        print(f"  {claim.verdict:<20} {claim.text}")
    minutes = (time.monotonic() - began) / 60
    print(f"Report: {findings.files[0]}")
    print(f"MLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}")
    print(f"{minutes:.1f} minutes in all")
    return 0


def _report(lab: Lab, found: Mapping[str, Findings], recorded: Recorded) -> tuple[Findings, list[Claim]]:
    """Decides the claims and writes the report. The findings are what MLflow gets of it."""
    tables = {analysis: findings.tables for analysis, findings in found.items()}
    claims = decide(tables)
    spec = lab.plan.evaluation
    facts = [
        f"study {lab.study}",
        f"model {model_name(lab)}",
        f"text {lab.plan.config.text.source}",
        f"{len(lab.saes)} SAEs at {', '.join(lab.hook_points)}",
        f"{sum(map(recorded.rows, SPLITS)):,} held-out tokens in A, B and C",
        f"context {spec.context_length}, first {spec.skip_positions} skipped",
        f"intervals over the {len(set(recorded.groups('C').tolist()))} groups of documents in C",
    ]
    figures = {analysis: [file for file in each.files if file.suffix == ".png"] for analysis, each in found.items()}
    notes = {analysis: each.notes for analysis, each in found.items()}
    path = lab.folder / "report.html"
    report = write_report(path, DARK_MATTER, facts, claims, tables, figures, notes, lab.warnings)
    findings = Findings("dark_matter", [each.key for each in found.values()], pd.DataFrame({"sae": []}), files=[report])
    for verdict in (HOLDS, FAILS, UNTOLD):
        count = sum(claim.verdict == verdict for claim in claims)
        findings.numbers[f"claims/{verdict.replace(' ', '_')}"] = float(count)
    return findings, claims


# ---------------------------------------------------------------- tables in the report


def shown_tables(analysis: str, tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    """The captions and tables of an analysis in the report. All its tables lie beside it as CSV and Parquet."""
    shown = {
        "error_regression": _regressions,
        "breakdown": _breakdown,
        "introduced_error": _introduced,
        "downstream_loss": _downstream,
        "error_saes": _error_saes,
        "pursuit": _pursuit,
    }
    return shown[analysis](tables) if analysis in shown else []


def _regressions(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    columns = ["hook_point", "architecture", "width", col.L0, col.FVU, col.NONLINEAR_FVU, col.R2_ERROR]
    columns += [col.R2_ERROR_WEIGHTED, col.R2_ERROR + col.RESCALED, col.R2_ERROR_NORM, col.R2_NORM_NONLINEAR]
    table = tables["regressions"]
    if (abs(table[col.FVU_INLIERS] / table[col.FVU] - 1) > OFF).any():
        columns[6:6] = [col.FVU_INLIERS, col.NONLINEAR_FVU_INLIERS]
    shown = [
        (
            "Every SAE. Inliers: without rows of outlier norm, where that matters",
            table[columns].sort_values(["hook_point", "width", col.L0]),
        )
    ]
    if "half_trained" in tables:
        compared = (col.FVU, col.R2_ERROR, col.R2_ERROR + col.RESCALED, col.R2_ERROR_NORM)
        columns = ["width", *(name for column in compared for name in (column, column + col.HALF))]
        caption = "Undertraining: the same SAEs trained on half the tokens (…_half)"
        shown.append((caption, tables["half_trained"][columns]))
    return shown


def _breakdown(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    if "breakdown" not in tables:
        return []
    columns = ["width", col.FVU, col.NONLINEAR_FVU, col.LINEAR_GAP, col.ABSENT, col.LINEAR, col.ENCODER]
    caption = (
        "What the error consists of, as FVU. Linear gap: FVU − nonlinear FVU, which needs no fit. Absent or linear "
        "below 0: the fit cannot tell linear error from absent features"
    )
    return [(caption, tables["breakdown"][columns])]


def _introduced(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    def some(name: str) -> pd.DataFrame:
        table = tables[name]
        return table[(table[col.SIGMA_X] % 2 == 0) & (table[col.SIGMA_R] % 2 == 0)]

    synthetic = some("synthetic_closed_form")
    caption = (
        "Estimates on the synthetic model beside their closed form. Deviation: relative, where the closed form is "
    )
    judged = [f"{column}{end}" for column in (col.DEVIATION, col.REENCODING_FVU) for end in ("", col.LOW, col.HIGH)]
    caption_of_sae = (
        "The SAE, over the whole grid at no ablation: deviation, the distance of the estimates from the closed form as "
        "a share of it, and FVU(x′, Sae(x′))"
    )
    return [
        (caption_of_sae, tables["judged"][judged]),
        ("Estimates on the SAE beside the closed form for a perfect re-encoding", some("closed_form")),
        (f"{caption}not below 0.01", synthetic[synthetic[col.ABLATED].isin((0, 0.5))]),
    ]


def _downstream(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    parts = (col.LINEAR, col.NONLINEAR)
    columns = ["width", col.L0, col.FVU, col.CE_CLEAN, col.CE_SAE]
    columns += [*map(col.ce, parts), *map(col.recovered, parts)]
    return [("Cross-entropy in nats per token", tables["downstream"][columns].sort_values(col.FVU))]


def _error_saes(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    columns = [col.KIND, "width", col.SEEDS, col.L0, col.FVU, col.EQUAL_L0]
    for column in (col.FVU_EQUAL_L0, col.WORSE):
        columns += [column, col.low(column), col.high(column)]
    columns += [col.SHARE, col.DEAD_FRACTION]
    caption = (
        "SAEs on the parts of the error, means over seeds. Worse: FVU at equal L0 over that of the linear part, − 1. "
        "Share: the part's variance over e's"
    )
    return [(caption, tables["error_saes"][columns])]


def _pursuit(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    columns = ["width", col.L0, col.L0_PURSUIT, col.FVU, col.FVU_PURSUIT]
    columns += [col.NONLINEAR_FVU, col.NONLINEAR_FVU_PURSUIT, col.ENCODER_ERROR]
    return [("Before and after pursuit", tables["pursuit"][columns])]


DARK_MATTER = Paper(
    title="The dark matter of sparse autoencoders",
    sections=SECTIONS,
    captions=CAPTIONS,
    numbers=PAPER,
    shown=shown_tables,
    reading="R² is measured on contexts of other documents than those it was fitted on. Intervals are 95 %, over "
    "groups of documents: a jackknife for 10 to 30 groups, a bootstrap above. With fewer than 10 there are none, and "
    "no claim that needs one can be told. Ratios, slopes and medians are worked out per replicate. The mean over "
    "dimensions is the paper's figure. The variance-weighted R² weighs each dimension by its variance. FVU is the "
    "fraction of variance unexplained. Paper: Engels, Riggs, Tegmark, Decomposing the dark matter of sparse "
    "autoencoders (arXiv 2410.14670), on Gemma 2 with Gemma Scope SAEs. The accuracy of explanations per activation "
    "decile, which belongs to analysis 6, is left out: it needs interpretability scores.",
)
