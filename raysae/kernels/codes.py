"""Sparse code matrices as lists of their nonzeros, and the products that end in one row per feature.

A code matrix is (b, n): rows of the batch × features. A *feature* is a column: a latent of the dictionary, or a place
in a list of latents. Nonzeros come grouped by row. Gradients of weights need them by feature, so `ByFeature` sorts them
once per backward pass. Each feature's sum then has a fixed order, and gives the same bits every time.

Every product here is an embedding bag: a weighted sum of rows of a dense matrix. So neither a dense code matrix nor a
gathered (N, d) tensor exists. Products that end in one row per row of the batch are in `products.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.kernels.buffers import OUTER_BYTES, rows_of
from raysae.kernels.compiled import compiled


class Nonzeros(NamedTuple):
    """The nonzeros of a (b, n) code matrix, grouped by row."""

    features: Tensor  # (N,) int64
    values: Tensor  # (N,)
    rows: Tensor  # (N,) int64, ascending
    starts: Tensor  # (b,) int64: the place where each row begins

    @classmethod
    def of_rows(cls, indices: Tensor, values: Tensor) -> Nonzeros:
        """The nonzeros of rows that have `values` (b, k) at the features `indices` (b, k)."""
        b, k = indices.shape
        starts = torch.arange(0, b * k, k, device=indices.device)
        rows = torch.arange(b, device=indices.device).repeat_interleave(k)
        return cls(indices.flatten(), values.flatten(), rows, starts)


def starts_of(ascending: Tensor, bins: int) -> Tensor:
    """The places (bins,) where each of the numbers 0 … bins − 1 begins in the sorted list `ascending`."""
    return torch.searchsorted(ascending, torch.arange(bins, dtype=ascending.dtype, device=ascending.device))


def order_of(keys: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sorts `keys` (N,) int64 stably, by counting on a CPU. Its plain twin is `keys.sort(stable=True)`.

    Keys must be in 0 … bins − 1. They are not checked.

    Returns:
        The order (N,) that sorts them, and the places (bins,) where each number then begins.
    """
    if keys.device.type != "cpu":
        ordered, order = keys.to(torch.int32).sort(stable=True)  # Half the time of sorting 64 bits
        return order, starts_of(ordered, bins)
    order, starts = torch.empty_like(keys), keys.new_empty(bins)
    _order_of(keys.numpy(), order.numpy(), starts.numpy())
    return order, starts


@compiled
def _order_of(keys, order, starts):
    starts[:] = 0
    for key in keys:
        starts[key] += 1
    total = 0
    for key in range(len(starts)):
        starts[key], total = total, total + starts[key]
    free = starts.copy()
    for i in range(len(keys)):
        order[free[keys[i]]] = i
        free[keys[i]] += 1


def outer_blocks(rows: Tensor, values: Tensor, starts: Tensor, source: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Sums values · source[row] over each feature's nonzeros, a block of features at a time.

    Blocks spare a second matrix of the size of all sums.

    Args:
        rows: (N,), sorted by feature.
        values: (N,), in the same order.
        starts: The place where each feature begins in both.
        source: (b, d).

    Yields:
        Features, and their sums (·, d).
    """
    block = rows_of(OUTER_BYTES, source)
    edges = [*starts[::block].tolist(), len(values)]
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        features = slice(i * block, (i + 1) * block)
        yield (
            features,
            embedding_bag(
                rows[begin:end], source, starts[features] - begin, mode="sum", per_sample_weights=values[begin:end]
            ),
        )


class ByFeature:
    """Nonzeros sorted by feature, for products that end in one row per feature."""

    def __init__(self, codes: Nonzeros, n: int):
        self.order, self.starts = order_of(codes.features, n)
        self.rows = codes.rows.index_select(0, self.order)
        self.b = len(codes.starts)

    def outer_(self, out: Tensor, values: Tensor, source: Tensor, add_to: Tensor | None = None) -> None:
        """Writes Σ values · source[row] over each feature's nonzeros into the feature's row of `out` (n, d).

        The plain twin is `out = codes.T @ source` with a dense code matrix that holds `values`.

        Args:
            out: (n, d), or larger with `add_to`.
            values: (N,), in the order of the nonzeros before sorting.
            source: (b, d).
            add_to: (n,). Feature f is added to row add_to[f] of `out` instead. Rows must be distinct.
        """
        for features, sums in outer_blocks(self.rows, values.index_select(0, self.order), self.starts, source):
            if add_to is None:
                out[features] = sums
            else:
                out.index_add_(0, add_to[features], sums)

    def sum_(self, out: Tensor, values: Tensor, add_to: Tensor | None = None) -> None:
        """Writes the sum of each feature's values into `out` (n,), or adds it there, as `outer_` does."""
        self.outer_(out.unsqueeze(1), values, values.new_ones(self.b, 1), add_to)
