"""Activations from a known sparse dictionary, and a small training loop."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.kernels.rows import unit_rows
from raysae.sae.base import SAE, StepInfo


class Planted:
    """Rows Σ_f c_f · feature_f + offset, of width d, from `n` features of norm 1.

    On average `active` features take part in a row. Their coefficients c_f lie between 0.5 and 1.5.
    """

    def __init__(self, d: int = 32, n: int = 48, active: float = 3, offset: float = 0.0, seed: int = 0):
        self.generator = torch.Generator().manual_seed(1000 + seed)  # Not the seed of an SAE, which would start there
        self.features = unit_rows(torch.randn(n, d, generator=self.generator))
        self.probability = active / n
        self.offset = offset * torch.randn(d, generator=self.generator)

    def rows(self, b: int) -> Tensor:
        shape = (b, len(self.features))
        on = torch.rand(shape, generator=self.generator) < self.probability
        coefficients = torch.rand(shape, generator=self.generator) + 0.5
        return (on * coefficients) @ self.features + self.offset


def train(
    sae: SAE, planted: Planted, steps: int, learning_rate: float, batch: int = 256, dead_after: int = 100
) -> None:
    """Trains `sae` with Adam.

    The learning rate falls linearly to 0 over the last half. The penalty warms up over the first tenth.
    AuxK takes a latent for dead after `dead_after` idle steps.
    """
    sae.initialise(planted.rows(4096))
    optimizer = torch.optim.Adam(sae.parameters(), lr=learning_rate)
    idle = torch.zeros(sae.n)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, 2 * (1 - step / steps))
        x = planted.rows(batch) / sae.scale
        sae.loss_and_grads(
            x,
            x,
            StepInfo(sparsity_factor=min(1, 10 * step / steps), dead=idle >= dead_after, progress=step / steps),
        )
        sae.after_grads()
        optimizer.step()
        sae.after_step()
        idle = (idle + 1) * ~sae.fired()
    sae.calibrate(planted.rows(4096) / sae.scale)
