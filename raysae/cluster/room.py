"""Words for what the cluster has room for. They go into the message that ends a sweep which cannot go on."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray._private import state
from ray.actor import ActorHandle

NODES_NAMED = 4
KINDS = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}


def placed(actor: ActorHandle) -> bool:
    """Whether the actor has a process somewhere. The process may still be starting."""
    return state.actors(actor._actor_id.hex()).get("Address", {}).get("Port", 0) > 0


def machine_of(actor: ActorHandle) -> str | None:
    """Hexadecimal id of the machine that the actor is alive on.

    It is None while the actor starts, waits for a place, or is dead.
    """
    known = state.actors(actor._actor_id.hex())
    return known["Address"]["NodeID"] if known.get("State") == "ALIVE" else None


def missing(needs: Mapping[str, float]) -> str:
    """Words that compare `needs`, which are as in an actor's options, with what the machines have."""
    asked = {KINDS[key]: amount for key, amount in needs.items() if amount}
    free = state.available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    rooms = [
        ", ".join(
            f"{free.get(node['NodeID'], {}).get(kind, 0):g} of {node['Resources'].get(kind, 0):g} {kind}s"
            for kind in asked
        )
        for node in nodes
    ]
    more = f" and {len(rooms) - NODES_NAMED} machines more" if len(rooms) > NODES_NAMED else ""
    wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in asked.items())
    return f"{wanted} on one machine are needed, free are {'; '.join(rooms[:NODES_NAMED])}{more}"
