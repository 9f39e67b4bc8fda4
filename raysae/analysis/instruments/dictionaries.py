"""How alike two dictionaries are, with features as rows.

MMCS (see the specs) is asymmetric and takes no absolute value.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from raysae.kernels.rows import unit_rows

CHUNK_BYTES = 64 << 20  # Cosines held at once


def max_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Largest cosine of each row of `a` (n_a, d) with any row of `b` (n_b, d), (n_a,)."""
    a, b = unit_rows(a.float()), unit_rows(b.float())
    rows = max(1, CHUNK_BYTES // (4 * len(b)))
    return torch.cat([(part @ b.T).amax(1) for part in a.split(rows)])


def mmcs(a: Tensor, b: Tensor) -> float:
    """Mean over a's rows of the largest cosine with any row of b."""
    return max_cosines(a, b).mean().item()


def fraction_above(a: Tensor, b: Tensor, cosine: float = 0.9) -> float:
    """Share of a's rows whose largest cosine with any row of b exceeds `cosine`."""
    return (max_cosines(a, b) > cosine).float().mean().item()


def matched_mmcs(a: Tensor, b: Tensor) -> float:
    """Mean cosine under the one-to-one matching of rows that makes it largest (Hungarian).

    The larger dictionary's other rows stay single.
    """
    cosines = (unit_rows(a.float()) @ unit_rows(b.float()).T).numpy(force=True)
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean())
