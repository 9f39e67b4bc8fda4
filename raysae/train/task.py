"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

from raysae.config import SAEConfig, SweepConfig
from raysae.stream.spec import ActivationSpec


@dataclass(frozen=True)
class Training:
    """What a trainer needs to know. The fields are the arguments of `start_trainer`.

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
