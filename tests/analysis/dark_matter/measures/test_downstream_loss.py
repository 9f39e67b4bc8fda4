"""Cross-entropy with parts of the error put back, against plain hooks on the real model.

The comparison is made for every single prediction.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from raysae.analysis.dark_matter.measures.downstream_loss import Patched, downstream_loss
from raysae.analysis.instruments.regression import Linear, Moments
from raysae.config import ModelConfig, SAEConfig, TrainConfig
from raysae.lm.model import LanguageModel
from raysae.lm.tokenizer import load_tokenizer
from raysae.sae.architectures import build
from raysae.sae.base import SAE

CONTEXTS, LENGTH, SKIP = 11, 40, 4
REPLACED = (torch.arange(LENGTH) >= SKIP).repeat(CONTEXTS, 1)


@pytest.fixture(scope="module")
def lm(stories_model) -> LanguageModel:
    return LanguageModel.load(ModelConfig(name=str(stories_model)))


@pytest.fixture(scope="module")
def tokens(shared_data, stories_model) -> Tensor:
    """Tokens (CONTEXTS, LENGTH) of real stories. Each context begins with BOS."""
    text = (shared_data / "text" / "tinystories" / "validation_head.txt").read_text()[:6000]
    tokenizer = load_tokenizer(ModelConfig(name=str(stories_model)))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    body = ids[: CONTEXTS * (LENGTH - 1)].view(CONTEXTS, LENGTH - 1)
    return torch.cat([torch.full((CONTEXTS, 1), tokenizer.bos_token_id), body], 1)


def patched(tokens: Tensor, kept: Tensor = REPLACED, per_group: int = 1) -> Patched:
    """The contexts, as many to a group of documents as `per_group` says."""
    return Patched(tokens, torch.arange(len(tokens)) // per_group, kept[: len(tokens)])


def make_sae(x: Tensor, width: int, hook_point: str) -> SAE:
    """A TopK SAE whose latents point at some rows of `x`."""
    config = SAEConfig(architecture="topk", hook_point=hook_point, width=width, k=6, learning_rate=1e-3)
    sae = build(config, x.shape[1], TrainConfig()).requires_grad_(False)
    directions = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:width]] - x.mean(0)
    directions = directions / directions.norm(dim=1, keepdim=True)
    sae.W_enc.copy_(directions * 0.5)
    sae.W_dec.copy_(directions)
    sae.b_dec.copy_(x.mean(0))
    return sae


def fitted(sae: SAE, x: Tensor) -> Linear:
    moments = Moments()
    moments.add(x, {"e": x - sae(x)})
    return moments.solve().maps["e"]


def patched_loss(lm: LanguageModel, tokens: Tensor, hook_point: str, function) -> Tensor:
    """Loss (CONTEXTS, predictions) in float64, by whole forward passes of the transformers model.

    `function` replaces the activations at positions from SKIP on.
    """
    kind, layer = hook_point.split(".")
    block = lm.model.model.layers[int(layer)]

    def patch(module, args, output):
        return torch.cat([output[:, :SKIP], function(output[:, SKIP:])], 1)

    handle = (block if kind == "resid_post" else block.mlp).register_forward_hook(patch)
    with torch.no_grad():
        logits = lm.model(tokens).logits.double()
    handle.remove()
    log_probability = logits.log_softmax(-1)
    loss = torch.zeros(CONTEXTS, LENGTH - 1 - SKIP, dtype=torch.float64)
    for context in range(CONTEXTS):
        for position in range(SKIP, LENGTH - 1):
            loss[context, position - SKIP] = -log_probability[context, position, tokens[context, position + 1]]
    return loss


@pytest.mark.parametrize("hook_point", ["resid_post.2", "mlp_out.1"])
def test_every_number_equals_brute_force(lm, tokens, hook_point, monkeypatch):
    # Gives batches of 3, 3, 3 and 2 contexts
    monkeypatch.setattr("raysae.analysis.dark_matter.measures.downstream_loss.ROWS_AT_ONCE", 3 * LENGTH)
    x = lm.activations(tokens, [hook_point])[hook_point][:, SKIP:].flatten(0, 1)
    saes = {"a": make_sae(x, 32, hook_point), "b": make_sae(x, 100, hook_point)}
    probes = {name: fitted(sae, x[: len(x) // 2]) for name, sae in saes.items()}
    table = downstream_loss(lm, patched(tokens), hook_point, saes, probes)
    assert list(table["sae"]) == ["a", "b"]
    assert list(table["width"]) == [32, 100]
    for (_, row), (name, sae) in zip(table.iterrows(), saes.items(), strict=True):
        weight, bias = probes[name].weight.float(), probes[name].bias.float()

        def with_part(rows: Tensor, part: str, sae=sae, weight=weight, bias=bias) -> Tensor:
            r = rows.flatten(0, 1)
            made = sae(r)
            linear = r @ weight + bias
            return (made + {"sae": 0, "linear": linear, "nonlinear": r - made - linear}[part]).view_as(rows)

        loss = {
            part: patched_loss(lm, tokens, hook_point, lambda rows, part=part: with_part(rows, part))
            for part in ("sae", "linear", "nonlinear")
        }
        loss["clean"] = patched_loss(lm, tokens, hook_point, lambda rows: rows)
        mean = {part: float(values.mean()) for part, values in loss.items()}
        e = (x - sae(x)).double().numpy()
        linear = (x.double() @ probes[name].weight + probes[name].bias).numpy()
        expected = {f"ce_{part}": value for part, value in mean.items()}
        expected["l0"] = float((sae.encode(x).values > 0).sum(1).double().mean())
        expected["fvu"] = np.square(e).sum() / np.square(x.numpy() - x.double().numpy().mean(0)).sum()
        for part, v in {"linear": linear, "nonlinear": e - linear}.items():
            expected[f"recovered_{part}"] = (mean["sae"] - mean[part]) / (mean["sae"] - mean["clean"])
            expected[f"variance_share_{part}"] = v.var(0).sum() / e.var(0).sum()
            expected[f"norm_share_{part}"] = np.linalg.norm(v, axis=1).sum() / np.linalg.norm(e, axis=1).sum()
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)
        assert mean["sae"] - mean["clean"] > 0.05
        assert all(row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] for key in expected)
        assert row["recovered_linear_low"] < row["recovered_linear_high"]


def test_interval_is_students_over_contexts(lm, tokens):
    """With a context per group, the interval of the cross-entropy is Student's."""
    x = lm.activations(tokens, ["resid_post.2"])["resid_post.2"][:, SKIP:].flatten(0, 1)
    sae = make_sae(x, 32, "resid_post.2")
    row = downstream_loss(lm, patched(tokens), "resid_post.2", {"a": sae}, {"a": fitted(sae, x)}, 1000).iloc[0]
    loss = patched_loss(lm, tokens, "resid_post.2", lambda rows: sae(rows.flatten(0, 1)).view_as(rows)).mean(1).numpy()
    width = 2 * stats.t.ppf(0.975, CONTEXTS - 1) * loss.std(ddof=1) / CONTEXTS**0.5
    assert row["ce_sae_high"] - row["ce_sae_low"] == pytest.approx(width, rel=1e-3)


