"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the b·k largest positive pre-activations of a batch of b rows.

The readable twin is `batchtopk` in `tests/sae/naive.py`. Loss and AuxK are those of TopK.

Rows compete in training only. `encode` keeps what lies above `threshold`, so a row's codes do not depend on the rows
beside it. `calibrate` chooses the threshold at which k latents per row are active on average, with the present
weights. The paper averages each batch's smallest selected value over training. That lags behind the weights: early in
training far fewer than k latents would be active.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.codes import Nonzeros
from raysae.kernels.products import pre_activation_chunks
from raysae.kernels.selection import BatchTop, top_k
from raysae.sae.topk import DeadCodes, TopK


class BatchTopK(TopK):
    """x̂ comes from the pre-activations above one threshold, k per row on average."""

    SAVED = (*TopK.SAVED, "threshold")
    CALIBRATION_ROWS = 8192

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def code_width(self) -> int:
        return self.n

    def encode(self, x: Tensor) -> Tensor:
        pre = self.pre_activations(x)
        return (pre * (pre > self.threshold)).T

    def _select(self, centred: Tensor, dead: Tensor | None) -> tuple[Nonzeros, DeadCodes | None]:
        top, dead_tops = BatchTop(len(centred) * self.config.k, self.n, self.b_enc), []
        for rows, scores in pre_activation_chunks(
            centred, self.W_enc, self.b_enc, self._workspace, precision=self.precision
        ):
            top.add(rows.start, scores)
            if dead is not None:
                of_dead = torch.index_select(
                    scores, 0, dead, out=self._workspace.take("dead", (len(dead), scores.shape[1]), scores)
                )
                dead_tops.append(top_k(of_dead, min(self.k_aux, len(dead))))
        codes = top.nonzeros(len(centred))
        if dead is None:
            return codes, None
        values, places = (torch.cat(parts) for parts in zip(*dead_tops, strict=True))
        return codes, DeadCodes(dead, places, values.relu_())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Sets `threshold` so that k latents per row of `x` (r, d) are active on average.

        If fewer pre-activations are positive, the threshold lets all of these pass.
        """
        top = BatchTop(len(x) * self.config.k, self.n, self.b_enc)
        for rows, scores in pre_activation_chunks(x - self.b_dec, self.W_enc, self.b_enc, self._workspace):
            top.add(rows.start, scores)
        smallest = top.values.min() if len(top.values) else torch.zeros_like(self.threshold)
        # The next number below it, since active means above the threshold
        self.threshold.copy_(torch.nextafter(smallest, torch.zeros_like(smallest)))

    def saved(self) -> dict[str, Tensor]:
        """Repeats `threshold` for every latent, (n,), as files have it."""
        return super().saved() | {"threshold": self.threshold.expand(self.n)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore({**tensors, "threshold": tensors["threshold"][0]})

    def _in_activation_units(self) -> list[Tensor]:
        return [*super()._in_activation_units(), self.threshold]
