"""TODO docstring."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.kernels.buffers import OUTER_BYTES, rows_of
from raysae.kernels.compiled import compiled

# ---------------------------------------------------------------- products with sparse codes


class Nonzeros(NamedTuple):
    """The nonzeros of a (b, n) code matrix, grouped by row."""

    features: Tensor  # (N,) int64
    values: Tensor  # (N,)
    rows: Tensor  # (N,) int64, ascending
    starts: Tensor  # (b,) int64

    @classmethod
    def of_rows(cls, indices: Tensor, values: Tensor) -> Nonzeros:
        """Of `indices` and `values` (b, k)."""
        b, k = indices.shape
        starts = torch.arange(0, b * k, k, device=indices.device)
        rows = torch.arange(b, device=indices.device).repeat_interleave(k)
        return cls(indices.flatten(), values.flatten(), rows, starts)


def starts_of(ascending: Tensor, bins: int) -> Tensor:
    """Where each of the numbers 0 … bins − 1 starts in the list `ascending`, (bins,)."""
    return torch.searchsorted(ascending, torch.arange(bins, dtype=ascending.dtype, device=ascending.device))


def order_of(keys: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """What sorts `keys` (N,) int64, stably: (N,), and where each of the numbers 0 … bins − 1 then starts: (bins,). Keys are not checked."""
    if keys.device.type != "cpu":
        ordered, order = keys.to(torch.int32).sort(stable=True)  # in half the time of 64 bits
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
    """Σ over a feature's nonzeros of values · source[row], for `rows` and `values` (N,) sorted by feature, feature f from starts[f] on, and `source`
    (b, d): blocks of features and their sums (·, d), so that there is no second matrix of the size of all."""
    block = rows_of(OUTER_BYTES, source)
    edges = [*starts[::block].tolist(), len(values)]
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        features = slice(i * block, (i + 1) * block)
        yield features, embedding_bag(rows[begin:end], source, starts[features] - begin, mode="sum", per_sample_weights=values[begin:end])


class ByFeature:
    """The same nonzeros sorted by feature, for products that end in one row per feature."""

    def __init__(self, codes: Nonzeros, n: int):
        self.order, self.starts = order_of(codes.features, n)
        self.rows = codes.rows.index_select(0, self.order)
        self.b = len(codes.starts)

    def outer_(self, out: Tensor, values: Tensor, source: Tensor, add_to: Tensor | None = None) -> None:
        """Σ over a feature's nonzeros of values · source[row], with `source` (b, d), written to the feature's row of `out` (n, d).

        With `add_to` (n,) feature f is added to row add_to[f] of a larger `out` instead.
        """
        for features, sums in outer_blocks(self.rows, values.index_select(0, self.order), self.starts, source):
            if add_to is None:
                out[features] = sums
            else:
                out.index_add_(0, add_to[features], sums)

    def sum_(self, out: Tensor, values: Tensor, add_to: Tensor | None = None) -> None:
        """Σ of a feature's values, into `out` (n,), or added to it, as in `outer_`."""
        self.outer_(out.unsqueeze(1), values, values.new_ones(self.b, 1), add_to)
