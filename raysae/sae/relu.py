"""ReLU with an L1 penalty on the codes; decoder rows have norm 1, so that the penalty cannot be evaded.

Loss = mean over rows of ‖x − x̂‖² + sparsity · mean over rows of ‖c‖₁, in normalised units (mean of ‖x‖² is d).
"""

from __future__ import annotations

from torch import Tensor

from raysae.kernels.elements import All, Few
from raysae.sae.dense import DenseSAE, Rows


class ReLU(DenseSAE):
    """c = ReLU(W_enc (x − b_dec) + b_enc)."""

    def _matter(self, pre: Tensor) -> Tensor:
        return (pre <= 0).logical_not_()

    def _activate(self, pre: Tensor, elements: All | Few) -> Tensor:
        return pre.relu()

    def _backward(
        self, rows: Rows, elements: All | Few, pre: Tensor, codes: Tensor, grad_codes: Tensor
    ) -> dict[str, Tensor]:
        grad_codes.add_(rows.coefficient).mul_(codes > 0)
        return {"penalty": codes.sum()}
