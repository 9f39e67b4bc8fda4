"""TODO docstring."""

from __future__ import annotations

from dataclasses import dataclass

from raysae.config import SAEConfig, SweepConfig
from raysae.stream.spec import ActivationSpec


@dataclass(frozen=True)
class Training:
    """What a trainer needs to know; the fields are the arguments of `start_trainer`.

    The queue goes by its name because an actor that may be restarted should depend on nothing in the object store, where Ray counts handles.
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
