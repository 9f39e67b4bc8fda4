"""The largest pre-activations, exactly: k of each row (`top_k`) or a number of a whole batch (`BatchTop`).

Pre-activations come latent-major, `scores` (n, r): latents × rows of the batch, as `kernels.pre_activation_chunks` makes them.

On a CPU `top_k` is compiled, as torch.topk moves every element several times. For each row it

    1. takes the maximum of every group of some consecutive latents,
    2. halves an interval until it has a bound which k of these maxima, but not many more, reach,
    3. looks for elements at or above the bound in the groups that reach it: the k largest are among them,
    4. keeps the k largest of these.

1 and 2 go through 64 rows at once in vector registers, 3 and 4 touch a small part of the elements.
"""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from torch import Tensor

from raysae.sae.kernels import Nonzeros, starts_of

STRIP, LANES = 64, 16  # rows that are handled together, and of these the ones that one comparison is for
HALVINGS = 8  # the bound is then within 1/256 of the maxima's range of the k-th largest of them
COMPILED = (torch.float32, torch.float64)
_threads = ThreadPoolExecutor()
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each column of `scores` (n, r), in no particular order: values and indices, (r, k) each; the values are torch.topk's.

    NaN counts as larger than any number. Of equal elements the same are taken every time, however the columns are divided into chunks.
    """
    n, r = scores.shape
    if scores.device.type != "cpu" or scores.dtype not in COMPILED:
        values, indices = torch.topk(scores, k, dim=0, sorted=False)
        return values.T.contiguous(), indices.T.contiguous()
    values, indices = scores.new_empty(r, k), torch.empty(r, k, dtype=torch.int64)
    arrays = scores.contiguous().numpy(), k, math.isqrt(n // k), values.numpy(), indices.numpy()  # √(n/k) latents a group: n/√(n/k) ≥ k groups
    share = STRIP * math.ceil(r / STRIP / torch.get_num_threads())
    first, *others = itertools.pairwise([*range(0, r, share), r])
    others = [_threads.submit(_select, *arrays, *part) for part in others]
    _select(*arrays, *first)
    for other in others:
        other.result()
    return values, indices


@_compiled
def _select(scores, k, members, values, indices, first, last):  # pragma: no cover (compiled)
    """Columns `first` to `last` of `scores` (n, r): their rows of `values` and `indices` (r, k)."""
    n = scores.shape[0]
    groups, room = n // members, 2 * k + LANES
    maxima = np.empty((groups, STRIP), scores.dtype)
    found, places, number = np.empty((STRIP, room), scores.dtype), np.empty((STRIP, room), np.int64), np.empty(STRIP, np.int64)
    for start in range(first, last, STRIP):
        width = min(STRIP, last - start)
        _take_maxima(scores, start, width, members, maxima)
        bound = _bound(maxima, k)
        bound[width:] = np.inf
        number[:] = 0
        _collect(scores, start, width, maxima, members, k, bound, found, places, number)
        for c in range(width):
            _keep_largest(found[c], places[c], number[c], k)
            for i in range(k):
                indices[start + c, i] = places[c, i]
                values[start + c, i] = scores[places[c, i], start + c]


@_compiled
def _take_maxima(scores, start, width, members, maxima):  # pragma: no cover
    """The maxima (groups, STRIP) of consecutive latents in `width` columns of `scores` (n, r) from `start` on; −∞ in the places that are left."""
    maxima[:, width:] = -np.inf
    for g in range(len(maxima)):
        maximum = maxima[g]
        for c in range(width):
            maximum[c] = scores[g * members, start + c]
        for j in range(g * members + 1, (g + 1) * members):
            row = scores[j, start : start + width]
            for c in range(width):  # NaN stays, and comes in
                maximum[c] = maximum[c] if maximum[c] > row[c] or maximum[c] != maximum[c] else row[c]


@_compiled
def _bound(maxima, k):  # pragma: no cover
    """Numbers (STRIP,) that k or more of each column of `maxima` (groups, STRIP) are not below."""
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
            middle[c], reached[c] = low[c] + (high[c] - low[c]) / 2, 0
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


@_compiled
def _collect(scores, start, width, maxima, members, k, bound, found, places, number):  # pragma: no cover
    """Elements of these columns not below `bound` (STRIP,), their latents and their number into `found`, `places` and `number`."""
    n, groups = len(scores), len(maxima)
    bounds = bound.reshape(STRIP // LANES, LANES)  # a view: `bound` rises on the way
    for g in range(groups):
        blocks = maxima[g].reshape(STRIP // LANES, LANES)
        for block in range(STRIP // LANES):
            reached = np.float32(0)
            for lane in range(LANES):
                reached += np.float32(0) if blocks[block, lane] < bounds[block, lane] else np.float32(1)
            if reached > 0:
                for c in range(block * LANES, (block + 1) * LANES):
                    if not maxima[g, c] < bound[c]:
                        for j in range(g * members, (g + 1) * members):
                            if not scores[j, start + c] < bound[c]:
                                _take(scores[j, start + c], j, c, k, bound, found, places, number)
    for j in range(groups * members, n):  # latents in no group
        for c in range(width):
            if not scores[j, start + c] < bound[c]:
                _take(scores[j, start + c], j, c, k, bound, found, places, number)


@_compiled
def _take(value, j, c, k, bound, found, places, number):  # pragma: no cover
    """Adds a value not below its bound; where there is no room, the bound rises to the k-th largest so far."""
    if number[c] == found.shape[1]:
        _keep_largest(found[c], places[c], number[c], k)
        bound[c], number[c] = found[c, :k].min(), k
    found[c, number[c]] = value if value == value else np.inf
    places[c, number[c]] = j
    number[c] += 1


@_compiled
def _keep_largest(found, places, number, k):  # pragma: no cover
    """Brings the k largest of the first `number` of `found` to its front, with their `places`: Hoare's selection."""
    low, high = 0, number - 1
    while low < high:
        pivot, i, j = found[(low + high) // 2], low, high
        while i <= j:
            while found[i] > pivot:
                i += 1
            while found[j] < pivot:
                j -= 1
            if i <= j:
                found[i], found[j] = found[j], found[i]
                places[i], places[j] = places[j], places[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break


class BatchTop:
    """The `count` largest positive elements of a (b, n) matrix that comes in chunks of rows."""

    def __init__(self, count: int, n: int, like: Tensor):
        self.count, self.n = count, n
        self.values = like.new_empty(0)
        self.places = torch.empty(0, dtype=torch.int64, device=like.device)  # row · n + column

    def add(self, first_row: int, scores: Tensor) -> None:
        """Takes the rows from `first_row` on, as columns of `scores` (n, r), contiguous."""
        flat, r = scores.flatten(), scores.shape[1]
        found = torch.nonzero(flat >= self._lower_bound(scores)).squeeze(1)
        latents = found.div(r, rounding_mode="floor")
        values = torch.cat([self.values, flat[found]])
        places = torch.cat([self.places, (found - latents * r + first_row) * self.n + latents])
        if len(values) > self.count:
            values, best = torch.topk(values, self.count, sorted=False)
            places = places[best]
        self.values, self.places = values, places

    def _lower_bound(self, scores: Tensor) -> Tensor:
        """A number above 0: elements below it cannot be among the `count` largest and need no look."""
        smallest_positive = scores.new_tensor(torch.finfo(scores.dtype).tiny)
        if len(self.values) == self.count:
            return self.values.min()
        members = min(16, self.n, scores.numel() // (2 * self.count))
        if members < 2:
            return smallest_positive
        groups = self.n // members
        maxima = scores[: members * groups].unflatten(0, (members, groups)).amax(0).flatten()
        if len(maxima) < self.count:
            return smallest_positive
        # `count` groups have an element at least as large as the count-th largest maximum
        return torch.topk(maxima, self.count, sorted=False).values.min().maximum(smallest_positive)

    def nonzeros(self, b: int) -> Nonzeros:
        """What was selected, as nonzeros of a (b, n) matrix."""
        places, order = self.places.sort()
        rows = places.div(self.n, rounding_mode="floor")
        return Nonzeros(places - rows * self.n, self.values[order], rows, starts_of(rows, b))
