"""Pursuit against its dense definition, at every step. Its report must equal sums in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import raysae.analysis.dark_matter.measures.pursuit as module
from raysae.analysis.dark_matter.measures.pursuit import Pursuit, pursuit
from raysae.analysis.instruments.activations import ArrayActivations
from raysae.kernels import buffers
from raysae.kernels.rows import unit_rows
from raysae.sae.base import Codes
from tests.sae.conftest import make
from tests.sae.planted import Planted


def naive_step(x: Tensor, D: Tensor, w: Tensor) -> Tensor:
    """One step of the definition for all tokens, with dense weights `w` (b, n)."""
    r = x - w @ D
    scores = r @ D.T
    support = w != 0
    support[torch.arange(len(x)), scores.argmax(1)] = True
    g = torch.where(support, scores, 0)
    gD = g @ D
    denominator = (gD * gD).sum(1)
    step = torch.where(denominator > 0, (gD * r).sum(1) / denominator, 0)
    return (w + step[:, None] * g).clamp_min(0)


def naive(x: Tensor, D: Tensor, steps: Tensor) -> Tensor:
    w = x.new_zeros(len(x), len(D))
    for i in range(int(steps.max())):
        w = torch.where((i < steps)[:, None], naive_step(x, D, w), w)
    return w


def dense(codes: Codes, n: int) -> Tensor:
    return codes.values.new_zeros(len(codes.values), n).scatter_add_(1, codes.indices, codes.values)


def problem(b: int = 120, d: int = 12, n: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (b, d) and a dictionary (n, d).

    Most lie in the positive orthant. There, features take the place of others chosen before them.
    """
    generator = torch.Generator().manual_seed(seed)
    D, x = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, b))
    D[5:].abs_()
    x[20:].abs_()
    return x, unit_rows(D)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["gram", "both", "dense"])
def way(request, monkeypatch) -> str:
    """How products are made: by the Gram matrix at every step, at the first 4 only, or never.

    The other products are dense. Tokens come in blocks of 25.
    """
    monkeypatch.setattr(module, "DIMENSIONS_PER_SLOT", {"gram": 1 / 2, "both": 3, "dense": 3}[request.param])
    monkeypatch.setattr(module, "GRAM_BYTES", 0 if request.param == "dense" else 1 << 30)
    monkeypatch.setattr(module, "GRAM_COLUMNS", 8)
    monkeypatch.setattr(module, "SCORE_BYTES", {"gram": 24**2, "both": 30, "dense": 30}[request.param] * 8 * 25)
    monkeypatch.setattr(buffers, "CHUNK_BYTES", {"cpu": 30 * 8 * 10})
    monkeypatch.setattr(buffers, "MINIMUM_ROWS", 1)
    return request.param


def test_every_step_is_the_definition_in_float64(way):
    x, D = problem()
    pursue, w = Pursuit(D), torch.zeros(120, 30, dtype=torch.float64)
    clipped = repeated = 0
    for step in range(1, 25):
        before, w = w, naive_step(x, D, w)
        codes = pursue(x, torch.full((120,), step))
        assert codes.values.shape == codes.indices.shape == (120, step)
        torch.testing.assert_close(dense(codes, 30), w, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pursue.decode(codes), w @ D, rtol=1e-9, atol=1e-12)
        clipped += int(((before > 0) & (w == 0)).sum())
        repeated += int(((w > 0).sum(1) == (before > 0).sum(1)).sum())
    # Both special cases occur: a latent leaves, and the argmax is active already
    assert clipped > 5
    assert repeated > 5


def test_every_step_is_the_definition_in_float32(way):
    """The definition takes its next step in float64, from the state that float32 has reached.

    Where two latents are equal up to rounding, either may be next.
    """
    x, D = problem(seed=1)
    pursue, before = Pursuit(D.float()), torch.zeros(120, 30, dtype=torch.float64)
    compared = 0
    for step in range(1, 25):
        after = dense(pursue(x.float(), torch.full((120,), step)), 30).double()
        top = ((x - before @ D) @ D.T).topk(2).values
        clear = top[:, 0] - top[:, 1] > 1e-5
        torch.testing.assert_close(after[clear], naive_step(x, D, before)[clear], rtol=1e-4, atol=1e-5)
        compared += int(clear.sum())
        before = after
    assert compared > 2700


def test_each_token_at_its_own_l0(way):
    x, D = problem(b=200, seed=2)
    steps = torch.randint(0, 15, (200,), generator=torch.Generator().manual_seed(0))
    codes = Pursuit(D)(x, steps)
    torch.testing.assert_close(dense(codes, 30), naive(x, D, steps), rtol=1e-9, atol=1e-12)
    assert (codes.values[steps == 0] == 0).all()
    assert codes.values.shape == (200, 14)


