"""Products with sparse codes in bounded memory, the same bits every time; what a GPU does otherwise is in `cuda.py`.

Nonzeros of a code matrix (b, n) are three parallel lists, grouped by row: `features` (N,) int64, `values` (N,) and `starts` (b,), the place
where each row begins. Every product with them is an embedding bag (a sum of rows of a dense matrix, weighted), so neither a dense code
matrix nor a gathered (N, d) tensor exists. Large temporaries are reused buffers: memory fresh from the system costs a page fault per 4 KiB.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.sae.compiled import SUMS, compiled, in_parts

VERSION = 8  # raised with what gives SAEs other bits, here, in compiled, cuda, selection, screening, elements: earlier checkpoints are then refused
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # of pre-activations at a time …
MINIMUM_ROWS = 64  # … or more at great widths: with few rows the dense product waits for W_enc to come from memory
MAXIMUM_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
DENSE_PER_NONZERO = {"cpu": 4, "cuda": 64}  # elements of a dense code matrix that cost as much as one nonzero of a sparse one
OUTER_BYTES = 8 << 20  # of rows of features that are summed, or gathered, at a time
COMPILED = (torch.float32, torch.float64)  # dtypes, on a CPU
PASS_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # of a matrix at a time in several operations in turn, which on a CPU find it in its cache


class Workspace(threading.local):
    """Buffers of one autoencoder, kept between steps; each thread has its own. A copy or a pickle starts empty."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this shape with the dtype and device of `like`; its content is whatever the last use of `name` left."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)

    def __reduce__(self):
        return Workspace, ()


