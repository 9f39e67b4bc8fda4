"""ReLU with a penalty on the codes: L1, or Lp with p annealed. Decoder rows have norm 1, so nothing evades the penalty.

Loss = mean over rows of ‖x − x̂‖² + sparsity · mean over rows of ‖c‖₁, in normalised units (mean of ‖x‖² is d).
`naive.relu` in `tests/sae/naive.py` is the readable version.

With `train.p_end` below 1 the penalty is Σ (c + ε)^p − ε^p instead of ‖c‖₁ (p-annealing, Karvonen et al. 2024,
arXiv 2408.00113). p falls from 1 to p_end in `LEVELS` equal steps, between the end of the coefficient's warm-up and the
start of the learning rate's decay. At each step the coefficient is rescaled, so that the penalty of the codes at hand
stays what it was. ε keeps the slope at 0 finite. p and the rescaling are buffers, so a checkpoint has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.elements import All, Few
from raysae.sae.base import StepInfo
from raysae.sae.dense import DenseSAE, Rows

LEVELS = 10  # Values of p after 1
EPSILON = 1e-3  # In units of the normalised activation


class ReLU(DenseSAE):
    """c = ReLU(W_enc (x − b_dec) + b_enc)."""

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.annealed = train.p_end < 1
        if self.annealed:
            self.register_buffer("p", torch.ones((), dtype=torch.float64))
            self.register_buffer("rescale", torch.ones((), dtype=torch.float64))  # Of the penalty's coefficient
            # Sums of the last batch's penalty with this p and with the next one
            self.register_buffer("penalties", torch.ones(2, dtype=torch.float64))

    def _matter(self, pre: Tensor) -> Tensor:
        return (pre <= 0).logical_not_()

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        return pre.relu()

    def loss_and_grads(self, x: Tensor, target: Tensor, step: StepInfo) -> dict[str, Tensor]:
        if self.annealed:
            self._anneal(step.progress)
        return super().loss_and_grads(x, target, step)

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        if not self.annealed:
            grad_codes.add_(rows.coefficient).mul_(codes > 0)
            return {"penalty": codes.sum()}
        p = float(self.p)
        slope = (codes + EPSILON).pow_(p - 1).mul_(p * float(self.rescale) * rows.coefficient)
        grad_codes.add_(slope).mul_(codes > 0)
        now, then = (_penalty(codes, level) for level in (p, self._below(p)))
        self.penalties += torch.stack([now, then])
        return {"penalty": now.to(codes.dtype) * float(self.rescale)}

    def _anneal(self, progress: float) -> None:
        """Brings p up to `progress`, the share of steps done, and keeps the penalty's size."""
        first, last = self.train_config.sparsity_warmup, 1 - self.train_config.decay
        done = 1.0 if progress >= last else (progress - first) / (last - first)
        level = max(0, min(LEVELS, int(done * LEVELS)))
        wanted = 1 - (1 - self.train_config.p_end) * level / LEVELS
        if wanted < float(self.p) - 1e-9:
            self.rescale.mul_(self.penalties[0] / self.penalties[1])
            self.p.fill_(self._below(float(self.p)))
        self.penalties.zero_()

    def _below(self, p: float) -> float:
        """The value of p after `p`."""
        return max(self.train_config.p_end, p - (1 - self.train_config.p_end) / LEVELS)


def _penalty(codes: Tensor, p: float) -> Tensor:
    """Σ (c + ε)^p − ε^p over positive codes, in float64."""
    return ((codes.double() + EPSILON).pow_(p) - EPSILON**p).sum()
