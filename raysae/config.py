"""Every knob of raysae with its unit, default and bounds.

A job's configuration is one pydantic model. Command-line overrides go before a YAML file, and both before the defaults
here. The descriptions are the text of `--help`. It is instant, because this module imports neither torch nor Ray.
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
    beta1: float = 0.9  # Adam's beta 1 where train.beta1 is unset
    # Width of the straight-through window where train.bandwidth is unset, for activations of mean square norm 1
    bandwidth: float | None = None
    earlier_levels: tuple[float, ...] = ()  # Default range of studies with the earlier unit, see train.jumprelu_unit

    def pick(self, *, k: int, sparsity: float) -> dict[str, float]:
        """The one of both knobs that the architecture takes, as an argument of SAEConfig."""
        return {"k": k} if self.level == "k" else {"sparsity": sparsity}


# Ranges of coefficients span a useful range of L0. The squared error is a sum over d, and for tied a mean. JumpReLU's
# coefficient is multiplied by d.
ARCHITECTURES: dict[str, ArchitectureFacts] = {
    "topk": ArchitectureFacts("k", (8, 16, 32), "topk", searches=1),
    "batchtopk": ArchitectureFacts("k", (8, 16, 32), "jumprelu", native=False, searches=2),
    "matryoshka": ArchitectureFacts("k", (8, 16, 32), "jumprelu", native=False, searches=2),
    "relu": ArchitectureFacts("sparsity", (0.3, 1.0, 3.0), "standard"),
    "tied": ArchitectureFacts("sparsity", (1e-4, 1e-3, 1e-2), "standard", native=False),
    # beta1 and bandwidth are the paper's (arXiv 2407.14435)
    "jumprelu": ArchitectureFacts(
        "sparsity", (3e-4, 1e-3, 3e-3), "jumprelu", beta1=0.0, bandwidth=1e-3, earlier_levels=(0.03, 0.3, 3.0)
    ),
    "gated": ArchitectureFacts("sparsity", (0.3, 1.0, 3.0), "gated", searches=5),
}
Architecture = Literal[*ARCHITECTURES]
Fraction = Annotated[float, Field(ge=0, le=1)]
NumberFormat = Literal["float32", "bfloat16", "float16"]  # Of a language model and its activations
_ARITHMETIC = ("torch", "device", "threads", "tf32", "bf16_reduction")
_TRAINERS = (*_ARITHMETIC, "kernels", "numba", "fast_integers", "triton", "precision", "spec")
_PRODUCERS = (*_ARITHMETIC, "numpy", "transformers", "attention", "dtype", "transform")
# Facts on which the bits of an SAE depend, beside the knobs. See docs/determinism.md.
FACTS = (*_TRAINERS, *(f"producer.{fact}" for fact in _PRODUCERS))
OUTLIER_NORM = 10.0  # A row is an outlier where its norm is above this multiple of the median norm


class UserError(ValueError):
    """A mistake of the user's. The message names the field, the value and what would be right.

    Jobs print it and exit with 2.
    """


class Strict(BaseModel):
    """A section of the configuration. It is immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def newer_knob(default: Any, *, before: Any, **more: Any) -> Any:
    """A knob that studies begun before it lack. There it counts as `before`, so that they can still be resumed."""
    return Field(default, json_schema_extra={"before": before}, **more)


