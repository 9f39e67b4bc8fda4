"""A loop's rows out of the stream's queue."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from raysae.stream.blocks import as_tensor, blocks_per_shard
from raysae.stream.client import StreamClient
from raysae.stream.reader import BatchReader
from raysae.train.actor import Training

INITIAL_ROWS = 16_384  # at most, from which an SAE is initialised


class StreamSource:
    """A loop's rows out of the queue. Implements `loop.Source`."""

    def __init__(self, plan: Training, client: StreamClient, device: torch.device):
        self.plan, self.client, self.device = plan, client, device

    def open(self, row: int) -> BatchReader:
        train = self.plan.config.train
        return self.client.open(row, train.batch, end=train.steps * train.batch, device=self.device)

    def first_rows(self) -> torch.Tensor:
        wanted = min(INITIAL_ROWS, self.plan.training.rows_per_shard)
        blocks, rows = [], 0
        while rows < wanted:
            blocks.append(as_tensor(self.client.block(0, len(blocks)), self.plan.training.dtype))
            rows += len(blocks[-1])
        return torch.cat(blocks)[:wanted].float()

    def evaluation(self, rows: int) -> Iterator[torch.Tensor]:
        spec = self.plan.evaluation
        blocks = blocks_per_shard(spec, self.plan.width, self.plan.config.stream.block_mib)
        for shard in range(spec.shards):
            for block in range(blocks):
                if rows <= 0:
                    return
                chunk = as_tensor(self.client.evaluation_block(shard, block), spec.dtype)[:rows]
                rows -= len(chunk)
                yield chunk
