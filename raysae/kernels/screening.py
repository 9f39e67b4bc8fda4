"""Finds the k largest pre-activations of each row, exactly, without computing all of them.

It needs a CPU that multiplies 8-bit integers fast. Where that is missing, or bounds say little, all are computed. The
short readable version is `dense_top(pre, k)` in `tests/sae/naive.py`.

Every weight row W_i and every row x_j is rounded to integers, W_i ≈ s_i Q_i and x_j ≈ t_j P_j. The products Q_i·P_j
take a quarter of the time of those in float32. They tell where each pre-activation lies (Cauchy-Schwarz):

    |W_i·x_j − s_i t_j Q_i·P_j| ≤ ‖W_i − s_i Q_i‖ ‖x_j‖ + ‖s_i Q_i‖ ‖x_j − t_j P_j‖

Latents whose upper bound is among the largest are computed in float32. The k-th largest of these is a lower bound for
the k-th largest of all. Then all latents whose upper bound reaches it are computed. No other can be among the k
largest. Those computed are a few times k where d is some hundreds. A larger d makes them more.

Before rounding, W is multiplied by a factor for each dimension, and x is divided by it. So no dimension is much larger
than the others in either. Raise `backends.VERSION` with a change here that gives SAEs other bits.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from raysae.kernels.backends import for_triton
from raysae.kernels.buffers import Workspace
from raysae.kernels.compiled import SUMS, compiled, in_parts
from raysae.kernels.products import pre_activation_chunks, products_of
from raysae.kernels.selection import STRIP, bounds_of_largest, keep_largest, top_of_chunks

LEVELS = 127  # Integers go from −LEVELS to LEVELS
# Fewest latents for each of k. With fewer, so many may reach the k-th largest that computing all is as fast.
LATENTS_PER_K = 32
FEWEST_ROWS = 2 * STRIP  # For fewer rows, rounding W takes as long as it saves
# Largest d. Relative to the spread of pre-activations, bounds loosen with √d: too much in thousands of dimensions.
WIDEST = 1 << 10
# Largest share of latents to compute. Above it bounds are too loose for these rows, and computing all is as fast.
TOO_MANY = 1 / 12
# Guess of how far the k-th largest pre-activation lies below the k-th largest upper bound, in mean error bounds.
GUESS = 1.25
INTEGERS = 1 << 26  # Most weights to round. Each takes one byte.
PRODUCTS, CACHED = 1 << 24, 1 << 20  # Most products of 4 bytes at a time, and most that stay in the cache
SAMPLE = 1024  # Rows that dimensions' factors are estimated from
BYTE = np.uint64(0x0001020304050607)  # Times 256ⁱ it has i as its highest byte, for i from 0 to 7
SMALLEST = np.float32(1e-15)  # Smallest scale of a row
UNDERFLOW = np.float32(2e-38)  # More than what a square in float32 loses by underflow
ROUNDING = 2.0**-20  # More than what some operations in float32 round, relatively


def top_pre_activations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    workspace: Workspace,
    precision: torch.dtype | None = None,
    latents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest elements of x·weightᵀ + bias in each row, in any order.

    The plain twin is `(x @ weight.T + bias).topk(k)`. Results are exact up to the rounding of the way they are found.
    Ties are broken arbitrarily. NaN counts as +∞.

    Args:
        x: (b, d). It may be rounded to `precision` already.
        weight: (n, d), or more rows with `latents`. It may be rounded likewise.
        bias: (n,), or more with `latents`. All three have one dtype where there is no `precision`.
        k: From 1 to n.
        workspace: Holds pre-activations and integers.
        precision: As in `products.product`. The kernels of `cuda.py` round the products x·weightᵀ to it too.
        latents: (n,). Only these rows of `weight` and `bias` count. Indices are places among them.

    Returns:
        Values and indices, (b, k) each.

    Raises:
        ValueError: `k` is not in 1 … n.
    """
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    (b, d), n = x.shape, len(weight if latents is None else latents)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}: from 1 to {n} is right for {n} latents")
    if not b:
        return x.new_empty(0, k), x.new_empty(0, k, dtype=torch.int64)
    if cuda := for_triton(bias):
        if latents is not None:
            weight, bias = weight[latents], bias[latents]
        return cuda.top_pre_activations(x, weight, bias, k, workspace, precision)
    if latents is not None:
        return top_of_chunks(pre_activation_chunks(x, weight, bias, workspace, latents, precision), k)
    sizes = 1 < d <= WIDEST and n * d <= INTEGERS and n <= PRODUCTS // STRIP  # _int_mm is wrong for d = 1
    if (
        sizes
        and b >= FEWEST_ROWS
        and n >= LATENTS_PER_K * k
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and fast_integers()
    ):
        found = _screened(x.contiguous(), weight.contiguous(), bias.contiguous(), k, workspace)
        if found is not None:
            return found
    return top_of_chunks(pre_activation_chunks(x, weight, bias, workspace, precision=precision), k)