def test_rows_of_any_norm_and_degenerate_tokens(way):
    x, D = problem(seed=3)
    x[0], x[1] = 0, -D.sum(0) * 1e-12
    D = torch.cat([D, torch.zeros(1, 12, dtype=torch.float64)])
    steps = torch.full((120,), 9)
    codes = Pursuit(D * torch.rand(31, 1, dtype=torch.float64).add(0.5))(x, steps)
    assert codes.values.isfinite().all()
    torch.testing.assert_close(dense(codes, 31), naive(x, D, steps), rtol=1e-8, atol=1e-12)
    assert (codes.values[0] == 0).all()


def test_one_direction_is_found_exactly():
    D = torch.eye(4)[:3]
    codes = Pursuit(D)(torch.tensor([[0.0, 2.0, 0, 5.0], [-1.0, -1.0, -1.0, 0]]), torch.tensor([3, 3]))
    torch.testing.assert_close(dense(codes, 3), torch.tensor([[0, 2.0, 0], [0, 0, 0]]))


def test_nothing_to_do():
    D = torch.eye(4)
    assert Pursuit(D)(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)).values.shape == (2, 0)
    assert Pursuit(D)(torch.ones(0, 4), torch.zeros(0, dtype=torch.int64)).values.shape == (0, 0)
    codes = Pursuit(D)(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(Pursuit(D).decode(codes), torch.zeros(2, 4))


def test_no_dense_weights(monkeypatch):
    """Only one block of tokens at a time has a tensor with one element per token and latent."""
    monkeypatch.setattr(module, "SCORE_BYTES", 2048 * 4 * 16)  # A block has 16 tokens
    x, steps = torch.randn(128, 8), torch.full((128,), 4)
    pursue = Pursuit(torch.randn(2048, 8))
    largest = 0
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        pursue(x, steps)
    for event in profile.function_events:
        largest = max(largest, event.cpu_memory_usage)
    assert 0 < largest <= 2 * 2048 * 4 * 16


# ---------------------------------------------------------------- the report


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    return float((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum())


def fitted(x: Tensor, y: Tensor) -> np.ndarray:
    """Least-squares map from `x` to `y` with an intercept, (d + 1, d)."""
    return np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y.numpy(), rcond=None)[0]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_report_equals_sums_over_all_tokens(architecture):
    planted = Planted(offset=0.5)
    x = planted.rows(1500)
    x += 0.02 * torch.randn(x.shape, generator=planted.generator)
    sae = make(architecture, 32, 48, k=4).requires_grad_(False)
    sae.W_dec.copy_(planted.features)
    # An encoder with errors
    sae.W_enc.copy_(planted.features + 0.1 * torch.randn(48, 32, generator=torch.Generator().manual_seed(0)))
    sae.b_dec.copy_(planted.offset)
    if architecture == "jumprelu":
        sae.threshold.fill_(0.6)
    activations = ArrayActivations({"resid_post.2": x}, torch.arange(1500) // 10)
    table = pursuit(activations, "resid_post.2", {"a": sae})
    assert list(table["sae"]) == ["a"]
    assert list(table["width"]) == [48]
    numbers = table.iloc[0]

    rows = {split: torch.cat([chunk.x["resid_post.2"] for chunk in activations.chunks(split)]) for split in "AC"}
    expected, errors = {}, {}
    for split, x in rows.items():
        codes = sae.encode(x)
        l0 = ((codes.values if architecture == "topk" else codes) > 0).sum(1)
        D = sae.decoder().double()
        w = naive(x.double() - sae.b_dec.double(), D, l0)
        errors[split] = {"": x.double() - sae(x), "_pursuit": x.double() - sae.b_dec - w @ D}
        expected["l0"], expected["l0_pursuit"] = float(l0.double().mean()), float((w > 0).sum(1).double().mean())
    x = rows["C"].double()
    for when, error in errors["C"].items():
        map_ = fitted(rows["A"], errors["A"][when])
        expected[f"fvu{when}"] = fvu(x, x - error)
        expected[f"nonlinear_fvu{when}"] = fvu(
            x, x - error + torch.from_numpy(np.column_stack([x, np.ones(len(x))]) @ map_)
        )
    expected["encoder_error"] = expected["nonlinear_fvu"] - expected["nonlinear_fvu_pursuit"]
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert numbers["encoder_error_low"] > 0  # The encoder is worse than the decoder allows
    assert all(numbers[f"{name}_low"] <= numbers[name] <= numbers[f"{name}_high"] for name in expected)
