"""Small operations on the rows of matrices: sums, norms, writing and adding rows, and the geometric median.

On a CPU they go over a matrix in blocks that stay in its cache. On a GPU Triton does several operations in one pass.
Names that end in _ change their argument in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from raysae.kernels.backends import for_triton
from raysae.kernels.buffers import PASS_BYTES, rows_of


def sum_of_squares(matrix: Tensor) -> Tensor:
    """The sum of the squares of all elements, a scalar in the dtype of `matrix`."""
    flat = matrix.flatten()
    return flat.dot(flat)


def sum_of_rows(matrix: Tensor) -> Tensor:
    """The sum (d,) of the rows of `matrix` (b, d), in float64.

    A GPU would first write the whole matrix in float64. So it adds up to 64 rows in the matrix's own dtype before.
    """
    if matrix.is_cuda:
        matrix = matrix.unflatten(0, (-1, math.gcd(len(matrix), 64))).sum(1)
    return matrix.sum(0, dtype=torch.float64)


def put_(numbers: Tensor, places: Tensor, values: Tensor) -> None:
    """Writes `values` (m,) to the `places` (m,) of `numbers` (n,). Places must be distinct."""
    if cuda := for_triton(numbers):
        return cuda.put_(numbers, places, values)
    numbers[places] = values


def add_rows_(matrix: Tensor, places: Tensor, rows: Tensor) -> None:
    """Adds `rows` (m, d) to the rows `places` (m,) of `matrix` (n, d). Places must be distinct."""
    if cuda := for_triton(matrix):
        return cuda.add_rows_(matrix, places, rows)
    matrix.index_add_(0, places, rows)


def unit_rows(matrix: Tensor) -> Tensor:
    """The rows of `matrix` (n, d) divided by their norm."""
    return matrix / row_norms(matrix)


def row_norms(matrix: Tensor) -> Tensor:
    """The norms (n, 1) of the rows of `matrix` (n, d), to divide by. A row of zeros gets the smallest normal number."""
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def norm_limit(norms: Tensor, multiple: float) -> float:
    """The norm above which a row is an outlier: `multiple` times the median of `norms` (r,).

    Where that is 0, nothing is an outlier, and the limit is infinite.
    """
    return multiple * float(norms.median()) or math.inf


def without_outliers(rows: Tensor, multiple: float) -> Tensor:
    """The rows of `rows` (r, d) that are no outliers, see `norm_limit`. Without outliers, `rows` itself."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    outliers = norms > norm_limit(norms, multiple)
    return rows[~outliers] if bool(outliers.any()) else rows


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same rows of matrices of one shape, as many at a time as `PASS_BYTES` allows."""
    rows = rows_of(PASS_BYTES[matrices[0].device.type], matrices[0])
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def normalise_rows_(matrix: Tensor) -> None:
    """Divides each row of `matrix` (n, d) by its norm. A row of zeros stays."""
    if cuda := for_triton(matrix):
        return cuda.normalise_rows_(matrix)
    for (rows,) in row_blocks(matrix):
        rows.div_(row_norms(rows))


def remove_parallel_(gradient: Tensor, unit: Tensor) -> None:
    """Subtracts from each row of `gradient` its component along the same row of `unit`. Both are (n, d)."""
    if cuda := for_triton(gradient):
        return cuda.remove_parallel_(gradient, unit)
    for gradients, units in row_blocks(gradient, unit):
        gradients.addcmul_(units, torch.linalg.vecdot(gradients, units).unsqueeze(1), value=-1)


def geometric_median(rows: Tensor, tolerance: float = 1e-6, iterations: int = 500) -> Tensor:
    """The point (d,) of least mean distance to `rows` (r, d), by Weiszfeld's iteration in float64.

    Distances have a tiny lower bound, so it does no harm to start on a row.

    Args:
        rows: (r, d).
        tolerance: The iteration ends when a step is at most this share of the rows' mean distance.
        iterations: The most steps.
    """
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(rows - point, dim=1)
        spread = distances.mean()
        weights = 1 / distances.clamp_min(1e-9 * spread + torch.finfo(torch.float64).tiny)
        new = weights @ rows / weights.sum()
        moved = torch.linalg.vector_norm(new - point)
        point = new
        if not moved > tolerance * spread:  # Also true if rows are not finite
            break
    return point
