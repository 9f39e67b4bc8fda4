"""What the architectures with dense codes share: the loss and its gradients, in chunks of rows so that memory is bounded at any width."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.sae import kernels
from raysae.sae.base import SAE, StepInfo


class DenseSAE(SAE):
    """Loss = error_weight · mean over rows of ‖x − x̂‖² + sparsity · warm-up factor · mean over rows of the penalty.

    A subclass gives the activation, the penalty and their derivatives; the gradients of weights and biases follow here.
    """

    error_weight: float = 1.0

    def encode(self, x: Tensor) -> Tensor:
        return self._activate(self.pre_activations(x).T).T

    def _activate(self, pre: Tensor) -> Tensor:
        """Codes of pre-activations, latent-major, (n, r) both."""
        raise NotImplementedError

    def _backward(self, pre: Tensor, codes: Tensor, grad_codes: Tensor, coefficient: float) -> Tensor:
        """Sum of the penalty over these rows. Turns `grad_codes`, in place, from the error's gradient for codes into the loss's for
        pre-activations, all (n, r); adds gradients of parameters of its own. `coefficient` is the weight of this sum in the loss."""
        raise NotImplementedError

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, step: StepInfo) -> dict[str, Tensor]:
        self._take_grads()
        for parameter in self.parameters():
            parameter.grad.zero_()
        b, coefficient = len(x), self.config.sparsity * step.sparsity_factor / len(x)
        encoder, decoder = self.encoder(), self.decoder()
        centred = torch.sub(x, self.b_dec, out=self._workspace.take("centred", x.shape, x))
        squared_error, penalty, active, grad_x_hat_sum = (torch.zeros((), dtype=x.dtype, device=x.device) for _ in range(4))
        fired = self._fired.zero_()
        for part, pre in kernels.pre_activation_chunks(centred, encoder, self.b_enc, self._workspace):
            codes = self._activate(pre)
            error = centred[part] - codes.T @ decoder
            squared_error += kernels.sum_of_squares(error) / b
            grad_x_hat = error.mul_(-2 * self.error_weight / b)
            grad_pre = torch.mm(decoder, grad_x_hat.T, out=self._workspace.take("grad_pre", pre.shape, pre))
            penalty += self._backward(pre, codes, grad_pre, coefficient) / b
            self._add_weight_grads(codes, grad_x_hat, grad_pre, centred[part])
            grad_x_hat_sum = grad_x_hat_sum + grad_x_hat.sum(0)
            on = codes > 0
            active += on.sum() / b
            fired |= on.any(1)
        self._finish_grads(grad_x_hat_sum)
        loss = self.error_weight * squared_error + self.config.sparsity * step.sparsity_factor * penalty
        return {"loss": loss, "squared_error": squared_error, "l0": active, "penalty": penalty}

    def _add_weight_grads(self, codes: Tensor, grad_x_hat: Tensor, grad_pre: Tensor, centred: Tensor) -> None:
        self.W_dec.grad.addmm_(codes, grad_x_hat)
        self.W_enc.grad.addmm_(grad_pre, centred)
        self.b_enc.grad.add_(grad_pre.sum(1))

    def _finish_grads(self, grad_x_hat_sum: Tensor) -> None:
        # x − b_dec enters both the encoder and the error: b_dec's gradient needs no dense gradient of the input
        torch.sub(grad_x_hat_sum, self.b_enc.grad @ self.W_enc, out=self.b_dec.grad)
