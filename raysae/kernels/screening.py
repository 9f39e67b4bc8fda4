"""The k largest pre-activations of each row, exactly, without computing all of them: on CPUs that multiply integers of 8 bits fast.

Every weight row W_i and every row x_j is rounded to integers, W_i ≈ s_i Q_i and x_j ≈ t_j P_j. Their products Q_i·P_j take a quarter of the time of
those in float32, and tell where each pre-activation lies (Cauchy-Schwarz):

    |W_i·x_j − s_i t_j Q_i·P_j| ≤ ‖W_i − s_i Q_i‖ ‖x_j‖ + ‖s_i Q_i‖ ‖x_j − t_j P_j‖

The latents whose upper bound is among the largest are computed in float32; the k-th largest of these is a lower bound for the k-th largest of all,
and what is left to compute are the latents whose upper bound reaches it: none of the others can be among the k largest. These are a few times k
where d is some hundreds, and more the larger it is. Before rounding, W is multiplied by a factor for each dimension and x divided by it, so that no
dimension is much larger than the others in either.
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

LEVELS = 127  # integers go from −LEVELS to LEVELS
LATENTS_PER_K = 32  # with fewer, so many may reach the k-th largest that computing all is as fast
FEWEST_ROWS = 2 * STRIP  # for fewer, rounding W takes as long as it saves
WIDEST = 1 << 10  # d: bounds are √d times as loose as pre-activations vary, in thousands of dimensions too loose
TOO_MANY = 1 / 12  # of the latents: where more are left, bounds are too loose for the rows at hand, and all are as fast computed
GUESS = 1.25  # of the largest possible error, typically: so much lower than the k-th largest upper bound the k-th largest is expected
INTEGERS = 1 << 26  # that weights may be rounded to, of a byte each
PRODUCTS, CACHED = 1 << 24, 1 << 20  # of 4 bytes each: how many there may be at a time, and how many are found in the cache again
SAMPLE = 1024  # rows that the factors of dimensions are estimated from
BYTE = np.uint64(0x0001020304050607)  # times 256ⁱ it has i as its highest byte, for i from 0 to 7
SMALLEST = np.float32(1e-15)  # scale
UNDERFLOW = np.float32(2e-38)  # more than a square is too small by in float32
ROUNDING = 2.0**-20  # relatively, more than some operations in float32 take or add


def top_pre_activations(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    workspace: Workspace,
    precision: torch.dtype | None = None,
    latents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest of x·weightᵀ + bias in each row, for x (b, d), weight (n, d) and bias (n,), all of one dtype: values and indices, (b, k) each, in
    any order. NaN counts as +∞. Whichever way they are found, they are the largest but for what that way rounds, and of equal ones some.
    x and weight may be rounded to `precision` already; with it the products x·weightᵀ are too. With `latents` (n,) only these rows of a larger weight
    and bias count; indices are places among them.

    ValueError: k is not in 1 … n."""
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
    if sizes and b >= FEWEST_ROWS and n >= LATENTS_PER_K * k and x.device.type == "cpu" and x.dtype == torch.float32 and fast_integers():
        found = _screened(x.contiguous(), weight.contiguous(), bias.contiguous(), k, workspace)
        if found is not None:
            return found
    return top_of_chunks(pre_activation_chunks(x, weight, bias, workspace, precision=precision), k)


@cache
def fast_integers() -> bool:
    """Whether this CPU multiplies integers of 8 bits faster than float32, and PyTorch does it right: told to do without the instructions for that
    (ONEDNN_MAX_CPU_ISA), oneDNN adds up in 16 bits, which overflow."""
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return False
    largest = torch.full((STRIP, STRIP), LEVELS, dtype=torch.int8)
    return all(bool((torch._int_mm(sign * largest, largest.T) == sign * STRIP * LEVELS**2).all()) for sign in (1, -1))


