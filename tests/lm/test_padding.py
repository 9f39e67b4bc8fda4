"""Padding at the end of contexts changes no number before it, and counts in none."""

import numpy as np
import pytest
import torch

from raysae.lm.patched_loss import downstream_metrics
from raysae.text.contexts import Contexts
from tests.lm.models import CONFIGS_OF_ALL, LENGTH, load, random_tokens, save

LENGTHS = torch.tensor([20, 11, 3, 7, 1, 20])
SKIP = 2


@pytest.mark.parametrize("architecture", CONFIGS_OF_ALL)
def test_no_activation_before_the_padding_depends_on_it(architecture, tmp_path):
    lm = load(save(architecture, tmp_path))
    hooks = [f"resid_post.{layer}" for layer in range(lm.facts.layers)]
    tokens = random_tokens(len(LENGTHS)) % 58  # The last ids of one model stand for images
    real = torch.arange(LENGTH) < LENGTHS.unsqueeze(1)
    seen = [lm.activations(torch.where(real, tokens, pad), hooks, token_loss=True) for pad in (1, 57)]
    for name in [*hooks, "token_loss"]:
        one, other = (found[name][real] for found in seen)
        # Experts take tokens of all contexts together, so the padding may change how their products round
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-5)
    alone = lm.activations(tokens[1:2, :11], hooks, token_loss=True)
    for name in [*hooks, "token_loss"]:
        torch.testing.assert_close(seen[0][name][1:2, :11], alone[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.fixture
def lm(tmp_path):
    return load(save("llama", tmp_path))


def predicting(lengths: torch.Tensor) -> torch.Tensor:
    """(c, LENGTH) bool, the positions that predict a real token."""
    contexts = Contexts("t", np.zeros((len(lengths), LENGTH), np.uint16), lengths=lengths.numpy())
    indices = np.arange(len(lengths))
    return torch.from_numpy(contexts.before_no_padding(indices, contexts.real(indices)))


def test_cross_entropy_counts_each_context_up_to_its_padding(lm):
    tokens = random_tokens(len(LENGTHS))
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) / 5
    saes, mean = {"a": lambda x: x @ weight}, torch.full((24,), 0.1)
    found = downstream_metrics(lm, tokens, "resid_post.1", saes, mean, SKIP, predicting(LENGTHS))
    parts = [
        downstream_metrics(lm, context[None, :length], "resid_post.1", saes, mean, SKIP)
        for context, length in zip(tokens, LENGTHS.tolist(), strict=True)
        if length > SKIP + 1  # The others predict nothing
    ]
    total = sum(parts[1:], parts[0])
    assert found.tokens == total.tokens == 17 + 8 + 4 + 17
    for name in ("clean", "mean", "zero", "sae", "kl"):
        assert getattr(found, name) == pytest.approx(getattr(total, name), rel=1e-4)
    whole = downstream_metrics(lm, tokens, "resid_post.1", saes, mean, SKIP)
    assert whole.finish()["a"]["ce_clean"] != pytest.approx(found.finish()["a"]["ce_clean"], rel=1e-3)


def test_saes_see_no_padding(lm):
    tokens, seen = random_tokens(len(LENGTHS)), []
    saes, kept = {"a": lambda x: seen.append(x) or x}, predicting(LENGTHS)
    downstream_metrics(lm, tokens, "mlp_out.1", saes, torch.zeros(24), SKIP, kept)
    rows = lm.activations(tokens, ["mlp_out.1"])["mlp_out.1"]
    expected = [row[SKIP : length - 1] for row, length in zip(rows[1:-1], LENGTHS[1:-1].tolist(), strict=True)]
    full = [rows[0, SKIP:], *expected, rows[-1, SKIP:]]  # Nothing follows a full context's last position
    torch.testing.assert_close(torch.cat(seen), torch.cat(full))


def test_contexts_that_predict_nothing_are_refused(lm):
    kept = predicting(torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="no prediction"):
        downstream_metrics(lm, random_tokens(2), "resid_post.1", {}, torch.zeros(24), SKIP, kept)
