"""Every knob of raysae, its unit, default and bounds. Imports neither torch nor Ray, so that `--help` is instant.

A job's configuration is one pydantic model. It is read from (strongest first) command-line overrides, a YAML file and the defaults here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


@dataclass(frozen=True)
class ArchitectureFacts:
    """What the rest of the house knows of an architecture. Its mathematics is a module of `raysae/sae/`."""

    level: Literal["k", "sparsity"]  # The knob that sets how sparse its codes are
    levels: tuple[float, ...]  # Default range of that knob, from low to high L0 or penalty
    saelens: str  # SAELens's name of the architecture that a saved SAE has
    native: bool = True  # SAELens's files of that name are loaded as this architecture
    searches: float = 3  # Predicted cost of a step in units of TopK's search, see `capacity.cost`

    def pick(self, *, k: int, sparsity: float) -> dict[str, float]:
        """The one of both knobs that the architecture takes, as an argument of SAEConfig."""
        return {"k": k} if self.level == "k" else {"sparsity": sparsity}


# Ranges of coefficients span a useful range of L0. The squared error is a sum over d, and for tied a mean.
ARCHITECTURES: dict[str, ArchitectureFacts] = {
    "topk": ArchitectureFacts("k", (8, 16, 32), "topk", searches=1),
    "batchtopk": ArchitectureFacts("k", (8, 16, 32), "jumprelu", native=False, searches=2),
    "relu": ArchitectureFacts("sparsity", (0.3, 1.0, 3.0), "standard"),
    "tied": ArchitectureFacts("sparsity", (1e-4, 1e-3, 1e-2), "standard", native=False),
    "jumprelu": ArchitectureFacts("sparsity", (0.03, 0.3, 3.0), "jumprelu"),
}
Architecture = Literal[*ARCHITECTURES]
Fraction = Annotated[float, Field(ge=0, le=1)]
_ARITHMETIC = ("torch", "device", "threads", "tf32", "bf16_reduction")
_TRAINERS = (*_ARITHMETIC, "kernels", "numba", "fast_integers", "triton", "precision", "spec")
_PRODUCERS = (*_ARITHMETIC, "numpy", "transformers", "attention", "dtype", "transform")
FACTS = (*_TRAINERS, *(f"producer.{fact}" for fact in _PRODUCERS))  # that bits depend on beside the knobs: docs/determinism.md


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that names the field, the value and what would be right. Jobs print it and exit with 2."""


