"""What a sweep ends with: the table of its SAEs, and the figures of `figures.py`.

Input is a DataFrame with a row per SAE. It has the SAE's name and knobs (architecture, width, k, sparsity, hook_point,
learning_rate, seed) and its numbers (see `METRICS`). `status` is "done", "stopped" (early) or what else happened. Where
it is not "done", `reason` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysae.sweep.figures import KNOBS, draw
from raysae.sweep.notes import OFF

if TYPE_CHECKING:
    import pandas as pd

# Statuses with a final evaluation, at the end of the run or when the scheduler ended the SAE
EVALUATED = ("done", "stopped")
METRICS = {  # Column: heading, format
    "fvu": ("FVU", ".4f"),
    "fvu_inliers": ("FVU, no outliers", ".4f"),
    "l0": ("L0", ".1f"),
    "dead_fraction": ("dead", ".1%"),
    "ce_recovered": ("CE recovered", ".3f"),
    "kl": ("KL, nats", ".4f"),
    "cosine": ("cosine", ".3f"),
    "norm_ratio": ("norm ratio", ".3f"),
    "tokens": ("tokens", ",.0f"),
}


def summary_table(results: pd.DataFrame, title: str = "") -> RenderableType:
    """The results as a table for the terminal.

    Columns that are equal for all SAEs go into the caption. SAEs that failed are listed below.
    """
    varying, common = _knobs(results)
    finished, others = split(results)
    metrics = _metrics(finished)
    same_tokens = "tokens" in metrics and finished["tokens"].nunique() == 1
    if same_tokens:
        metrics.remove("tokens")
        common["tokens"] = format(finished["tokens"].iloc[0], ",.0f")
    caption = " · ".join(f"{key} {value}" for key, value in common.items())
    table = Table(title=title or None, box=None, padding=(0, 1), header_style="bold", title_justify="left")
    for heading in [KNOBS[column] for column in varying] + [METRICS[column][0] for column in metrics]:
        table.add_column(heading, justify="right", no_wrap=True)
    for _, row in finished.iterrows():
        table.add_row(
            *(_knob(row[column]) for column in varying),
            *(_value(row[column], METRICS[column][1]) for column in metrics),
        )
    return Group(
        table, Text(f" {caption}", style="dim"), *([Text(failures(others), style="bold red")] if len(others) else [])
    )


def failures(others: pd.DataFrame) -> str:
    """One line per SAE that did not come to its end, with the reason."""
    lines = [
        f"  {row['name']}: {row['status']}" + (f", {row['reason']}" if _known(row.get("reason")) else "")
        for _, row in others.iterrows()
    ]
    return "\n".join([f"{len(others)} SAE{'s' * (len(others) != 1)} without a final result:", *lines])


def write_summary(results: pd.DataFrame, folder: Path, model: str, notes: Sequence[str] = ()) -> list[Path]:
    """Write summary.csv (everything), summary.md (the table and `notes`) and the figures into `folder`.

    Returns the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    csv, markdown = folder / "summary.csv", folder / "summary.md"
    results.to_csv(csv, index=False)
    markdown.write_text(_markdown(results, model, notes), encoding="utf-8")
    whole = results[results["status"] == "done"]  # SAEs that were stopped early would bend the curves
    return [csv, markdown, *draw(split(whole)[0], folder, model)]


def split(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(SAEs with a final result, the others), each ordered by hook point, architecture, sparsity and width."""
    ordered = results.sort_values(
        [column for column in ("hook_point", "architecture", "k", "sparsity", "width") if column in results],
        kind="stable",
    )
    finished = ordered["status"].isin(EVALUATED) & (ordered["fvu"].notna() if "fvu" in ordered else False)
    return ordered[finished], ordered[~finished]


def _metrics(finished: pd.DataFrame) -> list[str]:
    """Columns of METRICS that have numbers. Of both FVUs the first is enough where they are nearly equal."""
    known = [column for column in METRICS if column in finished and finished[column].notna().any()]
    if "fvu_inliers" in known and not (abs(finished["fvu_inliers"] - finished["fvu"]) > OFF * finished["fvu"]).any():
        known.remove("fvu_inliers")
    return known


def _markdown(results: pd.DataFrame, model: str, notes: Sequence[str]) -> str:
    varying, common = _knobs(results)
    finished, others = split(results)
    metrics = _metrics(finished)
    rows = [[KNOBS[column] for column in varying] + [METRICS[column][0] for column in metrics]]
    rows.append(["---:"] * len(rows[0]))
    for _, row in finished.iterrows():
        rows.append(
            [_knob(row[column]) for column in varying] + [_value(row[column], METRICS[column][1]) for column in metrics]
        )
    text = f"# SAEs of {model}\n\n" + "".join(f"- {key}: {value}\n" for key, value in common.items())
    text += "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    text += "".join(f"\n{note}\n" for note in notes)
    return text + (f"\n{failures(others)}\n" if len(others) else "")


def _knobs(results: pd.DataFrame) -> tuple[list[str], dict[str, str]]:
    """Columns of `results` that tell its SAEs apart, and the values of those that do not."""
    present = [column for column in KNOBS if column in results and results[column].notna().any()]
    varying = [column for column in present if results[column].nunique(dropna=False) > 1]
    return varying or present[:2], {
        KNOBS[column]: _knob(results[column].iloc[0]) for column in present if column not in varying
    }


def _known(value: object) -> bool:
    return value is not None and value == value and value != ""  # NaN is not itself


def _knob(value: object) -> str:
    return "–" if not _known(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _value(value: float | None, form: str) -> str:
    return format(value, form) if _known(value) else "–"