def digest(content: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of `content` as canonical JSON.

    Equal content has the same digest on every machine.
    """
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- where activations come from


class ModelConfig(Strict):
    """The language model whose activations are read."""

    name: str = Field(
        "embedded",
        min_length=1,
        description="Language model: 'embedded' (the one in the package), a folder, a .gguf file, or a name on the "
        "Hugging Face hub.",
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit on the Hugging Face hub. Unset: the default branch. A study keeps the "
        "commit it began with.",
    )
    dtype: Literal["auto", NumberFormat] = Field(
        "auto",
        description="Number format of the model's weights and of the activations. 'auto' takes the model's own where "
        "producers multiply it fast (GPUs, CPUs with AMX), else float32. The embedded model takes float32. bfloat16 "
        "and float16 take half the memory and round more coarsely. float16 overflows above 65,504.",
    )
    device_map: Literal["auto"] | None = Field(
        None,
        description="'auto' spreads one model over all GPUs of a producer. It needs the package accelerate. Unset: "
        "the model is on one device.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code from the model's repository. Set it only for repositories you trust."
    )
    modules: dict[str, str] = Field(
        default_factory=dict,
        description="Module paths, in place of those that raysae knows or finds, e.g. "
        "blocks=transformer.h,attn=attn,attn_proj=attn.o,mlp=mlp,mlp_proj=mlp.o",
    )


class TextConfig(Strict):
    """The text that the language model reads."""

    source: str = Field(
        "stdlib",
        description="Text: 'stdlib' (this interpreter's standard library), 'hf:NAME' (a Hugging Face dataset), or "
        "files or globs separated by commas. Files are txt, md, py, jsonl or parquet, or these as .gz, "
        ".xz or .zst.",
    )
    field: str = Field(
        "text",
        description="Column that holds the documents in jsonl, parquet and Hugging Face datasets. It holds text, lists "
        "of token ids, or chats: lists of messages with role and content, which go through the model's chat template.",
    )
    subset: str | None = Field(None, description="Configuration name of a Hugging Face dataset. Unset: its default.")
    split: str = Field("train", description="Split of a Hugging Face dataset.")
    max_documents: int | None = Field(None, gt=0, description="Most documents to read. Unset: no limit.")
    separator: str = Field(
        "\n\n",
        description="Text put after each text, before the next. No BOS is put between the documents of a context. A "
        "special token here lies inside contexts, where its activations can have outlier norms.",
    )
    delimiter: str | None = Field(
        None,
        min_length=1,
        description="String that separates documents inside a text, e.g. '<|endoftext|>'. Unset: each txt or md file, "
        "each line of jsonl and each row is one document. Python files are never split.",
    )
    join_documents: bool = newer_knob(
        True,
        before=True,
        description="Contexts join documents one after the other. False: each context is the start of one document, "
        "cut at the context length. What a shorter document leaves free is padded and yields no rows.",
    )
    evaluation_fraction: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of the documents held out for evaluation, chosen by a hash of each document. Larger "
        "leaves less text for training.",
    )
    cache: str = Field("~/.cache/raysae/text", description="Folder that keeps tokenised text for later runs.")


class StreamConfig(Strict):
    """How producers turn text into shards of activations, and how these reach trainers."""

    context_length: int | None = Field(
        None, ge=4, description="Tokens per context. Unset: the model's longest context, at most 1,024."
    )
    skip_positions: int | None = Field(
        None,
        ge=1,
        description="Positions at the start of each context that yield no rows, because BOS has an outlier norm. "
        "Larger leaves fewer rows. Unset: 8, or 200 for contexts of 1,024 tokens and more.",
    )
    leave_out_tokens: list[str | int] = newer_knob(
        [],
        before=[],
        description="Tokens whose positions yield no rows: 'special' (all special tokens of the tokenizer), token ids, "
        "or tokens as the tokenizer spells them, e.g. special,198,Ġthe. A row of the same shard takes the "
        "place of each one left out.",
    )
    leave_out_norm: float | None = newer_knob(
        None,
        before=None,
        gt=1,
        description="Leave out rows whose norm is above this multiple of their shard's median norm, such as 10. "
        "Smaller leaves out more. Unset: none.",
    )
    leave_out_hook_point: str | None = newer_knob(
        None,
        before=None,
        description="Hook point at which leave_out_norm judges the norm. Rows are left out at every hook point alike. "
        "Unset: the study's first.",
    )
    epochs: int = Field(
        1,
        gt=0,
        description="Passes over the text, each with the contexts in a new order. More passes give more rows from "
        "the same text.",
    )
    seed: int = Field(0, ge=0, description="Seed of the order of contexts and rows, and of a random search.")
    shard_contexts: int = Field(
        256,
        ge=256,
        description="Contexts per shard, the unit that is produced and shuffled as a whole. Larger mixes each batch "
        "from more texts and takes more memory.",
    )
    block_mib: float = Field(
        32, gt=0, description="Size of a block, a piece of a shard, in MiB. Larger makes fewer and longer transfers."
    )
    mib_in_flight: float = Field(
        256,
        gt=0,
        description="Most activations held for trainers, in MiB. Larger lets producers run further ahead and takes "
        "more memory.",
    )
    batch_contexts: int = Field(
        32,
        gt=0,
        description="Contexts per forward pass of the language model. Larger can be faster and takes more memory. "
        "The bits of the activations depend on it.",
    )
    lag: Literal["stall", "detach"] = Field(
        "stall",
        description="What a trainer does when it is far ahead of the slowest one: 'stall' waits, 'detach' goes on in "
        "a pass of its own. That pass may make shards again.",
    )
    hold_seconds: float = Field(
        120,
        ge=0,
        description="Seconds for which the first blocks are kept for trainers that have not joined yet. Larger gives "
        "slow starters more time to read along from the beginning. A trainer that never comes delays "
        "the others for longer.",
    )
    producers_min: int = Field(
        1,
        gt=0,
        description="Producers kept running, each with a language model of its own. More make activations faster and "
        "take more CPUs or GPUs.",
    )
    producers_max: int = Field(
        1,
        gt=0,
        description="Most producers at a time. One is added while trainers wait for activations. Those above "
        "producers_min go when they idle.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="CPU threads of a producer. Unset: the cores of the smallest machine. On CPUs the bits of the "
        "activations depend on it.",
    )
    cache: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Keep activations on disk for later readers: 'on', 'off', or 'auto' (on where the whole pass "
        "takes at most cache_gib).",
    )
    cache_gib: float = Field(
        4,
        gt=0,
        description="Disk space for the activations of one pass, in GiB. Of a longer pass the first shards are kept, "
        "so larger keeps more of it.",
    )
    cache_dir: str = Field(
        "~/.cache/raysae/activations",
        description="Folder or s3:// URL of the activation cache. raysae keeps old activations there, so delete them "
        "yourself.",
    )
    bad_shards: Literal["stop", "skip"] = Field(
        "stop",
        description="What happens at a shard that cannot be produced, or holds NaN or infinite activations. With "
        "'stop', SAEs that come to it fail. With 'skip', all SAEs pass over it.",
    )

    @model_validator(mode="after")
    def _bounds(self) -> StreamConfig:
        if self.producers_max < self.producers_min:
            raise ValueError(
                f"producers_max is {self.producers_max}: it must be at least producers_min, {self.producers_min}"
            )
        if self.leave_out_hook_point and self.leave_out_norm is None:
            raise ValueError(
                f"leave_out_hook_point is {self.leave_out_hook_point}, but leave_out_norm is unset: "
                "set leave_out_norm to a multiple of the median norm, such as 10"
            )
        return self


class ErrorsConfig(Strict):
    """What the hook points H.error, H.linear and H.nonlinear stand for.

    Let x be the activation at H. Then they are e = x − Sae(x), its linear prediction ê from x, and ε = e − ê. SAEs are
    trained on them as on activations.
    """

    sae: str | None = Field(
        None,
        description="Folder or URL of the SAE whose errors the hook points H.error, H.linear and H.nonlinear stand "
        "for.",
    )
    probe: str | None = Field(
        None,
        description="File with the linear map from x to ê. jobs/error_regression.py writes it to "
        "OUTPUT/STUDY/analysis/probes/SAE.safetensors.",
    )


ERROR_KINDS = ("error", "linear", "nonlinear")


def error_kind(hook_point: str) -> tuple[str | None, str]:
    """The kind of error that a hook point stands for, and the hook point it is an error at.

    `resid_post.2.nonlinear` gives ("nonlinear", "resid_post.2"). A hook point that is no error's gives (None, itself).
    """
    hook, _, kind = hook_point.rpartition(".")
    return (kind, hook) if kind in ERROR_KINDS else (None, hook_point)


# ---------------------------------------------------------------- SAEs and their training


def _names(level: str) -> str:
    return ", ".join(name for name, facts in ARCHITECTURES.items() if facts.level == level)


def _own_facts(name: str) -> str:
    """One fact of all architectures: the value of most, then who has another."""
    values = [getattr(facts, name) for facts in ARCHITECTURES.values()]
    usual = max(values, key=values.count)
    others = [f"{kind} {value:g}" for kind, value in zip(ARCHITECTURES, values, strict=True) if value != usual]
    return ", ".join([*others, f"others {usual:g}"])


def _ranges(level: str) -> str:
    ranges = {name: facts.levels for name, facts in ARCHITECTURES.items() if facts.level == level}
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


GROUP_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)


class TrainConfig(Strict):
    """The training of every SAE of a sweep."""

    tokens: int = Field(
        1_000_000,
        gt=0,
        description="Tokens (rows of activations) each SAE is trained on, rounded up to whole batches. More take "
        "longer and reconstruct better.",
    )
    batch: int = Field(1024, gt=0, description="Rows per step. Larger takes fewer steps for the same tokens.")
    warmup: Fraction = Field(
        0.05, description="Share of the steps, at the start, in which the learning rate rises linearly from 0."
    )
    decay: Fraction = Field(
        0.2, description="Share of the steps, at the end, in which the learning rate falls linearly to 0."
    )
    sparsity_warmup: Fraction = Field(
        0.1,
        description="Share of the steps, at the start, in which a sparsity coefficient rises linearly from 0. It has "
        "no effect on architectures with k.",
    )
    beta1: float | None = Field(
        None,
        ge=0,
        lt=1,
        description=f"Adam's beta 1. Larger averages gradients over more steps. Unset: each architecture has its own: "
        f"{_own_facts('beta1')}.",
    )
    beta2: float = Field(
        0.999, ge=0, lt=1, description="Adam's beta 2. Larger averages squared gradients over more steps."
    )
    clip_norm: float = Field(
        1.0,
        gt=0,
        description="Largest global norm of a step's gradients, in units of √d, because losses are sums over the d "
        "dimensions. Gradients of a larger norm are scaled down to it.",
    )
    aux_coefficient: float = Field(
        1 / 32,
        ge=0,
        description="Weight of the AuxK loss, which revives dead latents (architectures with k). Larger pulls harder "
        "on dead latents. 0 turns it off.",
    )
    decoder_bias: Literal["mean", "median"] = Field(
        "median", description="Start of the decoder bias b_dec: the mean or the geometric median of the first rows."
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Number format of the operands of a step's products, and of TopK's pre-activations. Unset: "
        "bfloat16 on GPUs that have it, else float32. CPUs take float32 only.",
    )
    bandwidth: float | None = Field(
        None,
        gt=0,
        description="Width of jumprelu's straight-through window, in units of the normalised activation. Larger: "
        f"thresholds learn from more rows, less exactly. Unset: {ARCHITECTURES['jumprelu'].bandwidth:g} √d, for "
        "activations of width d.",
    )
    jumprelu_unit: Literal["norm", "sum"] = newer_knob(
        "norm",
        before="sum",
        description="Unit of jumprelu's coefficient. With 'norm' it is the paper's, for activations of mean square "
        "norm 1. With 'sum' it is d times as large, as in studies begun before this knob.",
    )
    group_shares: list[Annotated[float, Field(gt=0)]] = newer_knob(
        list(GROUP_SHARES),
        before=list(GROUP_SHARES),
        min_length=1,
        description="Shares of the width that matryoshka's groups of latents have, from the first to the last. They "
        "add up to 1. A larger first group makes the smallest nested SAE larger.",
    )
    p_end: float = newer_knob(
        1.0,
        before=1.0,
        gt=0,
        le=1,
        description="Last exponent p of the penalty Σ cᵖ of relu and tied, which falls from 1 in training "
        "(p-annealing, usually to 0.2). Smaller punishes weak codes more and strong ones less. 1 keeps L1.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        description="CPU threads of a trainer. Unset: a machine's cores, shared out evenly over its trainers. On "
        "CPUs the bits of an SAE depend on it.",
    )
    reports: int = Field(
        10,
        gt=0,
        description="Evaluations per run, evenly spaced, the last at the end. More give finer curves and take time.",
    )
    checkpoint_seconds: float = Field(
        60,
        gt=0,
        description="Seconds between a trainer's checkpoints, or more where writing them takes long. Larger writes "
        "less and repeats more steps after a fault.",
    )

    @field_validator("group_shares")
    @classmethod
    def _whole(cls, shares: list[float]) -> list[float]:
        if abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"the shares add up to {sum(shares):g}: they must add up to 1")
        return shares

    @model_validator(mode="after")
    def _room_to_anneal(self) -> TrainConfig:
        if self.p_end < 1 and self.sparsity_warmup + self.decay >= 1:
            raise ValueError(
                f"p_end is {self.p_end:g}, but sparsity_warmup {self.sparsity_warmup:g} and decay {self.decay:g} leave "
                "no steps for p to fall: they must add up to less than 1"
            )
        return self

    @property
    def steps(self) -> int:
        """Steps of a run. The last batch is full, so a run may take more than `tokens` rows."""
        return -(-self.tokens // self.batch)


class EvaluationConfig(Strict):
    """How much held-out text SAEs are evaluated on."""

    rows: int = Field(
        200_000,
        gt=0,
        description="Held-out rows for the final fvu, l0 and dead_fraction. More rows give steadier numbers and take "
        "more time and memory.",
    )
    interim_rows: int = Field(
        8_192,
        gt=0,
        description="Held-out rows for each earlier evaluation, at most `rows`. More rows give steadier curves and "
        "take more time.",
    )
    predicted_tokens: int = Field(
        16_384,
        ge=0,
        description="Held-out tokens for ce_recovered and kl. More give steadier numbers and take more time. 0 "
        "leaves both metrics out.",
    )
    outlier_norm: float = newer_knob(
        OUTLIER_NORM,
        before=OUTLIER_NORM,
        gt=1,
        description="Rows whose norm is above this multiple of the median norm count as outliers. fvu_inliers is the "
        "FVU without them. Smaller counts more rows as outliers. Training measures its scale without rows above 10.",
    )


# ---------------------------------------------------------------- the sweep


class ResourcesConfig(Strict):
    """The cluster, and what each process reserves on it."""

    address: str | None = Field(
        None, description="Ray cluster to connect to. Unset: RAY_ADDRESS, or else a Ray on this machine alone."
    )
    banks: int | None = Field(
        None,
        gt=0,
        description="Trainer processes. Each trains one bank, SAEs at one hook point that share every batch. More "
        "banks hold fewer SAEs each. Unset: as many as GPUs have room for beside the producers, or one "
        "per CPU core, at most 8 per machine.",
    )
    trainer_cpus: float = Field(
        0.25, gt=0, description="CPUs that a trainer reserves. Larger lets fewer trainers share a machine."
    )
    trainer_gpus: float = Field(
        0,
        ge=0,
        description="GPUs that a trainer reserves. A fraction lets several processes share a GPU. 0 trains on CPUs.",
    )
    producer_cpus: float = Field(
        0.25, gt=0, description="CPUs that a producer reserves. Larger lets fewer producers share a machine."
    )
    producer_gpus: float = Field(
        0,
        ge=0,
        description="GPUs that a producer reserves. A fraction lets several processes share a GPU. 0 runs the "
        "language model on CPUs.",
    )
    trials: int | None = Field(
        None,
        gt=0,
        description="Ray Tune trials at a time, each a process of 120 MiB that follows one SAE. More take more "
        "memory and train nothing faster. Unset: 1, or all with asha.",
    )
    shared_storage: bool = Field(
        False,
        description="Whether all machines of the cluster share the folder `output` (NFS, for example). If false, a "
        "job on several machines refuses a local folder.",
    )


class FaultsConfig(Strict):
    """When something counts as broken, and how often it is tried again.

    Every timeout and limit of the stream, the trainers and the driver is here. See docs/faults.md.
    """

    hang_seconds: float = Field(
        900,
        gt=0,
        description="Seconds of silence after which a producer, trainer, queue or relay is replaced. Larger notices "
        "hangs later and spares slow work. Once shards have been made, a producer gets less: 10 times "
        "the longest time a shard took, at least 30 s.",
    )
    start_seconds: float = Field(
        900,
        gt=0,
        description="Longest wait for room on the cluster, or for a trainer or language model to start there, in "
        "seconds. Then the sweep ends and says why. Raise it where machines take long to come.",
    )
    start_attempts: int = Field(
        3,
        gt=0,
        description="Attempts in a row to start a producer and load its language model. When the last one fails, the "
        "sweep ends.",
    )
    shard_attempts: int = Field(
        4,
        gt=0,
        description="Attempts to produce a shard before it counts as bad. A producer that dies or hangs counts as a "
        "third of an attempt, because that is mostly not the shard's fault.",
    )
    producer_deaths: int = Field(
        12,
        ge=0,
        description="Deaths and hangs per producer that a sweep survives within ten minutes. One more ends the sweep.",
    )
    trainer_restarts: int = Field(
        100,
        ge=0,
        description="Restarts of a trainer's process, and of a trial's handle. When a trainer has had them all, its "
        "SAEs fail and others go on.",
    )
    queue_seconds: float = Field(
        120,
        gt=0,
        description="Seconds for which callers ask again while the process of a queue or relay is being restarted. "
        "After them the call fails.",
    )
    block_seconds: float = Field(
        120,
        gt=0,
        description="Longest wait of a trainer for a block to come from its machine, in seconds. Then the shard is "
        "produced again and the next wait may be twice as long. After shard_attempts waits the trainer's "
        "SAEs fail.",
    )
    stop_seconds: float = Field(
        45,
        gt=0,
        description="Seconds that trainers get to write checkpoints when the sweep is interrupted, or their machine "
        "is about to go. Steps since the last written checkpoint are repeated later.",
    )


class TrackingConfig(Strict):
    """Where MLflow keeps runs."""

    uri: str = Field(
        "sqlite:///mlflow.db",
        description="MLflow tracking URI of a database (sqlite:///mlflow.db) or a server (http://HOST:5000).",
    )
    experiment: str = Field("raysae", description="MLflow experiment that holds the study's runs.")

    @field_validator("uri")
    @classmethod
    def _known(cls, uri: str) -> str:
        if not re.match(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?://|https?://|databricks", uri):
            raise ValueError(
                "MLflow needs a database or a server: give sqlite:///mlflow.db, postgresql://… or http://…"
            )
        return uri


class SweepConfig(Strict):
    """A study: every SAE of a grid, trained on one pass of a language model."""

    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    stream: StreamConfig = StreamConfig()
    hook_points: list[str] = Field(
        default_factory=list,
        description="Hook points whose activations SAEs are trained on, as KIND.LAYER, e.g. resid_post.3. Empty: "
        "resid_post of the middle layer.",
    )
    errors: ErrorsConfig = ErrorsConfig()
    architectures: list[Architecture] = Field(
        ["topk"], min_length=1, description=f"Kinds of SAE: {', '.join(ARCHITECTURES)}."
    )
    widths: list[Annotated[int, Field(gt=0)]] = Field(
        [256, 512, 1024, 2048, 4096, 8192],
        min_length=1,
        description="Latents per SAE. Wider SAEs reconstruct more and take more time and memory.",
    )
    k: list[Annotated[int, Field(gt=0)]] = Field(
        default_factory=list,
        description=f"Active latents per token, or their mean ({_names('k')}). More reconstruct more and are less "
        f"sparse. Empty: each architecture has its own: {_ranges('k')}.",
    )
    sparsities: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=list,
        description=f"Coefficients of the sparsity penalty ({_names('sparsity')}). Larger ones give fewer active "
        f"latents. Empty: each architecture has its own: {_ranges('sparsity')}.",
    )
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(
        [1e-3], min_length=1, description="Peak learning rates of Adam. Larger trains faster and less stably."
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="Seeds of the SAEs' initial weights."
    )
    search: Literal["grid", "random"] = Field(
        "grid",
        description="'grid' trains every combination of the values, 'random' draws `samples` of the combinations.",
    )
    samples: int = Field(
        10,
        gt=0,
        description="SAEs drawn from all combinations where search is random. If there are no more than this, all "
        "are trained.",
    )
    scheduler: Literal["none", "asha"] = Field(
        "none", description="'asha' stops the worse SAEs early, by held-out FVU. 'none' trains all to the end."
    )
    asha_reduction: float = Field(
        2,
        gt=1,
        description="At each rung asha keeps one SAE in this many. Larger stops more SAEs at a rung and has fewer "
        "rungs.",
    )
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()
    faults: FaultsConfig = FaultsConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = Field(
        "runs", description="Folder or s3:// URL for checkpoints, SAEs and summaries, with a folder for each study."
    )
    study: str | None = Field(
        None, description="Name of the sweep and of its folder in `output`. Unset: date and time."
    )

    @field_validator("output")
    @classmethod
    def _somewhere(cls, output: str) -> str:
        if re.fullmatch(r"(\w+:)?/*", output):
            raise ValueError(f"{output!r} names no folder: give one, e.g. runs or s3://bucket/runs")
        return output

    @field_validator("study")
    @classmethod
    def _a_folders_name(cls, study: str | None) -> str | None:
        if study is not None and not re.fullmatch(r"\w[\w.-]*", study):
            raise ValueError(
                f"{study!r} is no name for a folder: use letters, digits, dots, hyphens and underscores only"
            )
        return study

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        for field in ("hook_points", "architectures", "widths", "k", "sparsities", "learning_rates", "seeds"):
            values = getattr(self, field)
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{field} has {twice[0]} twice: every SAE is trained once")
        by_k = [ARCHITECTURES[name] for name in self.architectures if ARCHITECTURES[name].level == "k"]
        if by_k:
            wide = max(max(self.k or facts.levels) for facts in by_k)
            narrow = min(self.widths)
            if wide > narrow:
                raise ValueError(f"k is {wide}, more than the width {narrow}: every k must be at most every width")
        return self

    def _levels(self, facts: ArchitectureFacts) -> list[dict[str, float]]:
        given = self.k if facts.level == "k" else self.sparsities
        own = facts.earlier_levels if self.train.jumprelu_unit == "sum" and facts.earlier_levels else facts.levels
        return [{facts.level: value} for value in given or own]

    def saes(self) -> list[SAEConfig]:
        """The sweep's SAEs, in a fixed order. `hook_points` must be resolved.

        Random search draws without replacement, seeded by stream.seed.
        """
        saes = []
        for hook, arch in itertools.product(self.hook_points, self.architectures):
            levels = self._levels(ARCHITECTURES[arch])
            for width, level, lr, seed in itertools.product(self.widths, levels, self.learning_rates, self.seeds):
                saes.append(
                    SAEConfig(architecture=arch, hook_point=hook, width=width, learning_rate=lr, seed=seed, **level)
                )
        saes = list({sae.name: sae for sae in saes}.values())
        if self.search == "random" and self.samples < len(saes):
            chosen = np.random.default_rng(self.stream.seed).choice(len(saes), self.samples, replace=False)
            saes = [saes[i] for i in sorted(chosen)]
        return saes


# ---------------------------------------------------------------- analyses


class AnalysisConfig(Strict):
    """Which SAEs an analysis takes apart, on how many tokens, and where its results go.

    Model, text and stream are the sweep's unless given.
    """

    sweep: str | None = Field(
        None, description="Sweep to analyse: its study's name or MLflow run id. Unset: the latest that has saved SAEs."
    )
    sae: list[str] = Field(
        default_factory=list,
        description="SAEs to analyse in place of a sweep's: MLflow run ids, or folders, files or URLs of saved or "
        "public SAEs.",
    )
    hook_points: list[str] = Field(
        default_factory=list,
        description="Hook points whose SAEs are analysed. Empty: all. Name exactly one for public SAEs whose files "
        "do not say theirs.",
    )
    tokens: int | None = Field(
        None,
        gt=0,
        description="Held-out tokens to fit and to evaluate on. More give narrower intervals and take more time. "
        "Unset: about 3 × 256 per dimension, from 60,000 to 450,000, or all if there are fewer.",
    )
    predicted_tokens: int = Field(
        16_384,
        gt=0,
        description="Held-out tokens for cross-entropy (downstream_loss). More give narrower intervals and take more "
        "time.",
    )
    target_l0: float = Field(
        60,
        gt=0,
        description="L0 (active latents per token) at which widths are compared. Each width shows its SAE with the "
        "nearest L0.",
    )
    half_trained: bool = Field(
        True,
        description="Train the SAEs of error_regression's figure again on half the tokens. This shows whether short "
        "training explains what is predictable.",
    )
    train_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens for each SAE that error_saes and earlier_layers train. Unset: as many as the sweep's "
        "SAEs had.",
    )
    replicates: int = Field(
        200,
        ge=20,
        description="Bootstrap replicates of every interval over more than 30 groups of documents. More give steadier "
        "intervals and take more time and memory.",
    )
    seed: int = Field(0, ge=0, description="Seed of splits, bootstrap and noise.")
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    stream: StreamConfig = StreamConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: str = Field(
        "runs",
        description="Folder for results, which go to OUTPUT/STUDY/analysis. On several machines, name one that all "
        "of them share.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> AnalysisConfig:
        if self.sweep and self.sae:
            raise ValueError("sweep and sae are both given: name a sweep, or SAEs, not both")
        if "://" in self.output:
            raise ValueError(f"output is {self.output}, a URL: name a folder for the results of analyses, e.g. runs")
        return self
