"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest pre-activations of each row, then ReLU; dead latents revived by AuxK.

Loss = mean over rows of ‖x − x̂‖² + aux_coefficient · d · ‖e − ê‖² / ‖e − ē‖², where e = x − x̂ (a constant here) and ê is its reconstruction
from the k_aux dead latents of largest pre-activation, k_aux = d/2 rounded to a power of two, or from all of them where there are fewer.
Rows are scaled so that the mean of ‖x‖² is d: both terms are then fractions of Σ‖x‖² or of an error's variance, times d. In the paper the first is a
fraction of the variance; where the mean of x is large, AuxK weighs accordingly less here.

The gradients are written by hand: one dense product per step (the pre-activations, or bounds of them in integers), everything else touches active
latents only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raysae.kernels.codes import Nonzeros
from raysae.kernels.products import code_matrix
from raysae.kernels.rows import sum_of_squares
from raysae.kernels.screening import top_pre_activations
from raysae.sae.base import SAE, Codes, StepInfo

AUX_NONZEROS = {"cpu": 1 << 19, "cuda": 1 << 21}  # of AuxK handled at a time


@dataclass(frozen=True)
class DeadCodes:
    """Codes of AuxK for a whole batch: places in `dead` and values, (b, k_aux) each."""

    dead: Tensor  # (n_dead,) int64: which latents are dead
    places: Tensor
    values: Tensor


class Fit(NamedTuple):
    """What the reconstruction of a batch leaves."""

    error: Tensor  # (b, d), target − x̂
    pull: Tensor  # (b, d), −b/2 times the loss's gradient for x̂: the error itself, or a sum of errors
    loss: Tensor | None = None  # Mean over rows of what is minimised. None: of ‖error‖²


class TopK(SAE):
    """x̂ from the k largest pre-activations of each row that are positive."""

    FACTOR_WITHOUT_DIRECTION = 0.0  # Its owner ranks such a latent with a pre-activation of 0

    @property
    def code_width(self) -> int:
        return 3 * self.config.k  # a value and an index of 8 bytes each

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes | Tensor:
        values, indices = top_pre_activations(x - self.b_dec, self.W_enc, self.b_enc, self.config.k, self._workspace)
        return Codes(values.relu_(), indices)

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, target: Tensor, step: StepInfo) -> dict[str, Tensor]:
        self._take_grads()
        centred, wanted = self._centred(x, target)
        dead = (
            torch.nonzero(step.dead).squeeze(1) if step.dead is not None and self.train_config.aux_coefficient else None
        )
        low = centred if self.precision is None else centred.to(self.precision)
        codes, dead_codes = self._select(low, dead if dead is not None and len(dead) else None)
        active = codes.values > 0

        fit = self._fit(codes, low, wanted)
        squared_error = sum_of_squares(fit.error) / len(x)
        loss = squared_error if fit.loss is None else fit.loss
        terms = {"loss": loss, "squared_error": squared_error, "l0": active.sum() / len(x)}
        if dead_codes is not None:
            terms["aux"] = self._aux(dead_codes, centred, wanted, fit.error)
            terms["loss"] = loss + self.train_config.aux_coefficient * self.d_out * terms["aux"]

        # b_dec is in the encoder's input and in the error. Its gradient needs no dense gradient of the input.
        torch.sub(fit.pull.sum(0).mul_(-2 / len(x)), self.b_enc.grad @ self.W_enc, out=self.b_dec.grad)
        # a place behind the last latent's for what is not active: to leave it out, a GPU would wait for how much that is
        fired = torch.zeros(self.n + 1, dtype=torch.bool, device=x.device).index_fill_(
            0, codes.features.where(active, self.n), True
        )
        self._fired.copy_(fired[:-1])
        return terms

    def _fit(self, codes: Nonzeros, x: Tensor, target: Tensor) -> Fit:
        """How well `codes` reconstruct `target` (b, d). Writes the gradients of W_enc, b_enc and W_dec.

        `x` (b, d) is the encoder's input. Both are less b_dec.
        """
        matrix = code_matrix(codes, self.n, self._workspace, precision=self.precision)
        error = matrix.residual(target, self.W_dec)
        matrix.backward(-2 / len(x), error, x, self.W_enc.grad, self.b_enc.grad, self.W_dec.grad)
        return Fit(error, error)

    def _select(self, centred: Tensor, dead: Tensor | None) -> tuple[Nonzeros, DeadCodes | None]:
        """The batch's codes, and AuxK's where there are dead latents, from x − b_dec (b, d), rounded to `precision` already."""
        weight = self.W_enc.to(centred.dtype)
        values, indices = top_pre_activations(
            centred, weight, self.b_enc, self.config.k, self._workspace, self.precision
        )
        codes = Nonzeros.of_rows(indices, values.relu_())
        if dead is None:
            return codes, None
        k_aux = min(self.k_aux, len(dead))
        values, places = top_pre_activations(centred, weight, self.b_enc, k_aux, self._workspace, self.precision, dead)
        return codes, DeadCodes(dead, places, values.relu_())

    @property
    def k_aux(self) -> int:
        """d/2 rounded (in the exponent) to a power of two."""
        return 2 ** max(0, round(math.log2(self.d_out / 2)))

    def _aux(self, codes: DeadCodes, centred: Tensor, target: Tensor, error: Tensor) -> Tensor:
        """‖e − ê‖² / ‖e − ē‖² of the batch's `error` (b, d); adds the gradients of its share of the loss."""
        variance = sum_of_squares(error - error.mean(0))
        # rows with no error, or one row alone, have nothing to normalise by: no AuxK then
        enough = variance > torch.finfo(error.dtype).eps * sum_of_squares(target)
        share = torch.where(enough, 1 / variance, 0)
        weight = 2 * self.train_config.aux_coefficient * self.d_out * share
        missed = torch.zeros_like(variance)
        rows = max(1, AUX_NONZEROS[error.device.type] // codes.places.shape[1])
        for start in range(0, len(error), rows):
            part = slice(start, start + rows)
            nonzeros = Nonzeros.of_rows(codes.places[part], codes.values[part])
            matrix = code_matrix(nonzeros, len(codes.dead), self._workspace, codes.dead, self.precision)
            left = matrix.residual(error[part], self.W_dec)
            missed += sum_of_squares(left)
            matrix.backward(-weight, left, centred[part], self.W_enc.grad, self.b_enc.grad, self.W_dec.grad)
        return missed * share
