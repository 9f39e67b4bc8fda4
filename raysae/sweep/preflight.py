"""What is checked and settled before anything starts: the language model, the text, the hook points, the cluster.

Each failure is a `UserError` of one sentence. Nothing here imports torch or loads weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import ray

from raysae.apart import apart
from raysae.config import ActivationSpec, SAEConfig, SweepConfig, UserError, error_kind
from raysae.lm.facts import ModelFacts, hook_width, model_facts
from raysae.lm.tokenizer import load_tokenizer, tokenizer_digest
from raysae.storage import open_location
from raysae.stream.queue import shards_in_flight
from raysae.text.contexts import Contexts, build_contexts, check_enough

LONGEST_DEFAULT_CONTEXT = 1024
SKIPPED, SKIPPED_LONG, LONG_CONTEXT = 8, 200, 1024  # first positions without rows, the second from a long context on
BANKS_PER_MACHINE = 8  # on CPUs: each holds some 0.5 GiB beside its SAEs


@dataclass(frozen=True)
class Plan:
    """A sweep with everything resolved: what will be streamed, to which SAEs."""

    config: SweepConfig
    facts: ModelFacts
    contexts: dict[str, Contexts]  # "train" and "evaluation"
    training: ActivationSpec
    evaluation: ActivationSpec
    saes: tuple[SAEConfig, ...]

    @property
    def shards(self) -> int:
        """Shards of the training stream that the run reads: its rows, rounded up."""
        return math.ceil(self.config.train.steps * self.config.train.batch / self.training.rows_per_shard)

    @property
    def evaluation_shards(self) -> int:
        return math.ceil(self.config.evaluation.rows / self.evaluation.rows_per_shard)

    @property
    def hook_points(self) -> list[str]:
        return list(dict.fromkeys(sae.hook_point for sae in self.saes))

    @property
    def widths(self) -> dict[str, int]:
        """Hook point → width of its activations, for the hook points that the SAEs read."""
        return {hook: hook_width(error_kind(hook)[1], self.facts) for hook in self.hook_points}

    @property
    def streamed_widths(self) -> dict[str, int]:
        """The same for the model's own hook points, which are streamed: errors are computed where they are used."""
        return {error_kind(hook)[1]: width for hook, width in self.widths.items()}


def plan(config: SweepConfig, held_out: int = 0) -> Plan:
    """Resolve the defaults that depend on the model, tokenise the text (cached) and check that there is enough of it.

    Of a dataset, text for `held_out` held-out rows is read where it has them, though the sweep itself takes fewer.

    Raises:
        UserError: model or file not found, unknown hook point, context too long, too little text, too little room for a shard.
    """
    if config.model.device_map and find_spec("accelerate") is None:
        raise UserError(f"model.device_map is {config.model.device_map}, which needs the package accelerate: pip install 'raysae[multi-gpu]'")
    if config.train.precision == "bfloat16" and not config.resources.trainer_gpus:
        raise UserError("train.precision is bfloat16 but trainers run on CPUs (resources.trainer_gpus is 0): leave it unset, or set float32")
    open_location("stream.cache_dir", config.stream.cache_dir)
    facts = model_facts(config.model)
    hooks = config.hook_points or [f"resid_post.{facts.layers // 2 - 1 if facts.layers > 1 else 0}"]
    for hook in hooks:
        kind, of = error_kind(hook)
        hook_width(of, facts)
        if kind:
            _check_errors(config, hook)
    length = config.stream.context_length or min(facts.context_length, LONGEST_DEFAULT_CONTEXT)
    if length > facts.context_length:
        raise UserError(f"stream.context_length is {length}: {config.model.name} takes at most {facts.context_length} tokens.")
    skipped = config.stream.skip_positions or (SKIPPED_LONG if length >= LONG_CONTEXT else SKIPPED)
    if skipped > length - 2:
        raise UserError(f"stream.skip_positions is {skipped}: it must be at most the context length less 2, {length - 2}")
    stream = config.stream.model_copy(update={"context_length": length, "skip_positions": skipped})
    model = config.model.model_copy(update={"revision": facts.commit or config.model.revision})  # whatever appears on the hub meanwhile
    config = config.model_copy(update={"hook_points": list(dict.fromkeys(hooks)), "stream": stream, "model": model})
    enough = _enough(config, held_out) if config.text.source.startswith("hf:") else None
    contexts = build_contexts(config.text, partial(load_tokenizer, config.model), tokenizer_digest(config.model), length, enough, run=apart)

    def spec(split: str, epochs: int) -> ActivationSpec:
        return ActivationSpec(
            model=facts.digest, text=contexts[split].digest, contexts=max(1, len(contexts[split])), context_length=length, epochs=epochs,
            skip_positions=config.stream.skip_positions, dtype=config.model.dtype, seed=config.stream.seed,
            shard_contexts=config.stream.shard_contexts, batch_contexts=config.stream.batch_contexts,
        )  # fmt: skip

    training, evaluation = spec("train", config.stream.epochs), spec("evaluation", 1)
    check_enough(training, config.train.steps * config.train.batch, "train.tokens", "stream.epochs")
    check_enough(evaluation, config.evaluation.rows, "evaluation.rows", None)
    settled = Plan(config, facts, contexts, training, evaluation, tuple(config.saes()))
    shards_in_flight(config.stream, training, settled.streamed_widths)
    return settled


