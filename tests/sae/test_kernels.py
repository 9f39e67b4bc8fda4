"""The kernels against torch's own plain operations."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from raysae.sae import kernels
from raysae.sae.kernels import ByFeature, Nonzeros
from raysae.sae.selection import BatchTop, top_k


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 400), st.data())
def test_top_k_is_torch_topk(rows, n, data):
    k = data.draw(st.integers(1, n))
    scores = torch.randn(n, rows, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        scores = (scores * 2).round()  # many ties
    are_largest(*top_k(scores, k), scores, k)
    again = top_k(scores[:, -2:].clone(), k)
    assert torch.equal(again[1], top_k(scores, k)[1][-2:])  # whatever company the rows are in


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "rows", "k"), [(8192, 200, 8), (8191, 65, 32), (5000, 20, 1), (16384, 130, 64), (700, 64, 600), (1, 3, 1)])
def test_top_k_at_width(n, rows, k, dtype):
    scores = torch.randn(n, rows).to(dtype)
    are_largest(*top_k(scores, k), scores, k)
    are_largest(*top_k(scores[:, 1:], k), scores[:, 1:], k)  # not contiguous


@pytest.mark.parametrize("order", ["ascending", "descending", "one far off", "equal", "infinite", "minus infinity"])
@pytest.mark.parametrize("k", [1, 16, 900])
def test_top_k_of_awkward_scores(order, k):
    scores = torch.linspace(-1, 1, 1000).unsqueeze(1).expand(-1, 70).clone()
    match order:
        case "descending":
            scores = scores.flip(0)
        case "one far off":
            scores[400] = 1e30
        case "equal":
            scores.zero_()
        case "infinite":
            scores[::7] = torch.inf
        case "minus infinity":
            scores[:950] = -torch.inf
    are_largest(*top_k(scores, k), scores, k)


@pytest.mark.parametrize("n", [40, 1000])
def test_top_k_takes_nan_first(n):
    scores = torch.randn(n, 70)
    scores[n // 2, 3] = scores[n - 1, 4] = torch.nan
    scores[:, 5] = torch.nan
    values, indices = top_k(scores, 3)
    assert n // 2 in indices[3]
    assert n - 1 in indices[4]
    assert values.isnan().sum(1).tolist() == [0, 0, 0, 1, 1, 3, *[0] * 64]
    assert all(len(set(row)) == 3 for row in indices.tolist())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_top_k_does_not_depend_on_threads(threads):
    scores, before = torch.randn(3000, 300).round(decimals=1), torch.get_num_threads()
    expected = top_k(scores, 20)[1]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(top_k(scores, 20)[1], expected)
    finally:
        torch.set_num_threads(before)


def are_largest(values, indices, scores, k):
    """Whether these are the k largest of each column of `scores`."""
    assert torch.equal(values.sort(dim=1, descending=True).values, scores.T.topk(k, dim=1).values)
    assert torch.equal(scores.T.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 13), st.data())
def test_batch_top(b, n, chunk, data):
    count = data.draw(st.integers(1, b * n))
    scores = torch.randn(b, n, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        scores = (scores * 2).round()
    top = BatchTop(count, n, scores)
    for start in range(0, b, chunk):
        top.add(start, scores[start : start + chunk].T.contiguous())
    found = top.nonzeros(b)
    expected = scores.flatten().topk(count).values
    assert torch.equal(found.values.sort(descending=True).values, expected[expected > 0])
    assert torch.equal(scores[found.rows, found.features], found.values)
    assert len(set(zip(found.rows.tolist(), found.features.tolist(), strict=True))) == len(found.values)
    assert torch.equal(found.starts, torch.searchsorted(found.rows, torch.arange(b)))


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_products_with_nonzeros(block_bytes, monkeypatch):
    monkeypatch.setattr(ByFeature, "BLOCK_BYTES", block_bytes)
    b, n, d, k = 30, 50, 7, 4
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(b)])
    values, source, weight = torch.rand(b, k).double(), torch.randn(b, d).double(), torch.randn(n, d).double()
    dense = torch.zeros(b, n).double().scatter(1, indices, values)
    torch.testing.assert_close(kernels.decode_rows(indices, values, weight), dense @ weight)
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
def test_code_matrices(form, monkeypatch):
    """Forward and backward against autograd through a dense matrix; a place without an active latent gets no gradient."""
    monkeypatch.setattr(kernels, "DENSE_PER_NONZERO", {"sparse": 0, "dense": 1000}[form])
    b, n, d, k = 30, 50, 7, 4
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(b)])
    x, weight, grad = torch.randn(b, d).double(), torch.randn(n, d).double(), torch.randn(b, d).double()
    values = torch.randn(b, k).double().relu()
    assert (values == 0).any()
    encoder, decoder = (torch.zeros(n, d, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    on = torch.zeros(b, n).double().scatter(1, indices, (values > 0).double())
    dense = torch.zeros(b, n).double().scatter(1, indices, values)
    (((dense + on * (x @ encoder.T + bias)) @ (weight + decoder)) * grad).sum().backward()

    codes = kernels.code_matrix(Nonzeros.of_rows(indices, values), n, kernels.Workspace())
    assert isinstance(codes, {"sparse": kernels.SparseCodes, "dense": kernels.DenseCodes}[form])
    torch.testing.assert_close(codes.decode(weight), dense @ weight)
    W_enc, b_enc, W_dec = torch.full((n, d), 9.0).double(), torch.full((n,), 9.0).double(), torch.full((n, d), 9.0).double()
    codes.backward(grad, x, W_enc, b_enc, W_dec)
    expected = (encoder.grad, bias.grad, decoder.grad)
    for found, right in zip((W_enc, b_enc, W_dec), expected, strict=True):
        torch.testing.assert_close(found, right)
    latents = torch.randperm(n + 5)[:n]  # of a dictionary of n + 5, of which these codes are a part
    part = kernels.code_matrix(Nonzeros.of_rows(indices, values), n, kernels.Workspace(), latents)
    whole = torch.full((n + 5, d), torch.nan).double().index_copy(0, latents, weight)
    torch.testing.assert_close(part.decode(whole), dense @ weight)
    larger = torch.ones(n + 5, d).double(), torch.ones(n + 5).double(), torch.ones(n + 5, d).double()
    part.backward(grad, x, *larger)
    for found, right in zip(larger, expected, strict=True):
        torch.testing.assert_close(found[latents], 1 + right)
        assert (found.sum() - found[latents].sum()).item() == pytest.approx(found[0].numel() * 5)


def test_geometric_median_is_the_point_of_least_distance():
    rows = np.random.default_rng(0).standard_t(2, size=(300, 4)) + 3
    found = kernels.geometric_median(torch.from_numpy(rows), tolerance=1e-9).numpy()
    best = minimize(lambda p: np.linalg.norm(rows - p, axis=1).sum(), rows.mean(0), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(found, best, atol=1e-5)
    assert np.linalg.norm(rows.mean(0) - best) > 0.01


def test_geometric_median_on_a_row():
    rows = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(kernels.geometric_median(rows), torch.zeros(2).double(), atol=1e-6, rtol=0)


def test_workspace_reuses_memory_and_is_left_out_of_copies():
    workspace, like = kernels.Workspace(), torch.zeros(1)
    first = workspace.take("a", (4, 5), like)
    assert workspace.take("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert workspace.take("a", (2, 3), like.double()).dtype == torch.float64
    assert not copy.deepcopy(workspace)._buffers
    assert not pickle.loads(pickle.dumps(workspace))._buffers


@pytest.mark.parametrize(("n", "bytes_each"), [(1, 4), (8192, 4), (1 << 20, 4), (1 << 26, 4)])
def test_chunks_are_bounded(n, bytes_each):
    rows = kernels.chunk_rows(n, bytes_each)
    assert rows == 1 or rows * n * bytes_each <= kernels.MAXIMUM_BYTES
