"""What a trainer is told when it starts.

Ray hands the same value to a restarted trainer. So it holds settled facts and names, and no Ray objects. It does not
hold progress, which a trainer reads from its checkpoints. The type has a module of its own, so that readers of rows
need not import the actor.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysae.config import SAEConfig, SweepConfig
from raysae.stream.spec import ActivationSpec


@dataclass(frozen=True)
class Training:
    """What a trainer needs to know. The fields are the arguments of `actor.start_trainer`, which explains them.

    The queue is given by name. Ray counts handles in the object store, and a restarted actor must not depend on it.
    """

    queue: str
    consumer: str
    folder: str
    hook_point: str
    width: int
    saes: tuple[SAEConfig, ...]
    training: ActivationSpec
    evaluation: ActivationSpec
    config: SweepConfig
    threads: int
    allow: frozenset[str] = frozenset()
