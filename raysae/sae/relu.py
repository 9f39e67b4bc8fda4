"""ReLU with a penalty on the codes: L1, or Lp with p annealed. Decoder rows have norm 1, so nothing evades the penalty.

Loss = mean over rows of ‖x − x̂‖² + sparsity · mean over rows of ‖c‖₁, in normalised units (mean of ‖x‖² is d).
`naive.relu` in `tests/sae/naive.py` is the readable version.

With `train.p_end` below 1 the penalty is Σ (c + ε)^p − ε^p instead of ‖c‖₁ (p-annealing, Karvonen et al. 2024, arXiv
2408.00113). p falls from 1 to p_end in `LEVELS` equal steps, between the end of the coefficient's warm-up and the
start of the learning rate's decay. Whenever p falls, the coefficient is rescaled so that the penalty of the batch
before keeps its size. dictionary_learning averages over ten batches instead. Where that batch was skipped, or had no
active latent, p falls one step later. ε keeps the slope at 0 finite. p and the rescaling are buffers, so a checkpoint
has them.
"""

from __future__ import annotations

import math

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
            # p, the factor on the penalty's coefficient, and the next p
            self.register_buffer("stage", torch.ones(3, dtype=torch.float64))
            # The last batch's penalty with p, and with the next p where that is lower. 0: not measured
            self.register_buffer("penalties", torch.zeros(2, dtype=torch.float64))

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
        p, factor, following = self._stage
        slope = (codes + EPSILON).pow_(p - 1).mul_(p * factor * rows.coefficient)
        grad_codes.add_(slope).mul_(codes > 0)
        penalty = _penalty(codes, p)
        if following < p:
            self.penalties += torch.stack([penalty, _penalty(codes, following)])
        return {"penalty": penalty.to(codes.dtype) * factor}

    def _anneal(self, progress: float) -> None:
        """Brings p to where it is to be at `progress`, the share of steps done, as far as the last batch tells how."""
        p, factor, following = self.stage.tolist()
        if self._p_at(progress) <= following < p:
            now, then = self.penalties.tolist()
            if then > 0:
                p, factor = following, factor * now / then
        following = min(p, self._p_at(progress), self._p_at(progress + 1 / self.train_config.steps))
        self._stage = p, factor, following
        self.stage.copy_(torch.tensor(self._stage, dtype=torch.float64))
        self.penalties.zero_()

    def _p_at(self, progress: float) -> float:
        first, last = self.train_config.sparsity_warmup, 1 - self.train_config.decay
        done = min(1.0, max(0.0, (progress - first) / (last - first)))
        return 1 - (1 - self.train_config.p_end) * math.ceil(done * LEVELS - 1e-9) / LEVELS


def _penalty(codes: Tensor, p: float) -> Tensor:
    """Σ (c + ε)^p − ε^p over positive codes, in float64."""
    return ((codes.double() + EPSILON).pow_(p) - EPSILON**p).sum()
