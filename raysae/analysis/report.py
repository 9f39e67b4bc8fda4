"""The report of all analyses of a study: one HTML file with its figures in it, the numbers beside the paper's, and a verdict per claim."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from raysae.analysis.claims import FAILS, HOLDS, UNTOLD, Claim

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
COLORS = {HOLDS: "#00795a", FAILS: "#a33c00", UNTOLD: "#5a5a5a"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1060px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; margin-bottom: .1em; } h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
p.facts { color: #555; margin-top: 0; } p.note { color: #555; font-size: .92em; }
table { border-collapse: collapse; font-size: .9em; margin: .8em 0; } .wide { overflow-x: auto; }
th, td { padding: .3em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; } th { border-bottom: 1px solid #888; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
th { vertical-align: bottom; }
td.verdict { white-space: nowrap; font-weight: 600; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .9em; color: #444; }
p.warning { background: #fff4e0; border-left: 4px solid #e69f00; padding: .6em 1em; }
"""


def write_report(
    path: Path,
    title: str,
    facts: Sequence[str],
    claims: Sequence[Claim],
    tables: Mapping[str, Mapping[str, pd.DataFrame]],
    figures: Mapping[str, Sequence[Path]],
    notes: Mapping[str, Sequence[str]],
    warning: str | None = None,
) -> Path:
    """Writes the report to `path`; everything is by analysis. `figures` are PNG files."""
    body = [f"<h1>{_text(title)}</h1>", f'<p class="facts">{_text(" · ".join(facts))}<br>written {time.strftime("%Y-%m-%d %H:%M")}</p>']
    if warning:
        body.append(f'<p class="warning">{_text(warning)}</p>')
    body += ["<h2>Claims of the paper</h2>", _claims(claims), "<h2>Numbers beside the paper's</h2>", _numbers(tables)]
    for analysis, (heading, question) in SECTIONS.items():
        if analysis not in tables:
            continue
        body += [f'<h2 id="{analysis}">{_text(heading)}</h2>', f"<p>{_text(question)}</p>"]
        body += [_figure(file) for file in figures.get(analysis, ())]
        body += [f'<p class="note">Not shown: {_text(note)}.</p>' for note in notes.get(analysis, ())]
        body += [_table(table, caption) for caption, table in _shown(analysis, tables[analysis])]
    body.append(
        "<h2>How to read this</h2><p>R² is measured on contexts of other documents than those it was fitted on; intervals are 95 %, from resampled "
        "contexts. The mean over dimensions is the paper's figure; the variance-weighted R² weighs each dimension by its variance. FVU is the "
        "fraction of variance unexplained. Paper: Engels, Riggs, Tegmark, Decomposing the dark matter of sparse autoencoders (arXiv 2410.14670), on "
        "Gemma 2 with Gemma Scope SAEs. The accuracy of explanations per activation decile (part of analysis 6) is left out: it needs "
        "interpretability scores.</p>"
    )
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style></head><body>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + "\n".join(body) + "</body></html>\n", encoding="utf-8")
    return path


def _claims(claims: Sequence[Claim]) -> str:
    rows = "".join(
        f'<tr><td>{_text(claim.text)}</td><td class="verdict" style="color:{COLORS[claim.verdict]}">{claim.verdict}</td>'
        f'<td>{_text(claim.evidence)}. <a href="#{claim.analysis}">more</a></td><td>{_text(claim.paper)}</td></tr>'
        for claim in claims
    )
    return f"<table><tr><th>Claim</th><th>Here it</th><th>Evidence</th><th>The paper</th></tr>{rows}</table>"


def _numbers(tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> str:
    rows = []
    for label, analysis, name, column, paper in PAPER:
        table = tables.get(analysis, {}).get(name)
        if table is None or column not in table or not table[column].notna().any():
            continue
        values = table[column].dropna()
        ends = f" [{_number(table[f'{column}_low'].median())}, {_number(table[f'{column}_high'].median())}]" if f"{column}_low" in table else ""
        cells = [f"{_number(values.median())}{ends}", f"{_number(values.min())} to {_number(values.max())}", str(len(values)), _text(paper)]
        rows.append(f"<tr><td>{_text(label)}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells[:3]) + f"<td>{cells[3]}</td></tr>")
    heads = "".join(f'<th class="number">{head}</th>' for head in ("median [of its interval]", "range", "of"))
    return f"<table><tr><th>Number</th>{heads}<th>The paper</th></tr>{''.join(rows)}</table>"


def _shown(analysis: str, tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, pd.DataFrame]]:
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


def _table(table: pd.DataFrame, caption: str) -> str:
    head = "".join(f'<th class="number">{_text(column.replace("_", " "))}</th>' for column in table)
    rows = "".join("<tr>" + "".join(f'<td class="number">{_cell(value)}</td>' for value in row) + "</tr>" for row in table.itertuples(index=False))
    return f'<p class="note">{_text(caption)}</p><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figure(file: Path) -> str:
    caption = next((text for name, text in CAPTIONS.items() if file.stem.startswith(name)), file.stem)
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}"><figcaption>{_text(caption)}</figcaption></figure>'


def _cell(value: object) -> str:
    if isinstance(value, (float, np.floating)):
        return _number(value)
    return f"{value:,}" if isinstance(value, (int, np.integer)) else _text(str(value))


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _text(text: str) -> str:
    return html.escape(text)
