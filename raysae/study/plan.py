"""What is settled before anything starts: the language model, the text, the hook points, and how much memory they take.

Every mistake of a user that can be seen without a cluster is found here, as a `UserError`. To be quick, nothing here
imports torch or loads weights. `sweep/capacity.py` checks the cluster.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from raysae.config import ModelConfig, SAEConfig, SweepConfig, UserError, error_kind
from raysae.lm.facts import ModelFacts, hook_width, model_facts
from raysae.lm.tokenizer import load_tokenizer, load_vocabulary, tokenizer_digest
from raysae.processes import apart
from raysae.storage import open_location
from raysae.stream.blocks import WIRE_DTYPES, shards_in_flight
from raysae.stream.spec import ActivationSpec
from raysae.study.number_format import settled_dtype
from raysae.text.contexts import Contexts, build_contexts
from raysae.text.tokens import special_tokens

LONGEST_DEFAULT_CONTEXT = 1024
SKIPPED, SKIPPED_LONG = 8, 200  # First positions of a context that give no rows. The second is for long contexts.
LONG_CONTEXT = 1024  # Length from which on a context is long
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """A sweep with everything settled: what is streamed, and to which SAEs."""

    config: SweepConfig
    facts: ModelFacts
    contexts: dict[str, Contexts]  # Keys: "train" and "evaluation"
    training: ActivationSpec
    evaluation: ActivationSpec
    saes: tuple[SAEConfig, ...]

    @property
    def shards(self) -> int:
        """Shards of the training stream that the run reads. The last may be read in part."""
        return math.ceil(self.config.train.steps * self.config.train.batch / self.training.rows_per_shard)

    @property
    def evaluation_shards(self) -> int:
        return math.ceil(self.config.evaluation.rows / self.evaluation.rows_per_shard)

    @property
    def hook_points(self) -> list[str]:
        return list(dict.fromkeys(hook for sae in self.saes for hook in sae.hook_points))

    @property
    def widths(self) -> dict[str, int]:
        """Hook point → width of its activations, for all hook points that the SAEs read."""
        return {hook: hook_width(error_kind(hook)[1], self.facts) for hook in self.hook_points}

    @property
    def streamed_widths(self) -> dict[str, int]:
        """The same for the model's own hook points, which are the ones streamed. Trainers compute errors themselves."""
        return {error_kind(hook)[1]: width for hook, width in self.widths.items()}


def plan(config: SweepConfig, held_out: int = 0) -> Plan:
    """Settle the defaults that depend on the model, tokenise the text (cached) and check that there is enough of it.

    Args:
        held_out: held-out rows to read from a dataset, if it has them and the sweep itself takes fewer.

    Raises:
        UserError: model or file not found, unknown hook point, context too long, too little text, too little room for
            a shard.
    """
    if config.model.device_map and find_spec("accelerate") is None:
        raise UserError(
            f"model.device_map is {config.model.device_map}, which needs the package accelerate: "
            "pip install 'raysae[multi-gpu]'"
        )
    if config.train.precision == "bfloat16" and not config.resources.trainer_gpus:
        raise UserError(
            "train.precision is bfloat16 but trainers run on CPUs (resources.trainer_gpus is 0): "
            "leave it unset, or set float32"
        )
    open_location("stream.cache_dir", config.stream.cache_dir)
    facts = model_facts(config.model)
    config = _with_defaults(config, facts)
    length = config.stream.context_length
    enough = _enough(config, held_out) if config.text.source.startswith("hf:") else None
    tokenizer = partial(load_tokenizer, config.model)
    vocabulary = partial(load_vocabulary, config.model)
    contexts = build_contexts(
        config.text, tokenizer, tokenizer_digest(config.model), length, enough, run=apart, load_vocabulary=vocabulary
    )

    left_out = leave_out_ids(config)

    def spec(split: str, epochs: int) -> ActivationSpec:
        return ActivationSpec(
            model=facts.digest, text=contexts[split].digest, contexts=max(1, len(contexts[split])),
            context_length=length, epochs=epochs, skip_positions=config.stream.skip_positions,
            dtype=config.model.dtype, seed=config.stream.seed, shard_contexts=config.stream.shard_contexts,
            batch_contexts=config.stream.batch_contexts, leave_out_tokens=left_out,
            leave_out_norm=config.stream.leave_out_norm, leave_out_hook_point=config.stream.leave_out_hook_point,
        )  # fmt: skip

    training, evaluation = spec("train", config.stream.epochs), spec("evaluation", 1)
    check_enough(training, config.train.steps * config.train.batch, "train.tokens", "stream.epochs")
    check_enough(evaluation, config.evaluation.rows, "evaluation.rows", None)
    settled = Plan(config, facts, contexts, training, evaluation, tuple(config.saes()))
    shards_in_flight(config.stream, training, settled.streamed_widths)
    return settled


