"""What the architectures with dense codes share: the loss and its gradients, in chunks of rows so that memory is bounded at any width."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.kernels.elements import All, Few, elements_of
from raysae.kernels.products import pre_activation_chunks
from raysae.kernels.rows import sum_of_squares
from raysae.sae.base import SAE, StepInfo


class DenseSAE(SAE):
    """Loss = error_weight · mean over rows of ‖x − x̂‖² + sparsity · warm-up factor · mean over rows of the penalty.

    A subclass gives the activation, the penalty and their derivatives; the gradients of weights and biases follow here.
    """

    error_weight: float = 1.0

    def encode(self, x: Tensor) -> Tensor:
        return self._activate(self.pre_activations(x), All(self._workspace)).T

    def _matter(self, pre: Tensor) -> Tensor:
        """Which pre-activations (n, r) the loss depends on, (n, r) bool; NaN does matter."""
        raise NotImplementedError

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        """Codes of pre-activations, quantities of `elements` both."""
        raise NotImplementedError

    def _backward(self, pre: Tensor, codes: Tensor, grad_codes: Tensor, coefficient: float, elements: All | Few) -> Tensor:
        """Sum of the penalty over these rows. Turns `grad_codes`, in place, from the error's gradient for codes into the loss's for
        pre-activations, quantities of `elements` all, and may write into `pre`; adds gradients of parameters of its own. `coefficient` is the weight
        of this sum in the loss."""
        raise NotImplementedError

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, step: StepInfo) -> dict[str, Tensor]:
        self._take_grads()
        for parameter in self.parameters():
            parameter.grad.zero_()
        b, coefficient = len(x), self.config.sparsity * step.sparsity_factor / len(x)
        encoder, decoder = (matrix if self.precision is None else matrix.to(self.precision) for matrix in (self.encoder(), self.decoder()))
        centred = torch.sub(x, self.b_dec, out=self._workspace.take("centred", x.shape, x))
        squared_error, penalty, active, grad_x_hat_sum = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(4))
        fired = self._fired.zero_()
        for part, chunk in pre_activation_chunks(centred, encoder, self.b_enc, self._workspace, precision=self.precision):
            elements = elements_of(self._matter(chunk), self._workspace, self.precision)
            pre = elements.of(chunk)
            codes = self._activate(pre, elements)
            error = centred[part] - elements.decode(codes, decoder)
            squared_error += sum_of_squares(error) / b
            grad_x_hat = error.mul_(-2 * self.error_weight / b)
            grad_pre = elements.gradient(grad_x_hat, decoder)
            penalty += self._backward(pre, codes, grad_pre, coefficient, elements) / b
            self._add_weight_grads(elements, codes, grad_x_hat, grad_pre, centred[part])
            self.b_enc.grad.add_(elements.sum(grad_pre))
            grad_x_hat_sum = grad_x_hat_sum + grad_x_hat.sum(0)
            on = codes > 0
            active += on.sum(dtype=x.dtype) / b
            fired |= elements.any(on)
            del elements, pre, codes, grad_pre, on  # a list takes memory: not two at a time
        self._finish_grads(grad_x_hat_sum)
        loss = self.error_weight * squared_error + self.config.sparsity * step.sparsity_factor * penalty
        return {"loss": loss, "squared_error": squared_error, "l0": active, "penalty": penalty}

    def _add_weight_grads(self, elements: All | Few, codes: Tensor, grad_x_hat: Tensor, grad_pre: Tensor, centred: Tensor) -> None:
        elements.add_outer_(self.W_dec.grad, codes, grad_x_hat)
        elements.add_outer_(self.W_enc.grad, grad_pre, centred)

    def _finish_grads(self, grad_x_hat_sum: Tensor) -> None:
        # x − b_dec enters both the encoder and the error: b_dec's gradient needs no dense gradient of the input
        torch.sub(grad_x_hat_sum, self.b_enc.grad @ self.W_enc, out=self.b_dec.grad)
