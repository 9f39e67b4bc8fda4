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
    """What a trainer needs to know.

    The queue is given by name. Ray counts handles in the object store, and a restarted actor must not depend on it.
    """

    queue: str  # Name of the stream's queue, or of one of its relays
    consumer: str  # The trainer's name on the stream, its own among all trainers
    folder: str  # The study's folder, an absolute path or a URL. Every machine that may run a trainer reaches it
    hook_point: str
    width: int  # Dimensions of the hook point's activations
    saes: tuple[SAEConfig, ...]
    training: ActivationSpec
    evaluation: ActivationSpec
    config: SweepConfig
    threads: int  # CPU threads. Bits depend on them, so a study is resumed with the same number
    allow: frozenset[str] = (
        frozenset()
    )  # Facts in which a run may differ from its checkpoints: `checkpoint.fingerprint`
