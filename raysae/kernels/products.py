"""The products of a training step: pre-activations, residuals, and gradients of weights.

Pre-activations are a dense product. What follows touches active latents only: with `SparseCodes` here, or with
`FusedCodes` of `cuda.py` on a GPU. Where there are few latents, `DenseCodes` multiplies dense matrices instead, which
is faster there. `code_matrix` chooses by size and device. Memory is bounded, and the same input gives the same bits
every time.

`tests/sae/naive.py` is the short readable version of a whole training step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from raysae.kernels.backends import for_triton
from raysae.kernels.buffers import MAXIMUM_BYTES, OUTER_BYTES, Workspace, chunk_rows, rows_of
from raysae.kernels.codes import ByFeature, Nonzeros
from raysae.kernels.compiled import COMPILED, SUMS, compiled, in_parts
from raysae.kernels.rows import add_rows_, put_

# Elements of a dense code matrix that cost as much as one nonzero of a sparse one.
DENSE_PER_NONZERO = {"cpu": 4, "cuda": 64}


def product(a: Tensor, b: Tensor, precision: torch.dtype | None, out: Tensor | None = None) -> Tensor:
    """a · b. On a GPU operands may be rounded to `precision`. Sums and result are then float32."""
    if precision is None:
        return torch.mm(a, b, out=out)
    return torch.mm(a.to(precision), b.to(precision), out_dtype=torch.float32, out=out)


def pre_activation_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    workspace: Workspace,
    latents: Tensor | None = None,
    precision: torch.dtype | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """weight·xᵀ + bias (n, b), in chunks of rows of `x`.

    Chunks are latent-major, so that BLAS has the long side first: x·weightᵀ takes 15 to 50 % longer on a CPU.

    Args:
        x: (b, d).
        weight: (n, d), or more rows with `latents`.
        bias: (n,), or more with `latents`.
        workspace: Holds the chunk.
        latents: (n,). Only these rows of `weight` and `bias` count.
        precision: As in `product`.

    Yields:
        Rows of `x`, and their chunk (n, r). The next chunk overwrites it.
    """
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


def decode_rows(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Decodes `indices` and `values` (b, k) with `weight` (n, d): Σ_j values[:, j] · weight[indices[:, j]], (b, d)."""
    return embedding_bag(indices, weight, mode="sum", per_sample_weights=values)


