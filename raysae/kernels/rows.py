"""TODO docstring."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from raysae.kernels.backends import for_triton
from raysae.kernels.buffers import PASS_BYTES, rows_of

# ---------------------------------------------------------------- small parts


def sum_of_squares(matrix: Tensor) -> Tensor:
    flat = matrix.flatten()
    return flat.dot(flat)


def sum_of_rows(matrix: Tensor) -> Tensor:
    """(d,) float64 for `matrix` (b, d); a GPU, which would write all of it in float64 first, adds up to 64 rows in its own format."""
    if matrix.is_cuda:
        matrix = matrix.unflatten(0, (-1, math.gcd(len(matrix), 64))).sum(1)
    return matrix.sum(0, dtype=torch.float64)


def put_(numbers: Tensor, places: Tensor, values: Tensor) -> None:
    """Writes `values` (m,) to the `places` (m,), all different, of `numbers` (n,)."""
    if cuda := for_triton(numbers):
        return cuda.put_(numbers, places, values)
    numbers[places] = values


def add_rows_(matrix: Tensor, places: Tensor, rows: Tensor) -> None:
    """Adds `rows` (m, d) to the rows `places` (m,), all different, of `matrix` (n, d)."""
    if cuda := for_triton(matrix):
        return cuda.add_rows_(matrix, places, rows)
    matrix.index_add_(0, places, rows)


def unit_rows(matrix: Tensor) -> Tensor:
    """The rows of `matrix` (n, d) divided by their norm."""
    return matrix / row_norms(matrix)


def row_norms(matrix: Tensor) -> Tensor:
    """(n, 1); a row of zeros counts as having the smallest norm above 0, so that it can be divided by."""
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of matrices of one shape, as many at a time as `PASS_BYTES` allows."""
    rows = rows_of(PASS_BYTES[matrices[0].device.type], matrices[0])
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def normalise_rows_(matrix: Tensor) -> None:
    if cuda := for_triton(matrix):
        return cuda.normalise_rows_(matrix)
    for (rows,) in row_blocks(matrix):
        rows.div_(row_norms(rows))


def remove_parallel_(gradient: Tensor, unit: Tensor) -> None:
    """Subtracts from each row of `gradient` its part along the same row of `unit`, (n, d) both."""
    if cuda := for_triton(gradient):
        return cuda.remove_parallel_(gradient, unit)
    for gradients, units in row_blocks(gradient, unit):
        gradients.addcmul_(units, torch.linalg.vecdot(gradients, units).unsqueeze(1), value=-1)


def geometric_median(rows: Tensor, tolerance: float = 1e-6, iterations: int = 500) -> Tensor:
    """The point (d,) of least mean distance to `rows` (r, d), by Weiszfeld's iteration in float64, to `tolerance` of the rows' mean distance.

    Rows closer to the present point than a trifle count as that far away, so that starting on a row does no harm."""
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(rows - point, dim=1)
        spread = distances.mean()
        weights = 1 / distances.clamp_min(1e-9 * spread + torch.finfo(torch.float64).tiny)
        new = weights @ rows / weights.sum()
        moved = torch.linalg.vector_norm(new - point)
        point = new
        if not moved > tolerance * spread:  # also where rows are not finite
            break
    return point
