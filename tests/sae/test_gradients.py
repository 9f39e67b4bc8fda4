"""`loss_and_grads` against autograd, in float64. The losses that autograd differentiates are in `naive.py`."""

import pytest
import torch

from raysae.kernels import codes, elements, products
from raysae.kernels.elements import Few
from raysae.sae.base import StepInfo
from tests.sae import naive
from tests.sae.conftest import make, with_k

D, N, B = 20, 70, 48


def perturbed(sae, seed=1):
    """Moves every parameter off its symmetric start. Decoder rows keep norm 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    sae.after_step()
    return sae


def check(sae, dead, factor=0.7):
    sae = perturbed(sae.double())
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    expected = naive.loss(sae, parameters, x, factor, dead)
    expected.backward()
    for _ in range(2):  # The second round runs in used buffers
        terms = sae.loss_and_grads(x, x, StepInfo(sparsity_factor=factor, dead=dead))
    torch.testing.assert_close(terms["loss"], expected.detach(), rtol=1e-12, atol=1e-12)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(
            parameter.grad, parameters[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert parameters[name].grad.abs().max() > 0
    return terms


@pytest.mark.parametrize("chunk_rows", [7, B])
@pytest.mark.parametrize("dense", [False, True])  # Whether codes are a dense matrix
def test_gradients_equal_autograd(architecture, chunk_rows, dense, monkeypatch):
    monkeypatch.setattr(products, "DENSE_PER_NONZERO", {"cpu": 1000 * dense})
    monkeypatch.setattr(elements, "LISTED", not dense)
    monkeypatch.setattr(products, "chunk_rows", lambda n, element_size, device="cpu": chunk_rows)
    check(make(architecture, D, N, bandwidth=0.8), dead=None)


@pytest.mark.parametrize("architecture", with_k())
@pytest.mark.parametrize("dead_latents", [3, 40])  # Fewer and more than k_aux = 8
@pytest.mark.parametrize("aux_nonzeros", [50, 1 << 19])
@pytest.mark.parametrize("dense_per_nonzero", [0, 1000])
def test_gradients_with_auxk(architecture, dead_latents, aux_nonzeros, dense_per_nonzero, monkeypatch):
    monkeypatch.setattr(products, "DENSE_PER_NONZERO", {"cpu": dense_per_nonzero})
    monkeypatch.setattr("raysae.sae.topk.AUX_NONZEROS", {"cpu": aux_nonzeros})
    monkeypatch.setattr(products, "chunk_rows", lambda n, element_size, device="cpu": 11)
    monkeypatch.setattr(codes, "OUTER_BYTES", 13 * D * 8)
    monkeypatch.setattr(products, "OUTER_BYTES", 13 * D * 8)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[torch.randperm(N, generator=torch.Generator().manual_seed(3))[:dead_latents]] = True
    sae = make(architecture, D, N)
    assert sae.k_aux == 8
    terms = check(sae, dead)
    assert terms["aux"] > 0


@pytest.mark.parametrize("architecture", with_k())
def test_no_active_latent_at_all(architecture):
    sae = make(architecture, D, N).double()
    with torch.no_grad():
        sae.bias.fill_(-100)
    x = torch.randn(B, D, dtype=torch.float64)
    terms = sae.loss_and_grads(x, x, StepInfo(dead=torch.ones(N, dtype=torch.bool)))
    sae.after_step()
    torch.testing.assert_close(terms["squared_error"], x.square().sum(1).mean())
    assert terms["l0"] == 0
    assert not sae.fired().any()
    assert not sae.W_enc.grad.any()


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "tied", "gated"])
def test_no_active_latent_at_all_in_a_dense_kind(architecture):
    sae = make(architecture, D, N).double()
    with torch.no_grad():
        sae.bias.fill_(-100)
    x = torch.randn(B, D, dtype=torch.float64)
    terms = sae.loss_and_grads(x, x, StepInfo())
    torch.testing.assert_close(terms["squared_error"], x.square().sum(1).mean())
    assert terms["l0"] == 0
    assert not sae.fired().any()
    assert not any(parameter.grad.any() for name, parameter in sae.named_parameters() if name != "b_dec")


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "tied", "gated"])
def test_few_active_latents_are_a_list(architecture, monkeypatch):
    sae = make(architecture, D, N, bandwidth=0.8).double()
    made = []
    monkeypatch.setattr(elements, "Few", lambda where: made.append(where) or Few(where))
    with torch.no_grad():
        sae.bias.fill_(-3)
    check(sae, dead=None)
    assert made
    assert 0 < made[0].sum() < made[0].numel() * elements.LISTED


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "tied", "gated"])
@pytest.mark.parametrize("listed", [0, 1])
def test_a_nan_is_not_lost(architecture, listed, monkeypatch):
    monkeypatch.setattr(elements, "LISTED", listed)
    sae = make(architecture, D, N)
    with torch.no_grad():
        sae.bias.fill_(-100)
        sae.W_enc[3, 1] = torch.nan
    assert sae.loss_and_grads(rows := torch.randn(B, D), rows, StepInfo())["loss"].isnan()


@pytest.mark.parametrize("architecture", with_k())
@pytest.mark.parametrize("among_dead", [False, True])
def test_a_nan_is_not_lost_by_a_selection(architecture, among_dead):
    sae = make(architecture, D, N)
    with torch.no_grad():
        sae.W_enc[3, 1] = torch.nan
    dead = torch.arange(N) < 20 if among_dead else None
    terms = sae.loss_and_grads(rows := torch.randn(B, D), rows, StepInfo(dead=dead))
    assert not terms["loss"].isfinite()


def test_l0_and_fired(architecture):
    sae = make(architecture, D, N, bandwidth=0.8).double()
    x = torch.randn(B, D, dtype=torch.float64)
    terms = sae.loss_and_grads(x, x, StepInfo())
    if architecture in ("batchtopk", "matryoshka"):
        pre = sae.pre_activations(x).T.detach()
        codes = naive.dense_top(pre.flatten()[None], sae.config.k * B).relu().view_as(pre)
    else:
        codes = sae.encode(x)
    if architecture == "topk":
        codes = torch.zeros(B, N, dtype=torch.float64).scatter(1, codes.indices, codes.values)
    torch.testing.assert_close(terms["l0"].double(), (codes > 0).sum(1).double().mean(), rtol=1e-6, atol=0)
    assert torch.equal(sae.fired(), (codes > 0).any(0))


def test_gradient_along_decoder_rows_is_removed_and_rows_stay_unit(architecture):
    sae = make(architecture, D, N, bandwidth=0.8).double()
    sae.after_step()  # Decoder rows get norm 1 to the precision of float64
    sae.loss_and_grads(rows := torch.randn(B, D, dtype=torch.float64), rows, StepInfo())
    sae.after_grads()
    assert (sae.W_dec.grad * sae.decoder()).sum(1).abs().max() < 1e-12
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.sub_(0.1 * parameter.grad)
    sae.after_step()
    torch.testing.assert_close(sae.decoder().norm(dim=1), torch.ones(N, dtype=torch.float64))


def test_same_bits_every_time_and_in_company(architecture):
    def trained(company: bool):
        sae, other = make(architecture, D, N), make(architecture, D, 300, seed=5)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            x = torch.randn(B, D, generator=generator)
            if company:
                other.loss_and_grads(x, x, StepInfo())
            sae.loss_and_grads(x, x, StepInfo(dead=torch.arange(N) < 20))
            sae.after_grads()
            with torch.no_grad():
                for parameter in sae.parameters():
                    parameter.sub_(0.01 * parameter.grad)
            sae.after_step()
        return sae.state_dict()

    alone, accompanied = trained(False), trained(True)
    assert all(torch.equal(alone[name], accompanied[name]) for name in alone)


@pytest.mark.parametrize("architecture", with_k())
def test_auxk_on_one_row_is_left_out(architecture):
    sae = make(architecture, D, N).double()
    row = torch.randn(1, D, dtype=torch.float64)
    terms = sae.loss_and_grads(row, row, StepInfo(dead=torch.ones(N, dtype=torch.bool)))
    assert terms["aux"] == 0
    assert terms["loss"] == sae.loss_and_grads(row, row, StepInfo())["loss"]
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())
