"""Selects the largest pre-activations, exactly: k of each row (`top_k`), or a number of a whole batch (`BatchTop`).

Pre-activations come latent-major, `scores` (n, r): latents × rows of the batch. `products.pre_activation_chunks` makes
them so. The short readable versions are `dense_top` in `tests/sae/naive.py`, and `torch.topk`.

On a CPU `top_k` is compiled, because `torch.topk` moves every element several times. It works in four steps per row.

    1. It takes the maximum of every group of some consecutive latents.
    2. It halves the interval of these maxima a few times, towards a bound that k of them just reach. At least k do.
    3. It collects elements at or above the bound, from the groups that reach it. The k largest are among them.
    4. It keeps the k largest of these.

Steps 1 and 2 go through many rows at once in vector registers. Steps 3 and 4 touch few elements. They touch more where
one maximum lies far from all others. Raise `backends.VERSION` with a change here that gives SAEs other bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from raysae.kernels.codes import Nonzeros, starts_of
from raysae.kernels.compiled import COMPILED, compiled, in_parts

STRIP, LANES = 64, 16  # Rows that are handled together, and rows of one comparison
HALVINGS = 8  # More make the bound tighter, and take longer


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest elements of each column of `scores` (n, r), in no particular order.

    Its plain twin is `scores.T.topk(k)`, which gives the same values. NaN counts as +∞. Of equal elements the same are
    taken every time. On a CPU the columns beside do not matter either.

    Returns:
        Values and indices, (r, k) each.

    Raises:
        ValueError: `k` is not in 1 … n.
    """
    n, r = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: from 1 to {n} is right for {n} latents")
    if scores.device.type != "cpu" or scores.dtype not in COMPILED:
        return torch.topk(scores.T.contiguous(), k, dim=1, sorted=False)
    values, indices = scores.new_empty(r, k), scores.new_empty(r, k, dtype=torch.int64)
    # Latents of a group. There are then at least k groups, and step 3 has about as much to do as step 2.
    members = math.isqrt(n // k)
    arguments = scores.contiguous().numpy(), k, members, values.numpy(), indices.numpy()
    in_parts(_select, r, LANES, *arguments)
    return values, indices


def top_of_chunks(chunks: Iterable[tuple[slice, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """`top_k` of chunks of columns, as `products.pre_activation_chunks` makes them: values and indices, (b, k) each."""
    values, indices = zip(*(top_k(scores, k) for _, scores in chunks), strict=True)
    return torch.cat(values), torch.cat(indices)


@compiled
def _select(scores, k, members, values, indices, first, last):
    """Selects from columns `first` to `last` of `scores` (n, r), into these rows of `values` and `indices` (r, k)."""
    groups, room = len(scores) // members, 2 * k + 16  # `_take` makes room where a column has more elements
    maxima = np.empty((groups, STRIP), scores.dtype)
    found, latents, counts = (
        np.empty((STRIP, room), scores.dtype),
        np.empty((STRIP, room), np.int64),
        np.empty(STRIP, np.int64),
    )
    for start in range(first, last, STRIP):
        width = min(STRIP, last - start)
        _group_maxima(scores, start, width, members, maxima)
        bound = bounds_of_largest(maxima, k)
        bound[width:] = np.inf
        counts[:] = 0
        _collect(scores, start, width, maxima, members, k, bound, found, latents, counts)
        for c in range(width):
            keep_largest(found[c], latents[c], counts[c], k)
            for i in range(k):
                indices[start + c, i] = latents[c, i]
                values[start + c, i] = scores[latents[c, i], start + c]


@compiled
def _group_maxima(scores, start, width, members, maxima):
    """Writes the maxima (groups, STRIP) of consecutive latents, for `width` columns of `scores` (n, r) from `start` on.

    Columns from `width` on get −∞.
    """
    maxima[:, width:] = -np.inf
    for g in range(len(maxima)):
        maximum = maxima[g]
        for c in range(width):
            maximum[c] = scores[g * members, start + c]
        for j in range(g * members + 1, (g + 1) * members):
            # One-dimensional and contiguous, or the loop would not be vectorised.
            row = scores[j, start : start + width]
            for c in range(width):  # A maximum becomes NaN, and stays so, where a member is NaN
                maximum[c] = maximum[c] if maximum[c] > row[c] or maximum[c] != maximum[c] else row[c]


@compiled
def bounds_of_largest(maxima, k):
    """A bound (STRIP,) for each column of `maxima` (groups, STRIP): at least k of its maxima are not below it."""
    half = maxima.dtype.type(0.5)
    low, high = np.full(STRIP, np.inf, maxima.dtype), np.full(STRIP, -np.inf, maxima.dtype)
    middle, reached = np.empty(STRIP, maxima.dtype), np.empty(STRIP, np.float32)
    for g in range(len(maxima)):
        row = maxima[g]
        for c in range(STRIP):
            low[c] = row[c] if row[c] < low[c] else low[c]
        for c in range(STRIP):
            high[c] = row[c] if row[c] > high[c] else high[c]
    for _ in range(HALVINGS):
        for c in range(STRIP):
            middle[c], reached[c] = low[c] + (high[c] - low[c]) * half, 0
        for g in range(len(maxima)):
            row = maxima[g]
            for c in range(STRIP):
                reached[c] += np.float32(0) if row[c] < middle[c] else np.float32(1)
        for c in range(STRIP):
            if reached[c] >= k:
                low[c] = middle[c]
            else:
                high[c] = middle[c]
    return low


@compiled
def _collect(scores, start, width, maxima, members, k, bound, found, latents, counts):
    """Collects the elements of these columns that are not below `bound` (STRIP,).

    Elements go into `found`, their latents into `latents`, and their number into `counts`.
    """
    n, groups = len(scores), len(maxima)
    bounds = bound.reshape(STRIP // LANES, LANES)  # A view, because `bound` rises on the way
    for g in range(groups):
        blocks = maxima[g].reshape(STRIP // LANES, LANES)
        for block in range(STRIP // LANES):
            some = np.float32(0)
            for lane in range(LANES):
                some += np.float32(0) if blocks[block, lane] < bounds[block, lane] else np.float32(1)
            if some > 0:
                for c in range(block * LANES, (block + 1) * LANES):
                    if not maxima[g, c] < bound[c]:
                        for j in range(g * members, (g + 1) * members):
                            if not scores[j, start + c] < bound[c]:
                                _take(scores[j, start + c], j, c, k, bound, found, latents, counts)
    for j in range(groups * members, n):  # Latents in no group
        for c in range(width):
            if not scores[j, start + c] < bound[c]:
                _take(scores[j, start + c], j, c, k, bound, found, latents, counts)


@compiled
def _take(value, j, c, k, bound, found, latents, counts):
    """Adds an element to those found. If there is no room, the bound first rises to the k-th largest so far."""
    if counts[c] == found.shape[1]:
        keep_largest(found[c], latents[c], counts[c], k)
        bound[c], counts[c] = found[c, :k].min(), k
    found[c, counts[c]] = value if value == value else np.inf
    latents[c, counts[c]] = j
    counts[c] += 1


@compiled
def keep_largest(found, latents, count, k):
    """Brings the k largest of the first `count` elements of `found` to its front, by Hoare's selection.

    Their `latents` move with them.
    """
    low, high = 0, count - 1
    while low < high:
        pivot, i, j = found[(low + high) // 2], low, high
        while i <= j:
            while found[i] > pivot:
                i += 1
            while found[j] < pivot:
                j -= 1
            if i <= j:
                found[i], found[j] = found[j], found[i]
                latents[i], latents[j] = latents[j], latents[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


class BatchTop:
    """The `count` largest positive elements of a (b, n) matrix that comes in chunks of rows.

    The plain twin is `matrix.flatten().topk(count)`, as in `naive.batch_top` of `tests/sae/naive.py`. This one never
    holds the whole matrix. NaN counts as +∞, which is selected in its place.
    """

    def __init__(self, count: int, n: int, like: Tensor):
        self.count, self.n = count, n
        self.values = like.new_empty(0)
        self.places = torch.empty(0, dtype=torch.int64, device=like.device)  # Each is row · n + latent

    def add(self, first_row: int, scores: Tensor) -> None:
        """Takes the rows from `first_row` on. They are the columns of `scores` (n, r), which is contiguous."""
        flat, r = scores.flatten(), scores.shape[1]
        found = torch.nonzero((flat < self._lower_bound(scores)).logical_not_()).squeeze(1)
        values = torch.cat([self.values, _nan_as_infinity(flat[found])])
        latents = found.div(r, rounding_mode="floor")
        rows = found.sub_(latents, alpha=r).add_(first_row)
        places = torch.cat([self.places, latents.add_(rows, alpha=self.n)])
        if len(values) > self.count:
            values, best = torch.topk(values, self.count, sorted=False)
            places = places[best]
        self.values, self.places = values, places

    def _lower_bound(self, scores: Tensor) -> Tensor:
        """A number above 0. No element below it can be among the `count` largest."""
        smallest_positive = scores.new_tensor(torch.finfo(scores.dtype).tiny)
        if len(self.values) == self.count:
            return self.values.min()
        members = min(16, self.n, scores.numel() // (2 * self.count))
        if members < 2:
            return smallest_positive
        groups = self.n // members
        maxima = _nan_as_infinity(scores[: members * groups].unflatten(0, (members, groups)).amax(0).flatten())
        if len(maxima) < self.count:
            return smallest_positive
        # At least `count` groups have an element as large as the count-th largest maximum.
        return torch.topk(maxima, self.count, sorted=False).values.min().maximum(smallest_positive)

    def nonzeros(self, b: int) -> Nonzeros:
        """The selected elements as nonzeros of a (b, n) matrix."""
        places, order = self.places.sort()
        rows = places.div(self.n, rounding_mode="floor")
        return Nonzeros(places - rows * self.n, self.values[order], rows, starts_of(rows, b))


def _nan_as_infinity(values: Tensor) -> Tensor:
    return values.where(values.isnan().logical_not_(), torch.inf)
