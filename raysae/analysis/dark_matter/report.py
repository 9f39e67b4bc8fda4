"""TODO docstring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from raysae.analysis.dark_matter.claims import decide
from raysae.analysis.dark_matter.earlier_layers import earlier_hook_points
from raysae.analysis.dark_matter.probes import main_hook_point, model_name
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.results import Findings, carry_out
from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD
from raysae.analysis.report.page import Paper, write_report
from raysae.config import AnalysisConfig

SECTIONS = {  # analysis: heading, what it asks
    "error_regression": (
        "1 and 2. Error regression and norm prediction",
        "How much of the error e = x − Sae(x) a linear map of the activation x predicts (ê, the linear error; ε = e − ê is the nonlinear one), how "
        "both change with width, and how well the squared norms of e and of its parts are predicted.",
    ),
    "per_token_scaling": ("3. Per-token scaling", "Whether SAEs of different widths fail on the same tokens."),
    "introduced_error": (
        "4. Introduced error",
        "Whether the linear and the nonlinear error tell what was put in on purpose: noise of the activation (σ_x), noise of the output (σ_r), "
        "absent features (ablated latents).",
    ),
    "downstream_loss": ("5. Downstream loss", "How much of the language model's lost cross-entropy returns when a part of the error is put back."),
    "error_saes": ("6. SAEs on the error", "Whether SAEs of equal size can decompose e, ê and ε equally well."),
    "pursuit": ("7. Pursuit", "How much of the nonlinear error is the encoder's: what gradient pursuit with the same dictionary and L0 removes."),
    "earlier_layers": ("8. Earlier layers", "How well linear maps of what SAEs see at earlier places predict the error and its parts."),
}
CAPTIONS = {  # figure: what it shows, by the beginning of its name
    "breakdown": "Left: FVU and nonlinear FVU against width with their fits. Right: what the error consists of; hatched where c lies below the "
    "nonlinear FVU, so that the fit cannot tell linear error from absent features.",
    "contours": "Nonlinear FVU and both R² over width and L0; circles are the SAEs.",
    "norms": "R² of squared norms predicted from x (left), and of ‖e‖² predicted from other things (right); a point per SAE.",
    "loadings": "What the probe for ‖Sae(x) − b_dec‖² makes of each decoder row, against the latent's mean value when active.",
    "layers": "Both R² against the layer.",
    "pairs": "R² of the wider SAE's error norm from the narrower one's, and what ‖ε‖ adds.",
    "lines": "Error norms along the first held-out context, and a part of it with its tokens.",
    "grid": "Estimates under introduced errors, on the central SAE.",
    "synthetic": "The same on a fully synthetic model, where every error is known.",
    "widths": "Cross-entropy recovered by each part of the error, beside its shares of norm and variance, over widths.",
    "sparsities": "The same over L0 at one width.",
    "error_saes": "SAEs of equal width and k, trained on e, ê and ε.",
    "pursuit": "FVU and nonlinear FVU before and after pursuit.",
    "earlier_layers": "R² of e, ê and ε from each source; hatched bars are 1 by definition.",
}
PAPER = (  # number, analysis, table, column, the paper's value
    ("R² of e, mean over dimensions", "error_regression", "regressions", "r2_error", "about 0.5"),
    ("R² of e, variance-weighted", "error_regression", "regressions", "r2_error_weighted", "–"),
    ("R² of e after the best rescaling", "error_regression", "regressions", "r2_error_rescaled", "–"),
    ("R² of e, SAEs on half the tokens", "error_regression", "half_trained", "r2_error_half", "–"),
    ("R² of ‖e‖²", "error_regression", "regressions", "r2_error_norm", "0.86 to 0.95"),
    ("R² of ‖ε‖²", "error_regression", "regressions", "r2_norm_nonlinear", "lower than ‖e‖²"),
    ("FVU", "error_regression", "regressions", "fvu", "–"),
    ("nonlinear FVU", "error_regression", "regressions", "nonlinear_fvu", "flat in width"),
    ("R² of ‖e_large‖ from ‖e_small‖", "per_token_scaling", "pairs", "r2", "high for all pairs"),
    ("cross-entropy recovered by ê", "downstream_loss", "downstream", "recovered_linear", "–"),
    ("cross-entropy recovered by ε", "downstream_loss", "downstream", "recovered_nonlinear", "about ε's share of the norm"),
    ("ε's share of the error's variance", "downstream_loss", "downstream", "variance_share_nonlinear", "–"),
    ("ε's share of the error's norm", "downstream_loss", "downstream", "norm_share_nonlinear", "–"),
    ("encoder error (FVU)", "pursuit", "pursuit", "encoder_error", "a few % of the nonlinear FVU"),
)


def run_all(config: AnalysisConfig, given: Mapping[str, Any], analyses: Mapping[str, Callable[[Lab], Findings]]) -> int:
    """The job of all analyses and their report; the exit code."""
    began = time.monotonic()
    lab = Lab(config, given)
    print(f"Study {lab.study}: {len(lab.saes)} SAEs at {', '.join(lab.hook_points)}", flush=True)
    lab.record(
        list(dict.fromkeys([*lab.hook_points, *earlier_hook_points(lab, main_hook_point(lab))]))
    )  # one pass of the language model for all of them
    found: dict[str, Findings] = {}
    for analysis, experiment in analyses.items():
        started = time.monotonic()
        found[analysis] = carry_out(lab, analysis, experiment)
        print(f"{analysis}: {time.monotonic() - started:.0f} s", flush=True)
    tables = {analysis: findings.tables for analysis, findings in found.items()}
    claims = decide(tables)
    spec = lab.plan.evaluation
    facts = [
        f"study {lab.study}", f"model {model_name(lab)}", f"text {lab.plan.config.text.source}", f"{len(lab.saes)} SAEs at {', '.join(lab.hook_points)}",
        f"{lab.shards * spec.rows_per_shard:,} held-out tokens for A, B and C", f"context {spec.context_length}, first {spec.skip_positions} skipped",
    ]  # fmt: skip
    report = write_report(
        lab.folder / "report.html", DARK_MATTER, facts, claims, tables,
        {analysis: [file for file in findings.files if file.suffix == ".png"] for analysis, findings in found.items()},
        {analysis: findings.notes for analysis, findings in found.items()}, lab.warning,
    )  # fmt: skip
    numbers = {f"claims/{verdict.replace(' ', '_')}": float(sum(claim.verdict == verdict for claim in claims)) for verdict in (HOLDS, FAILS, UNTOLD)}
    keys = [findings.key for findings in found.values()]
    lab.track("dark_matter", keys, numbers, pd.DataFrame({"sae": []}), [report])
    for claim in claims:
        print(f"  {claim.verdict:<20} {claim.text}")
    minutes = (time.monotonic() - began) / 60
    print(f"Report: {report}\nMLflow: experiment '{config.tracking.experiment}' at {lab.sweep.tracking.uri}\n{minutes:.1f} minutes in all")
    return 0


def shown_tables(analysis: str, tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
    """The tables of an analysis that are in the report, with captions; all of them lie beside it as CSV and Parquet."""
    if analysis == "error_regression":
        columns = ["hook_point", "architecture", "width", "l0", "fvu", "nonlinear_fvu", "r2_error", "r2_error_weighted", "r2_error_rescaled"]
        columns += ["r2_error_norm", "r2_norm_nonlinear"]
        shown = [("Every SAE", tables["regressions"][columns].sort_values(["hook_point", "width", "l0"]))]
        if "half_trained" in tables:
            columns = ["width", "fvu", "fvu_half", "r2_error", "r2_error_half", "r2_error_rescaled", "r2_error_rescaled_half", "r2_error_norm"]
            shown.append(
                ("Undertraining: the same SAEs trained on half the tokens (…_half)", tables["half_trained"][[*columns, "r2_error_norm_half"]])
            )
        return shown
    if analysis == "introduced_error":

        def some(name: str) -> pd.DataFrame:
            return tables[name][(tables[name]["sigma_x"] % 2 == 0) & (tables[name]["sigma_r"] % 2 == 0)]

        synthetic = some("synthetic_closed_form")
        return [
            ("Estimates on the SAE beside the closed form for a perfect re-encoding", some("closed_form")),
            (
                "Estimates on the synthetic model beside their closed form; deviation: relative, where the closed form is not below 0.01",
                synthetic[synthetic["ablated"].isin((0, 0.5))],
            ),
        ]
    if analysis == "downstream_loss":
        columns = ["width", "l0", "fvu", "ce_clean", "ce_sae", "ce_linear", "ce_nonlinear", "recovered_linear", "recovered_nonlinear"]
        return [("Cross-entropy in nats per token", tables["downstream"][columns].sort_values("fvu"))]
    if analysis == "pursuit":
        columns = ["width", "l0", "l0_pursuit", "fvu", "fvu_pursuit", "nonlinear_fvu", "nonlinear_fvu_pursuit", "encoder_error"]
        return [("Before and after pursuit", tables["pursuit"][columns])]
    if analysis == "error_saes":
        columns = ["kind", "width", "l0", "fvu", "fvu_low", "fvu_high", "worse", "worse_low", "worse_high", "share", "dead_fraction"]
        caption = "SAEs on the parts of the error; worse: FVU/FVU of the linear part − 1; share: the part's variance over e's"
        return [(caption, tables["error_saes"][columns])]
    return []


DARK_MATTER = Paper(
    title="The dark matter of sparse autoencoders",
    sections=SECTIONS,
    captions=CAPTIONS,
    numbers=PAPER,
    shown=shown_tables,
    reading="R² is measured on contexts of other documents than those it was fitted on; intervals are 95 %, from resampled "
    "contexts. The mean over dimensions is the paper's figure; the variance-weighted R² weighs each dimension by its variance. FVU is the "
    "fraction of variance unexplained. Paper: Engels, Riggs, Tegmark, Decomposing the dark matter of sparse autoencoders (arXiv 2410.14670), on "
    "Gemma 2 with Gemma Scope SAEs. The accuracy of explanations per activation decile (part of analysis 6) is left out: it needs "
    "interpretability scores.",
)
