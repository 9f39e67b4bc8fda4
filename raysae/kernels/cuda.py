"""Triton kernels for a TopK step on a GPU: the largest pre-activations, and products with sparse codes.

Dense products stay with cuBLAS. Matrices come in the products' number format, bfloat16 or float32. Sums are float32.

The kernels for codes go over rows first and over strips of columns last. What programs read at a time, a strip of the
weights or of the batch, then stays in the GPU's cache. A latent's weights come from memory once, for all rows that
read them. There are no atomic additions, so the same input gives the same bits every time.

The k largest of a row are found as in `selection.py`. One kernel takes the maximum of every group of consecutive
latents. The next takes the k groups of largest maximum, and the last takes the k largest members of these. Both find a
bound that k elements reach, by halving an interval in registers.

Docstrings name plain twins, in `screening.py`, `products.py`, `codes.py` and `rows.py`. `tests/sae/naive.py` is the
short readable version of a whole training step. Raise `backends.VERSION` with a change here that gives other bits.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

from raysae.kernels.buffers import Workspace, power_of_two
from raysae.kernels.codes import ByFeature, Nonzeros

SCORES = 1 << 30  # Bytes of pre-activations at a time
# Columns of a program, which is one warp. It sums over nonzeros within a thread, and over columns without a barrier.
STRIP = 256
PER_ROW, PER_FEATURE = 8, 4  # Nonzeros of a row, or of a feature, that a program loads at a time
TILE = 8192  # Numbers that a program handles at a time: pre-activations of one row, or places of `put_`
# Rows of a program of `_group_maxima`, and rows at a time. A grid's second dimension has at most 65,535 programs.
ROWS, MOST_ROWS = 8, 1 << 18
LEAST = tl.constexpr(-(2**31))  # Less than the key of every number


def top_pre_activations(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, workspace: Workspace, precision: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """`screening.top_pre_activations` on a GPU.

    With `precision`, pre-activations are rounded to it before the bias is added.
    """
    x, weight = (matrix if precision is None else matrix.to(precision) for matrix in (x, weight))
    found = []
    for part in x.split(min(MOST_ROWS, power_of_two(max(1, SCORES // (len(weight) * x.element_size()))))):
        scores = torch.mm(part, weight.T, out=workspace.take("pre_activations", (len(part), len(weight)), part))
        found.append(top_k(scores, bias, k))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def top_k(scores: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest elements of each row of `scores` + `bias`, by three kernels.

    The plain twin is `(scores.float() + bias).topk(k)`. NaN counts as +∞. Of equal elements the first are taken.

    Args:
        scores: (r, n), bfloat16 or float32.
        bias: (n,), float32.
        k: From 1 to n.

    Returns:
        Values, float32, and indices, int64 and ascending: (r, k) each.
    """
    r, n = scores.shape
    # Latents of a group: the k groups chosen then have about as many members as there are groups.
    members = 1 << (math.isqrt(n // k).bit_length() - 1)
    groups = triton.cdiv(n, members)
    maxima = torch.empty(r, groups, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(r, k, dtype=torch.int32, device=scores.device)
    values, indices = torch.empty_like(chosen, dtype=torch.float32), torch.empty_like(chosen, dtype=torch.int64)
    per_program, sets = max(1, TILE // members), triton.next_power_of_2(k)
    with torch.cuda.device_of(scores):
        _group_maxima[triton.cdiv(groups, per_program), triton.cdiv(r, ROWS)](
            scores, bias, maxima, r, n, groups, members, per_program, ROWS
        )
        size = triton.next_power_of_2(groups)
        _top_groups[r,](maxima, chosen, groups, k, size, sets, num_warps=warps(size))
        size = triton.next_power_of_2(k * members)
        _top_members[r,](scores, bias, chosen, values, indices, n, k, members, size, sets, num_warps=warps(size))
    return values, indices


def warps(elements: int) -> int:
    """Warps for a program that holds so many numbers in registers: from 4 to 16."""
    return min(16, max(4, elements // 1024))


@triton.jit
def _group_maxima(scores, bias, maxima, r, n, groups, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    offset = tl.load(bias + column, mask=column < n, other=0.0)
    for i in range(ROWS):
        row = tl.program_id(1).to(tl.int64) * ROWS + i
        score = (
            tl.load(scores + row * n + column, mask=(column < n) & (row < r), other=float("-inf")).to(tl.float32)
            + offset
        )
        score = tl.where(score == score, score, float("inf"))
        tl.store(maxima + row * groups + group, tl.max(score, 1), mask=(group < groups) & (row < r))


@triton.jit
def _top_groups(maxima, chosen, groups, k, SIZE: tl.constexpr, SETS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, SIZE)
    maximum = tl.load(maxima + row * groups + group, mask=group < groups, other=0.0)
    taken = _largest(tl.where(group < groups, _key(maximum), LEAST), k, SIZE, SETS)
    tl.store(chosen + row * k + tl.cumsum(taken.to(tl.int32), 0) - 1, group, mask=taken)


@triton.jit
def _top_members(
    scores, bias, chosen, values, indices, n, k, MEMBERS: tl.constexpr, SIZE: tl.constexpr, SETS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, SIZE)
    there = candidate < k * MEMBERS
    column = tl.load(chosen + row * k + candidate // MEMBERS, mask=there, other=0) * MEMBERS + candidate % MEMBERS
    there = there & (column < n)
    score = tl.load(scores + row * n + column, mask=there, other=0.0).to(tl.float32) + tl.load(
        bias + column, mask=there, other=0.0
    )
    score = tl.where(score == score, score, float("inf"))
    taken = _largest(tl.where(there, _key(score), LEAST), k, SIZE, SETS)
    place = row * k + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(values + place, score, mask=taken)
    tl.store(indices + place, column.to(tl.int64), mask=taken)


@triton.jit
def _key(score):
    """Integers that have the order of the floats `score`."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(keys, k, SIZE: tl.constexpr, SETS: tl.constexpr):
    """Marks the `k` largest of `keys` (SIZE,), and of equal ones the first. SETS is at least k."""
    bound = tl.min(tl.max(tl.reshape(keys, [SIZE // SETS, SETS]), 0), 0)  # At least k keys reach it: one of each set
    above = tl.max(keys, 0) + 1  # Fewer than k keys reach it
    # Half of their sum, rounded down. The sum itself may overflow 32 bits.
    middle = (bound & above) + ((bound ^ above) >> 1)
    reached = 0
    while (middle != bound) & (reached != k):
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        if reached >= k:
            bound = middle
        else:
            above = middle
        middle = (bound & above) + ((bound ^ above) >> 1)
    equal = keys == bound
    left = k - tl.sum((keys > bound).to(tl.int32), 0)
    return (keys > bound) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))


class FusedCodes:
    """`products.SparseCodes` on a GPU. Weights, errors and inputs are rounded to `precision` if there is one."""

    def __init__(self, codes: Nonzeros, n: int, latents: Tensor | None, precision: torch.dtype | None):
        self.codes, self.n, self.latents, self.precision = codes, n, latents, precision or torch.float32

    def residual(self, target: Tensor, weight: Tensor) -> Tensor:
        features = self.codes.features if self.latents is None else self.latents[self.codes.features]
        self._weight = weight.detach().to(self.precision)
        self._residual, self._rounded = residual(self.codes._replace(features=features), target, self._weight)
        return self._residual

    def backward(
        self, scale: float | Tensor, gradient: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
    ) -> None:
        rounded = self._rounded if gradient is self._residual else gradient.to(self.precision)
        by_feature = ByFeature(self.codes, self.n)
        products = by_feature.outer_(W_dec, self.codes.values * scale, rounded, self.latents, self._weight)
        grad_codes = products.mul_(scale).mul_(self.codes.values > 0)
        by_feature.outer_(W_enc, grad_codes, x.to(self.precision), self.latents)
        by_feature.sum_(b_enc, grad_codes, self.latents)


def residual(codes: Nonzeros, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`target` (b, d) minus codes (b, n) times `weight` (n, d). Its plain twin is `products.plain_residuals`.

    Returns:
        The residual (b, d) in float32, and again rounded to weight's number format.
    """
    b, d = target.shape
    found, rounded = torch.empty_like(target), torch.empty_like(target, dtype=weight.dtype)
    operands = codes.features, codes.values, codes.starts, target, weight, found, rounded
    with torch.cuda.device_of(target):
        _residual[b, triton.cdiv(d, STRIP)](*operands, b, len(codes.values), d, PER_ROW, STRIP, num_warps=1)
    return found, rounded


@triton.jit
def _residual(
    features, values, starts, target, weight, found, rounded, b, nonzeros, d, SOME: tl.constexpr, STRIP: tl.constexpr
):
    row = tl.program_id(0)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1, mask=row + 1 < b, other=nonzeros)
    column = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    inside = column < d
    left = tl.load(target + row.to(tl.int64) * d + column, mask=inside, other=0.0)
    for first in range(begin, end, SOME):
        i = first + tl.arange(0, SOME)
        feature = tl.load(features + i, mask=i < end, other=0)
        value = tl.load(values + i, mask=i < end, other=0.0)
        latent = tl.load(
            weight + feature[:, None] * d + column[None, :], mask=(i < end)[:, None] & inside[None, :], other=0.0
        )
        left -= tl.sum(value[:, None] * latent.to(tl.float32), 0)
    place = row.to(tl.int64) * d + column
    tl.store(found + place, left, mask=inside)
    tl.store(rounded + place, left.to(rounded.dtype.element_ty), mask=inside)


class ByFeature(ByFeature):
    """`codes.ByFeature` with a kernel for outer products."""

    def outer_(
        self, out: Tensor, values: Tensor, source: Tensor, add_to: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor | None:
        """Writes or adds the sums of `codes.ByFeature.outer_`, in float32.

        Returns:
            None, or with a `weight` of the shape of `out` source[row] · weight[feature] for each nonzero, (N,).
            With `add_to` the row of `weight` is add_to[feature].
        """
        n, d = len(self.starts), source.shape[1]
        strip = min(STRIP, triton.next_power_of_2(d))
        strips = triton.cdiv(d, strip)
        products = torch.empty(strips if weight is not None else 0, len(values), dtype=torch.float32, device=out.device)
        with torch.cuda.device_of(out):
            _outer[n, strips](
                out, self.order, self.rows, values[self.order], self.starts, source, weight, products, add_to,
                n, len(values), d, weight is not None, add_to is not None, PER_FEATURE, strip, num_warps=1,
            )  # fmt: skip
        return products.sum(0) if weight is not None else None


@triton.jit
def _outer(
    out, order, rows, values, starts, source, weight, products, add_to, n, nonzeros, d,
    PRODUCTS: tl.constexpr, ADD: tl.constexpr, SOME: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0)
    begin = tl.load(starts + feature)
    end = tl.load(starts + feature + 1, mask=feature + 1 < n, other=nonzeros)
    latent = tl.load(add_to + feature) if ADD else feature.to(tl.int64)
    column = tl.program_id(1) * STRIP + tl.arange(0, STRIP)
    inside = column < d
    if PRODUCTS:
        own = tl.load(weight + latent * d + column, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([STRIP], tl.float32)
    if ADD:
        sums += tl.load(out + latent * d + column, mask=inside, other=0.0)
    for first in range(begin, end, SOME):
        i = first + tl.arange(0, SOME)
        row = tl.load(rows + i, mask=i < end, other=0)
        value = tl.load(values + i, mask=i < end, other=0.0)
        x = tl.load(
            source + row[:, None] * d + column[None, :], mask=(i < end)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        sums += tl.sum(value[:, None] * x, 0)
        if PRODUCTS:
            place = tl.load(order + i, mask=i < end, other=0)
            tl.store(
                products + tl.program_id(1).to(tl.int64) * nonzeros + place, tl.sum(x * own[None, :], 1), mask=i < end
            )
    tl.store(out + latent * d + column, sums, mask=inside)


def put_(numbers: Tensor, places: Tensor, values: Tensor) -> None:
    """`rows.put_` on a GPU. PyTorch would sort the places to give the same bits every time. This does not need to."""
    with torch.cuda.device_of(numbers):
        _put[triton.cdiv(len(places), TILE),](numbers, places, values, len(places), TILE)


@triton.jit
def _put(numbers, places, values, m, TILE: tl.constexpr):
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(numbers + tl.load(places + i, mask=i < m, other=0), tl.load(values + i, mask=i < m), mask=i < m)


def add_rows_(matrix: Tensor, places: Tensor, rows: Tensor) -> None:
    """`rows.add_rows_` on a GPU. It does not sort the places either."""
    m, d = rows.shape
    with torch.cuda.device_of(matrix):
        _add_rows[m,](matrix, places, rows, d, triton.next_power_of_2(d), num_warps=warps(d))


@triton.jit
def _add_rows(matrix, places, rows, d, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    row = tl.program_id(0)
    place = tl.load(places + row) * d + column
    more = tl.load(rows + row.to(tl.int64) * d + column, mask=column < d, other=0.0)
    tl.store(matrix + place, tl.load(matrix + place, mask=column < d, other=0.0) + more, mask=column < d)


def remove_parallel_(gradient: Tensor, unit: Tensor) -> None:
    """`rows.remove_parallel_` on a GPU, in one pass."""
    n, d = gradient.shape
    with torch.cuda.device_of(gradient):
        _remove_parallel[n,](gradient, unit, d, triton.next_power_of_2(d), num_warps=warps(d))


@triton.jit
def _remove_parallel(gradient, unit, d, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    place = tl.program_id(0).to(tl.int64) * d + column
    own = tl.load(gradient + place, mask=column < d, other=0.0)
    along = tl.load(unit + place, mask=column < d, other=0.0)
    tl.store(gradient + place, own - tl.sum(own * along, 0) * along, mask=column < d)


def normalise_rows_(matrix: Tensor) -> None:
    """`rows.normalise_rows_` on a GPU, in one pass."""
    n, d = matrix.shape
    with torch.cuda.device_of(matrix):
        _normalise_rows[n,](matrix, torch.finfo(matrix.dtype).tiny, d, triton.next_power_of_2(d), num_warps=warps(d))


@triton.jit
def _normalise_rows(matrix, least, d, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    place = tl.program_id(0).to(tl.int64) * d + column
    row = tl.load(matrix + place, mask=column < d, other=0.0)
    tl.store(matrix + place, row / tl.maximum(tl.sqrt(tl.sum(row * row, 0)), least), mask=column < d)
