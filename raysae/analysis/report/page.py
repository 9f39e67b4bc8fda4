"""The report of all analyses of a study: one HTML file with figures, numbers beside the paper's, and verdicts.

The figures are in the file, so that it can be sent. It knows no paper: a `Paper` brings the words.
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.intervals import median_of
from raysae.analysis.report.claims import FAILS, HOLDS, UNTOLD, Claim

COLORS = {HOLDS: "#00795a", FAILS: "#a33c00", UNTOLD: "#5a5a5a"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1060px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; margin-bottom: .1em; }
h2 { font-size: 1.2em; margin-top: 2.2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
p.facts { color: #555; margin-top: 0; } p.note { color: #555; font-size: .92em; }
table { border-collapse: collapse; font-size: .9em; margin: .8em 0; } .wide { overflow-x: auto; }
th, td { padding: .3em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { border-bottom: 1px solid #888; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
th { vertical-align: bottom; }
td.verdict { white-space: nowrap; font-weight: 600; }
figure { margin: 1em 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .9em; color: #444; }
p.warning { background: #fff4e0; border-left: 4px solid #e69f00; padding: .6em 1em; }
"""


@dataclass(frozen=True)
class Paper:
    """What a report says that depends on the paper: its words, and which tables and numbers it shows.

    Args:
        title: the report's.
        sections: heading and question of each analysis, in the order of the report.
        captions: of figures, by the beginning of the figure's name.
        numbers: label, analysis, table, column and the paper's value of each number beside the paper's.
        shown: from an analysis and its tables to captions and the tables that the report shows.
        reading: how to read the report.
    """

    title: str
    sections: Mapping[str, tuple[str, str]]
    captions: Mapping[str, str]
    numbers: Sequence[tuple[str, str, str, str, str]]
    shown: Callable[[str, Mapping[str, pd.DataFrame]], list[tuple[str, pd.DataFrame]]]
    reading: str


def write_report(
    path: Path,
    paper: Paper,
    facts: Sequence[str],
    claims: Sequence[Claim],
    tables: Mapping[str, Mapping[str, pd.DataFrame]],
    figures: Mapping[str, Sequence[Path]],
    notes: Mapping[str, Sequence[str]],
    warnings: Sequence[str] = (),
) -> Path:
    """Writes the report to `path`.

    Args:
        path: the HTML file.
        paper: what the report says of the paper.
        facts: what was analysed, in a few words each.
        claims: decided.
        tables: by analysis, then by name.
        figures: PNG files, by analysis.
        notes: what could not be shown and why, by analysis.
        warnings: stand above everything else.
    """
    written = f"{_text(' · '.join(facts))}<br>written {time.strftime('%Y-%m-%d %H:%M')}"
    body = [f"<h1>{_text(paper.title)}</h1>", f'<p class="facts">{written}</p>']
    body += [f'<p class="warning">{_text(warning)}</p>' for warning in warnings]
    body += [
        "<h2>Claims of the paper</h2>",
        _claims(claims),
        "<h2>Numbers beside the paper's</h2>",
        _numbers(paper, tables),
    ]
    for analysis, (heading, question) in paper.sections.items():
        if analysis not in tables:
            continue
        body += [f'<h2 id="{analysis}">{_text(heading)}</h2>', f"<p>{_text(question)}</p>"]
        body += [_figure(file, paper.captions) for file in figures.get(analysis, ())]
        body += [f'<p class="note">Not shown: {_text(note)}.</p>' for note in notes.get(analysis, ())]
        body += [_table(table, caption) for caption, table in paper.shown(analysis, tables[analysis])]
    body.append(f"<h2>How to read this</h2><p>{_text(paper.reading)}</p>")
    head = f'<meta charset="utf-8"><title>{_text(paper.title)}</title><style>{STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(body) + "</body></html>\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _claims(claims: Sequence[Claim]) -> str:
    """The table of claims and verdicts."""
    rows = "".join(
        f"<tr><td>{_text(claim.text)}</td>"
        f'<td class="verdict" style="color:{COLORS[claim.verdict]}">{claim.verdict}</td>'
        f'<td>{_text(claim.evidence)}. <a href="#{claim.analysis}">more</a></td><td>{_text(claim.paper)}</td></tr>'
        for claim in claims
    )
    return f"<table><tr><th>Claim</th><th>Here it</th><th>Evidence</th><th>The paper</th></tr>{rows}</table>"


def _numbers(paper: Paper, tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> str:
    """The table of numbers beside the paper's: each the median of a column, its interval, and its range."""
    rows = []
    for label, analysis, name, column, theirs in paper.numbers:
        table = tables.get(analysis, {}).get(name)
        if table is None or column not in table or not table[column].notna().any():
            continue
        values = table[column].dropna()
        median = _number(values.median())
        if col.replicates(column) in table:
            estimate = median_of(table, column)
            median += f" [{_number(estimate.low)}, {_number(estimate.high)}]"
        ours = (median, f"{_number(values.min())} to {_number(values.max())}", len(values))
        cells = "".join(f'<td class="number">{cell}</td>' for cell in ours)
        rows.append(f"<tr><td>{_text(label)}</td>{cells}<td>{_text(theirs)}</td></tr>")
    heads = "".join(f'<th class="number">{head}</th>' for head in ("median [its interval]", "range", "of"))
    return f"<table><tr><th>Number</th>{heads}<th>The paper</th></tr>{''.join(rows)}</table>"


def _table(table: pd.DataFrame, caption: str) -> str:
    head = "".join(f'<th class="number">{_text(column.replace("_", " "))}</th>' for column in table)
    cells = (
        "".join(f'<td class="number">{_cell(value)}</td>' for value in row) for row in table.itertuples(index=False)
    )
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<p class="note">{_text(caption)}</p><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _figure(file: Path, captions: Mapping[str, str]) -> str:
    caption = next((text for name, text in captions.items() if file.stem.startswith(name)), file.stem)
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


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
