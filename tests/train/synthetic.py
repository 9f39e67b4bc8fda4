"""A small stream with planted features, and a source for the training loop without Ray."""

from __future__ import annotations

import time

import torch

from raysae.config import ARCHITECTURES, EvaluationConfig, SAEConfig, TrainConfig
from raysae.stream.spec import ActivationSpec

D = 32
SPEC = ActivationSpec(
    model="m",
    text="t",
    contexts=1024,
    context_length=16,
    skip_positions=1,
    dtype="float32",
    seed=0,
    epochs=1,
    shard_contexts=256,
    batch_contexts=32,
)
TRAIN = TrainConfig(tokens=64 * 20, batch=64, reports=4, checkpoint_seconds=1e6)
EVALUATION = EvaluationConfig(rows=600, interim_rows=250)


def rows(count: int, seed: int = 0, d: int = D) -> torch.Tensor:
    """Rows (count, d): sparse sums of 48 fixed directions, centred away from zero."""
    directions = torch.randn(48, d, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, 48, generator=generator) * (torch.rand(count, 48, generator=generator) < 0.1)
    return weights @ directions + 3.0


def config(architecture: str = "topk", width: int = 64, seed: int = 0, **changes) -> SAEConfig:
    level = ARCHITECTURES[architecture].pick(k=4, sparsity=1e-3)
    chosen = {
        "architecture": architecture,
        "hook_point": "resid_post.0",
        "width": width,
        "learning_rate": 3e-3,
        "seed": seed,
    }
    return SAEConfig(**chosen | level | changes)


class ArrayReader:
    """Serves batches of a tensor in order, and lists the rows it served."""

    def __init__(self, data: torch.Tensor, batch: int, row: int, served: list[int], delay: float = 0.0) -> None:
        self.data, self.batch, self.row, self.served, self.delay = data, batch, row, served, delay
        self.waited_seconds = 0.0

    def next(self) -> torch.Tensor:
        time.sleep(self.delay)
        self.served.append(self.row)
        self.row += self.batch
        return self.data[self.row - self.batch : self.row].clone()

    def close(self) -> None:
        pass


class ArraySource:
    def __init__(
        self, train: TrainConfig = TRAIN, evaluation: EvaluationConfig = EVALUATION, delay: float = 0.0
    ) -> None:
        self.train, self.delay = train, delay
        self.data = rows(train.steps * train.batch)
        self.held_out = rows(evaluation.rows, seed=7)
        self.served: list[int] = []
        self.opened: list[int] = []
        self.numerics = {"threads": [1], "device": ["cpu"]}

    def open(self, row: int) -> ArrayReader:
        self.opened.append(row)
        return ArrayReader(self.data, self.train.batch, row, self.served, self.delay)

    def first_rows(self) -> torch.Tensor:
        return self.data[:512]

    def evaluation(self, rows: int):
        yield from self.held_out[:rows].split(190)

    def leave(self) -> None:
        pass
