"""A loop's rows, taken from the stream's queue."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from raysae.determinism import Seen
from raysae.stream.blocks import as_tensor, blocks_per_shard
from raysae.stream.client import StreamClient
from raysae.stream.reader import BatchReader
from raysae.train.errors import ErrorOf, Transformed
from raysae.train.task import Training

INITIAL_ROWS = 16_384  # An SAE is initialised from at most this many rows


class StreamSource:
    """A loop's rows, taken from the queue. A `transform` is applied to them, if given. Implements `loop.Source`."""

    def __init__(self, task: Training, client: StreamClient, device: torch.device, transform: ErrorOf | None = None):
        self.task, self.client, self.device, self.transform = task, client, device, transform

    def open(self, row: int) -> BatchReader | Transformed:
        train = self.task.config.train
        reader = self.client.open(row, train.batch, end=train.steps * train.batch, device=self.device)
        return Transformed(reader, self.transform) if self.transform else reader

    @property
    def numerics(self) -> Seen:
        return (
            {**self.client.numerics, "transform": [self.transform.digest]} if self.transform else self.client.numerics
        )

    def first_rows(self) -> torch.Tensor:
        rows = self._first_rows()
        return self.transform(rows) if self.transform else rows

    def evaluation(self, rows: int) -> Iterator[torch.Tensor]:
        chunks = self._evaluation(rows)
        return map(self.transform, chunks) if self.transform else chunks

    def leave(self) -> None:
        self.client.leave()

    def _first_rows(self) -> torch.Tensor:
        wanted = min(INITIAL_ROWS, self.task.training.rows_per_shard)
        blocks, rows, shard = [], 0, 0
        while rows < wanted:
            block = self.client.block(shard, len(blocks))
            if block is None:  # The shard is skipped, so the first rows are those of the next shard
                blocks, rows, shard = [], 0, shard + 1
                continue
            blocks.append(as_tensor(block, self.task.training.dtype))
            rows += len(blocks[-1])
        return torch.cat(blocks)[:wanted].float()

    def _evaluation(self, rows: int) -> Iterator[torch.Tensor]:
        spec = self.task.evaluation
        blocks = blocks_per_shard(spec, self.task.width, self.task.config.stream.block_mib)
        for shard in range(spec.shards):
            for number in range(blocks):
                if rows <= 0:
                    return
                block = self.client.evaluation_block(shard, number)
                if block is None:
                    break
                chunk = as_tensor(block, spec.dtype)[:rows]
                rows -= len(chunk)
                yield chunk
