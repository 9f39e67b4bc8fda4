"""Each architecture finds the dictionary that made its data."""

import pytest
import torch

from raysae.analysis.instruments.dictionaries import fraction_above, matched_mmcs, mmcs
from tests.sae.conftest import make
from tests.sae.planted import Planted, train

# Level and offset of the rows. Matryoshka's early latents are to find general features: see test_matryoshka.py.
CASES = {
    "topk": ({}, 0.5),
    "batchtopk": ({}, 0.5),
    "relu": ({"sparsity": 1.0}, 0.5),
    "tied": ({"sparsity": 0.015}, 0.0),
    "jumprelu": ({"sparsity": 0.01}, 0.5),
    "gated": ({"sparsity": 1.0}, 0.5),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", CASES)
def test_recovers_a_planted_dictionary(architecture):
    level, offset = CASES[architecture]
    planted = Planted(offset=offset)
    sae = make(architecture, 32, 96, k=3, bandwidth=0.1, seed=1, **level)
    start = mmcs(planted.features, sae.decoder().detach())
    train(sae, planted, steps=2000, learning_rate=1e-2)
    found = sae.folded().decoder()
    assert start < 0.7, "training must not begin at its goal"
    assert mmcs(planted.features, found) >= 0.95
    assert matched_mmcs(planted.features, found) >= 0.95
    assert fraction_above(planted.features, found) == 1


@pytest.mark.timeout(300)
def test_batchtopk_threshold_gives_k_on_average():
    planted = Planted()
    sae = make("batchtopk", 32, 64, k=3)
    train(sae, planted, steps=600, learning_rate=3e-3)
    codes = sae.folded().encode(planted.rows(4096))
    assert (codes > 0).sum(1).float().mean().item() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize(("bias", "active"), [(0.0, 4.0), (-1.5, None), (-100.0, 0.0)])
def test_the_threshold_lets_exactly_k_pass_or_all_that_are_positive(architecture, bias, active, monkeypatch):
    monkeypatch.setattr("raysae.kernels.products.chunk_rows", lambda n, element_size, device="cpu": 7)
    sae = make(architecture, 8, 30, k=4)
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.fill_(bias)
        positive = (sae.pre_activations(x) > 0).sum().item() / len(x)
        sae.calibrate(x)
        assert (active is None) == (0 < positive < 4)
        assert (sae.encode(x) > 0).sum().item() / len(x) == (positive if active is None else active)
