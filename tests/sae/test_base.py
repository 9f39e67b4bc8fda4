"""What all architectures share: initial values, folding, encoding."""

import pickle

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from raysae.analysis.instruments.dictionaries import fraction_above, matched_mmcs, mmcs
from raysae.kernels.rows import geometric_median
from raysae.sae import base
from raysae.sae.base import Codes, StepInfo
from tests.sae.conftest import make
from tests.sae.planted import Planted, train


def briefly_trained(architecture, d=32, width=64):
    planted = Planted(d=d, offset=3.0)
    sparsity = {"tied": 0.02, "jumprelu": 0.01}.get(architecture, 0.3)
    sae = make(architecture, d, width, k=3, sparsity=sparsity, bandwidth=0.1)
    train(sae, planted, steps=30, learning_rate=1e-2)
    return sae, planted.rows(500)


def dense(codes, n):
    return (
        torch.zeros(len(codes.values), n, dtype=codes.values.dtype).scatter(1, codes.indices, codes.values)
        if isinstance(codes, Codes)
        else codes
    )


def test_weights_depend_on_the_seed_alone(architecture):
    torch.manual_seed(1)
    a = make(architecture, 16, 40, seed=3)
    torch.manual_seed(2)
    torch.rand(5)
    b, c = make(architecture, 16, 40, seed=3), make(architecture, 16, 40, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec, c.W_dec)


@pytest.mark.parametrize("decoder_bias", ["mean", "median"])
def test_initialise(architecture, decoder_bias):
    rows = 7 * torch.randn(3000, 16, generator=torch.Generator().manual_seed(0)).exp()
    sae = make(architecture, 16, 40, decoder_bias=decoder_bias)
    sae.initialise(rows)
    if architecture == "tied":
        bound = (6 / 56) ** 0.5
        assert sae.scale == 1
        assert not sae.b_enc.any()
        assert "b_dec" not in dict(sae.named_parameters())
        assert 0.95 * bound < sae.W_dec.abs().max() <= bound
        return
    torch.testing.assert_close((rows / sae.scale).square().sum(1).mean(), torch.tensor(16.0))
    centre = rows.mean(0) if decoder_bias == "mean" else geometric_median(rows).float()
    torch.testing.assert_close(sae.b_dec.detach(), centre / sae.scale)
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_folded_takes_raw_activations(architecture):
    sae, x = briefly_trained(architecture)
    if architecture != "tied":
        assert abs(sae.scale - 1) > 0.5
    sae, x = sae.double(), x.double()
    with torch.no_grad():
        folded, codes = sae.folded(), sae.encode(x / sae.scale)
        torch.testing.assert_close(folded(x), sae.scale * sae(x / sae.scale), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dense(folded.encode(x), 64), sae.scale * dense(codes, 64), rtol=1e-10, atol=1e-10)
        assert folded.scale == 1
        assert not any(parameter.requires_grad for parameter in folded.parameters())
        torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(64).double(), rtol=1e-6, atol=0)
        twice = folded.folded()
        torch.testing.assert_close(twice(x), folded(x), rtol=1e-12, atol=1e-12)


def test_codes_are_what_the_architecture_says(architecture):
    sae, x = briefly_trained(architecture)
    with torch.no_grad():
        folded = sae.folded()
        codes, pre = folded.encode(x), (x - folded.b_dec) @ folded.W_enc.T + folded.bias
        if architecture == "topk":
            expected = torch.zeros_like(pre).scatter(1, pre.topk(3).indices, pre.topk(3).values.relu())
        elif architecture in ("batchtopk", "matryoshka", "jumprelu"):
            expected = pre * (pre > folded.threshold)
            assert (folded.threshold > 0).all()
        elif architecture == "gated":
            magnitude = folded.r_mag.exp() * (pre - folded.b_gate) + folded.b_mag
            assert ((pre > 0) != (magnitude > 0)).any(), "the two paths are to differ"
            expected = (pre > 0) * magnitude.relu()
        else:
            expected = pre.relu()
        torch.testing.assert_close(dense(codes, 64), expected)
        torch.testing.assert_close(folded(x), expected @ folded.W_dec + folded.b_dec)
        torch.testing.assert_close(folded.decode(codes), folded(x))
        one_by_one = torch.cat([folded(row[None]) for row in x[:20]])
        torch.testing.assert_close(one_by_one, folded(x[:20]))


def test_forward_in_chunks_of_rows(architecture, monkeypatch):
    sae, x = briefly_trained(architecture)
    folded = sae.folded()
    whole = folded(x)
    monkeypatch.setattr(base, "chunk_rows", lambda n, element_size, device="cpu": 9)
    torch.testing.assert_close(folded(x), whole)


def test_state_continues_training_bit_for_bit(architecture):
    """A copy through state_dict takes the same further steps, and so does a pickle. Checkpoints need no more."""
    sae, x = briefly_trained(architecture)
    copy = make(architecture, 32, 64, k=3, sparsity=sae.config.sparsity or 0, bandwidth=0.1)
    copy.load_state_dict(sae.state_dict())
    pickled = pickle.loads(pickle.dumps(sae))
    for each in (sae, copy, pickled):
        each.loss_and_grads(scaled := x / each.scale, scaled, StepInfo())
        each.after_grads()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.sub_(0.01 * parameter.grad)
        each.after_step()
    for other in (copy, pickled):
        assert all(
            torch.equal(a, b) for a, b in zip(sae.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_nan_shows_in_the_loss(architecture):
    sae = make(architecture, 16, 40)
    x = torch.randn(20, 16)
    x[3, 4] = torch.nan
    assert sae.loss_and_grads(x, x, StepInfo())["loss"].isnan()


def test_mmcs_by_hand():
    a, b = torch.randn(7, 5), torch.randn(9, 5)
    cosines = torch.tensor([[torch.nn.functional.cosine_similarity(p, q, dim=0) for q in b] for p in a])
    assert mmcs(a, b) == pytest.approx(cosines.max(1).values.mean().item(), abs=1e-6)
    assert mmcs(b, a) == pytest.approx(cosines.max(0).values.mean().item(), abs=1e-6)
    assert mmcs(a, -2 * a) < 1
    assert fraction_above(a, b, 0.5) == pytest.approx((cosines.max(1).values > 0.5).float().mean().item())
    rows, columns = linear_sum_assignment(-cosines)
    assert matched_mmcs(a, b) == pytest.approx(cosines[rows, columns].mean().item(), abs=1e-6)
    assert matched_mmcs(a, 3 * a[torch.randperm(7)]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("width", "active"), [(40, 10), (400, 32)])
def test_jumprelu_starts_with_min_2d_and_a_quarter_of_its_latents_active(width, active):
    rows = 5 * torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    sae = make("jumprelu", 16, width)
    sae.initialise(rows)
    with torch.no_grad():
        assert (sae.encode(rows / sae.scale) > 0).sum(1).float().mean().item() == pytest.approx(active, rel=0.02)
        torch.testing.assert_close(sae.log_threshold.exp(), sae.threshold)
