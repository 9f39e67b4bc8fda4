"""What a stream is told when it starts. The type imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raysae.config import FaultsConfig, ModelConfig, ResourcesConfig, StreamConfig
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    from raysae.text.contexts import Contexts


@dataclass(frozen=True)
class Streaming:
    """What `queue.start_stream` needs to know."""

    model: ModelConfig
    stream: StreamConfig
    resources: ResourcesConfig  # What a producer reserves
    training: ActivationSpec
    evaluation: ActivationSpec
    contexts: Mapping[str, Contexts]  # Tokens of both specs, under "train" and "evaluation"
    widths: Mapping[str, int]  # Hook point → width of its activations, for all that anyone will ask for
    shards: int | None = None  # Shards of the training stream that are needed in all. None: all it has
    # Shards of the held-out stream that will be read. Producers make them when they have nothing else to do, and others
    # when someone asks for them.
    held_out: int = 0
    threads: int | None = None  # CPU threads of a producer. None: torch's default
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    skipped: str | None = None  # File, a path or URL, that remembers the skipped shards
