"""Which SAEs train together, and whether the cluster has room for the sweep.

A bank plan packs SAEs by their predicted cost. The prediction is rough, so banks end at different times by up to that
error. No bank plan changes while a sweep runs: an SAE keeps its process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raysae.config import ARCHITECTURES, ResourcesConfig, SAEConfig, UserError
from raysae.study.plan import Plan

BANKS_PER_MACHINE = 8  # Most trainers on a machine without GPUs. Each holds about 0.5 GiB beside its SAEs.


@dataclass(frozen=True)
class BankPlan:
    """The SAEs that one process trains on one copy of each batch. `name` is also the bank's name on the stream."""

    name: str
    hook_point: str
    saes: tuple[SAEConfig, ...]


def cost(sae: SAEConfig, d: int) -> float:
    """Predicted time of a step on a CPU. A unit is about 20 ps for each row and thread.

    It has three terms:

    - TopK's search for the largest pre-activations, times the architecture's `searches`. BatchTopK counts twice: it
      computes all of them. Architectures without a k count three times or more, as their products have many active
      latents.
    - Sparse products of the active latents. One operation takes twenty times as long as one of the search.
    - A constant.

    In 26 measured steps (d 256 and 768) the prediction is off by a factor of 1.8 at most. Matryoshka and Gated were not
    among them.
    """
    return ARCHITECTURES[sae.architecture].searches * sae.width * d + 20 * (sae.k or 0) * d + 2e5


def pack(saes: tuple[SAEConfig, ...], banks: int, width_of: dict[str, int]) -> list[BankPlan]:
    """Deal the SAEs out to bank plans of near-equal predicted cost.

    The largest SAE comes first, and each goes to the least loaded bank plan of its hook point. A bank reads one batch,
    so every hook point gets a bank plan of its own. Further ones go to the hook point with the most work per bank.

    Args:
        banks: how many bank plans to make. It may be more than there are SAEs.
        width_of: hook point → width of its activations.
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
    order = {sae.name: i for i, sae in enumerate(saes)}
    bank_plans = []
    for hook, group in by_hook.items():
        members: list[list[SAEConfig]] = [[] for _ in range(share[hook])]
        load = [0.0] * share[hook]
        for sae in sorted(group, key=lambda s: -cost(s, width_of[hook])):
            lightest = load.index(min(load))
            members[lightest].append(sae)
            load[lightest] += cost(sae, width_of[hook])
        for i, packed in enumerate(members):
            bank_plans.append(BankPlan(f"{hook}-{i}", hook, tuple(sorted(packed, key=lambda s: order[s.name]))))
    return bank_plans


def check_cluster(settled: Plan) -> int:
    """Check that the cluster can ever give what the sweep asks for, and return how many banks it gets.

    Raises:
        UserError: a GPU where there is none, more CPUs or GPUs than the cluster can have, or a local folder as output
            of several machines.
    """
    ask = settled.config.resources
    nodes = [n for n in ray.nodes() if n["Alive"]]
    limits = growth_limits()
    _check_output(settled.config.output, ask, len({n["NodeManagerHostname"] for n in nodes}), limits)
    now = ray.cluster_resources()
    have = {kind: max(now.get(kind, 0), limits.get(kind, 0)) for kind in ("CPU", "GPU")}
    for field, need in (("trainer_gpus", ask.trainer_gpus), ("producer_gpus", ask.producer_gpus)):
        if need and not have["GPU"]:
            raise UserError(
                f"resources.{field} is {need:g} but this Ray cluster has no GPU. Set it to 0 to run on CPUs"
            )
    producers = settled.config.stream.producers_min
    if ask.trainer_gpus:
        most = int((have["GPU"] - producers * ask.producer_gpus) / ask.trainer_gpus)
    else:
        # A bank per core. Small products gain nothing from a second core.
        most = sum(min(int(node["Resources"].get("CPU", 0)), BANKS_PER_MACHINE) for node in nodes)
    banks = max(min(ask.banks or most, len(settled.saes)), len(settled.hook_points))
    asked = (("CPU", ask.trainer_cpus, ask.producer_cpus), ("GPU", ask.trainer_gpus, ask.producer_gpus))
    for kind, trainer, producer in asked:
        need = banks * trainer + producers * producer
        if need > have[kind] + 1e-6:
            raise UserError(
                f"the sweep needs {need:g} {kind}s ({banks} × {trainer:g} for trainers, {producers} × {producer:g} for "
                f"language models) and the cluster can have {have[kind]:g}. "
                f"Lower resources.trainer_{kind.lower()}s or add machines"
            )
        if not limits:
            _check_machines(kind, [trainer] * banks, [producer] * producers, nodes)
    return banks


def _check_output(output: str, ask: ResourcesConfig, machines: int, limits: Mapping[str, float]) -> None:
    """UserError where several machines would write to a local folder that they do not share."""
    if (machines > 1 or limits) and "://" not in output and not ask.shared_storage:
        has = f"has {machines} machines" if machines > 1 else "grows by further machines"
        raise UserError(
            f"output is the local folder '{output}' but the cluster {has}. Name storage that all of them reach "
            "(s3://…), or set resources.shared_storage if they share this folder"
        )


def _check_machines(
    kind: str, trainers: Sequence[float], producers: Sequence[float], nodes: Sequence[Mapping[str, Any]]
) -> None:
    """UserError where some actor, or all together, find no room on the machines that are there."""
    rooms = [node["Resources"].get(kind, 0) for node in nodes]
    largest = max(rooms)
    for role, needs in (("trainer", trainers), ("producer", producers)):
        if needs and needs[0] > largest:
            raise UserError(
                f"resources.{role}_{kind.lower()}s is {needs[0]:g} but no machine of the cluster has more than "
                f"{largest:g} {kind}s. Lower it"
            )
    if not _fits([*trainers, *producers], rooms):
        raise UserError(
            f"{len(trainers)} trainers of {trainers[0]:g} {kind}s and {len(producers)} producers of {producers[0]:g} "
            f"do not fit on machines of {', '.join(format(room, 'g') for room in rooms)} {kind}s. "
            f"Lower resources.trainer_{kind.lower()}s"
        )


def _fits(needs: list[float], rooms: list[float]) -> bool:
    """Whether each need finds room on one of the machines. The largest need comes first."""
    rooms = list(rooms)
    for need in sorted(needs, reverse=True):
        open_rooms = [i for i, room in enumerate(rooms) if room >= need - 1e-6]
        if not open_rooms:
            return False
        rooms[max(open_rooms, key=lambda i: rooms[i])] -= need
    return True


def growth_limits() -> dict[str, float]:
    """How much of each kind of resource the autoscaler may reach. Empty where no autoscaler adds machines."""
    from ray._private import state

    return state.state.get_max_resources_from_cluster_config() or {}