class Strict(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def newer_knob(default: Any, *, before: Any, **more: Any) -> Any:
    """A knob that studies begun before it lack. There it counts as `before`, so that they can still be resumed."""
    return Field(default, json_schema_extra={"before": before}, **more)


def digest(content: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `content` as canonical JSON: equal content, equal digest, on every machine."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- where activations come from


class ModelConfig(Strict):
    name: str = Field("embedded", min_length=1, description="'embedded' (the model in the package), a folder, or a Hugging Face model name")
    revision: str | None = Field(None, description="revision on the Hugging Face hub")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of weights and activations")
    device_map: Literal["auto"] | None = Field(None, description="'auto' spreads one model over all GPUs of a producer")
    trust_remote_code: bool = Field(False, description="run Python code that the model's repository brings")
    modules: dict[str, str] = Field(
        default_factory=dict,
        description="module paths of other architectures, e.g. blocks=transformer.h,attn=attn,attn_proj=attn.o,mlp=mlp,mlp_proj=mlp.o",
    )


class TextConfig(Strict):
    source: str = Field(
        "stdlib",
        description="'stdlib' (this interpreter's standard library), files or globs separated by commas (txt md py jsonl parquet, "
        "also .gz .xz .zst), or 'hf:NAME'",
    )
    field: str = Field("text", description="column that holds the text (jsonl, parquet, Hugging Face)")
    subset: str | None = Field(None, description="configuration name of a Hugging Face dataset")
    split: str = Field("train", description="split of a Hugging Face dataset")
    max_documents: int | None = Field(None, gt=0, description="read at most this many documents")
    separator: str = Field("\n\n", description="text between two documents (there is no BOS inside a context)")
    delimiter: str | None = Field(
        None, description="a string that separates documents inside .txt and .md files, e.g. '<|endoftext|>'; unset: one file, one document"
    )
    evaluation_fraction: float = Field(0.15, gt=0, lt=1, description="share of the documents held out for evaluation, by hash of the document")
    cache: str = Field("~/.cache/raysae/text", description="folder for tokenised text")


class StreamConfig(Strict):
    context_length: int | None = Field(None, ge=4, description="tokens per context; unset: the model's own, 1,024 at most")
    skip_positions: int | None = Field(
        None,
        ge=1,
        description="first positions of each context that yield no rows (BOS has an outlier norm); unset: 8, or 200 from a context of 1,024 on",
    )
    epochs: int = Field(1, gt=0, description="passes over the text; each permutes the contexts anew")
    seed: int = Field(0, ge=0, description="seed of the order of contexts and rows")
    shard_contexts: int = Field(256, ge=256, description="contexts per shard")
    block_mib: float = Field(32, gt=0, description="size of a block in MiB")
    mib_in_flight: float = Field(256, gt=0, description="bound on the activations held for consumers, in MiB")
    batch_contexts: int = Field(32, gt=0, description="contexts per forward pass of the language model")
    lag: Literal["stall", "detach"] = Field("stall", description="a consumer far ahead of the slowest waits, or goes on in a pass of its own")
    hold_seconds: float = Field(120, ge=0, description="how long the first blocks wait for expected consumers")
    producers_min: int = Field(1, gt=0, description="language models kept running at least")
    producers_max: int = Field(1, gt=0, description="language models running at most")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of a producer; unset: the cores of the smallest machine. The bits of the activations depend on it"
    )
    cache: Literal["auto", "on", "off"] = Field("auto", description="keep activations on disk; auto: where the whole pass is at most cache_gib")
    cache_gib: float = Field(4, gt=0, description="size of the activation cache per pass, in GiB: it keeps a prefix of the pass")
    cache_dir: str = Field("~/.cache/raysae/activations", description="folder or s3:// URL of the activation cache")
    bad_shards: Literal["stop", "skip"] = Field(
        "stop",
        description="a shard that cannot be produced, or holds NaN or infinite activations, stops the SAEs that come to it, or all skip it alike",
    )

    @model_validator(mode="after")
    def _bounds(self) -> StreamConfig:
        if self.producers_max < self.producers_min:
            raise ValueError(f"producers_max is {self.producers_max}: it must be at least producers_min, {self.producers_min}")
        return self


class ErrorsConfig(Strict):
    """What the hook points H.error, H.linear and H.nonlinear stand for: e = x − Sae(x), its linear prediction ê from x, and ε = e − ê, x being the
    activation at H. SAEs are trained on them as on activations."""

    sae: str | None = Field(None, description="folder or URL of the SAE that H.error, H.linear and H.nonlinear in hook_points are errors of")
    probe: str | None = Field(None, description="file with the linear map from x to ê that jobs/error_regression.py fits (probe.safetensors)")


ERROR_KINDS = ("error", "linear", "nonlinear")


def error_kind(hook_point: str) -> tuple[str | None, str]:
    """`resid_post.2.nonlinear` → ("nonlinear", "resid_post.2"); (None, hook point) where it is none of an error's."""
    hook, _, kind = hook_point.rpartition(".")
    return (kind, hook) if kind in ERROR_KINDS else (None, hook_point)


# ---------------------------------------------------------------- SAEs and their training


def _names(level: str) -> str:
    return ", ".join(name for name, facts in ARCHITECTURES.items() if facts.level == level)


def _ranges() -> str:
    ranges = {name: facts.levels for name, facts in ARCHITECTURES.items() if facts.level == "sparsity"}
    return ", ".join(f"{name} {' '.join(f'{level:g}' for level in levels)}" for name, levels in ranges.items())


class SAEConfig(Strict):
    """One sparse autoencoder."""

    architecture: Architecture = "topk"
    hook_point: str
    width: int = Field(gt=0, description="latents n")
    k: int | None = Field(None, gt=0, description="active latents per token, or their mean")
    sparsity: float | None = Field(None, ge=0, description="coefficient of the sparsity penalty")
    learning_rate: float = Field(gt=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_sparsity(self) -> SAEConfig:
        if ARCHITECTURES[self.architecture].level == "k":
            if self.k is None or self.sparsity is not None:
                raise ValueError(f"{self.architecture} takes k and no sparsity coefficient")
            if self.k > self.width:
                raise ValueError(f"k is {self.k}, more than the width {self.width}")
        elif self.sparsity is None or self.k is not None:
            raise ValueError(f"{self.architecture} takes a sparsity coefficient and no k")
        return self

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The hook points whose activations a bank reads to train this SAE.

        Rows of a shard are permuted alike at every hook point, so the rows of several hook points align.
        """
        return (self.hook_point,)

    @property
    def name(self) -> str:
        """Unique in a sweep and safe as a file name, e.g. `topk_w1024_k16_resid_post.2_lr0.001_s0`."""
        level = f"k{self.k}" if self.k is not None else f"c{self.sparsity:g}"
        return f"{self.architecture}_w{self.width}_{level}_{self.hook_point}_lr{self.learning_rate:g}_s{self.seed}"


class TrainConfig(Strict):
    tokens: int = Field(1_000_000, gt=0, description="rows (tokens) each SAE is trained on")
    batch: int = Field(1024, gt=0, description="rows per step")
    warmup: Fraction = Field(0.05, description="share of the steps over which the learning rate rises from 0")
    decay: Fraction = Field(0.2, description="share of the steps, at the end, over which it falls to 0")
    sparsity_warmup: Fraction = Field(0.1, description="share of the steps over which a penalty's coefficient rises from 0 (relu, tied, jumprelu)")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's beta 1")
    beta2: float = Field(0.999, ge=0, lt=1, description="Adam's beta 2")
    clip_norm: float = Field(
        1.0, gt=0, description="gradients are scaled down to a global norm of this times √d: losses are sums over the d dimensions"
    )
    aux_coefficient: float = Field(1 / 32, ge=0, description="weight of the AuxK loss (topk, batchtopk)")
    decoder_bias: Literal["mean", "median"] = Field("median", description="b_dec starts at the mean or the geometric median of the first rows")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="number format of operands of a step's products, and of TopK's pre-activations; unset: bfloat16 on GPUs that have it",
    )
    bandwidth: float = Field(0.03, gt=0, description="width of jumprelu's straight-through window, in units of the normalised activation")
    threads: int | None = Field(
        None, gt=0, description="CPU threads of a trainer; unset: the cores of its machine shared out evenly. The bits of an SAE depend on it"
    )
    reports: int = Field(10, gt=0, description="interim evaluations per run")
    checkpoint_seconds: float = Field(60, gt=0, description="seconds between checkpoints of a trainer")

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch)


class EvaluationConfig(Strict):
    rows: int = Field(200_000, gt=0, description="held-out rows for fvu, l0 and dead_fraction")
    interim_rows: int = Field(8_192, gt=0, description="held-out rows of an interim evaluation")
    predicted_tokens: int = Field(16_384, ge=0, description="tokens for ce_recovered and kl; 0 leaves both out")


# ---------------------------------------------------------------- the sweep


class ResourcesConfig(Strict):
    address: str | None = Field(None, description="Ray cluster to connect to; unset: RAY_ADDRESS, else a local Ray")
    banks: int | None = Field(None, gt=0, description="trainer processes; unset: one per GPU, or one per CPU core (8 per machine at most)")
    trainer_cpus: float = Field(0.25, gt=0, description="CPUs a trainer reserves")
    trainer_gpus: float = Field(0, ge=0, description="GPUs a trainer reserves (fractions share one)")
    producer_cpus: float = Field(0.25, gt=0, description="CPUs a producer reserves")
    producer_gpus: float = Field(0, ge=0, description="GPUs a producer reserves")
    trials: int | None = Field(None, gt=0, description="Ray Tune trials at a time, a process of 120 MiB each; unset: 1, or all with asha")
    shared_storage: bool = Field(False, description="`output` is a folder that all machines of the cluster share (NFS and the like)")


class FaultsConfig(Strict):
    """When something counts as broken, and how often it is tried again: every timeout and limit of the stream, the trainers and the driver."""

    hang_seconds: float = Field(
        900,
        gt=0,
        description="a producer, trainer, queue or relay that is silent for longer is replaced; "
        "a producer sooner, once it is known how long a shard takes: "
        "after ten times that, 30 s at least",
    )
    start_seconds: float = Field(
        900, gt=0, description="a sweep that has no place on the cluster for a producer or trainer for so long, or no model loaded, ends and says why"
    )
    start_attempts: int = Field(3, gt=0, description="times in a row that a producer's model may fail to load")
    shard_attempts: int = Field(
        4,
        gt=0,
        description="times a shard is tried before it counts as bad; where its producer dies or hangs, which is mostly not its fault, three "
        "times as many",
    )
    producer_deaths: int = Field(12, ge=0, description="deaths or hangs per producer within ten minutes that are borne; more end the sweep")
    trainer_restarts: int = Field(100, ge=0, description="times a trainer's process, or the handle of a trial, is restarted")
    queue_seconds: float = Field(
        120, gt=0, description="for which a queue or relay that does not answer (its process is being restarted) is asked again"
    )
    block_seconds: float = Field(
        120,
        gt=0,
        description="for which a block may take from its machine to a trainer; then its shard is "
        "produced again, and the next may take twice as long; at the last of shard_attempts the trainer's SAEs fail",
    )
    stop_seconds: float = Field(
        45, gt=0, description="for which trainers may write checkpoints when the sweep is interrupted, or their machine is lost"
    )


class TrackingConfig(Strict):
    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI: a database or a server")
    experiment: str = Field("raysae", description="MLflow experiment of the study")

    @field_validator("uri")
    @classmethod
    def _known(cls, uri: str) -> str:
        if not re.match(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://|databricks", uri):
            raise ValueError("MLflow keeps runs in a database (sqlite:///mlflow.db, postgresql://…) or on a server (http://…)")
        return uri


class SweepConfig(Strict):
    """A study: every SAE of a grid, trained by one pass of a language model."""

    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    stream: StreamConfig = StreamConfig()
    hook_points: list[str] = Field(default_factory=list, description="hook points, e.g. resid_post.3; unset: the middle layer's resid_post")
    errors: ErrorsConfig = ErrorsConfig()
    architectures: list[Architecture] = Field(["topk"], min_length=1, description=", ".join(ARCHITECTURES))
    widths: list[Annotated[int, Field(gt=0)]] = Field([256, 512, 1024, 2048, 4096, 8192], min_length=1, description="latents per SAE")
    k: list[Annotated[int, Field(gt=0)]] = Field(
        list(ARCHITECTURES["topk"].levels), description=f"Active latents per token, or their mean ({_names('k')})."
    )
    sparsities: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=list,
        description=f"Coefficients of the sparsity penalty ({_names('sparsity')}). Larger ones give fewer active "
        f"latents. Unset, each architecture has its own: {_ranges()}.",
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field([1e-3], min_length=1, description="peak learning rates of Adam")
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1, description="seeds of the SAEs' initial weights")
    search: Literal["grid", "random"] = Field("grid", description="every combination, or `samples` of them drawn at random")
    samples: int = Field(10, gt=0, description="SAEs drawn when search is random")
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops the worse SAEs early, by held-out FVU")
    asha_reduction: float = Field(2, gt=1, description="asha keeps one SAE in this many at each rung")
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    faults: FaultsConfig = FaultsConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = Field("runs", description="folder or s3:// URL for checkpoints, SAEs and summaries")
    study: str | None = Field(None, description="name of this sweep's folder; unset: date and time")

    @field_validator("output")
    @classmethod
    def _somewhere(cls, output: str) -> str:
        if re.fullmatch(r"(\w+:)?/*", output):
            raise ValueError(f"{output!r} names no folder: runs, say, or s3://bucket/runs")
        return output

    @field_validator("study")
    @classmethod
    def _a_folders_name(cls, study: str | None) -> str | None:
        if study is not None and not re.fullmatch(r"\w[\w.-]*", study):
            raise ValueError(f"{study!r} is no name for a folder: letters, digits, dots, hyphens and underscores make one")
        return study

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        for field in ("hook_points", "architectures", "widths", "k", "sparsities", "learning_rates", "seeds"):
            values = getattr(self, field)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{field} has {twice[0]} twice: every SAE is trained once")
        by_k = [name for name in self.architectures if ARCHITECTURES[name].level == "k"]
        if by_k and not self.k:
            raise ValueError(f"k is empty: {by_k[0]} needs at least one value")
        if by_k:
            wide = max(self.k)
            narrow = min(self.widths)
            if wide > narrow:
                raise ValueError(f"k is {wide}, more than the width {narrow}: every k must be at most every width")
        return self

    def _levels(self, facts: ArchitectureFacts) -> list[dict[str, float]]:
        if facts.level == "k":
            return [{"k": k} for k in self.k]
        return [{"sparsity": sparsity} for sparsity in self.sparsities or facts.levels]

    def saes(self) -> list[SAEConfig]:
        """The sweep's SAEs, in a fixed order. `hook_points` must be resolved. Random search draws without replacement, seeded by stream.seed."""
        saes = []
        for hook, arch in itertools.product(self.hook_points, self.architectures):
            levels = self._levels(ARCHITECTURES[arch])
            for width, level, lr, seed in itertools.product(self.widths, levels, self.learning_rates, self.seeds):
                saes.append(SAEConfig(architecture=arch, hook_point=hook, width=width, learning_rate=lr, seed=seed, **level))
        saes = list({sae.name: sae for sae in saes}.values())
        if self.search == "random" and self.samples < len(saes):
            chosen = np.random.default_rng(self.stream.seed).choice(len(saes), self.samples, replace=False)
            saes = [saes[i] for i in sorted(chosen)]
        return saes


# ---------------------------------------------------------------- analyses


class AnalysisConfig(Strict):
    """Which SAEs an analysis takes apart, on how many tokens, and where its results go. Model, text and stream are the sweep's unless given."""

    sweep: str | None = Field(None, description="sweep to analyse, its study's name or MLflow run id; unset: the latest that has saved SAEs")
    sae: list[str] = Field(
        default_factory=list, description="SAEs to analyse in place of a sweep's: MLflow run ids, or folders, files or URLs of saved or public SAEs"
    )
    hook_points: list[str] = Field(
        default_factory=list, description="hook points whose SAEs are analysed; unset: all. For a public SAE that does not say its own: that"
    )
    tokens: int | None = Field(
        None, gt=0, description="held-out tokens, to fit and to evaluate; unset: about 3 × 256 per dimension, 60,000 to 450,000, or all"
    )
    predicted_tokens: int = Field(16_384, gt=0, description="tokens for cross-entropy (downstream_loss)")
    target_l0: float = Field(60, gt=0, description="where one SAE per width is shown: the one with the L0 nearest to this")
    half_trained: bool = Field(
        True, description="train the SAEs of error_regression's figure again on half the tokens: does short training explain what is predictable?"
    )
    train_tokens: int | None = Field(
        None, gt=0, description="tokens for the SAEs that error_saes and earlier_layers train; unset: as many as the sweep's SAEs had"
    )
    replicates: int = Field(200, ge=20, description="bootstrap replicates of every interval")
    seed: int = Field(0, ge=0, description="seed of splits, bootstrap and noise")
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    stream: StreamConfig = StreamConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = Field("runs", description="folder for results: OUTPUT/STUDY/analysis. On several machines one that all of them share")

    @model_validator(mode="after")
    def _one_source(self) -> AnalysisConfig:
        if self.sweep and self.sae:
            raise ValueError("sweep and sae are both given: name a sweep, or SAEs")
        if "://" in self.output:
            raise ValueError(f"output is {self.output}: results of analyses go to a folder")
        return self
