"""What every analysis of a study shares: its SAEs, one set of recorded activations, and tasks whose results are kept.

Everything lies in OUTPUT/STUDY/analysis:

    activations/  recorded once per stream and hook point (`recording.collect`)
    tasks/        what each task has found, under a digest of all it depends on
    ANALYSIS/     tables and figures
    tracking/     an outbox per MLflow run

A job that was killed goes on with the tasks it lacks, and every job reads what another has worked out. Where an
analysis needs SAEs that the sweep lacks, the ordinary sweep trains them, and goes on from its checkpoints likewise.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from raysae.analysis.instruments.activations import SPLITS
from raysae.analysis.lab.recording import Recorded, Recording
from raysae.analysis.lab.subjects import Subject, content_of, find, subjects_of
from raysae.analysis.lab.tasks import Task, ensure_ray, work
from raysae.borders import border
from raysae.config import AnalysisConfig, ErrorsConfig, SAEConfig, SweepConfig, TrainConfig, UserError, digest
from raysae.knobs import earlier, from_flat
from raysae.lm.facts import ModelFacts, hook_width, model_facts
from raysae.processes import INTERRUPTED
from raysae.sae.origins import doubt_of, require_fit
from raysae.storage import file_system, is_there
from raysae.study.place import config_of, saved_config, with_absolute_paths
from raysae.study.plan import Plan, plan
from raysae.tracking.find import STUDY_CONFIG, TrackedSAE, study_params, study_settings
from raysae.tracking.runs import is_cut

# Default rows of each split. With 256 rows per dimension, the fit costs R² on other rows about 1/256.
ROWS_PER_DIMENSION = 256
FEWEST_ROWS, MOST_ROWS = 20_000, 150_000  # The paper has 150,000.
ENOUGH = 0.8  # Share of the wanted rows below which a warning tells what the lack does


def _settings(
    config: AnalysisConfig, given: Mapping[str, Any], found: Sequence[tuple[str, TrackedSAE | None]]
) -> tuple[str, SweepConfig, bool]:
    """The study's name, its sweep's config, and whether a sweep trained the SAEs.

    In the config, the knobs `given` on the command line replace the sweep's own model, text and stream.
    """
    tracked = [sae for _, sae in found if sae]
    studies = {sae.study for sae in tracked}
    if len(studies) > 1:
        raise UserError(
            f"--sae names SAEs of {len(studies)} sweeps. Name those of one, since they share model and text."
        )
    if tracked:
        name, sweep = tracked[0].study, _trained_with(tracked[0], given)
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


def _trained_with(sae: TrackedSAE, given: Mapping[str, Any]) -> SweepConfig:
    """The config of the sweep that trained `sae`.

    It is the study's config.yaml: that in the study's folder, else the copy in MLflow. Older studies may lack both.
    Then it is MLflow's parameters, if none is cut.

    Raises:
        UserError: the settings are damaged or cut, or the sweep ran code from the model's repository and the user has
            not said that it may run here.
    """
    params = study_params(sae)
    output = params.get("output", "")
    if not is_cut(output) and is_there(f"{output}/{sae.study}/{STUDY_CONFIG}"):
        sweep = saved_config(output, sae.study)
    elif settings := study_settings(sae):
        sweep = config_of(settings, f"{STUDY_CONFIG} of {sae.study} in MLflow")
    else:
        if lost := [knob for knob, value in params.items() if is_cut(value) and knob not in given]:
            raise UserError(
                f"sweep is {sae.study}, whose {STUDY_CONFIG} is not in {output}/{sae.study} any more, and MLflow has "
                f"only the beginning of {lost[0]}: put the folder back, or give --{lost[0]}"
            )
        sweep = from_flat(SweepConfig, params)
    if sweep.model.trust_remote_code and "model.trust_remote_code" not in given:
        raise UserError(
            f"sweep is {sae.study}, which ran code from the repository of {sweep.model.name}: "
            "give --model.trust_remote_code true if you trust it here too"
        )
    return sweep


def _check_origin(found: Sequence[tuple[str, TrackedSAE | None]], settled: Plan, stream: str | None) -> str | None:
    """A warning where a sweep's SAEs were trained on another stream than its settings give now.

    Args:
        found: where the SAEs lie.
        settled: the plan with the model that is read now.
        stream: the hash of the stream that the settings give. None where no sweep trained the SAEs.

    Raises:
        UserError: an SAE was trained on other weights than the model's.
    """
    streams = set()
    for where, _ in found:
        files, path = file_system(where)
        with border("sae", where, "whose cfg.json cannot be read", "name another SAE, or train it again"):
            if not files.exists(f"{path}/cfg.json"):
                continue
            origin = json.loads(files.cat_file(f"{path}/cfg.json")).get("metadata") or {}
        if origin.get("model_digest", settled.facts.digest) != settled.facts.digest:
            raise UserError(
                f"model.name is {settled.config.model.name}, whose weights are not those that {where} was trained on. "
                "Name that model, or train the SAEs again."
            )
        streams.add(origin.get("activation_spec"))
    if stream is None or stream in streams or streams <= {None}:
        return None
    return (
        "These SAEs were trained on another stream than their sweep's settings give now: the text has changed since, "
        "or the command line changes it. SAEs of older versions do not note the model's weights, and if those have "
        "changed, nothing here counts."
    )


class Lab:
    """The SAEs of a study, and what the analyses of them share.

    Opening a lab finds the SAEs and settles model and text. The first task that has to run connects to Ray.

    Args:
        config: the settings of the analysis.
        given: the knobs that the command line or a file has set. They replace the sweep's own.

    Raises:
        UserError: there is no such sweep or SAE, SAEs do not fit the model, or there is too little held-out text.
    """

    def __init__(self, config: AnalysisConfig, given: Mapping[str, Any] = {}) -> None:
        tracking = with_absolute_paths(SweepConfig(tracking=config.tracking)).tracking
        config = config.model_copy(update={"tracking": tracking})
        found = find(config)
        self.study, sweep, swept = _settings(config, given, found)
        self.config, self.sweep = config, with_absolute_paths(sweep)
        self.saes = {sae.name: sae for sae in subjects_of(config, found)}
        self._check_fit()
        self.plan, self.stream = self._plan(swept)
        self.folder = Path(self.sweep.output) / self.study / "analysis"
        self.replicates, self.seed = config.replicates, config.seed
        self.warnings: list[str] = []
        self.warn(_check_origin(found, self.plan, self.stream if swept else None))

    def warn(self, told: str | None) -> None:
        """Puts a warning on the console, and keeps it for the report. Does nothing for None, or if it was told."""
        if told and told not in self.warnings:
            self.warnings.append(told)
            print(f"Warning: {told}", file=sys.stderr, flush=True)

    def _check_fit(self) -> None:
        """Raises UserError where an SAE does not fit the language model. Warns where that is not certain."""
        model = self.sweep.model.name
        facts = model_facts(self.sweep.model)
        for sae in self.saes.values():
            require_fit(sae.name, sae.hook_point, sae.d_in, sae.origin, facts, model)
            if doubt := doubt_of(sae.name, sae.origin, model):
                print(f"Warning: {doubt}.", file=sys.stderr)

    def _plan(self, swept: bool) -> tuple[Plan, str]:
        """The settled plan, and the hash of the stream that the settings train SAEs on.

        The plan has text for the held-out tokens that the analysis wants. Of a dataset, that may be more text than the
        sweep has read, so the sweep's own plan gives the hash.
        """
        update: dict[str, Any] = {"hook_points": self.hook_points}
        if not swept:  # Nothing is trained unless an analysis asks for it.
            update["train"] = self.sweep.train.model_copy(update={"tokens": 1})
            update["evaluation"] = self.sweep.evaluation.model_copy(update={"rows": 1})
        sweep = self.sweep.model_copy(update=update)
        settled = plan(sweep, self.config.tokens or self._usual(model_facts(sweep.model)))
        as_trained = plan(sweep) if swept and sweep.text.source.startswith("hf:") else settled
        return settled, as_trained.training.hash

    def _usual(self, facts: ModelFacts) -> int:
        """How many held-out tokens to record where the settings name no number."""
        widest = max(hook_width(hook_point, facts) for hook_point in self.hook_points)
        return 3 * min(max(ROWS_PER_DIMENSION * widest, FEWEST_ROWS), MOST_ROWS)

    @property
    def hook_points(self) -> list[str]:
        """The hook points of the SAEs, in the order of the SAEs."""
        return list(dict.fromkeys(sae.hook_point for sae in self.saes.values()))

    def of(self, hook_point: str) -> dict[str, Subject]:
        """The SAEs of a hook point, by name."""
        return {name: sae for name, sae in self.saes.items() if sae.hook_point == hook_point}

    @cached_property
    def shards(self) -> int:
        """How many held-out shards to record.

        Raises:
            UserError: the settings ask for more tokens than the held-out text yields.
        """
        spec = self.plan.evaluation
        usual = max(1, round(self._usual(self.plan.facts) / spec.rows_per_shard))
        shards = -(-self.config.tokens // spec.rows_per_shard) if self.config.tokens else usual
        if self.config.tokens and shards > spec.shards:
            raise UserError(
                f"tokens is {self.config.tokens}, and the held-out text yields {spec.rows:,}. "
                "Lower tokens, raise text.evaluation_fraction or give more text."
            )
        return min(shards, spec.shards)

    def shortage(self, recorded: Recorded) -> str | None:
        """A warning where the splits have far fewer tokens than wanted, with what that does to R².

        Padding, rows left out and contexts that join two groups do not count, so a little less than wanted is usual.

        Least squares with d predictors and n rows leaves d/(n − d − 1) more than the best map would on other rows, for
        normal predictors (Breiman and Freedman 1983).
        """
        spec, wanted = self.plan.evaluation, self.config.tokens or self._usual(self.plan.facts)
        have, fit = sum(recorded.rows(split) for split in SPLITS), recorded.rows("A")
        if have >= ENOUGH * wanted:
            return None
        widest = max(hook_width(hook_point, self.plan.facts) for hook_point in self.hook_points)
        lost, usual = (widest / max(1, rows - widest - 1) for rows in (fit, wanted // len(SPLITS)))
        used_up = self.shards == spec.shards
        return (
            f"The held-out splits have {have:,} of the {wanted:,} tokens wanted, and {fit:,} of them fit {widest:,} "
            f"predictors. That lowers R² on other tokens by about {lost:.1%} of 1 − R², where all would lower it by "
            f"{usual:.1%}. Intervals are wider too. "
            + ("Raise text.evaluation_fraction or give more text." if used_up else f"Set tokens above {wanted}.")
        )

    # ---------------------------------------------------------------- activations and tasks

    def record(self, hook_points: Sequence[str]) -> Recorded:
        """The held-out activations at these hook points. A task with the language model records what is missing.

        Warns where they are far fewer than wanted.
        """
        contexts, spec = self.plan.contexts["evaluation"], self.plan.evaluation
        wanted = Recording(self.folder / "activations", spec, tuple(hook_points), self.shards, self.seed)
        recorded = wanted.find(contexts)
        if recorded is None:
            task = wanted.task(self.plan.config)
            (self._tasks / task.file).unlink(missing_ok=True)  # It may speak of files that somebody has removed.
            recorded = self.run([task])[0]
        self.warn(self.shortage(recorded))
        return recorded

    def key(self, *saes: Subject, **more: object) -> list:
        """What a task depends on that reads these SAEs and the recorded activations, apart from its analysis."""
        read = [[sae.name, sae.content, sae.hook_point] for sae in saes]
        return [self.plan.evaluation.hash, self.shards, self.seed, self.replicates, read, more]

    def run(self, tasks: Sequence[Task]) -> list[Any]:
        """The tasks' results, in order. The cluster works out those that are not kept yet, on a core each.

        Raises:
            Exception: what a task raises, once the tasks under way have been cancelled.
        """
        return work(self._tasks, tasks, self.plan)

    @property
    def _tasks(self) -> Path:
        """The folder of the tasks' results."""
        return self.folder / "tasks"

    # ---------------------------------------------------------------- SAEs that the sweep lacks

    def train(
        self,
        purpose: str,
        hook_points: Sequence[str],
        widths: Sequence[int],
        like: SAEConfig,
        tokens: int,
        errors: ErrorsConfig | None = None,
        seeds: int = 1,
    ) -> dict[str, Subject]:
        """SAEs that the sweep lacks, by name. One sweep with the study's settings trains them, beside the study.

        Args:
            purpose: goes into the name of that sweep.
            hook_points: each gets an SAE of every width.
            widths: see above.
            like: what the SAEs have in common.
            tokens: how many each trains on.
            errors: the SAE and probe that the hook points' errors come from.
            seeds: SAEs per hook point and width. Their seeds count up from that of `like`.

        Raises:
            UserError: some of them could not be trained.
        """
        train = self.sweep.train.model_copy(update={"tokens": tokens, "reports": 2})
        judge = self.plan.config.stream.leave_out_hook_point  # The recorded rows' judge, so that the same rows are out
        update = {
            "hook_points": list(hook_points), "architectures": [like.architecture], "widths": list(widths),
            "k": [] if like.k is None else [like.k], "sparsities": [] if like.sparsity is None else [like.sparsity],
            "learning_rates": [like.learning_rate], "seeds": [like.seed + i for i in range(seeds)],
            "search": "grid", "scheduler": "none", "train": train, "errors": errors or ErrorsConfig(),
            "stream": self.sweep.stream.model_copy(update={"leave_out_hook_point": judge}),
            "evaluation": self.sweep.evaluation.model_copy(update={"predicted_tokens": 0}),
        }  # fmt: skip
        config = self.sweep.model_copy(update=update)
        wanted = {sae.name: sae for sae in config.saes()}
        # The name depends on the probe's content. Every run writes the probe anew, under the same file name.
        of = [content_of(errors.sae), hashlib.sha256(Path(errors.probe).read_bytes()).hexdigest()] if errors else None
        key = digest([self.stream, _told(train), of, sorted(wanted)])[:8]
        config = config.model_copy(update={"study": f"{self.study}-{purpose}-{key}"})
        folder = Path(config.output) / config.study / "saes"
        if not all((folder / name / "outcome.json").exists() for name in wanted):
            self._sweep(purpose, config, len(wanted))
        return {
            name: Subject(
                name, str(folder / name), sae.hook_point, sae.width, content_of(str(folder / name)), None, {}, {}
            )
            for name, sae in wanted.items()
        }

    def _sweep(self, purpose: str, config: SweepConfig, saes: int) -> None:
        """Runs a sweep of `saes` SAEs, or goes on with it where its folder is there."""
        from raysae.sweep.run import run_sweep

        ensure_ray(self.plan)
        again = (Path(config.output) / config.study / "config.yaml").exists()
        print(f"{purpose}: {saes} SAEs to train" + (", going on with what was begun" if again else ""), flush=True)
        settings = saved_config(config.output, config.study) if again else config
        code = run_sweep(settings, config.study if again else None, made_for=self.study)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise UserError(
                f"the SAEs for {purpose} could not all be trained. The sweep {config.study} says above why. "
                "Begun again, this goes on."
            )

    @property
    def train_tokens(self) -> int:
        """Tokens that SAEs train on which an analysis needs. Unset: as many as the sweep's."""
        return self.config.train_tokens or self.sweep.train.tokens


def _told(train: TrainConfig) -> dict[str, Any]:
    """The knobs, without newer ones at their earlier value. So SAEs that are older than a knob are found again."""
    before = earlier(TrainConfig)
    return {knob: value for knob, value in train.model_dump().items() if knob not in before or value != before[knob]}
