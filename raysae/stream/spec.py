"""TODO docstring."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from raysae.config import Strict, digest


class ActivationSpec(Strict):
    """What fixes the activations of a pass, and with them its content hash. Shard i at a hook point is a function of (spec, hook point, i)."""

    model: str  # digest of the model's weights and configuration
    text: str  # digest of the tokenised contexts
    contexts: int = Field(gt=0)  # contexts in the text, one epoch
    context_length: int = Field(ge=4)
    skip_positions: int = Field(ge=0)
    dtype: Literal["float32", "bfloat16"]
    seed: int
    epochs: int = Field(gt=0)
    shard_contexts: int = Field(gt=0)
    batch_contexts: int = Field(gt=0)  # contexts per forward pass: part of what the bits depend on

    @property
    def hash(self) -> str:
        return digest(self.model_dump())

    @property
    def rows_per_shard(self) -> int:
        return self.shard_contexts * (self.context_length - self.skip_positions)

    @property
    def shards_per_epoch(self) -> int:
        return self.contexts // self.shard_contexts

    @property
    def shards(self) -> int:
        return self.shards_per_epoch * self.epochs

    @property
    def rows(self) -> int:
        return self.shards * self.rows_per_shard

    def contexts_of(self, shard: int) -> np.ndarray:
        """Indices of shard's contexts, `(shard_contexts,)`; the order of contexts is a permutation seeded with (seed, epoch)."""
        epoch, within = divmod(shard, self.shards_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.contexts)
        return order[within * self.shard_contexts : (within + 1) * self.shard_contexts]

    def permutation_of(self, shard: int) -> np.ndarray:
        """Order of the shard's rows, `(rows_per_shard,)`: row r of the stream's shard is row permutation[r] of the contexts laid end to end."""
        return np.random.default_rng([self.seed, shard // self.shards_per_epoch, shard, 1]).permutation(
            self.rows_per_shard
        )
