"""Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides which latents are active, another how strongly.

Both paths share W_enc. With u = W_enc (x − b_dec) the gate is π_gate = u + b_gate and the magnitude is
π_mag = exp(r_mag) · u + b_mag. A latent is active where π_gate > 0, with the code ReLU(π_mag).

Loss = mean over rows of ‖x − x̂‖² + sparsity · mean over rows of Σ ReLU(π_gate) + mean over rows of ‖x − x̂_gate‖², in
normalised units (mean of ‖x‖² is d). x̂_gate decodes ReLU(π_gate) with the decoder held constant. The step at π_gate =
0 has no gradient, so the gate learns from the last two terms alone. Decoder rows have norm 1, so that the penalty
cannot be evaded.

Only elements with π_gate > 0 matter to any term. `naive.gated` in `tests/sae/naive.py` is the readable version.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raysae.kernels.elements import All, Few
from raysae.kernels.rows import sum_of_squares
from raysae.sae.base import StepInfo
from raysae.sae.dense import DenseSAE, Rows


class Gated(DenseSAE):
    """c = ReLU(π_mag) where π_gate > 0, else 0. Pre-activations are π_gate."""

    SAVED = ("W_enc", "W_dec", "b_gate", "b_mag", "r_mag", "b_dec")

    def _make_weights(self, generator: torch.Generator) -> None:
        super()._make_weights(generator)
        del self.b_enc
        for name in ("b_gate", "b_mag", "r_mag"):
            setattr(self, name, nn.Parameter(torch.zeros(self.n)))

    @property
    def bias(self) -> Tensor:
        return self.b_gate

    def _matter(self, pre: Tensor) -> Tensor:
        return (pre <= 0).logical_not_()

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        factor = self.r_mag.exp()
        shift = self.b_mag - factor * self.b_gate
        magnitude = torch.addcmul(elements.spread(shift), pre, elements.spread(factor))
        return torch.ops.aten.threshold_backward(magnitude.relu_(), pre, 0)  # Zero where pre ≤ 0, in one pass

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        factor = self.r_mag.exp()
        # A copy, since the gate's gradient may overwrite `grad_codes`.
        copied = self._workspace.take("grad_magnitude", codes.shape, codes)
        grad_magnitude = _where_positive(grad_codes, codes, copied)
        grad_b_mag = elements.sum(grad_magnitude)
        self.b_mag.grad.add_(grad_b_mag)
        # exp(r_mag) · u is π_mag − b_mag, and π_mag is the code wherever there is a gradient.
        self.r_mag.grad.add_(elements.sum(grad_magnitude * codes)).addcmul_(self.b_mag, grad_b_mag, value=-1)

        gate = pre.relu_()
        error = rows.target - elements.decode(gate, rows.decoder)
        missed = sum_of_squares(error)
        grad_gate = elements.gradient(error.mul_(-2 / rows.batch), rows.decoder)
        _where_positive(grad_gate.add_(rows.coefficient), gate, grad_gate)
        self.b_gate.grad.add_(elements.sum(grad_gate))

        torch.addcmul(grad_gate, elements.spread(factor), grad_magnitude, out=grad_codes)
        return {"penalty": gate.sum(), "aux": missed}

    def _loss(self, squared_error: Tensor, further: dict[str, Tensor], step: StepInfo) -> Tensor:
        return super()._loss(squared_error, further, step) + further["aux"]

    def _add_grads(self, rows: Rows, elements: All | Few, codes: Tensor, grad_x_hat: Tensor, grad_pre: Tensor) -> None:
        elements.add_outer_(self.W_dec.grad, codes, grad_x_hat)
        elements.add_outer_(self.W_enc.grad, grad_pre, rows.x)

    def _finish_grads(self, grad_x_hat_sum: Tensor) -> None:
        grad_u_sum = self.b_gate.grad + self.r_mag.exp() * self.b_mag.grad
        torch.sub(grad_x_hat_sum, grad_u_sum @ self.W_enc, out=self.b_dec.grad)

    def _per_latent(self) -> list[Tensor]:
        return [self.b_gate, self.b_mag]

    @torch.no_grad()
    def subtract_b_dec_(self) -> None:
        shift = self.W_enc @ self.b_dec
        self.b_gate.add_(shift)
        self.b_mag.addcmul_(self.r_mag.exp(), shift)


def _where_positive(gradient: Tensor, quantity: Tensor, out: Tensor) -> Tensor:
    """Writes `gradient` where `quantity` is positive, else 0, in one pass over memory."""
    return torch.ops.aten.threshold_backward.grad_input(gradient, quantity, 0, grad_input=out)