def residuals(codes: Nonzeros, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes (b, n) leave of `target` (b, d), and its products with active latents.

    On a CPU a compiled loop does both, row by row. The weights of a row's latents are then still in the cache for the
    products. `plain_residuals` is its short readable twin.

    Returns:
        residual: target − codes · weight, (b, d).
        products: residual[row] · weight[feature] for each nonzero, (N,). `backward` needs them.
    """
    if target.device.type != "cpu" or target.dtype not in COMPILED:
        return plain_residuals(codes, target, weight)
    found, products = torch.empty_like(target), torch.empty_like(codes.values)
    operands = (tensor.numpy() for tensor in (*codes, target.contiguous(), weight.detach(), found, products))
    in_parts(_residuals, len(target), 1, *operands)
    return found, products


def plain_residuals(codes: Nonzeros, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`residuals` in plain PyTorch: autograd gives the products."""
    leaf = codes.values.detach().requires_grad_()
    with torch.enable_grad():
        decoded = embedding_bag(codes.features, weight.detach(), codes.starts, mode="sum", per_sample_weights=leaf)
    found = target - decoded.detach()
    return found, torch.autograd.grad(decoded, leaf, found)[0]


@compiled(fastmath=SUMS)
def _residuals(features, values, rows, starts, target, weight, found, products, first, last):
    """Writes rows `first` to `last` of `found`, and their nonzeros of `products`."""
    for i in range(first, last):
        begin, end = starts[i], starts[i + 1] if i + 1 < len(starts) else len(values)
        row = found[i]
        row[:] = target[i]
        for j in range(begin, end):
            value, latent = values[j], weight[features[j]]
            for m in range(len(row)):
                row[m] -= value * latent[m]
        products_of(weight, features[begin:end], row, products[begin:end])


def products_at(codes: Nonzeros, rows: Tensor, weight: Tensor) -> Tensor:
    """rows[row] · weight[feature] for each nonzero, (N,), where `rows` is (b, d) and `weight` (n, d)."""
    if rows.device.type != "cpu" or rows.dtype not in COMPILED:
        leaf = codes.values.detach().requires_grad_()
        with torch.enable_grad():
            decoded = embedding_bag(codes.features, weight.detach(), codes.starts, mode="sum", per_sample_weights=leaf)
        return torch.autograd.grad(decoded, leaf, rows)[0]
    products = torch.empty_like(codes.values)
    operands = (
        tensor.numpy() for tensor in (codes.features, codes.starts, rows.contiguous(), weight.detach(), products)
    )
    in_parts(_products_at, len(rows), 1, *operands)
    return products


@compiled(fastmath=SUMS)
def _products_at(features, starts, rows, weight, products, first, last):
    """Writes the products of rows `first` to `last`."""
    for i in range(first, last):
        begin, end = starts[i], starts[i + 1] if i + 1 < len(starts) else len(features)
        products_of(weight, features[begin:end], rows[i], products[begin:end])


@compiled(fastmath=SUMS)
def products_of(weight, latents, row, products):
    """Writes weight[latents] · row into `products`, for `weight` (n, d) and `row` (d,)."""
    last = len(latents) - 1
    for i in range(0, len(latents), 4):  # Four at a time, so that their weights come from memory side by side
        a, b, c, d = i, min(i + 1, last), min(i + 2, last), min(i + 3, last)
        latent_a, latent_b, latent_c, latent_d = (
            weight[latents[a]],
            weight[latents[b]],
            weight[latents[c]],
            weight[latents[d]],
        )
        of_a, of_b, of_c, of_d = row.dtype.type(0), row.dtype.type(0), row.dtype.type(0), row.dtype.type(0)
        for m in range(len(row)):
            of_a += latent_a[m] * row[m]
            of_b += latent_b[m] * row[m]
            of_c += latent_c[m] * row[m]
            of_d += latent_d[m] * row[m]
        products[a], products[b], products[c], products[d] = of_a, of_b, of_c, of_d


class SparseCodes:
    """A (b, n) code matrix as its nonzeros, between a dictionary's forward and backward pass.

    It works on active latents only. With `latents` (n,) the codes are of some latents of a larger dictionary: column f
    belongs to row latents[f] of the weights. `naive.topk` in `tests/sae/naive.py` is the plain version, with a dense
    code matrix and autograd.
    """

    def __init__(self, codes: Nonzeros, n: int, latents: Tensor | None = None):
        self.codes, self.n, self.latents = codes, n, latents

    def residual(self, target: Tensor, weight: Tensor) -> Tensor:
        """`target` (b, d) minus the codes times the latents' rows of `weight` (·, d)."""
        features = self.codes.features if self.latents is None else self.latents[self.codes.features]
        self._active, self._weight = self.codes._replace(features=features), weight
        self._residual, self._products = residuals(self._active, target, weight)
        return self._residual

    def backward(
        self, scale: float | Tensor, gradient: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
    ) -> None:
        """Writes the gradients of weights. With `latents` it adds them to these rows instead.

        Args:
            scale: The loss's gradient at the decoder output, codes · weight, is scale · gradient.
            gradient: (b, d). What `residual` returned last costs no further products.
            x: The encoder's input, (b, d).
            W_enc: Gradient (n, d), or larger with `latents`.
            b_enc: Gradient (n,), or larger with `latents`.
            W_dec: Gradient (n, d), or larger with `latents`.
        """
        known = gradient is self._residual
        products = self._products if known else products_at(self._active, gradient, self._weight)
        grad_codes = products.mul_(scale).mul_(self.codes.values > 0)
        by_feature = ByFeature(self.codes, self.n)
        by_feature.outer_(W_dec, self.codes.values * scale, gradient, self.latents)
        by_feature.outer_(W_enc, grad_codes, x.to(gradient), self.latents)
        by_feature.sum_(b_enc, grad_codes, self.latents)


class DenseCodes:
    """`SparseCodes` with a dense matrix.

    This is faster where there are few latents: a dense product takes far less time per operation.
    """

    def __init__(
        self, codes: Nonzeros, n: int, latents: Tensor | None, workspace: Workspace, precision: torch.dtype | None
    ):
        shape = (len(codes.starts), n)
        self.matrix = workspace.take("codes", shape, codes.values).zero_()
        put_(self.matrix.view(-1), torch.add(codes.features, codes.rows, alpha=n), codes.values)
        self.latents, self.workspace, self.precision = latents, workspace, precision

    def residual(self, target: Tensor, weight: Tensor) -> Tensor:
        self._weight = weight if self.latents is None else weight[self.latents]
        if self.precision is None:
            return torch.addmm(target, self.matrix, self._weight, alpha=-1)
        return target - product(self.matrix, self._weight, self.precision)

    def backward(
        self, scale: float | Tensor, gradient: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
    ) -> None:
        grad_codes = product(
            gradient, self._weight.T, self.precision, out=self.workspace.take("grad_codes", self.matrix.shape, gradient)
        )
        grad_codes.mul_(scale).mul_(self.matrix > 0)
        codes = self.matrix.mul_(scale)
        if self.latents is None:
            product(codes.T, gradient, self.precision, out=W_dec)
            product(grad_codes.T, x, self.precision, out=W_enc)
            torch.sum(grad_codes, 0, out=b_enc)
        else:
            add_rows_(W_dec, self.latents, product(codes.T, gradient, self.precision))
            add_rows_(W_enc, self.latents, product(grad_codes.T, x, self.precision))
            add_rows_(b_enc.unsqueeze(1), self.latents, grad_codes.sum(0).unsqueeze(1))


def code_matrix(
    codes: Nonzeros, n: int, workspace: Workspace, latents: Tensor | None = None, precision: torch.dtype | None = None
) -> SparseCodes | DenseCodes:
    """The nonzeros `codes` as a (b, n) matrix, in the form that is faster.

    The number of nonzeros and the device decide alone. So the same codes take the same form every time.

    Args:
        codes: The nonzeros.
        n: Columns of the matrix.
        workspace: Holds the matrix if it is dense.
        latents: (n,). The latents of a larger dictionary that the columns belong to.
        precision: As in `product`.
    """
    elements, device = len(codes.starts) * n, codes.values.device.type
    if (
        elements <= DENSE_PER_NONZERO[device] * len(codes.values)
        and elements * codes.values.element_size() <= MAXIMUM_BYTES[device]
    ):
        return DenseCodes(codes, n, latents, workspace, precision)
    if cuda := for_triton(codes.values):
        return cuda.FusedCodes(codes, n, latents, precision)
    return SparseCodes(codes, n, latents)
