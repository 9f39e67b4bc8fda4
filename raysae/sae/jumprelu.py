"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a latent is active where its pre-activation exceeds a threshold θ of its own.

Loss = mean over rows of ‖x − x̂‖² + sparsity · mean over rows of ‖c‖₀, in normalised units (mean of ‖x‖² is d). The step at θ has straight-through
derivatives with a rectangle kernel K of width ε = train.bandwidth (equations 11 and 12): ∂c/∂θ = −θ/ε · K((π − θ)/ε), ∂‖c‖₀/∂θ = −1/ε · K((π − θ)/ε);
pre-activations π get a gradient only where their latent is active. θ is positive, its logarithm is the parameter.

θ starts where min(2d, n/4) latents per row are active, on the first rows. The paper's start, a small constant, suits runs of some hundred thousand
steps: a logarithm moves by at most about the learning rate per step, and in a thousand steps no penalty could bring it to where L0 is small.

The input of the encoder is x − b_dec as in the other architectures: the paper's W_enc x + b_enc with another name for the bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.elements import All, Few
from raysae.sae.dense import DenseSAE, Rows

INITIAL_ROWS = 128  # that thresholds are first set from


class JumpReLU(DenseSAE):
    """c = π where π > θ, else 0, with π = W_enc (x − b_dec) + b_enc.

    `threshold` (n,) is θ, which codes are made with; `after_step` follows the parameter `log_threshold`.
    """

    SAVED = (*DenseSAE.SAVED, "threshold")

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.register_buffer("threshold", torch.full((self.n,), train.bandwidth))
        self.log_threshold = nn.Parameter(self.threshold.log())

    @torch.no_grad()
    def initialise(self, rows: Tensor, centre: Tensor | None = None) -> None:
        super().initialise(rows, centre)
        pre = self.pre_activations(rows[:INITIAL_ROWS].to(self.b_dec) / self.scale).flatten()
        active = min(2 * self.d_in, self.n / 4) / self.n
        self.threshold.fill_(
            pre.kthvalue(max(1, int((1 - active) * len(pre)))).values.clamp_min(self.train_config.bandwidth)
        )
        self.log_threshold.copy_(self.threshold.log())

    def _matter(self, pre: Tensor) -> Tensor:
        return (
            pre <= (self.threshold - self.train_config.bandwidth).unsqueeze(1)
        ).logical_not_()  # and a few more, for rounding

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        return pre * (pre > elements.spread(self.threshold))

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        bandwidth = self.train_config.bandwidth
        near = (pre.sub_(elements.spread(self.threshold)).abs_() < bandwidth / 2).to(pre)
        grad_threshold = (
            -(
                elements.sum(torch.mul(grad_codes, near, out=pre)) * self.threshold
                + rows.coefficient * elements.sum(near)
            )
            / bandwidth
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
        """Others apply a ReLU too, so that a negative threshold means 0."""
        threshold = tensors["threshold"].clamp_min(0)
        super().restore({**tensors, "threshold": threshold, "log_threshold": threshold.log()})

    def _multiply_codes(self, factors: Tensor) -> None:
        super()._multiply_codes(factors)
        self.log_threshold.copy_(self.threshold.log())

    def _per_latent(self) -> list[Tensor]:
        return [*super()._per_latent(), self.threshold]
