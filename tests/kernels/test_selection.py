"""Selection of the largest elements against torch.topk."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysae.kernels.selection import BatchTop, top_k


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 9), st.integers(1, 400), st.data())
def test_top_k_is_torch_topk(rows, n, data):
    k = data.draw(st.integers(1, n))
    scores = torch.randn(n, rows, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    if data.draw(st.booleans()):
        scores = (scores * 2).round()  # Many ties
    are_largest(*top_k(scores, k), scores, k)
    again = top_k(scores[:, -2:].clone(), k)
    assert torch.equal(again[1], top_k(scores, k)[1][-2:])  # Other rows in the call change nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "rows", "k"), [(8192, 200, 8), (8191, 65, 32), (5000, 20, 1), (16384, 130, 64), (700, 64, 600), (1, 3, 1)]
)
def test_top_k_at_width(n, rows, k, dtype):
    scores = torch.randn(n, rows).to(dtype)
    are_largest(*top_k(scores, k), scores, k)
    are_largest(*top_k(scores[:, 1:], k), scores[:, 1:], k)  # A view that is not contiguous


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


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_top_k_of_more_than_there_are(k):
    with pytest.raises(ValueError, match=f"k is {k}: from 1 to 10 is right"):
        top_k(torch.randn(10, 3), k)


def test_top_k_of_no_rows():
    assert [len(part) for part in top_k(torch.randn(10, 0), 3)] == [0, 0]


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


def test_top_k_takes_nan_as_infinity():
    scores = torch.randn(1000, 70)
    scores[::100] = torch.inf
    scores[950] = torch.nan
    values, indices = top_k(scores, 5)
    assert set(indices.flatten().tolist()) <= {*range(0, 1000, 100), 950}
    assert top_k(scores, 11)[1].eq(950).any(1).all()
    assert not values.isfinite().any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_top_k_does_not_depend_on_threads(threads):
    scores, before = torch.randn(3000, 300).round(decimals=1), torch.get_num_threads()
    scores[1000] = 1e30  # This makes the first bounds far off
    expected = top_k(scores, 20)[1]
    torch.set_num_threads(threads)
    try:
        assert torch.equal(top_k(scores, 20)[1], expected)
    finally:
        torch.set_num_threads(before)


def are_largest(values, indices, scores, k):
    """Asserts that these are the k largest of each column of `scores` (n, rows)."""
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


@pytest.mark.parametrize(("count", "chunk"), [(5, 40), (30, 7), (3000, 40)])
def test_batch_top_takes_nan_as_infinity(count, chunk):
    scores = torch.randn(40, 90)
    scores[3, 5] = scores[30, 80] = torch.nan
    scores[12, 1] = torch.inf
    top = BatchTop(count, 90, scores)
    for start in range(0, 40, chunk):
        top.add(start, scores[start : start + chunk].T.contiguous())
    found = top.nonzeros(40)
    infinite = found.values.isinf()
    where = list(zip(found.rows[infinite].tolist(), found.features[infinite].tolist(), strict=True))
    assert where == [(3, 5), (12, 1), (30, 80)]
    expected = scores.nan_to_num(nan=torch.inf, posinf=torch.inf).flatten().topk(count).values
    assert torch.equal(found.values.sort(descending=True).values, expected[expected > 0])


def test_without_a_folder_for_compiled_code(tmp_path):
    """Nothing fails where the package's folder cannot be written, with or without a writable home."""
    code = """
import os, pathlib, sys
refused = pathlib.Path.mkdir
def mkdir(self, *args, **kwargs):
    if not str(self).startswith(sys.argv[1]):
        raise PermissionError(self)
    refused(self, *args, **kwargs)
pathlib.Path.mkdir = mkdir
import numba, torch
before = numba.config.CACHE_DIR
from raysae.kernels.selection import top_k
print(top_k(torch.arange(12.).view(4, 3), 1)[1].tolist(), numba.config.CACHE_DIR == before)
"""

    def run(writable: str) -> str:
        environment = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code, writable], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert run("nowhere") == "[[3], [3], [3]] True"
    assert not list(tmp_path.rglob("*.nbi"))
    assert run(str(tmp_path)) == "[[3], [3], [3]] True"
    assert list(tmp_path.glob(".cache/raysae/numba-*/**/*.nbi")), (
        "compiled code goes to the user's caches if the package's folder cannot be written"
    )
