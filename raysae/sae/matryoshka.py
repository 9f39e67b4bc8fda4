"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries that each reconstruct the input.

The latents are divided into groups, `train.group_shares` of the width each. Prefix m is the first m groups. The codes
are BatchTopK's, selected once for the whole width.

Loss = Σ over prefixes of the mean over rows of ‖x − x̂_m‖², unweighted and with the full width included, where x̂_m
decodes the latents of prefix m alone. AuxK and the threshold of inference are BatchTopK's, with the error of the full
width.

Each group takes what the groups before it have left: e_m = e_{m−1} − codes_m · W_m. Group m is part of the prefixes
from m on, so that Σ_{l ≥ m} e_l pulls its weights. That costs one dense product a step, as in BatchTopK, however many
groups. `naive.matryoshka` in `tests/sae/naive.py` is the readable version.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from raysae.config import SAEConfig, TrainConfig
from raysae.kernels.codes import Nonzeros, starts_of
from raysae.kernels.products import code_matrix
from raysae.kernels.rows import sum_of_squares
from raysae.sae.batchtopk import BatchTopK
from raysae.sae.topk import Fit


class Matryoshka(BatchTopK):
    """BatchTopK whose prefixes of the dictionary reconstruct too. `groups` are the latents of each group."""

    KNOBS = ("group_shares",)

    def __init__(self, config: SAEConfig, d: int, train: TrainConfig):
        super().__init__(config, d, train)
        self.groups = groups_of(self.n, train.group_shares)

    def _fit(self, codes: Nonzeros, x: Tensor, target: Tensor) -> Fit:
        matrices, errors = [], [target]
        for number, group in enumerate(self.groups):
            workspace = self._workspace.part(number)  # The codes of all groups are in use at once
            matrix = code_matrix(_within(codes, group), len(group), workspace, precision=self.precision)
            errors.append(matrix.residual(errors[-1], self.W_dec[group.start : group.stop]))
            matrices.append(matrix)

        loss = sum(sum_of_squares(error) for error in errors[1:]) / len(x)
        pull = None
        for group, matrix, error in reversed(list(zip(self.groups, matrices, errors[1:], strict=True))):
            pull = error if pull is None else pull + error
            part = slice(group.start, group.stop)
            matrix.backward(-2 / len(x), pull, x, self.W_enc.grad[part], self.b_enc.grad[part], self.W_dec.grad[part])
        return Fit(errors[-1], pull, loss)


def groups_of(n: int, shares: list[float]) -> list[range]:
    """The latents of each group. Groups that would be empty are left out, and the last takes what rounding leaves."""
    edges = [round(n * share) for share in itertools.accumulate(shares)]
    edges[-1] = n
    return [range(first, last) for first, last in itertools.pairwise([0, *edges]) if first < last]


def _within(codes: Nonzeros, group: range) -> Nonzeros:
    """The nonzeros of the group's latents, counted from the group's first."""
    there = ((codes.features >= group.start) & (codes.features < group.stop)).nonzero().squeeze(1)
    rows = codes.rows[there]
    return Nonzeros(codes.features[there] - group.start, codes.values[there], rows, starts_of(rows, len(codes.starts)))
