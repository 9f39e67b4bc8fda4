"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from raysae.config import ARCHITECTURES, SAEConfig, UserError
from raysae.study.plan import Plan

BANKS_PER_MACHINE = 8  # on CPUs: each holds some 0.5 GiB beside its SAEs


@dataclass(frozen=True)
class BankPlan:
    """SAEs trained by one process on one copy of the batches."""

    name: str
    hook_point: str
    saes: tuple[SAEConfig, ...]


def cost(sae: SAEConfig, d: int) -> float:
    """Predicted time of a step on a CPU, a unit is about 20 ps a row and thread: TopK's search for the largest pre-activations; twice that for
    BatchTopK, which computes all, and thrice for kinds without a k, whose products are with more than a few; the sparse products of the others, an
    operation of which takes twenty times as long as one of that search; and a constant. Of 26 steps measured, d 256 and 768, none is off by more
    than a factor of 1.8."""
    return ARCHITECTURES[sae.architecture].searches * sae.width * d + 20 * (sae.k or 0) * d + 2e5


def pack(saes: tuple[SAEConfig, ...], banks: int, width_of: dict[str, int]) -> list[BankPlan]:
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
            packed.append(BankPlan(f"{hook}-{i}", hook, tuple(sorted(bank, key=lambda s: order[s.name]))))
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
