"""Pairwise regressions of error norms equal scikit-learn's, and the lines equal direct computation."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from raysae.analysis.dark_matter.measures.error_regression import error_regression
from raysae.analysis.dark_matter.measures.per_token_scaling import per_token_scaling, token_lines
from raysae.analysis.instruments.regression import Linear
from raysae.config import UserError
from tests.analysis.planted import HOOK, PER_CONTEXT, activations, gathered, sae

SAES = {"wide": sae(64, seed=1), "narrow": sae(16, seed=2), "middle": sae(32, seed=3)}
SOURCE = activations()


@pytest.fixture(scope="module")
def probes():
    return {name: result.probe for name, result in error_regression(SOURCE, HOOK, SAES, replicates=2).items()}


def norms(split: str, name: str, probes) -> tuple[np.ndarray, np.ndarray]:
    x = gathered(SOURCE, split).double()
    e = x - SAES[name](x.float()).double()
    return e.norm(dim=1).numpy(), (e - probes[name](x)).norm(dim=1).numpy()


def test_pairs_equal_scikit_learn(probes):
    table = per_token_scaling(SOURCE, HOOK, SAES, probes, replicates=50)
    assert list(zip(table["small"], table["large"], strict=True)) == [
        ("narrow", "middle"),
        ("narrow", "wide"),
        ("middle", "wide"),
    ]
    assert table["small_width"].tolist() == [16, 16, 32]
    for row in table.itertuples():
        (e_b, epsilon_b), (e_c, epsilon_c) = norms("B", row.small, probes), norms("C", row.small, probes)
        (y_b, _), (y_c, _) = norms("B", row.large, probes), norms("C", row.large, probes)

        def score(train, test, y_b=y_b, y_c=y_c):
            return r2_score(y_c, LinearRegression().fit(np.stack(train, 1), y_b).predict(np.stack(test, 1)))

        assert row.r2 == pytest.approx(score([e_b], [e_c]), abs=1e-6)
        assert row.r2_with_nonlinear == pytest.approx(score([e_b, epsilon_b], [e_c, epsilon_c]), abs=1e-6)
        assert row.gain == pytest.approx((row.r2_with_nonlinear - row.r2) / (1 - row.r2), abs=1e-9)
        x_b, x_c = (gathered(SOURCE, split).double().norm(dim=1).numpy() for split in "BC")
        from_x, with_x = score([x_b], [x_c]), score([x_b, e_b], [x_c, e_c])
        assert row.r2_from_x_norm == pytest.approx(from_x, abs=1e-6)
        assert row.r2_beyond_x_norm == pytest.approx((with_x - from_x) / (1 - from_x), abs=1e-6)
        assert row.squared_correlation == pytest.approx(np.corrcoef(e_c, y_c)[0, 1] ** 2, abs=1e-6)
        assert row.r2_low < row.r2 < row.r2_high


def test_errors_in_proportion_to_the_norm_predict_nothing_beyond_it():
    """Untrained SAEs of one latent per row miss nearly all of x, each in directions of its own."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0.5, 5, 6000)[torch.randperm(6000, generator=generator)]
    source = activations(contexts=300, x=torch.randn(6000, 12, generator=generator) * lengths.unsqueeze(1))
    saes = {str(seed): sae(32 * seed, 1, seed=seed, bias=0.0) for seed in (1, 2)}
    for each in saes.values():
        each.b_enc.zero_()
    zero = Linear(torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64))
    row = per_token_scaling(source, HOOK, saes, dict.fromkeys(saes, zero)).iloc[0]
    assert row["r2"] > 0.85
    assert row["r2_from_x_norm"] > 0.9
    assert abs(row["r2_beyond_x_norm"]) < 0.05


def test_one_sae_is_too_few(probes):
    with pytest.raises(UserError, match="there is 1: name more SAEs"):
        per_token_scaling(SOURCE, HOOK, {"wide": SAES["wide"]}, probes)


def test_lines_keep_to_one_of_the_contexts_of_a_document(probes):
    source = activations(per_document=10)
    context = gathered(source, "C", "context")
    wanted = torch.nonzero(context == context.unique_consecutive()[13]).squeeze(1)
    lines = token_lines(source, HOOK, SAES, probes, context=13)
    assert lines.groupby("sae").size().eq(PER_CONTEXT).all()
    tokens = gathered(source, "C", "token")[wanted].tolist()
    assert all(part["token"].tolist() == tokens for _, part in lines.groupby("sae"))


def test_lines_of_a_context(probes):
    context = gathered(SOURCE, "C", "context")
    wanted = context.unique_consecutive()[37]
    lines = token_lines(SOURCE, HOOK, SAES, probes, tokens=15, context=37)
    assert lines["sae"].unique().tolist() == ["narrow", "middle", "wide"]
    rows = torch.nonzero(context == wanted).squeeze(1)[:15].numpy()
    for name, part in lines.groupby("sae"):
        error, nonlinear = norms("C", name, probes)
        np.testing.assert_allclose(part["error"], error[rows], rtol=1e-5)
        np.testing.assert_allclose(part["nonlinear"], nonlinear[rows], rtol=1e-5)
        np.testing.assert_allclose(part["linear"], probes[name](gathered(SOURCE, "C")[rows]).norm(dim=1), rtol=1e-5)
        assert part["token"].tolist() == gathered(SOURCE, "C", "token")[rows].tolist()
        assert part["position"].tolist() == list(range(15))
    with pytest.raises(UserError, match="no context number 5000"):
        token_lines(SOURCE, HOOK, SAES, probes, context=5000)