def test_a_probe_that_knows_everything_recovers_everything(lm, tokens):
    """Sae(x) = 0 has the error x, and all of it is linear. So ê restores the model, and ε restores nothing."""
    x = lm.activations(tokens, ["resid_post.3"])["resid_post.3"][:, SKIP:].flatten(0, 1)
    sae = make_sae(x, 32, "resid_post.3")
    sae.W_dec.zero_()
    sae.b_dec.zero_()
    identity = Linear(torch.eye(x.shape[1], dtype=torch.float64), torch.zeros(x.shape[1], dtype=torch.float64))
    row = downstream_loss(lm, patched(tokens), "resid_post.3", {"a": sae}, {"a": identity}).iloc[0]
    assert row["recovered_linear"] == pytest.approx(1)
    assert row["recovered_nonlinear"] == pytest.approx(0, abs=1e-6)
    assert row["variance_share_linear"] == row["norm_share_linear"] == pytest.approx(1)
    assert row["variance_share_nonlinear"] == row["norm_share_nonlinear"] == pytest.approx(0, abs=1e-9)


def test_undefined_where_nothing_is_lost(lm, tokens):
    width = lm.facts.d_model
    sae = build(
        SAEConfig(architecture="relu", hook_point="resid_post.3", width=2 * width, sparsity=0, learning_rate=1),
        width,
        TrainConfig(),
    )
    sae.requires_grad_(False)
    for matrix in (sae.W_enc, sae.W_dec):
        matrix.copy_(torch.cat([torch.eye(width), -torch.eye(width)]))
    nothing = Linear(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))
    row = downstream_loss(lm, patched(tokens), "resid_post.3", {"a": sae}, {"a": nothing}).iloc[0]
    assert row["ce_sae"] == pytest.approx(row["ce_clean"], abs=1e-5)
    assert np.isnan(row["recovered_linear"])
    assert np.isnan(row["recovered_nonlinear"])


def test_no_prediction_at_a_replaced_position(lm, tokens):
    last = torch.arange(LENGTH).expand(CONTEXTS, -1) == LENGTH - 1
    with pytest.raises(ValueError, match="predict nothing"):
        downstream_loss(lm, patched(tokens, kept=last), "resid_post.2", {}, {})
    with pytest.raises(ValueError, match="0 contexts"):
        downstream_loss(lm, patched(tokens[:0]), "resid_post.2", {}, {})


def test_positions_left_out_stay_intact_and_are_not_counted(lm, tokens):
    """The same numbers as where a function leaves these activations as they are, over the other predictions."""
    kept = REPLACED & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.6)
    kept[3] = False
    rows = lm.activations(tokens, ["resid_post.2"])["resid_post.2"]
    sae = make_sae(rows[kept], 32, "resid_post.2")
    probes = {"a": fitted(sae, rows[kept])}
    row = downstream_loss(lm, patched(tokens, kept=kept), "resid_post.2", {"a": sae}, probes).iloc[0]

    def some(x: Tensor) -> Tensor:
        return torch.where(kept[:, SKIP:, None], sae(x.flatten(0, 1)).view_as(x), x)

    loss = patched_loss(lm, tokens, "resid_post.2", some)[kept[:, SKIP:-1]]
    x = rows[kept].double().numpy()
    missed = np.square(x - sae(rows[kept]).double().numpy()).sum()
    assert row["ce_sae"] == pytest.approx(float(loss.mean()), rel=1e-5)
    assert row["fvu"] == pytest.approx(missed / np.square(x - x.mean(0)).sum(), rel=1e-4)
