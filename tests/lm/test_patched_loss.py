"""Downstream metrics on a real model and real text, against whole forward passes and float64 log-probabilities."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from raysae.config import ModelConfig, SAEConfig, TrainConfig
from raysae.lm import model, patched_loss
from raysae.lm.facts import hook_width
from raysae.lm.model import LanguageModel
from raysae.lm.patched_loss import DownstreamSums, downstream_metrics
from raysae.lm.tokenizer import load_tokenizer
from raysae.sae.architectures import build

CONTEXTS, LENGTH, SKIP = 7, 48, 5
HOOK_POINTS = ["resid_post.2", "resid_post.4", "resid_pre.0", "attn_out.1", "mlp_out.3", "attn_z.0", "mlp_act.2"]


@pytest.fixture(scope="module")
def lm(stories_model) -> LanguageModel:
    return LanguageModel.load(ModelConfig(name=str(stories_model)))


@pytest.fixture(scope="module")
def tokens(shared_data, stories_model) -> Tensor:
    """(CONTEXTS, LENGTH) tokens of real stories, BOS first."""
    text = (shared_data / "text" / "tinystories" / "validation_head.txt").read_text()[:8000]
    tokenizer = load_tokenizer(ModelConfig(name=str(stories_model)))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    body = ids[: CONTEXTS * (LENGTH - 1)].view(CONTEXTS, LENGTH - 1)
    return torch.cat([torch.full((CONTEXTS, 1), tokenizer.bos_token_id), body], 1)


def make_sae(width: int, latents: int = 32, seed: int = 0):
    """A random ReLU autoencoder: (rows, w) → (rows, w)."""
    weight = torch.randn(latents, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return lambda x: (x @ weight.T).relu() @ weight * 0.5


def patched_logits(lm: LanguageModel, tokens: Tensor, hook_point: str, function) -> Tensor:
    """Float64 logits of one whole forward pass. `function` replaces the activations from position SKIP on."""

    def patch(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :SKIP], function(activation[:, SKIP:])], 1)

    if not hook_point.startswith("resid_post"):
        return lm.logits(tokens, {hook_point: patch}).double()
    block = lm.model.model.layers[int(hook_point[-1])]
    with block.register_forward_hook(lambda module, args, output: patch(output)), torch.no_grad():
        return lm.model(tokens).logits.double()


def brute_force(lm: LanguageModel, tokens: Tensor, hook_point: str, sae, mean: Tensor) -> dict[str, float]:
    """Every metric, prediction by prediction."""
    logits = {
        "clean": lm.model(tokens).logits.double(),
        "sae": patched_logits(lm, tokens, hook_point, sae),
        "mean": patched_logits(lm, tokens, hook_point, lambda x: mean.expand_as(x)),
        "zero": patched_logits(lm, tokens, hook_point, torch.zeros_like),
    }
    loss, divergence = dict.fromkeys(logits, 0.0), 0.0
    for context in range(CONTEXTS):
        for position in range(SKIP, LENGTH - 1):
            at = {name: value[context, position].log_softmax(-1) for name, value in logits.items()}
            for name in logits:
                loss[name] -= at[name][tokens[context, position + 1]].item()
            divergence += (at["clean"].exp() * (at["clean"] - at["sae"])).sum().item()
    count = CONTEXTS * (LENGTH - 1 - SKIP)
    ce = {name: value / count for name, value in loss.items()}
    return {
        "ce_recovered": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "ce_recovered_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
        "kl": divergence / count,
        **{f"ce_{name}": value for name, value in ce.items()},
    }


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_every_metric_equals_brute_force(lm, tokens, hook_point, monkeypatch):
    monkeypatch.setattr(patched_loss, "ROWS_AT_ONCE", 3 * LENGTH)  # Batches of 3, 3 and 1 contexts
    width = hook_width(hook_point, lm.facts)
    mean = lm.activations(tokens, [hook_point])[hook_point][:, SKIP:].mean((0, 1))
    saes = {"a": make_sae(width), "b": make_sae(width, seed=1)}
    metrics = downstream_metrics(lm, tokens, hook_point, saes, mean, SKIP).finish()
    assert set(metrics) == {"a", "b"}
    for name, sae in saes.items():
        truth = brute_force(lm, tokens, hook_point, sae, mean)
        assert metrics[name] == pytest.approx(truth, rel=1e-4, abs=1e-5)
    assert metrics["a"]["kl"] > 1e-3
    assert metrics["a"]["ce_sae"] != metrics["b"]["ce_sae"]


def test_shards_add_up(lm, tokens):
    saes, mean = {"a": make_sae(64)}, torch.zeros(64)
    whole = downstream_metrics(lm, tokens, "resid_post.2", saes, mean, SKIP)
    parts = [downstream_metrics(lm, part, "resid_post.2", saes, mean, SKIP) for part in tokens.split(2)]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    assert total.tokens == whole.tokens == CONTEXTS * (LENGTH - 1 - SKIP)
    assert total.finish()["a"] == pytest.approx(whole.finish()["a"], rel=1e-5)


def test_threads_take_batches_side_by_side(lm, tokens, monkeypatch):
    monkeypatch.setattr(patched_loss, "ROWS_AT_ONCE", LENGTH)  # One context per batch
    sae = build(SAEConfig(hook_point="resid_post.2", width=128, k=8, learning_rate=1e-3), 64, TrainConfig())
    sae.initialise(lm.activations(tokens, ["resid_post.2"])["resid_post.2"].flatten(0, 1))
    seen: dict[int, int] = {}  # Thread id → number of torch's threads in it
    meeting = threading.Barrier(1)

    def reconstruct(rows: Tensor) -> Tensor:
        if threading.get_ident() not in seen:
            seen[threading.get_ident()] = torch.get_num_threads()
            meeting.wait(60)
        return sae(rows)

    def found(threads: int, workers: int) -> DownstreamSums:
        nonlocal meeting
        meeting = threading.Barrier(workers)  # No thread goes on before all have begun
        torch.set_num_threads(threads)
        seen.clear()
        try:
            sums = downstream_metrics(lm, tokens, "resid_post.2", {"a": reconstruct}, torch.zeros(64), SKIP)
            assert torch.get_num_threads() == threads
            return sums
        finally:
            torch.set_num_threads(before)

    before = torch.get_num_threads()
    alone = found(1, workers=1)
    assert seen == {threading.get_ident(): 1}
    together = found(3, workers=3)
    assert list(seen.values()) == [1, 1, 1]
    assert together == alone, "the same batches, added up in the same order"
    # Too many logits to hold them several times
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 1)
    found(2, workers=1)
    assert seen == {threading.get_ident(): 2}


def test_perfect_and_useless_reconstructions(lm, tokens):
    mean = torch.full((64,), 0.1)
    saes = {"perfect": lambda x: x, "mean": lambda x: mean.expand_as(x), "zero": torch.zeros_like}
    metrics = downstream_metrics(lm, tokens, "resid_post.3", saes, mean, SKIP).finish()
    assert metrics["perfect"]["ce_recovered"] == pytest.approx(1)
    assert metrics["perfect"]["ce_recovered_zero"] == pytest.approx(1)
    assert metrics["perfect"]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["mean"]["ce_recovered"] == pytest.approx(0, abs=1e-6)
    assert metrics["zero"]["ce_recovered_zero"] == pytest.approx(0, abs=1e-6)
    assert metrics["zero"]["ce_recovered"] != pytest.approx(0, abs=1e-3)
    clean = lm.activations(tokens, [], token_loss=True)["token_loss"][:, SKIP + 1 :].double().mean().item()
    assert metrics["perfect"]["ce_clean"] == pytest.approx(clean, rel=1e-6)


def test_saes_see_raw_rows_of_replaced_positions_once(lm, tokens):
    seen = []
    downstream_metrics(lm, tokens, "mlp_out.1", {"a": lambda x: seen.append(x) or x}, torch.zeros(64), SKIP)
    rows = lm.activations(tokens, ["mlp_out.1"])["mlp_out.1"][:, SKIP:].flatten(0, 1)
    torch.testing.assert_close(torch.cat(seen), rows, rtol=0, atol=0)


def test_bfloat16_model(stories_model, tokens):
    lm = LanguageModel.load(ModelConfig(name=str(stories_model), dtype="bfloat16"))
    dtypes = []
    sums = downstream_metrics(
        lm, tokens, "resid_post.2", {"a": lambda x: dtypes.append(x.dtype) or x}, torch.zeros(64), SKIP
    )
    assert set(dtypes) == {torch.float32}
    assert sums.finish()["a"]["ce_recovered"] == pytest.approx(1, abs=1e-6)


def test_undefined_where_there_is_nothing_to_recover():
    sums = DownstreamSums(tokens=100, clean=200.0, mean=200.9, zero=202.0, sae={"a": 200.5}, kl={"a": 1.0})
    metrics = sums.finish()["a"]
    assert metrics["ce_recovered"] is None  # Only 0.009 nats can be recovered
    assert metrics["ce_recovered_zero"] == pytest.approx(0.75)  # 0.015 of 0.02 nats are recovered
    harmless = DownstreamSums(tokens=100, clean=200.0, mean=190.0, zero=190.0, sae={"a": 195.0}, kl={"a": 1.0})
    assert harmless.finish()["a"]["ce_recovered"] is None  # Ablation lowers the loss here


def test_sums_of_different_saes_do_not_add_up():
    one = DownstreamSums(1, 1.0, 1.0, 1.0, {"a": 1.0}, {"a": 1.0})
    with pytest.raises(ValueError, match="different SAEs"):
        one + DownstreamSums(1, 1.0, 1.0, 1.0, {"b": 1.0}, {"b": 1.0})


@pytest.mark.parametrize("skip", [LENGTH - 1, LENGTH, -1])
def test_no_prediction_at_a_replaced_position(lm, tokens, skip):
    with pytest.raises(ValueError, match=r"from 0 to 46"):
        downstream_metrics(lm, tokens, "resid_post.2", {}, torch.zeros(64), skip)
    with pytest.raises(ValueError, match="no contexts"):
        downstream_metrics(lm, tokens[:0], "resid_post.2", {}, torch.zeros(64), SKIP)


def test_positions_left_out_stay_intact_and_are_not_counted(lm, tokens, monkeypatch):
    monkeypatch.setattr(patched_loss, "ROWS_AT_ONCE", 3 * LENGTH)  # Batches of 3, 3 and 1 contexts. The last has no row
    kept = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    kept[6] = False
    sae, mean = make_sae(64), torch.full((64,), 0.1)
    sums = downstream_metrics(lm, tokens, "resid_post.2", {"a": sae}, mean, SKIP, kept)

    def some(x: Tensor) -> Tensor:
        return torch.where(kept[:, SKIP:, None], sae(x), x)

    counted = kept[:, SKIP:-1]
    clean = lm.model(tokens).logits.double().log_softmax(-1)[:, SKIP:-1]
    found = patched_logits(lm, tokens, "resid_post.2", some).log_softmax(-1)[:, SKIP:-1]
    loss = -found.gather(-1, tokens[:, SKIP + 1 :, None]).squeeze(-1)[counted].mean().item()
    kl = (clean.exp() * (clean - found)).sum(-1)[counted].mean().item()
    assert sums.tokens == int(counted.sum())
    assert sums.finish()["a"]["ce_sae"] == pytest.approx(loss, rel=1e-5)
    assert sums.finish()["a"]["kl"] == pytest.approx(kl, rel=1e-4)
    with pytest.raises(ValueError, match="no prediction is made"):
        downstream_metrics(lm, tokens, "resid_post.2", {"a": sae}, mean, SKIP, torch.zeros_like(kept))