def _check_errors(config: SweepConfig, hook: str) -> None:
    for field, value in config.errors.model_dump().items():
        if value is None:
            raise UserError(f"hook point {hook!r} is an error of an SAE, and errors.{field} is unset: name the SAE's folder and its probe")
        if "://" not in value and not Path(value).expanduser().exists():
            raise UserError(f"errors.{field} is {value}: there is no such file or folder")


def _enough(config: SweepConfig, held_out: int) -> dict[str, int]:
    """Contexts that the run takes of each split, rounded up to a power of two of shards: runs of like size share the tokenised text."""
    rows = config.stream.context_length - config.stream.skip_positions
    needed = {"train": config.train.steps * config.train.batch / config.stream.epochs, "evaluation": max(config.evaluation.rows, held_out)}
    shards = {split: math.ceil(count / rows / config.stream.shard_contexts) for split, count in needed.items()}
    return {split: config.stream.shard_contexts * 2 ** math.ceil(math.log2(count)) for split, count in shards.items()}


@dataclass(frozen=True)
class Bank:
    """SAEs trained by one process on one copy of the batches."""

    name: str
    hook_point: str
    saes: tuple[SAEConfig, ...]


def cost(sae: SAEConfig, d: int) -> float:
    """Predicted time of a step on a CPU, a unit is about 20 ps a row and thread: TopK's search for the largest pre-activations; twice that for
    BatchTopK, which computes all, and thrice for kinds without a k, whose products are with more than a few; the sparse products of the others, an
    operation of which takes twenty times as long as one of that search; and a constant. Of 26 steps measured, d 256 and 768, none is off by more
    than a factor of 1.8."""
    searches = 1 if sae.architecture == "topk" else 2 if sae.k is not None else 3
    return searches * sae.width * d + 20 * (sae.k or 0) * d + 2e5


def pack(saes: tuple[SAEConfig, ...], banks: int, width_of: dict[str, int]) -> list[Bank]:
    """Share the SAEs out over banks of near-equal predicted cost: largest first, each to the least loaded bank of its hook point.

    Every hook point gets at least one bank, since a bank has one batch; further banks go to the hook point with the most work per bank.
    """
    by_hook: dict[str, list[SAEConfig]] = {}
    for sae in saes:
        by_hook.setdefault(sae.hook_point, []).append(sae)
    work = {hook: sum(cost(s, width_of[hook]) for s in group) for hook, group in by_hook.items()}
    share = dict.fromkeys(by_hook, 1)
    for _ in range(banks - len(by_hook)):
        open_hooks = [h for h in by_hook if share[h] < len(by_hook[h])]
        if not open_hooks:
            break
        share[max(open_hooks, key=lambda h: work[h] / share[h])] += 1
    packed = []
    for hook, group in by_hook.items():
        members: list[list[SAEConfig]] = [[] for _ in range(share[hook])]
        load = [0.0] * share[hook]
        for sae in sorted(group, key=lambda s: -cost(s, width_of[hook])):
            lightest = load.index(min(load))
            members[lightest].append(sae)
            load[lightest] += cost(sae, width_of[hook])
        order = {sae.name: i for i, sae in enumerate(saes)}
        for i, bank in enumerate(members):
            packed.append(Bank(f"{hook}-{i}", hook, tuple(sorted(bank, key=lambda s: order[s.name]))))
    return packed


