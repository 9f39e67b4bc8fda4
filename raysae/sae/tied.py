"""The tied autoencoder of Cunningham et al. 2023 (arXiv 2309.08600), section 2: c = ReLU(M̂x + b), x̂ = M̂ᵀc, M̂ = M with rows of norm 1.

Loss = mean((x − x̂)²) + sparsity · mean over rows of ‖c‖₁, on raw activations (scale 1): the squared error is a mean over d as well, so the
coefficient is the paper's α (its equation 4) divided by d. M starts Xavier-uniform, b at 0; there is no decoder bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.elements import All, Few
from raysae.kernels.rows import normalise_rows_, remove_parallel_, row_blocks, row_norms, unit_rows
from raysae.sae.dense import Rows
from raysae.sae.relu import ReLU


class Tied(ReLU):
    """M is W_dec, free in norm: `encoder()` and `decoder()` both give M̂."""

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.error_weight = 1 / d

    def _make_weights(self, generator: torch.Generator) -> None:
        bound = math.sqrt(6 / (self.n + self.d_in))
        self.W_dec = nn.Parameter(torch.rand(self.n, self.d_in, generator=generator).mul_(2).sub_(1).mul_(bound))
        self.b_enc = nn.Parameter(torch.zeros(self.n))
        self.register_buffer("b_dec", torch.zeros(self.d_in))

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        return self.W_dec

    def initialise(self, rows: Tensor, centre: Tensor | None = None) -> None:
        """Nothing depends on the data."""

    def encoder(self) -> Tensor:
        return unit_rows(self.W_dec)

    def decoder(self) -> Tensor:
        return unit_rows(self.W_dec)

    def _add_grads(self, rows: Rows, elements: All | Few, codes: Tensor, grad_x_hat: Tensor, grad_pre: Tensor) -> None:
        elements.add_outer_(self.W_dec.grad, codes, grad_x_hat)
        elements.add_outer_(self.W_dec.grad, grad_pre, rows.x)
        self.b_enc.grad.add_(elements.sum(grad_pre))

    def _finish_grads(self, grad_x_hat_sum: Tensor) -> None:
        # from the gradient for M̂ to that for M
        for gradients, rows in row_blocks(self.W_dec.grad, self.W_dec):
            norms = row_norms(rows)
            remove_parallel_(gradients, rows / norms)
            gradients.div_(norms)

    def after_grads(self) -> None:
        """Nothing to remove: the norms of M are free, and its gradient is perpendicular to its rows."""

    def after_step(self) -> None:
        """Nothing to restore."""

    @torch.no_grad()
    def folded(self) -> Tied:
        """A copy for inference whose W_dec is M̂."""
        folded = super().folded()
        normalise_rows_(folded.W_dec)
        return folded