def chunk_rows(n: int, element_size: int, device: str = "cpu") -> int:
    """Rows whose `n` pre-activations are handled at a time: a power of two, which the dense product is up to a third faster with."""
    row = n * element_size
    return power_of_two(max(1, CHUNK_BYTES[device] // row, min(MINIMUM_ROWS, MAXIMUM_BYTES[device] // row)))


def rows_of(size: int, like: Tensor) -> int:
    """How many rows as those of the matrix `like` are of `size` bytes."""
    return max(1, size // (like.shape[1] * like.element_size()))


def power_of_two(number: int) -> int:
    """The largest one that is not above `number`."""
    return 1 << number.bit_length() - 1


def product(a: Tensor, b: Tensor, precision: torch.dtype | None, out: Tensor | None = None) -> Tensor:
    """a · b. On a GPU operands may be rounded to `precision`; the products are then added up, and given, in float32."""
    if precision is None:
        return torch.mm(a, b, out=out)
    return torch.mm(a.to(precision), b.to(precision), out_dtype=torch.float32, out=out)


def pre_activation_chunks(
    x: Tensor, weight: Tensor, bias: Tensor, workspace: Workspace, latents: Tensor | None = None, precision: torch.dtype | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """weight·xᵀ + bias (n, b) in chunks of rows of x: (rows, chunk (n, r)), each valid until the next is taken. With `latents` only these n of them.

    Latent-major, as BLAS then has the long side first: x·weightᵀ takes 15 to 50 % longer on a CPU."""
    n = len(weight) if latents is None else len(latents)
    if latents is not None and n * x.shape[1] * x.element_size() <= MAXIMUM_BYTES[x.device.type]:
        weight, bias, latents = weight[latents], bias[latents], None
    rows = min(chunk_rows(n, bias.element_size(), x.device.type), len(x))
    if precision is not None:
        weight, x = weight.to(precision), x.to(precision)
    for start in range(0, len(x), rows):
        part = slice(start, min(start + rows, len(x)))
        chunk = workspace.take("pre_activations", (n, part.stop - part.start), bias)
        if latents is None:
            _pre_activations(x[part], weight, bias, precision, chunk)
        else:
            block = rows_of(OUTER_BYTES, x)
            for some, out in zip(latents.split(block), chunk.split(block), strict=True):
                _pre_activations(x[part], weight[some], bias[some], precision, out)
        yield part, chunk


def _pre_activations(x: Tensor, weight: Tensor, bias: Tensor, precision: torch.dtype | None, out: Tensor) -> None:
    if precision is None:
        torch.addmm(bias.unsqueeze(1), weight, x.T, out=out)
    else:
        product(weight, x.T, precision, out=out).add_(bias.unsqueeze(1))


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


def decode_rows(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Σ_j values[:, j] · weight[indices[:, j]] for `indices` and `values` (b, k): (b, d)."""
    return embedding_bag(indices, weight, mode="sum", per_sample_weights=values)


def residuals(codes: Nonzeros, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`target` (b, d) less the codes (b, n) times `weight` (n, d), and the products of its rows with the rows of weight, those at nonzeros, (N,)."""
    if target.device.type != "cpu" or target.dtype not in COMPILED:
        return plain_residuals(codes, target, weight)
    found, products = torch.empty_like(target), torch.empty_like(codes.values)  # row by row: its latents' weights are still in the cache for these
    operands = (tensor.numpy() for tensor in (*codes, target.contiguous(), weight.detach(), found, products))
    in_parts(_residuals, len(target), 1, *operands)
    return found, products


def plain_residuals(codes: Nonzeros, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    leaf = codes.values.detach().requires_grad_()
    with torch.enable_grad():
        decoded = embedding_bag(codes.features, weight.detach(), codes.starts, mode="sum", per_sample_weights=leaf)
    found = target - decoded.detach()
    return found, torch.autograd.grad(decoded, leaf, found)[0]


@compiled(fastmath=SUMS)
def _residuals(features, values, rows, starts, target, weight, found, products, first, last):
    """Rows `first` to `last` of `found`, and their part of `products`."""
    for i in range(first, last):
        begin, end = starts[i], starts[i + 1] if i + 1 < len(starts) else len(values)
        row = found[i]
        row[:] = target[i]
        for j in range(begin, end):
            value, latent = values[j], weight[features[j]]
            for m in range(len(row)):
                row[m] -= value * latent[m]
        products_of(weight, features[begin:end], row, products[begin:end])


@compiled(fastmath=SUMS)
def products_of(weight, latents, row, products):
    """Into `products` those of `row` (d,) with the rows `latents` of `weight` (n, d)."""
    last = len(latents) - 1
    for i in range(0, len(latents), 4):  # four at a time, so that their weights come from memory side by side
        a, b, c, d = i, min(i + 1, last), min(i + 2, last), min(i + 3, last)
        latent_a, latent_b, latent_c, latent_d = weight[latents[a]], weight[latents[b]], weight[latents[c]], weight[latents[d]]
        of_a, of_b, of_c, of_d = row.dtype.type(0), row.dtype.type(0), row.dtype.type(0), row.dtype.type(0)
        for m in range(len(row)):
            of_a += latent_a[m] * row[m]
            of_b += latent_b[m] * row[m]
            of_c += latent_c[m] * row[m]
            of_d += latent_d[m] * row[m]
        products[a], products[b], products[c], products[d] = of_a, of_b, of_c, of_d


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


class SparseCodes:
    """A (b, n) code matrix as its nonzeros, between a dictionary's forward and backward pass: work for active latents only.

    With `latents` (n,) the codes are of a part of the dictionary: column f belongs to latent latents[f] of the weights."""

    def __init__(self, codes: Nonzeros, n: int, latents: Tensor | None = None):
        self.codes, self.n, self.latents = codes, n, latents

    def residual(self, target: Tensor, weight: Tensor) -> Tensor:
        """`target` (b, d) less the codes times the latents' rows of `weight` (·, d)."""
        features = self.codes.features if self.latents is None else self.latents[self.codes.features]
        residual, self._products = residuals(self.codes._replace(features=features), target, weight)
        return residual

    def backward(self, scale: float | Tensor, residual: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> None:
        """Gradients of the latents' weights into W_enc (n, d), b_enc (n,) and W_dec (n, d), of a loss whose gradient with respect to codes · weight
        is `scale` times the `residual` (b, d) found last, where the encoder's input is `x` (b, d); those of a part of the dictionary are added to
        its rows."""
        grad_codes = self._products.mul_(scale).mul_(self.codes.values > 0)
        by_feature = ByFeature(self.codes, self.n)
        by_feature.outer_(W_dec, self.codes.values * scale, residual, self.latents)
        by_feature.outer_(W_enc, grad_codes, x.to(residual), self.latents)
        by_feature.sum_(b_enc, grad_codes, self.latents)


class DenseCodes:
    """The same with a dense matrix, which is faster where there are few latents: a dense product does its operations so much faster."""

    def __init__(self, codes: Nonzeros, n: int, latents: Tensor | None, workspace: Workspace, precision: torch.dtype | None):
        shape = (len(codes.starts), n)
        self.matrix = workspace.take("codes", shape, codes.values).zero_()
        put_(self.matrix.view(-1), torch.add(codes.features, codes.rows, alpha=n), codes.values)
        self.latents, self.workspace, self.precision = latents, workspace, precision

    def residual(self, target: Tensor, weight: Tensor) -> Tensor:
        self._weight = weight if self.latents is None else weight[self.latents]
        if self.precision is None:
            return torch.addmm(target, self.matrix, self._weight, alpha=-1)
        return target - product(self.matrix, self._weight, self.precision)

    def backward(self, scale: float | Tensor, residual: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> None:
        grad_codes = product(residual, self._weight.T, self.precision, out=self.workspace.take("grad_codes", self.matrix.shape, residual))
        grad_codes.mul_(scale).mul_(self.matrix > 0)
        codes = self.matrix.mul_(scale)
        if self.latents is None:
            product(codes.T, residual, self.precision, out=W_dec)
            product(grad_codes.T, x, self.precision, out=W_enc)
            torch.sum(grad_codes, 0, out=b_enc)
        else:
            add_rows_(W_dec, self.latents, product(codes.T, residual, self.precision))
            add_rows_(W_enc, self.latents, product(grad_codes.T, x, self.precision))
            add_rows_(b_enc.unsqueeze(1), self.latents, grad_codes.sum(0).unsqueeze(1))


def code_matrix(
    codes: Nonzeros, n: int, workspace: Workspace, latents: Tensor | None = None, precision: torch.dtype | None = None
) -> SparseCodes | DenseCodes:
    """`codes` as a (b, n) matrix, of the `latents` (n,) of a larger dictionary or of a whole one, in the form that is faster: by their number alone,
    so that the same codes take the same way every time. `precision` is that of `product`."""
    elements, device = len(codes.starts) * n, codes.values.device.type
    if elements <= DENSE_PER_NONZERO[device] * len(codes.values) and elements * codes.values.element_size() <= MAXIMUM_BYTES[device]:
        return DenseCodes(codes, n, latents, workspace, precision)
    if cuda := for_triton(codes.values):
        return cuda.FusedCodes(codes, n, latents, precision)
    return SparseCodes(codes, n, latents)


def for_triton(like: Tensor) -> ModuleType | None:
    """`cuda.py`, whose kernels are for tensors like this one: float32 on a GPU. None: they are not."""
    if not like.is_cuda or like.dtype != torch.float32 or triton_version() is None:
        return None
    from raysae.sae import cuda

    return cuda


@cache
def triton_version() -> str | None:
    """None where there is none: PyTorch for GPUs brings it along on Linux. All is done in plain PyTorch then."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


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