@cache
def fast_integers() -> bool:
    """Whether this CPU multiplies 8-bit integers faster than float32, and PyTorch does so without error.

    ONEDNN_MAX_CPU_ISA can forbid oneDNN the instructions for it. Then oneDNN adds up in 16 bits, which overflow.
    """
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    largest = torch.full((STRIP, STRIP), LEVELS, dtype=torch.int8)
    return all(bool((torch._int_mm(sign * largest, largest.T) == sign * STRIP * LEVELS**2).all()) for sign in (1, -1))


def _screened(x: Tensor, weight: Tensor, bias: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor] | None:
    """`top_pre_activations` by bounds. None if something is not finite, or if bounds leave too many latents."""
    (b, d), n = x.shape, len(weight)
    padded = STRIP * math.ceil(b / STRIP)
    factors = _factors(x, weight)
    Q, latents = _rounded(weight, factors, n, "weight_integers", workspace)
    P, rows = _rounded(x, 1 / factors, padded, "x_integers", workspace)
    with np.errstate(all="ignore"):
        latents, rows = _of_latents(*latents, bias.numpy(), d), _of_rows(*rows)
        if not (
            np.isfinite(latents).all()
            and np.isfinite(rows).all()
            and np.isfinite(np.abs(latents[:, 1]).max() * rows[0].max())
        ):
            return None
    values, indices = x.new_empty(b, k), x.new_empty(b, k, dtype=torch.int64)
    members = math.isqrt(n // k)  # Latents of a group, as in `top_k`
    fewest = STRIP * min(torch.get_num_threads(), PRODUCTS // n // STRIP)  # Rows at a time, at least
    # The first range is short, to see early whether bounds are tight enough.
    starts = [0, *range(fewest, b, max(fewest, CACHED // n // STRIP * STRIP))]
    for start, end in itertools.pairwise([*starts, padded]):
        products = workspace.take("products", (n, end - start), P.new_empty(0, dtype=torch.int32))
        torch._int_mm(Q, P[start:end].T, out=products)
        part = slice(start, min(end, b))
        operands = (
            products.numpy(),
            latents,
            np.ascontiguousarray(rows[:, part]),
            weight.numpy(),
            bias.numpy(),
            x[part].numpy(),
        )
        computed = in_parts(
            _select, len(x[part]), STRIP, *operands, members, values[part].numpy(), indices[part].numpy()
        )
        if sum(computed) > TOO_MANY * n * len(x[part]):
            return None
    return values, indices


def _factors(x: Tensor, weight: Tensor) -> Tensor:
    """Factors (d,) float32 that multiply W and divide x. A dimension is then about as large in both."""
    of_x, of_weight = (
        torch.linalg.vector_norm(matrix[:SAMPLE], dim=0) / math.sqrt(min(len(matrix), SAMPLE)) for matrix in (x, weight)
    )
    return torch.where((of_x > 0) & (of_weight > 0), (of_x / of_weight).sqrt(), 1)


def _rounded(
    matrix: Tensor, factors: Tensor, padded: int, name: str, workspace: Workspace
) -> tuple[Tensor, np.ndarray]:
    """Rounds `matrix` (r, d) times `factors` (d,) to integers, with a scale for each row.

    Returns:
        Integers (padded, d), with zeros after the first r rows.
        Three numbers for each row, (3, r): its scale, its norm, and the norm of what rounding loses.
    """
    integers = workspace.take(name, (padded, matrix.shape[1]), matrix.new_empty(0, dtype=torch.int8))
    integers[len(matrix) :] = 0
    traits = np.empty((3, len(matrix)), np.float32)
    in_parts(_round, len(matrix), 1, matrix.numpy(), factors.numpy(), integers.numpy(), traits)
    return integers, traits


def _of_latents(scale: np.ndarray, norm: np.ndarray, lost: np.ndarray, bias: np.ndarray, d: int) -> np.ndarray:
    """The numbers that `_upper` needs of each latent, (n, 4).

    They are scale, bias, norm of what is lost, and a bound of the norm of the integers times the scale. Bias and lost
    norm are raised by more than float32 can round in the bounds and in the pre-activations.
    """
    return np.stack(
        [scale, bias + ROUNDING * np.abs(bias), lost + (d + 16) * ROUNDING / 4 * norm, norm + lost],
        axis=1,
        dtype=np.float32,
    )


def _of_rows(scale: np.ndarray, norm: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The numbers that `_upper` needs of each row, (3, r).

    They are the inverse of its scale, its norm, and the norm of what is lost, the last two in units of the scale.
    """
    return np.stack([1 / scale, norm / scale, lost / scale])


@compiled(fastmath=SUMS)
def _round(matrix, factors, integers, traits, first, last):
    """Writes rows `first` to `last` of what `_rounded` returns."""
    for i in range(first, last):
        row, rounded = matrix[i], integers[i]
        largest, squares, lost = np.float32(0), np.float32(0), np.float32(0)
        for m in range(len(row)):
            largest = max(largest, abs(row[m] * factors[m]))
        scale = max(largest / np.float32(LEVELS), SMALLEST)
        inverse = np.float32(1) / scale
        for m in range(len(row)):
            value = row[m] * factors[m]
            integer = np.rint(value * inverse)
            rounded[m] = np.int8(integer)
            squares += value * value
            lost += (value - integer * scale) ** 2
        traits[0, i], traits[1, i], traits[2, i] = (
            scale,
            np.sqrt(squares + len(row) * UNDERFLOW),
            np.sqrt(lost + len(row) * UNDERFLOW),
        )


@compiled
def _select(products, latents, rows, weight, bias, x, members, values, indices, first, last):
    """Writes rows `first` to `last` of `values` and `indices` (r, k), from the products Q·Pᵀ (n, at least r).

    Returns:
        How many pre-activations were computed.
    """
    n, k, total = len(weight), values.shape[1], 0
    typical = latents[:, 2].mean(), latents[:, 3].mean()
    maxima, own = np.empty((math.ceil(n / members), STRIP), np.float32), np.empty((3, STRIP), np.float32)
    found, candidates, counts = (
        np.empty((STRIP, 8 * k + 16), np.float32),
        np.empty((STRIP, 8 * k + 16), np.int64),
        np.empty(STRIP, np.int64),
    )
    for start in range(first, last, STRIP):
        width = min(STRIP, last - start)
        for trait in range(3):
            for c in range(STRIP):
                own[trait, c] = rows[trait, start + c] if c < width else 0
        _group_maxima(products, start, latents, own[0], own[1], own[2], members, maxima)
        bound = bounds_of_largest(maxima, k)
        bound[width:] = np.inf
        for c in range(width):
            bound[c] -= abs(bound[c]) * np.float32(ROUNDING) + np.float32(GUESS) * (
                typical[0] * own[1, c] + typical[1] * own[2, c]
            )
        left, again = width, False
        while left:
            counts[:] = 0
            total += _collect(
                products, start, latents, own[0], own[1], own[2], bound, weight, bias, x, k, candidates, counts, found
            )
            for c in range(width):
                if bound[c] == np.inf:  # This row is done
                    continue
                total += counts[c]
                lower = _lower(_compute(weight, bias, x[start + c], k, candidates[c], counts[c], found[c]), own[0, c])
                # If the guess was low enough, no other latent can be among the k largest.
                # The second time the bound is no guess.
                if counts[c] >= k and (again or lower >= bound[c]):
                    for i in range(k):
                        values[start + c, i], indices[start + c, i] = found[c, i], candidates[c, i]
                    bound[c], left = np.inf, left - 1
                else:
                    bound[c] = lower if counts[c] >= k else -np.inf
            again = True
    return total


@compiled
def _lower(pre_activation, inverse_scale):
    """A lower bound, in the row's scale, for the upper bound of every pre-activation that is as large."""
    scaled = pre_activation * inverse_scale
    return scaled - abs(scaled) * np.float32(ROUNDING)


@compiled(fastmath=SUMS)
def _upper(product, scale, bias, lost_of_latent, norm_of_latent, inverse_scale, norm, lost):
    """The upper bound for a latent in a row, in the row's scale."""
    return np.float32(product) * scale + (bias * inverse_scale + (lost_of_latent * norm + norm_of_latent * lost))


@compiled(fastmath=SUMS)
def _group_maxima(products, start, latents, inverse_scale, norm, lost, members, maxima):
    """Writes the maxima (groups, STRIP) of the upper bounds of consecutive latents."""
    for g in range(len(maxima)):
        maximum = maxima[g]
        maximum[:] = -np.inf
        for j in range(g * members, min((g + 1) * members, len(latents))):
            # One-dimensional and contiguous, like everything in the innermost loop, so that it is vectorised.
            product = products[j, start : start + STRIP]
            scale, bias, lost_j, norm_j = latents[j, 0], latents[j, 1], latents[j, 2], latents[j, 3]
            for c in range(STRIP):
                upper = _upper(product[c], scale, bias, lost_j, norm_j, inverse_scale[c], norm[c], lost[c])
                maximum[c] = upper if upper > maximum[c] else maximum[c]


@compiled(fastmath=SUMS)
def _collect(products, start, latents, inverse_scale, norm, lost, bound, weight, bias, x, k, candidates, counts, found):
    """Collects in `candidates` the latents whose upper bound reaches `bound`.

    If there is no room, pre-activations of a row's candidates are computed, and its bound rises.

    Returns:
        How many pre-activations were computed for that.
    """
    total, room = 0, candidates.shape[1]
    reach = np.empty(STRIP, np.uint8)
    eights = reach.view(np.uint64)  # Eight rows in one look, because mostly none reaches
    for j in range(len(latents)):
        product = products[j, start : start + STRIP]
        scale, bias_j, lost_j, norm_j = latents[j, 0], latents[j, 1], latents[j, 2], latents[j, 3]
        for c in range(STRIP):
            reach[c] = _upper(product[c], scale, bias_j, lost_j, norm_j, inverse_scale[c], norm[c], lost[c]) >= bound[c]
        for eight in range(len(eights)):
            left = eights[eight]
            while left != 0:
                lowest = left & (~left + np.uint64(1))
                left ^= lowest
                c = 8 * eight + np.int64((lowest * BYTE) >> np.uint64(56))
                if counts[c] == room:
                    lower = _lower(
                        _compute(weight, bias, x[start + c], k, candidates[c], room, found[c]), inverse_scale[c]
                    )
                    bound[c] = max(bound[c], lower)
                    total, counts[c] = total + room, k
                candidates[c, counts[c]] = j
                counts[c] += 1
    return total


@compiled(fastmath=SUMS)
def _compute(weight, bias, row, k, candidates, count, found):
    """Writes the pre-activations of the first `count` candidates into `found`.

    It brings the k largest to the front of both, and returns the least of these.
    """
    products_of(weight, candidates[:count], row, found[:count])
    for i in range(count):
        found[i] += bias[candidates[i]]
    keep_largest(found, candidates, count, k)
    least = found[0]
    for i in range(1, k):
        least = min(least, found[i])
    return least
