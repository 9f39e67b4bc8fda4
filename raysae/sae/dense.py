"""What architectures with dense codes share: the loss and its gradients, in chunks of rows so that memory is bounded.

The readable version of each whole step is in `tests/sae/naive.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysae.kernels.elements import All, Few, elements_of
from raysae.kernels.products import pre_activation_chunks
from raysae.kernels.rows import sum_of_squares
from raysae.sae.base import SAE, StepInfo


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that are handled together."""

    x: Tensor  # (r, d_in), input less b_dec
    target: Tensor  # (r, d_out), target less b_dec
    decoder: Tensor  # (n, d_out), rounded to the training's precision
    batch: int  # Rows of the whole batch
    coefficient: float  # Weight in the loss of the penalty's sum over rows


class DenseSAE(SAE):
    """Loss = error_weight · mean of ‖target − x̂‖² + coefficient · mean of the penalty, over rows.

    The coefficient is penalty_weight · sparsity · warm-up factor.

    A subclass gives the activation, the penalty and their derivatives. The gradients of weights and biases follow here.
    """

    error_weight: float = 1.0
    penalty_weight: float = 1.0

    def encode(self, x: Tensor) -> Tensor:
        return self._activate(self.pre_activations(x), All(self._workspace)).T

    def _matter(self, pre: Tensor) -> Tensor:
        """Which pre-activations (n, r) the loss depends on, (n, r) bool. NaN matters."""
        raise NotImplementedError

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        """Codes of pre-activations, quantities of `elements` both."""
        raise NotImplementedError

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        """Turns `grad_codes` in place from the error's gradient for codes into the loss's for W_enc (x − b_dec).

        `pre`, `codes` and `grad_codes` are quantities of `elements`. It may write into `pre`. It adds the gradients of
        parameters that the architecture has beside weights, b_enc and b_dec.

        Returns:
            Sums over these rows of the loss's further terms. `penalty` is one of them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, target: Tensor, step: StepInfo) -> dict[str, Tensor]:
        self._take_grads()
        for parameter in self.parameters():
            parameter.grad.zero_()
        b, coefficient = len(x), self._coefficient(step) / len(x)
        encoder, decoder = (
            matrix if self.precision is None else matrix.to(self.precision)
            for matrix in (self.encoder(), self.decoder())
        )
        centred, wanted = self._centred(x, target)
        squared_error, active, grad_x_hat_sum = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(3))
        further: dict[str, Tensor] = {}
        fired = self._fired.zero_()
        for part, chunk in pre_activation_chunks(
            centred, encoder, self.bias, self._workspace, precision=self.precision
        ):
            rows = Rows(centred[part], wanted[part], decoder, b, coefficient)
            elements = elements_of(self._matter(chunk), self._workspace, self.precision)
            pre = elements.of(chunk)
            codes = self._activate(pre, elements)
            error = rows.target - elements.decode(codes, decoder)
            squared_error += sum_of_squares(error) / b
            grad_x_hat = error.mul_(-2 * self.error_weight / b)
            grad_pre = elements.gradient(grad_x_hat, decoder)
            for name, value in self._backward(rows, elements, pre, codes, grad_pre).items():
                further[name] = further.get(name, 0) + value / b
            self._add_grads(rows, elements, codes, grad_x_hat, grad_pre)
            grad_x_hat_sum = grad_x_hat_sum + grad_x_hat.sum(0)
            on = codes > 0
            active += on.count_nonzero() / b
            fired |= elements.any(on)
            del elements, pre, codes, grad_pre, on  # A list of elements takes memory: not two at a time
        self._finish_grads(grad_x_hat_sum)
        loss = self._loss(squared_error, further, step)
        return {"loss": loss, "squared_error": squared_error, "l0": active, **further}

    def _loss(self, squared_error: Tensor, further: dict[str, Tensor], step: StepInfo) -> Tensor:
        return self.error_weight * squared_error + self._coefficient(step) * further["penalty"]

    def _coefficient(self, step: StepInfo) -> float:
        return self.penalty_weight * self.config.sparsity * step.sparsity_factor

    def _add_grads(self, rows: Rows, elements: All | Few, codes: Tensor, grad_x_hat: Tensor, grad_pre: Tensor) -> None:
        """Adds these rows' part to the gradients of W_dec, W_enc and b_enc."""
        elements.add_outer_(self.W_dec.grad, codes, grad_x_hat)
        elements.add_outer_(self.W_enc.grad, grad_pre, rows.x)
        self.b_enc.grad.add_(elements.sum(grad_pre))

    def _finish_grads(self, grad_x_hat_sum: Tensor) -> None:
        """Sets b_dec's gradient: b_dec is in the encoder's input and in the error.

        It needs no dense gradient of the input, since b_enc's gradient is the sum of what that would be made of.
        """
        torch.sub(grad_x_hat_sum, self.b_enc.grad @ self.W_enc, out=self.b_dec.grad)