def _with_defaults(config: SweepConfig, facts: ModelFacts) -> SweepConfig:
    """`config` with hook points, context length, skipped positions, and the model's revision and dtype settled.

    So is the hook point at which norms are judged.
    """
    hooks = config.hook_points or [f"resid_post.{facts.layers // 2 - 1 if facts.layers > 1 else 0}"]
    for hook in hooks:
        kind, of = error_kind(hook)
        hook_width(of, facts)
        if kind:
            _check_errors(config, hook)
    length = config.stream.context_length or min(facts.context_length, LONGEST_DEFAULT_CONTEXT)
    if length > facts.context_length:
        raise UserError(
            f"stream.context_length is {length}: {config.model.name} takes at most {facts.context_length} tokens."
        )
    skipped = config.stream.skip_positions or (SKIPPED_LONG if length >= LONG_CONTEXT else SKIPPED)
    if skipped > length - 2:
        raise UserError(
            f"stream.skip_positions is {skipped}: it must be at most the context length less 2, {length - 2}"
        )
    judge = None
    if config.stream.leave_out_norm is not None:
        judge = config.stream.leave_out_hook_point or error_kind(hooks[0])[1]
        hook_width(judge, facts)
    update = {"context_length": length, "skip_positions": skipped, "leave_out_hook_point": judge}
    stream = config.stream.model_copy(update=update)
    # The hub may get a newer revision while the sweep runs
    revision, dtype = facts.commit or config.model.revision, settled_dtype(config, facts)
    model = config.model.model_copy(update={"revision": revision, "dtype": dtype})
    return config.model_copy(update={"hook_points": list(dict.fromkeys(hooks)), "stream": stream, "model": model})


def leave_out_ids(config: SweepConfig) -> tuple[int, ...]:
    """The ids of the tokens in `stream.leave_out_tokens`, in order, each once.

    Raises:
        UserError: the tokenizer has no such token.
    """
    wanted = config.stream.leave_out_tokens
    return apart(_token_ids, config.model, wanted) if wanted else ()


def _token_ids(model: ModelConfig, wanted: list[str | int]) -> tuple[int, ...]:
    ids = {token: int(token) for token in wanted if str(token).isdecimal()}
    vocabulary, _ = load_vocabulary(model)
    if names := [token for token in wanted if token not in ids]:  # A model read by ids may have no tokenizer
        tokenizer = load_tokenizer(model)
        id_of = tokenizer.get_vocab()
        ids |= {token: id_of.get(token, vocabulary) for token in names if token != "special"}
        special = special_tokens(tokenizer) if "special" in names else []
        ids |= {token: id_of[token] for token in special if id_of[token] < vocabulary}
    if unknown := [token for token, id_ in ids.items() if id_ >= vocabulary]:
        raise UserError(
            f"stream.leave_out_tokens has {unknown[0]!r}, which is no token of {model.name}: give 'special', "
            f"ids up to {vocabulary - 1}, or tokens as the tokenizer spells them"
        )
    return tuple(sorted(set(ids.values())))


def _check_errors(config: SweepConfig, hook: str) -> None:
    """Raise UserError where the files of the error at `hook` are not named, or not there."""
    for field, value in config.errors.model_dump().items():
        if value is None:
            raise UserError(
                f"hook point {hook!r} is an error of an SAE, and errors.{field} is unset: "
                "name the SAE's folder and its probe"
            )
        if "://" not in value and not os.path.exists(os.path.expanduser(value)):
            raise UserError(f"errors.{field} is {value}: there is no such file or folder")


def _enough(config: SweepConfig, held_out: int) -> dict[str, int]:
    """How many contexts the run takes of each split. Rounded up, so that runs of like size share the tokenised text.

    The number is a power of two of shards.
    """
    rows = config.stream.context_length - config.stream.skip_positions
    needed = {
        "train": config.train.steps * config.train.batch / config.stream.epochs,
        "evaluation": max(config.evaluation.rows, held_out),
    }
    shards = {split: math.ceil(count / rows / config.stream.shard_contexts) for split, count in needed.items()}
    return {split: config.stream.shard_contexts * 2 ** math.ceil(math.log2(count)) for split, count in shards.items()}


def store_bytes(settled: Plan, held_out_width: int | None = None, token_copies: int = 1) -> int:
    """Bytes of object store that a local Ray needs: activations in flight, held-out activations, and contexts.

    Args:
        held_out_width: width of a held-out row, summed over the hook points whose rows lie there at the same time.
            Unset: all hook points that the sweep streams.
        token_copies: how many times the contexts lie there.
    """
    width = sum(settled.streamed_widths.values()) if held_out_width is None else held_out_width
    item = WIRE_DTYPES[settled.evaluation.dtype].itemsize
    held_out = settled.evaluation_shards * settled.evaluation.rows_per_shard * item * width
    tokens = sum(contexts.tokens.nbytes for contexts in settled.contexts.values())
    return int(settled.config.stream.mib_in_flight * MIB + 1.2 * held_out + token_copies * tokens) + 256 * MIB


def check_enough(spec: ActivationSpec, rows: int, asked_by: str, epochs_field: str | None) -> None:
    """Check that the spec has `rows` rows.

    Args:
        spec: the spec of a stream.
        rows: how many rows are needed.
        asked_by: the knob that asks for them, such as `train.tokens`.
        epochs_field: the knob that sets the number of epochs. None means that there is only one epoch and the text is
            the evaluation split.

    Raises:
        UserError: the text yields too few rows.
    """
    whose = "held-out text" if epochs_field is None else "text"
    more = (
        f"lower {asked_by}, raise text.evaluation_fraction or give more text"
        if epochs_field is None
        else "give more text"
    )
    if spec.shards_per_epoch == 0:
        raise UserError(
            f"the {whose} fills fewer than the {spec.shard_contexts} contexts of {spec.context_length} tokens that one "
            "shard takes (stream.shard_contexts): lower stream.context_length or give more text"
        )
    per_epoch = spec.shards_per_epoch * spec.rows_per_shard
    if per_epoch * spec.epochs < rows:
        epochs = "" if epochs_field is None else f"set {epochs_field} to {-(-rows // per_epoch)} or more, or "
        raise UserError(
            f"the {whose} yields {per_epoch:,} tokens per epoch, but {asked_by} needs {rows:,}: {epochs}{more}"
        )
