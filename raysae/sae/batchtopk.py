"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the b·k largest positive pre-activations of a batch of b rows; loss and AuxK as TopK.

Selection over a batch exists in training only. `encode` keeps what lies above `threshold`, the running mean of each batch's smallest selected
value, so that the codes of a row do not depend on its company.
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

AVERAGED_STEPS = 100  # the running mean is plain over the first so many steps, then exponential with this time constant


class BatchTopK(TopK):
    """x̂ from the pre-activations above one threshold, k per row on average."""

    SAVED = (*TopK.SAVED, "threshold")

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_steps", torch.zeros((), dtype=torch.int64))
        self._smallest: Tensor | None = None

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
        self._smallest = top.values.min() if len(top.values) else None
        codes = top.nonzeros(len(centred))
        if dead is None:
            return codes, None
        values, places = (torch.cat(parts) for parts in zip(*dead_tops, strict=True))
        return codes, DeadCodes(dead, places, values.relu_())

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        if self._smallest is not None:
            self.threshold_steps += 1
            self.threshold.lerp_(self._smallest, 1 / self.threshold_steps.clamp(max=AVERAGED_STEPS).to(self.threshold))

    def saved(self) -> dict[str, Tensor]:
        """Files have a threshold for each latent."""
        return super().saved() | {"threshold": self.threshold.expand(self.n)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore({**tensors, "threshold": tensors["threshold"][0]})

    def _in_activation_units(self) -> list[Tensor]:
        return [*super()._in_activation_units(), self.threshold]
