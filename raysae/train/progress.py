"""How far an SAE of a loop is, and when the loop writes checkpoints. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raysae.config import SAEConfig

if TYPE_CHECKING:
    from raysae.determinism import Seen
    from raysae.train.bank import Member

CHECKPOINT_SHARE = 0.02  # Checkpoints take at most this share of the time
ENDED = ("done", "stopped", "failed")


@dataclass
class Progress:
    """One SAE as others see it.

    `reports` is complete from the first report on, also after a restart. `member` exists while the SAE is in training.
    """

    config: SAEConfig
    member: Member | None = None
    state: str = "waiting"  # One of waiting, working, evaluating, done, stopped, failed
    tokens: int = 0
    message: str | None = None  # Why the SAE ends or ended early
    reports: list[dict] = field(default_factory=list)
    mean: list[float] | None = None  # Mean of the rows trained on, (d,), once the SAE has ended
    saved_row: int | None = None  # Next row in the newest checkpoint
    numerics: Seen = field(default_factory=dict)  # Numerics of the rows trained on
    leave_at: int | None = None  # The SAE ends early once it has seen this many tokens, if set

    @property
    def ended(self) -> bool:
        return self.state in ENDED


class Cadence:
    """Says when checkpoints are due: every `seconds`.

    They come less often where they would take more than `CHECKPOINT_SHARE` of the time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self.clock = seconds, clock
        self.cost = 0.0
        self.last = clock()

    def due(self) -> bool:
        return self.clock() - self.last >= max(self.seconds, self.cost / CHECKPOINT_SHARE)

    def written(self, began: float) -> None:
        self.last = self.clock()
        self.cost = self.last - began
