"""What every analysis job shares: the SAEs under analysis, one recorded set of activations, parts that run on the cluster and are kept, MLflow.

Everything lies in OUTPUT/STUDY/analysis:

    activations/  recorded once per stream and hook point (`activations.collect`)
    parts/        what a part has found, under the digest of all it depends on: whoever asks for it again, in whatever job, reads it
    ANALYSIS/     tables and figures
    tracking/     an outbox per MLflow run

So a job that was killed goes on with the parts it lacks. SAEs that an analysis needs and the sweep lacks are trained by the ordinary sweep, which
goes on from its checkpoints likewise.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raysae.analysis.instruments.plots import save
from raysae.analysis.lab.recording import Recorded, _AbsentError, collect, record_task
from raysae.analysis.lab.subjects import Subject, content_of, find, subjects_of
from raysae.analysis.lab.tasks import DEFINITION, Task, ensure_ray, work
from raysae.config import AnalysisConfig, ErrorsConfig, SAEConfig, SweepConfig, UserError, digest
from raysae.knobs import from_flat
from raysae.lm.facts import ModelFacts, hook_width, model_facts
from raysae.processes import INTERRUPTED
from raysae.sae.importers import load_any, require_width
from raysae.storage import file_system
from raysae.stream.shard import ShardMaker
from raysae.study.place import saved_config, with_absolute_paths
from raysae.study.plan import Plan, plan
from raysae.tracking.find import TrackedSAE, study_params
from raysae.tracking.outbox import refusal
from raysae.tracking.runs import Study

ROWS_PER_DIMENSION = 256  # of each split, by default: R² on other rows then suffers by about 1/256 from the fit
FEWEST_ROWS, MOST_ROWS = 20_000, 150_000  # of each split, by default (the paper's is the latter)


def _settings(config: AnalysisConfig, given: Mapping[str, Any], found: Sequence[tuple[str, TrackedSAE | None]]) -> tuple[str, SweepConfig, bool]:
    """The study's name, its sweep's config, with model, text and stream as `given` on the command line, and whether there was a sweep."""
    tracked = [sae for _, sae in found if sae]
    if len({sae.study for sae in tracked}) > 1:
        raise UserError(f"--sae names SAEs of {len({sae.study for sae in tracked})} sweeps: name those of one, since they share model and text")
    if tracked:
        name, sweep = tracked[0].study, from_flat(SweepConfig, study_params(tracked[0]))
    else:
        name = f"saes-{digest(sorted(where for where, _ in found))[:8]}"
        sweep = SweepConfig(model=config.model, text=config.text, stream=config.stream)
    changed: dict[str, dict] = {}
    for knob in given:
        section, _, field = knob.partition(".")
        if section in ("model", "text", "stream"):
            changed.setdefault(section, {})[field] = getattr(getattr(config, section), field)
    sections = {section: getattr(sweep, section).model_copy(update=fields) for section, fields in changed.items()}
    sections |= {"resources": config.resources, "tracking": config.tracking, "output": config.output}
    return name, sweep.model_copy(update=sections), bool(tracked)


def _check_origin(found: Sequence[tuple[str, TrackedSAE | None]], settled: Plan, stream: str | None) -> str | None:
    """A warning, where a sweep's SAEs were not trained on the stream that its settings give now, of hash `stream` (None where there is no sweep).

    Raises:
        UserError: on other weights than the model has.
    """
    streams = set()
    for where, _ in found:
        files, path = file_system(where)
        if not files.exists(f"{path}/cfg.json"):
            continue
        origin = json.loads(files.cat_file(f"{path}/cfg.json")).get("metadata") or {}
        if origin.get("model_digest", settled.facts.digest) != settled.facts.digest:
            raise UserError(
                f"model.name is {settled.config.model.name}, whose weights are not those that {where} was trained on: name that model, or train the "
                "SAEs again"
            )
        streams.add(origin.get("activation_spec"))
    if stream is None or stream in streams or streams <= {None}:
        return None
    return (
        "These SAEs were trained on another stream than their sweep's settings give now: the text has changed since, or the command line changes it, "
        "or, if they are of a version that did not note the model's weights, those have changed and nothing here counts."
    )


class Lab:
    """The SAEs of a study, and what the analyses of them share. Opening it finds the SAEs and settles model and text; Ray is connected by the first
    part that has to be worked out.

    `given` are the knobs that the command line or a file has set: they go before the sweep's own.

    Raises:
        UserError: no such sweep or SAE, SAEs that do not fit the model, too little held-out text.
    """

    def __init__(self, config: AnalysisConfig, given: Mapping[str, Any] = {}) -> None:
        config = config.model_copy(update={"tracking": with_absolute_paths(SweepConfig(tracking=config.tracking)).tracking})
        found = find(config)
        self.study, sweep, swept = _settings(config, given, found)
        self.config, self.sweep = config, with_absolute_paths(sweep)
        self.saes = {sae.name: sae for sae in subjects_of(config, found)}
        self.plan, self.stream = self._plan(swept)
        facts = self.plan.facts
        for sae in self.saes.values():
            d = hook_width(sae.hook_point, facts)
            if not sae.run_id:
                require_width(load_any(sae.where, sae.hook_point), d)
        self.folder = Path(self.sweep.output) / self.study / "analysis"
        self.replicates, self.seed = config.replicates, config.seed
        self.warning = _check_origin(found, self.plan, self.stream if swept else None)
        if self.warning:
            print(f"Warning: {self.warning}", file=sys.stderr)

    def _plan(self, swept: bool) -> tuple[Plan, str]:
        """The settled plan, with text for the held-out tokens that are wanted, and the hash of the stream that the settings train SAEs on: of a
        dataset, more text may be read here than a sweep has read."""
        update: dict[str, Any] = {"hook_points": self.hook_points}
        if not swept:  # nothing is trained unless an analysis asks for it
            update["train"] = self.sweep.train.model_copy(update={"tokens": 1})
            update["evaluation"] = self.sweep.evaluation.model_copy(update={"rows": 1})
        sweep = self.sweep.model_copy(update=update)
        settled = plan(sweep, self.config.tokens or self._usual(model_facts(sweep.model)))
        as_trained = plan(sweep) if swept and sweep.text.source.startswith("hf:") else settled
        return settled, as_trained.training.hash

    def _usual(self, facts: ModelFacts) -> int:
        """Held-out tokens where none are asked for."""
        widest = max(hook_width(hook_point, facts) for hook_point in self.hook_points)
        return 3 * min(max(ROWS_PER_DIMENSION * widest, FEWEST_ROWS), MOST_ROWS)

    @property
    def hook_points(self) -> list[str]:
        """Of the SAEs, in the order of their coming."""
        return list(dict.fromkeys(sae.hook_point for sae in self.saes.values()))

    def of(self, hook_point: str) -> dict[str, Subject]:
        return {name: sae for name, sae in self.saes.items() if sae.hook_point == hook_point}

    @cached_property
    def shards(self) -> int:
        """How many held-out shards are recorded."""
        spec = self.plan.evaluation
        usual = max(1, round(self._usual(self.plan.facts) / spec.rows_per_shard))
        shards = -(-self.config.tokens // spec.rows_per_shard) if self.config.tokens else usual
        if self.config.tokens and shards > spec.shards:
            raise UserError(
                f"tokens is {self.config.tokens} and the held-out text yields {spec.rows:,}: lower tokens, raise text.evaluation_fraction or give "
                "more text"
            )
        return min(shards, spec.shards)

    # ---------------------------------------------------------------- activations

    def record(self, hook_points: Sequence[str]) -> Recorded:
        """The held-out activations at these hook points, recorded where they are not there yet, by a task that loads the language model."""
        spec, folder, settled = self.plan.evaluation, self.folder / "activations", self.plan

        def absent(missing: list[str]) -> ShardMaker:
            raise _AbsentError

        with suppress(_AbsentError):
            there = collect(folder, spec, settled.contexts["evaluation"], hook_points, absent, self.shards, seed=self.seed)
            return Recorded(there.folder, tuple(hook_points), spec.skip_positions)
        part = Task(
            "activations", [spec.hash, self.shards, self.seed, *sorted(hook_points)], record_task,
            (folder, spec, list(hook_points), self.shards, self.seed, self.plan.config.model, self.plan.config.stream.block_mib),
            whole_machine=True, gpus=self.config.resources.producer_gpus, contexts=True,
        )  # fmt: skip
        (self.folder / "parts" / part.file).unlink(missing_ok=True)  # of files that somebody has removed
        return Recorded(self.run([part])[0], tuple(hook_points), spec.skip_positions)

    def key(self, *saes: Subject, **more: object) -> list:
        """What a part depends on that reads these SAEs and the recorded activations: everything but its analysis."""
        spec = self.plan.evaluation
        return [spec.hash, self.shards, self.seed, self.replicates, [[sae.name, sae.content, sae.hook_point] for sae in saes], more]

    # ---------------------------------------------------------------- parts

    def run(self, parts: Sequence[Task]) -> list[Any]:
        """The parts' results, in order; those that are not there yet are worked out on the cluster, one core each.

        Raises:
            UserError: a part's own; whatever a part raises, when the others that were under way have been given up.
        """
        folder = self.folder / "parts"
        if not all((folder / part.file).exists() for part in parts):
            ensure_ray(self.plan)
        return work(folder, parts, self.config.resources, self.plan.contexts["evaluation"])

    def kept(self, parts: Sequence[Task]) -> list[Any] | None:
        """The parts' results where all of them are there already."""
        return self.run(parts) if all((self.folder / "parts" / part.file).exists() for part in parts) else None

    # ---------------------------------------------------------------- SAEs that the sweep lacks

    def train(
        self, purpose: str, hook_points: Sequence[str], widths: Sequence[int], like: SAEConfig, tokens: int, errors: ErrorsConfig | None = None
    ) -> dict[str, Subject]:
        """SAEs of every width at every hook point, otherwise like `like`, by name, trained by one sweep with the settings of the study's own; kept
        beside the study.

        Raises:
            UserError: some of them could not be trained.
        """
        train = self.sweep.train.model_copy(update={"tokens": tokens, "reports": 2})
        config = self.sweep.model_copy(
            update={
                "hook_points": list(hook_points), "architectures": [like.architecture], "widths": list(widths),
                "k": [] if like.k is None else [like.k], "sparsities": [] if like.sparsity is None else [like.sparsity],
                "learning_rates": [like.learning_rate], "seeds": [like.seed], "search": "grid", "scheduler": "none", "train": train,
                "errors": errors or ErrorsConfig(), "evaluation": self.sweep.evaluation.model_copy(update={"predicted_tokens": 0}),
            }
        )  # fmt: skip
        wanted = {sae.name: sae for sae in config.saes()}
        # by content: the probe's file has one name and is written anew by every run
        of = [content_of(errors.sae), hashlib.sha256(Path(errors.probe).read_bytes()).hexdigest()] if errors else None
        key = digest([self.stream, train.model_dump(), of, sorted(wanted)])[:8]
        config = config.model_copy(update={"study": f"{self.study}-{purpose}-{key}"})
        folder = Path(config.output) / config.study
        if not all((folder / "saes" / name / "outcome.json").exists() for name in wanted):
            from raysae.sweep.run import run_sweep

            ensure_ray(self.plan)
            again = (folder / "config.yaml").exists()
            print(f"{purpose}: {len(wanted)} SAEs to train" + (", going on with what was begun" if again else ""), flush=True)
            code = run_sweep(saved_config(config.output, config.study) if again else config, config.study if again else None, made_for=self.study)
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                raise UserError(
                    f"the SAEs for {purpose} could not all be trained: the sweep {config.study} says above why; begun again, this goes on"
                )
        return {
            name: Subject(name, str(folder / "saes" / name), sae.hook_point, sae.width, content_of(str(folder / "saes" / name)), None, {}, {})
            for name, sae in wanted.items()
        }

    @property
    def train_tokens(self) -> int:
        return self.config.train_tokens or self.sweep.train.tokens

    # ---------------------------------------------------------------- results

    def save(self, analysis: str, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, Any]) -> list[Path]:
        """Writes an analysis's tables (CSV and Parquet) and figures (PNG) to its folder; returns the files."""
        folder = self.folder / analysis
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for name, table in tables.items():
            files += [folder / f"{name}.csv", folder / f"{name}.parquet"]
            table.to_csv(files[-2], index=False)
            table.to_parquet(files[-1], index=False)
        for name, figure in figures.items():
            files += save(figure, folder / name)
        return files

    def track(self, analysis: str, key: object, numbers: Mapping[str, float], per_sae: pd.DataFrame, files: Sequence[Path]) -> None:
        """Logs an analysis to MLflow: a run with its `numbers` and `files`, below it a run per SAE with the numbers of `per_sae` (column `sae`).

        The run is that of this analysis of these SAEs with these settings (`key`): logging again what is there changes nothing.
        """
        name = f"{self.study} {analysis} {digest([DEFINITION, analysis, key])[:8]}"
        config = {"analysis": analysis, "sweep": self.study, **self.config.model_dump(exclude={"sweep", "sae", "model", "text", "stream"})}
        config |= self.sweep.model_dump(include={"model", "text", "stream"})
        outbox = self.folder / "tracking" / f"{name.replace(' ', '-')}.db"
        run = Study(outbox, self.sweep.tracking, name, config, analysis=True)
        try:
            read = [self.saes[sae] for sae in per_sae["sae"] if sae in self.saes] or list(self.saes.values())
            run.tag(None, {"raysae.sweep": self.study, "raysae.saes": ", ".join(sae.run_id or sae.where for sae in read)})
            run.metrics(None, _finite(numbers), step=0)
            for row in per_sae.to_dict("records"):
                sae = self.saes[row["sae"]]
                run.child(sae.name, {**sae.params, "analysis": analysis, "sweep": self.study})
                run.tag(sae.name, {"raysae.sweep": self.study, "raysae.source_run": sae.run_id or sae.where})
                run.metrics(sae.name, _finite(row), step=int(sae.metrics.get("tokens", 0)))
                run.end(sae.name, "FINISHED")
            for file in files:
                run.artifact(None, file, "tables" if file.suffix in (".csv", ".parquet") else "figures" if file.suffix == ".png" else "")
            run.end(None, "FINISHED")
            run.flush(60)
            if refused := refusal(run.outbox):
                print(refused, file=sys.stderr)
        finally:
            run.close()


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float, np.number)) and np.isfinite(value)}
