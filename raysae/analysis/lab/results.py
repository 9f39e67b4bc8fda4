"""What an analysis has found, and how it gets to disk and to MLflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.instruments import columns as col
from raysae.analysis.instruments.plots import save
from raysae.analysis.lab.lab import Lab
from raysae.analysis.lab.tasks import RESULTS_DEFINITION
from raysae.config import UserError, digest
from raysae.tracking.outbox import refusal
from raysae.tracking.runs import Study

FLUSH_SECONDS = 60  # How long a job waits at its end for MLflow to take what was logged.


@dataclass
class Findings:
    """What an analysis has found.

    Args:
        analysis: its name in the catalogue.
        key: what the findings depend on.
        per_sae: a row per SAE, named in the column `sae`. MLflow gets its numbers as metrics of the SAE's run.
        numbers: the headlines. MLflow gets them as metrics of the analysis's run.
        tables: by name.
        figures: by name, as matplotlib figures.
        notes: what could not be shown, and why.
        files: what was written.
    """

    analysis: str
    key: list
    per_sae: pd.DataFrame
    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def draw(self, name: str, figure: Callable[..., Any], *arguments: object) -> None:
        """Adds a figure, or a note where these SAEs do not give one."""
        try:
            self.figures[name] = figure(*arguments)
        except UserError as error:
            self.notes.append(str(error))


def carry_out(lab: Lab, analysis: str, experiment: Callable[[Lab], Findings]) -> Findings:
    """Works an analysis out, writes its tables and figures and logs it to MLflow."""
    findings = experiment(lab)
    findings.files += save_results(lab.folder / analysis, findings.tables, findings.figures)
    track(lab, findings)
    return findings


def save_results(folder: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Any]) -> list[Path]:
    """Writes tables (CSV and Parquet) and figures (PNG) to `folder`, and returns the files.

    Replicates are in the Parquet files alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in tables.items():
        files += [folder / f"{name}.csv", folder / f"{name}.parquet"]
        table.drop(columns=table.filter(regex=f"{col.REPLICATES}$")).to_csv(files[-2], index=False)
        table.to_parquet(files[-1], index=False)
    for name, figure in figures.items():
        files += save(figure, folder / name)
    return files


def track(lab: Lab, findings: Findings) -> None:
    """Logs findings to MLflow: a run with numbers and files, and below it a run per SAE.

    The run belongs to this analysis of these SAEs with these settings. Logging the same again changes nothing.
    """
    analysis = findings.analysis
    name = f"{lab.study} {analysis} {digest([RESULTS_DEFINITION, analysis, findings.key])[:8]}"
    of_others = {"sweep", "sae", "model", "text", "stream"}
    config = {"analysis": analysis, "sweep": lab.study, **lab.config.model_dump(exclude=of_others)}
    config |= lab.sweep.model_dump(include={"model", "text", "stream"})
    outbox = lab.folder / "tracking" / f"{name.replace(' ', '-')}.db"
    run = Study(outbox, lab.sweep.tracking, name, config, analysis=True)
    try:
        read = [lab.saes[sae] for sae in findings.per_sae["sae"] if sae in lab.saes] or list(lab.saes.values())
        saes = ", ".join(sae.run_id or sae.where for sae in read)
        run.tag(None, {"raysae.sweep": lab.study, "raysae.saes": saes})
        run.metrics(None, _finite(findings.numbers), step=0)
        for row in findings.per_sae.to_dict("records"):
            sae = lab.saes[row["sae"]]
            run.child(sae.name, {**sae.params, "analysis": analysis, "sweep": lab.study})
            run.tag(sae.name, {"raysae.sweep": lab.study, "raysae.source_run": sae.run_id or sae.where})
            run.metrics(sae.name, _finite(row), step=int(sae.metrics.get("tokens", 0)))
            run.end(sae.name, "FINISHED")
        for file in findings.files:
            run.artifact(None, file, _artifact_folder(file))
        run.end(None, "FINISHED")
        run.flush(FLUSH_SECONDS)
        if refused := refusal(run.outbox):
            print(refused, file=sys.stderr)
    finally:
        run.close()


def _artifact_folder(file: Path) -> str:
    """Where a file goes among a run's artifacts."""
    return {".csv": "tables", ".parquet": "tables", ".png": "figures"}.get(file.suffix, "")


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values` that are finite."""
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float, np.number))}
    return {key: float(value) for key, value in numbers.items() if np.isfinite(value)}
