"""What a stream of activations is: the facts that fix its numbers, and which contexts each shard holds.

Shard i at a hook point is a pure function of (spec, hook point, i). So a lost shard can be produced again, and the
cache finds its files by the spec's hash. Every shard has the same number of rows, also where rows are left out: other
rows of the shard take their places. So a consumer's position is one number.

Rows are shuffled on two levels, because nobody holds a whole pass. Contexts are permuted over an epoch, and rows within
a shard. An epoch has whole shards only: the contexts that its permutation puts behind them are not used.

Hook points are not in a spec, so streams at all hook points of a model share one. Nothing here runs the model:
`shard.py` does. What bits depend on beside the spec, such as the device, is in `shard.numerics`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from pydantic import Field

from raysae.config import NumberFormat, Strict, digest

NEWER = ("leave_out_tokens", "leave_out_norm", "leave_out_hook_point")  # Fields that count in the hash only where set


class ActivationSpec(Strict):
    """The facts that fix the activations of a pass. Their digest is its content hash."""

    model: str  # Digest of the model's weights and configuration
    text: str  # Digest of the tokenised contexts
    contexts: int = Field(gt=0)  # Contexts in the text. Each epoch permutes them all.
    context_length: int = Field(ge=4)  # Tokens
    skip_positions: int = Field(ge=0)  # First positions of each context that give no rows
    dtype: NumberFormat
    seed: int
    epochs: int = Field(gt=0)
    shard_contexts: int = Field(gt=0)  # Contexts per shard
    batch_contexts: int = Field(gt=0)  # Contexts per forward pass. Bits depend on it.
    leave_out_tokens: tuple[int, ...] = ()  # Ids of the tokens whose positions give no rows
    leave_out_norm: float | None = None  # Rows of norm above this multiple of the shard's median norm are left out
    leave_out_hook_point: str | None = None  # Where that norm is judged

    @property
    def hash(self) -> str:
        return digest(self.model_dump(exclude={field for field in NEWER if not getattr(self, field)}))

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

    @staticmethod
    @lru_cache(maxsize=2)  # A producer makes shards of the training stream and of the held-out stream by turns
    def _order(seed: int, epoch: int, contexts: int) -> np.ndarray:
        """The order of an epoch's contexts. Drawing it takes 0.1 s for four million contexts, so shards share it."""
        return np.random.default_rng([seed, epoch]).permutation(contexts)

    def contexts_of(self, shard: int) -> np.ndarray:
        """Indices of the shard's contexts in the text, (shard_contexts,).

        Each epoch has an order of its own: a permutation of all contexts, seeded with (seed, epoch).
        """
        epoch, within = divmod(shard, self.shards_per_epoch)
        order = self._order(self.seed, epoch, self.contexts)
        return order[within * self.shard_contexts : (within + 1) * self.shard_contexts].copy()

    def permutation_of(self, shard: int) -> np.ndarray:
        """Order of the shard's rows, (rows_per_shard,), seeded with (seed, epoch, shard).

        Row r of the shard is row permutation[r] of its contexts laid end to end, without skipped positions.
        """
        return self._generator(shard, 1).permutation(self.rows_per_shard)

    def order_of(self, shard: int, kept: np.ndarray) -> np.ndarray:
        """The same order where only the rows `kept` (rows_per_shard,) bool count, so that none is left out.

        A kept row, drawn by a generator of the shard's own, takes the place of each row left out. None is drawn again
        before all have been drawn.

        Raises:
            ValueError: no row is kept.
        """
        order = self.permutation_of(shard)
        if kept.all():
            return order
        if not kept.any():
            raise ValueError(
                f"all rows of shard {shard} are left out, by stream.leave_out_tokens or stream.leave_out_norm: "
                "leave out less, or raise stream.shard_contexts"
            )
        away = ~kept[order]
        order[away] = np.resize(self._generator(shard, 2).permutation(np.flatnonzero(kept)), away.sum())
        return order

    def _generator(self, shard: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, shard // self.shards_per_epoch, shard, purpose])