def check_cluster(plan: Plan) -> int:
    """The number of banks this cluster gets, after checking that it can ever give what the sweep asks for.

    Raises:
        UserError: a GPU where there is none, more CPUs or GPUs than the cluster can have, local storage on several machines.
    """
    ask = plan.config.resources
    nodes = [n for n in ray.nodes() if n["Alive"]]
    machines = {n["NodeManagerHostname"] for n in nodes}
    limits = _limits()
    if (len(machines) > 1 or limits) and "://" not in plan.config.output and not ask.shared_storage:
        has = f"has {len(machines)} machines" if len(machines) > 1 else "grows by further machines"
        raise UserError(
            f"output is the local folder '{plan.config.output}' but the cluster {has}: name storage that all of them reach (s3://…), or set "
            "resources.shared_storage if they share this folder"
        )
    now = ray.cluster_resources()
    have = {kind: max(now.get(kind, 0), limits.get(kind, 0)) for kind in ("CPU", "GPU")}
    for field, need in (("trainer_gpus", ask.trainer_gpus), ("producer_gpus", ask.producer_gpus)):
        if need and not have["GPU"]:
            raise UserError(f"resources.{field} is {need:g} but this Ray cluster has no GPU: set it to 0 to run on CPUs.")
    producers = plan.config.stream.producers_min
    if ask.trainer_gpus:
        most = int((have["GPU"] - producers * ask.producer_gpus) / ask.trainer_gpus)
    else:  # a thread each rather than all threads together: small products gain nothing from a second core
        most = sum(min(int(node["Resources"].get("CPU", 0)), BANKS_PER_MACHINE) for node in nodes)
    banks = max(min(ask.banks or most, len(plan.saes)), len(plan.hook_points))
    for kind, trainer, producer in (("CPU", ask.trainer_cpus, ask.producer_cpus), ("GPU", ask.trainer_gpus, ask.producer_gpus)):
        need = banks * trainer + producers * producer
        if need > have[kind] + 1e-6:
            raise UserError(
                f"the sweep needs {need:g} {kind}s ({banks} × {trainer:g} for trainers, {producers} × {producer:g} for language models) and the "
                f"cluster can have {have[kind]:g}: lower resources.trainer_{kind.lower()}s or add machines"
            )
        largest = max(node["Resources"].get(kind, 0) for node in nodes)
        for field, one in ((f"trainer_{kind.lower()}s", trainer), (f"producer_{kind.lower()}s", producer)):
            if one > largest and not limits:
                raise UserError(f"resources.{field} is {one:g} but no machine of the cluster has more than {largest:g} {kind}s: lower it")
        if not limits and not _fits([trainer] * banks + [producer] * producers, [node["Resources"].get(kind, 0) for node in nodes]):
            raise UserError(
                f"{banks} trainers of {trainer:g} {kind}s and {producers} producers of {producer:g} do not fit on machines of "
                f"{', '.join(format(node['Resources'].get(kind, 0), 'g') for node in nodes)} {kind}s: lower resources.trainer_{kind.lower()}s"
            )
    return banks


def _fits(parts: list[float], rooms: list[float]) -> bool:
    """Whether the parts, largest first, each find room on one of the machines."""
    rooms = list(rooms)
    for part in sorted(parts, reverse=True):
        open_rooms = [i for i, room in enumerate(rooms) if room >= part - 1e-6]
        if not open_rooms:
            return False
        rooms[max(open_rooms, key=lambda i: rooms[i])] -= part
    return True


def _limits() -> dict[str, float]:
    """What the cluster may grow to, by kind of resource; empty where no autoscaler adds machines."""
    from ray._private import state

    return state.state.get_max_resources_from_cluster_config() or {}
