"""The report of all analyses of a study: one HTML file with its figures in it, the numbers beside the paper's, and a verdict per claim."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD, Claim

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


@dataclass(frozen=True)
class Paper:
    """What a report says that depends on the paper: its words, and which tables and numbers it shows."""

    title: str
    sections: Mapping[str, tuple[str, str]]  # analysis → heading and question
    captions: Mapping[str, str]  # beginning of a figure's name → caption
    numbers: Sequence[tuple[str, str, str, str, str]]  # label, analysis, table, column, the paper's value
    shown: Callable[[str, Mapping[str, pd.DataFrame]], list[tuple[str, pd.DataFrame]]]  # captions and tables of an analysis
    reading: str  # how to read the report


def write_report(
    path: Path,
    paper: Paper,
    facts: Sequence[str],
    claims: Sequence[Claim],
    tables: Mapping[str, Mapping[str, pd.DataFrame]],
    figures: Mapping[str, Sequence[Path]],
    notes: Mapping[str, Sequence[str]],
    warning: str | None = None,
) -> Path:
    """Writes the report to `path`; everything is by analysis. `figures` are PNG files."""
    body = [f"<h1>{_text(paper.title)}</h1>", f'<p class="facts">{_text(" · ".join(facts))}<br>written {time.strftime("%Y-%m-%d %H:%M")}</p>']
    if warning:
        body.append(f'<p class="warning">{_text(warning)}</p>')
    body += ["<h2>Claims of the paper</h2>", _claims(claims), "<h2>Numbers beside the paper's</h2>", _numbers(paper, tables)]
    for analysis, (heading, question) in paper.sections.items():
        if analysis not in tables:
            continue
        body += [f'<h2 id="{analysis}">{_text(heading)}</h2>', f"<p>{_text(question)}</p>"]
        body += [_figure(file, paper.captions) for file in figures.get(analysis, ())]
        body += [f'<p class="note">Not shown: {_text(note)}.</p>' for note in notes.get(analysis, ())]
        body += [_table(table, caption) for caption, table in paper.shown(analysis, tables[analysis])]
    body.append(f"<h2>How to read this</h2><p>{_text(paper.reading)}</p>")
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(paper.title)}</title><style>{STYLE}</style></head><body>'
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


def _numbers(paper: Paper, tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> str:
    rows = []
    for label, analysis, name, column, theirs in paper.numbers:
        table = tables.get(analysis, {}).get(name)
        if table is None or column not in table or not table[column].notna().any():
            continue
        values = table[column].dropna()
        ends = f" [{_number(table[f'{column}_low'].median())}, {_number(table[f'{column}_high'].median())}]" if f"{column}_low" in table else ""
        cells = [f"{_number(values.median())}{ends}", f"{_number(values.min())} to {_number(values.max())}", str(len(values)), _text(theirs)]
        rows.append(f"<tr><td>{_text(label)}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells[:3]) + f"<td>{cells[3]}</td></tr>")
    heads = "".join(f'<th class="number">{head}</th>' for head in ("median [of its interval]", "range", "of"))
    return f"<table><tr><th>Number</th>{heads}<th>The paper</th></tr>{''.join(rows)}</table>"


def _table(table: pd.DataFrame, caption: str) -> str:
    head = "".join(f'<th class="number">{_text(column.replace("_", " "))}</th>' for column in table)
    rows = "".join("<tr>" + "".join(f'<td class="number">{_cell(value)}</td>' for value in row) + "</tr>" for row in table.itertuples(index=False))
    return f'<p class="note">{_text(caption)}</p><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figure(file: Path, captions: Mapping[str, str]) -> str:
    caption = next((text for name, text in captions.items() if file.stem.startswith(name)), file.stem)
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
