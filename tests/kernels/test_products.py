"""The kernels against plain torch operations."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from raysae.kernels import codes as codes_module
from raysae.kernels import products
from raysae.kernels.buffers import MAXIMUM_BYTES, Workspace, chunk_rows
from raysae.kernels.codes import ByFeature, Nonzeros, order_of, starts_of
from raysae.kernels.products import (
    DenseCodes,
    SparseCodes,
    code_matrix,
    decode_rows,
    plain_residuals,
    pre_activation_chunks,
    residuals,
)
from raysae.kernels.rows import geometric_median


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_products_with_nonzeros(block_bytes, monkeypatch):
    monkeypatch.setattr(codes_module, "OUTER_BYTES", block_bytes)
    b, n, d, k = 30, 50, 7, 4
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(b)])
    values, source, weight = torch.rand(b, k).double(), torch.randn(b, d).double(), torch.randn(n, d).double()
    dense = torch.zeros(b, n).double().scatter(1, indices, values)
    torch.testing.assert_close(decode_rows(indices, values, weight), dense @ weight)
    codes = Nonzeros.of_rows(indices, values)
    by_feature, out, sums = ByFeature(codes, n), torch.full((n, d), 9.0).double(), torch.full((n,), 9.0).double()
    by_feature.outer_(out, codes.values, source)
    by_feature.sum_(sums, codes.values)
    torch.testing.assert_close(out, dense.T @ source)
    torch.testing.assert_close(sums, dense.sum(0))
    places = torch.randperm(n + 5)[:n]
    larger = torch.ones(n + 5, d).double()
    by_feature.outer_(larger, codes.values, source, add_to=places)
    torch.testing.assert_close(larger[places], 1 + dense.T @ source)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("pulled_by", ["the residual", "another gradient"])
def test_code_matrices(form, pulled_by, monkeypatch):
    """Forward and backward equal autograd through a dense matrix.

    A place without an active latent gets no gradient.
    """
    monkeypatch.setattr(products, "DENSE_PER_NONZERO", {"cpu": {"sparse": 0, "dense": 1000}[form]})
    b, n, d, k = 30, 50, 7, 4
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(b)])
    x, weight, target = torch.randn(b, d).double(), torch.randn(n, d).double(), torch.randn(b, d).double()
    values = torch.randn(b, k).double().relu()
    assert (values == 0).any()
    encoder, decoder = (torch.zeros(n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    on = torch.zeros(b, n).double().scatter(1, indices, (values > 0).double())
    dense = torch.zeros(b, n).double().scatter(1, indices, values)
    left = target - dense @ weight
    other = torch.randn(b, d).double()
    gradient = left if pulled_by == "the residual" else other
    (((dense + on * (x @ encoder.T + bias)) @ (weight + decoder)) * (0.3 * gradient)).sum().backward()

    codes = code_matrix(Nonzeros.of_rows(indices, values), n, Workspace())
    assert isinstance(codes, {"sparse": SparseCodes, "dense": DenseCodes}[form])
    residual = codes.residual(target, weight)
    torch.testing.assert_close(residual, left)
    W_enc, b_enc, W_dec = (
        torch.full((n, d), 9.0).double(),
        torch.full((n,), 9.0).double(),
        torch.full((n, d), 9.0).double(),
    )
    gradient = residual if pulled_by == "the residual" else other
    codes.backward(0.3, gradient, x, W_enc, b_enc, W_dec)
    expected = (encoder.grad, bias.grad, decoder.grad)
    for found, right in zip((W_enc, b_enc, W_dec), expected, strict=True):
        torch.testing.assert_close(found, right)
    latents = torch.randperm(n + 5)[:n]  # The codes use these latents of a dictionary of n + 5
    part = code_matrix(Nonzeros.of_rows(indices, values), n, Workspace(), latents)
    whole = torch.full((n + 5, d), torch.nan).double().index_copy(0, latents, weight)
    torch.testing.assert_close(part.residual(target, whole), left)
    larger = torch.ones(n + 5, d).double(), torch.ones(n + 5).double(), torch.ones(n + 5, d).double()
    part.backward(torch.tensor(0.3).double(), gradient, x, *larger)
    for found, right in zip(larger, expected, strict=True):
        torch.testing.assert_close(found[latents], 1 + right)
        assert (found.sum() - found[latents].sum()).item() == pytest.approx(found[0].numel() * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_residuals_and_their_products_with_latents(dtype, threads):
    """Rows with no nonzero, one and many give the same as dense products.

    They also give the same as torch's own operations, which a GPU uses.
    """
    b, n, d = 13, 40, 9
    matrix = torch.randn(b, n, dtype=dtype) * (torch.rand(b, n) < torch.linspace(0, 0.5, b).unsqueeze(1))
    matrix[1], matrix[2, 3] = 0, 1.5
    rows, features = matrix.nonzero(as_tuple=True)
    codes = Nonzeros(features, matrix[rows, features], rows, starts_of(rows, b))
    target, weight = torch.randn(b, d, dtype=dtype), torch.randn(n, d, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found, products = residuals(codes, target, weight)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, target - matrix @ weight)
    torch.testing.assert_close(products, (found @ weight.T)[rows, features])
    if threads == 1:
        plain = plain_residuals(codes, target, weight)
        torch.testing.assert_close((found, products), plain)


def test_geometric_median_is_the_point_of_least_distance():
    rows = np.random.default_rng(0).standard_t(2, size=(300, 4)) + 3
    found = geometric_median(torch.from_numpy(rows), tolerance=1e-9).numpy()
    best = minimize(
        lambda p: np.linalg.norm(rows - p, axis=1).sum(), rows.mean(0), method="BFGS", options={"gtol": 1e-9}
    ).x
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert np.linalg.norm(rows.mean(0) - best) > 0.01


def test_geometric_median_on_a_row():
    rows = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(rows), torch.zeros(2).double(), atol=1e-6, rtol=0)


def test_workspace_reuses_memory_and_is_left_out_of_copies():
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.take("a", (4, 5), like)
    assert workspace.take("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert workspace.take("a", (2, 3), like.double()).dtype == torch.float64
    with ThreadPoolExecutor(1) as other:
        assert (
            other.submit(workspace.take, "a", (2, 3), like).result().data_ptr()
            != workspace.take("a", (2, 3), like).data_ptr()
        )
    assert not copy.deepcopy(workspace)._buffers
    assert not pickle.loads(pickle.dumps(workspace))._buffers


@pytest.mark.parametrize(("n", "bytes_each"), [(1, 4), (8192, 4), (1 << 20, 4), (1 << 26, 4)])
def test_chunks_are_bounded(n, bytes_each):
    rows = chunk_rows(n, bytes_each)
    assert rows == 1 or rows * n * bytes_each <= MAXIMUM_BYTES["cpu"]


@pytest.mark.parametrize(
    ("n", "rows"),
    [(4096, 1024), (5000, 1024), (16_384, 256), (24_576, 256), (65_536, 64), (262_144, 64), (1 << 20, 16)],
)
def test_chunks_are_large_enough(n, rows):
    """A chunk has a power of two of rows, and enough of them for its width.

    With fewer rows the product would wait for W_enc to come from memory. The bound on memory limits great widths.
    """
    assert chunk_rows(n, 4) == rows


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_order_is_that_of_a_stable_sort(length):
    keys = torch.randint(0, 40, (length,)) + 3  # Some of 0 … 44 never occur
    order, starts = order_of(keys, 45)
    ordered, expected = keys.sort(stable=True)
    assert torch.equal(order, expected)
    assert torch.equal(starts, torch.searchsorted(ordered, torch.arange(45)))


@pytest.mark.parametrize("at_once", [0, 1 << 20])  # Bytes of weights that may be gathered at once
def test_pre_activations_of_some_latents(at_once, monkeypatch):
    monkeypatch.setattr(products, "chunk_rows", lambda n, element_size, device="cpu": 8)
    monkeypatch.setattr(products, "OUTER_BYTES", 5 * 7 * 8)
    monkeypatch.setattr(products, "MAXIMUM_BYTES", {"cpu": at_once})
    x, weight, bias, latents = (
        torch.randn(30, 7).double(),
        torch.randn(50, 7).double(),
        torch.randn(50).double(),
        torch.randperm(50)[:23],
    )
    chunks = pre_activation_chunks(x, weight, bias, Workspace(), latents)
    found = torch.cat([chunk.clone() for _, chunk in chunks], dim=1)
    torch.testing.assert_close(found, (x @ weight.T + bias).T[latents])