def _screened(x: Tensor, weight: Tensor, bias: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor] | None:
    """As `top_pre_activations`; None where something is not finite, or the bounds leave too many latents."""
    (b, d), n = x.shape, len(weight)
    padded = STRIP * math.ceil(b / STRIP)
    factors = _factors(x, weight)
    Q, latents = _rounded(weight, factors, n, "weight_integers", workspace)
    P, rows = _rounded(x, 1 / factors, padded, "x_integers", workspace)
    with np.errstate(all="ignore"):
        latents, rows = _of_latents(*latents, bias.numpy(), d), _of_rows(*rows)
        if not (np.isfinite(latents).all() and np.isfinite(rows).all() and np.isfinite(np.abs(latents[:, 1]).max() * rows[0].max())):
            return None
    values, indices = x.new_empty(b, k), x.new_empty(b, k, dtype=torch.int64)
    members = math.isqrt(n // k)  # of a group, as in `top_k`
    fewest = STRIP * min(torch.get_num_threads(), PRODUCTS // n // STRIP)  # rows at a time
    starts = [0, *range(fewest, b, max(fewest, CACHED // n // STRIP * STRIP))]  # a few first, to see what the bounds say
    for start, end in itertools.pairwise([*starts, padded]):
        products = workspace.take("products", (n, end - start), P.new_empty(0, dtype=torch.int32))
        torch._int_mm(Q, P[start:end].T, out=products)
        part = slice(start, min(end, b))
        operands = products.numpy(), latents, np.ascontiguousarray(rows[:, part]), weight.numpy(), bias.numpy(), x[part].numpy()
        computed = in_parts(_select, len(x[part]), STRIP, *operands, members, values[part].numpy(), indices[part].numpy())
        if sum(computed) > TOO_MANY * n * len(x[part]):
            return None
    return values, indices


def _factors(x: Tensor, weight: Tensor) -> Tensor:
    """(d,) float32: what W is multiplied by and x divided by, so that a dimension is about as large in both."""
    of_x, of_weight = (torch.linalg.vector_norm(matrix[:SAMPLE], dim=0) / math.sqrt(min(len(matrix), SAMPLE)) for matrix in (x, weight))
    return torch.where((of_x > 0) & (of_weight > 0), (of_x / of_weight).sqrt(), 1)


def _rounded(matrix: Tensor, factors: Tensor, padded: int, name: str, workspace: Workspace) -> tuple[Tensor, np.ndarray]:
    """Integers (padded, d), zeros after the rows of `matrix` (r, d); and of each row of matrix · factors the scale, the norm, and the norm of what
    rounding takes away, (3, r)."""
    integers = workspace.take(name, (padded, matrix.shape[1]), matrix.new_empty(0, dtype=torch.int8))
    integers[len(matrix) :] = 0
    traits = np.empty((3, len(matrix)), np.float32)
    in_parts(_round, len(matrix), 1, matrix.numpy(), factors.numpy(), integers.numpy(), traits)
    return integers, traits


def _of_latents(scale: np.ndarray, norm: np.ndarray, lost: np.ndarray, bias: np.ndarray, d: int) -> np.ndarray:
    """What `_upper` needs of each latent, (n, 4): scale, bias, norm of what is lost, norm of the integers times the scale; made larger by more than
    float32 can round there and in the pre-activations themselves."""
    return np.stack([scale, bias + ROUNDING * np.abs(bias), lost + (d + 16) * ROUNDING / 4 * norm, norm + lost], axis=1, dtype=np.float32)


def _of_rows(scale: np.ndarray, norm: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """What `_upper` needs of each row, (3, r): the scale's inverse, and in this scale the norm and the norm of what is lost."""
    return np.stack([1 / scale, norm / scale, lost / scale])


@compiled(fastmath=SUMS)
def _round(matrix, factors, integers, traits, first, last):
    """See `_rounded`."""
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
        traits[0, i], traits[1, i], traits[2, i] = scale, np.sqrt(squares + len(row) * UNDERFLOW), np.sqrt(lost + len(row) * UNDERFLOW)


@compiled
def _select(products, latents, rows, weight, bias, x, members, values, indices, first, last):
    """Rows `first` to `last` of `values` and `indices` (r, k), from products Q·Pᵀ (n, at least r). Returns how many pre-activations were computed."""
    n, k, total = len(weight), values.shape[1], 0
    typical = latents[:, 2].mean(), latents[:, 3].mean()
    maxima, own = np.empty((math.ceil(n / members), STRIP), np.float32), np.empty((3, STRIP), np.float32)
    found, candidates, counts = np.empty((STRIP, 8 * k + 16), np.float32), np.empty((STRIP, 8 * k + 16), np.int64), np.empty(STRIP, np.int64)
    for start in range(first, last, STRIP):
        width = min(STRIP, last - start)
        for trait in range(3):
            for c in range(STRIP):
                own[trait, c] = rows[trait, start + c] if c < width else 0
        _group_maxima(products, start, latents, own[0], own[1], own[2], members, maxima)
        bound = bounds_of_largest(maxima, k)
        bound[width:] = np.inf
        for c in range(width):
            bound[c] -= abs(bound[c]) * np.float32(ROUNDING) + np.float32(GUESS) * (typical[0] * own[1, c] + typical[1] * own[2, c])
        left, again = width, False
        while left:
            counts[:] = 0
            total += _collect(products, start, latents, own[0], own[1], own[2], bound, weight, bias, x, k, candidates, counts, found)
            for c in range(width):
                if bound[c] == np.inf:  # done
                    continue
                total += counts[c]
                lower = _lower(_compute(weight, bias, x[start + c], k, candidates[c], counts[c], found[c]), own[0, c])
                # None of the others can be among the k largest where the guess was low enough. The second time the bound is no guess.
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
    """What the upper bound of everything as large reaches."""
    scaled = pre_activation * inverse_scale
    return scaled - abs(scaled) * np.float32(ROUNDING)


@compiled(fastmath=SUMS)
def _upper(product, scale, bias, lost_of_latent, norm_of_latent, inverse_scale, norm, lost):
    """The upper bound for a latent in a row, in the row's scale."""
    return np.float32(product) * scale + (bias * inverse_scale + (lost_of_latent * norm + norm_of_latent * lost))


@compiled(fastmath=SUMS)
def _group_maxima(products, start, latents, inverse_scale, norm, lost, members, maxima):
    """The maxima (groups, STRIP) of the upper bounds of consecutive latents."""
    for g in range(len(maxima)):
        maximum = maxima[g]
        maximum[:] = -np.inf
        for j in range(g * members, min((g + 1) * members, len(latents))):
            product = products[j, start : start + STRIP]  # one-dimensional and contiguous, as all is in the innermost loop: it is vectorised
            scale, bias, lost_j, norm_j = latents[j, 0], latents[j, 1], latents[j, 2], latents[j, 3]
            for c in range(STRIP):
                upper = _upper(product[c], scale, bias, lost_j, norm_j, inverse_scale[c], norm[c], lost[c])
                maximum[c] = upper if upper > maximum[c] else maximum[c]


@compiled(fastmath=SUMS)
def _collect(products, start, latents, inverse_scale, norm, lost, bound, weight, bias, x, k, candidates, counts, found):
    """Into `candidates` the latents whose upper bound reaches `bound`, which rises where room is lacking. Returns how many were computed for that."""
    total, room = 0, candidates.shape[1]
    reach = np.empty(STRIP, np.uint8)
    eights = reach.view(np.uint64)  # eight rows are looked at together: mostly none reaches
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
                    lower = _lower(_compute(weight, bias, x[start + c], k, candidates[c], room, found[c]), inverse_scale[c])
                    bound[c] = max(bound[c], lower)
                    total, counts[c] = total + room, k
                candidates[c, counts[c]] = j
                counts[c] += 1
    return total


@compiled(fastmath=SUMS)
def _compute(weight, bias, row, k, candidates, count, found):
    """Pre-activations of the first `count` candidates, into `found`; brings the k largest to the front of both and returns the least of these."""
    products_of(weight, candidates[:count], row, found[:count])
    for i in range(count):
        found[i] += bias[candidates[i]]
    keep_largest(found, candidates, count, k)
    least = found[0]
    for i in range(1, k):
        least = min(least, found[i])
    return least
