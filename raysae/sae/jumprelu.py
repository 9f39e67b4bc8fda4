"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): each latent has a threshold θ, and is active above it.

The readable twin is `jumprelu` in `tests/sae/naive.py`. In normalised units (the mean of ‖x‖² is d):

    loss = mean over rows of ‖x − x̂‖² + coefficient · mean over rows of ‖c‖₀

Codes jump at θ. The derivatives there are straight-through ones (equations 11 and 12), for a pre-activation π:

    ∂c/∂θ = −θ/ε · K((π − θ)/ε)        ∂‖c‖₀/∂θ = −1/ε · K((π − θ)/ε)

K is a rectangle: it is 1 where |π − θ| < ε/2, and else 0. A pre-activation gets a gradient only if its latent is
active. The parameter is log θ, so that θ is positive.

The paper's activations have a mean of ‖x‖² of 1. Ours are √d times as large, and so are π, c, θ and ε. The squared
error is then d times as large, and the count stays. So d times the paper's loss, with its coefficient λ, is

    mean over rows of ‖x − x̂‖² + d λ · mean over rows of ‖c‖₀

So the coefficient is d · sparsity, unless train.jumprelu_unit says otherwise. The paper's ε of 0.001 becomes 0.001 √d,
unless train.bandwidth is set. Adam's step does not change with the size of gradients, so weights and log θ take the
paper's. Biases are √d times as large here, so their steps are relatively smaller.

Adam has the paper's β₁ = 0, because few rows lie within ε/2 of a threshold. With momentum, one such row would move the
threshold for many steps.

The pseudo-gradient for log θ can be far larger than all other gradients. It is neither clipped nor counted for their
clipping. Otherwise a large coefficient would slow the weights down, and L0 would rise with it.

On the first rows, θ starts where min(2d, n/4) latents per row are active. It starts at ε if that is larger. The
paper starts at a small constant, which suits some hundred thousand steps. A logarithm moves by at most about the
learning rate per step. So in a thousand steps no penalty could bring it to where L0 is small.

The encoder's input is x − b_dec as in the other architectures. The paper has W_enc x + b_enc. This is the same with
another name for the bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
from raysae.kernels.elements import All, Few
from raysae.sae.dense import DenseSAE, Rows

INITIAL_ROWS = 128  # Rows that set the first thresholds


class JumpReLU(DenseSAE):
    """c = π where π > θ, else 0, with π = W_enc (x − b_dec) + b_enc.

    `threshold` (n,) is θ, and codes use it. The parameter is `log_threshold`. `after_step` sets θ to its exponential.
    """

    SAVED = (*DenseSAE.SAVED, "threshold")
    UNCLIPPED = ("log_threshold",)

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.bandwidth = train.bandwidth or ARCHITECTURES["jumprelu"].bandwidth * math.sqrt(d)
        self.penalty_weight = d if train.jumprelu_unit == "norm" else 1
        self.register_buffer("threshold", torch.full((self.n,), self.bandwidth))
        self.log_threshold = nn.Parameter(self.threshold.log())

    @torch.no_grad()
    def initialise(self, rows: Tensor, centre: Tensor | None = None) -> None:
        super().initialise(rows, centre)
        pre = self.pre_activations(rows[:INITIAL_ROWS].to(self.b_dec) / self.scale).flatten()
        active = min(2 * self.d_in, self.n / 4) / self.n
        self.threshold.fill_(pre.kthvalue(max(1, int((1 - active) * len(pre)))).values.clamp_min(self.bandwidth))
        self.log_threshold.copy_(self.threshold.log())

    def _matter(self, pre: Tensor) -> Tensor:
        # K ends at θ − ε/2. The other half of ε is a margin for rounding.
        return (pre <= (self.threshold - self.bandwidth).unsqueeze(1)).logical_not_()

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        return pre * (pre > elements.spread(self.threshold))

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        near = (pre.sub_(elements.spread(self.threshold)).abs_() < self.bandwidth / 2).to(pre)
        grad_threshold = (
            -(
                elements.sum(torch.mul(grad_codes, near, out=pre)) * self.threshold
                + rows.coefficient * elements.sum(near)
            )
            / self.bandwidth
        )
        self.log_threshold.grad.addcmul_(grad_threshold, self.threshold)
        active = codes > 0
        grad_codes.mul_(active)
        return {"penalty": active.sum(dtype=codes.dtype)}

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        torch.exp(self.log_threshold, out=self.threshold)

    @torch.no_grad()
    def folded(self) -> JumpReLU:
        folded = super().folded()
        folded.log_threshold.copy_(folded.threshold.log())
        return folded

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes negative thresholds as 0. Their owners apply a ReLU too, so both mean the same."""
        threshold = tensors["threshold"].clamp_min(0)
        super().restore({**tensors, "threshold": threshold, "log_threshold": threshold.log()})

    def _multiply_codes(self, factors: Tensor) -> None:
        super()._multiply_codes(factors)
        self.log_threshold.copy_(self.threshold.log())

    def _per_latent(self) -> list[Tensor]:
        return [*super()._per_latent(), self.threshold]
