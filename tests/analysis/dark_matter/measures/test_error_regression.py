"""Error regression (analyses 1 and 2): every number against a naive computation, planted errors, the controls."""

import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from raysae.analysis.dark_matter.measures.error_regression import BASELINES, NORMS, error_regression
from raysae.analysis.instruments.activations import ArrayActivations, reconstruct
from tests.analysis.planted import HOOK, PER_CONTEXT, activations, gathered, linear_sae, rows, sae


def regressed(x, y, test):
    return torch.from_numpy(
        LinearRegression().fit(x.double().numpy(), y.double().numpy()).predict(test.double().numpy())
    )


def naive(source: ArrayActivations, autoencoder) -> dict[str, float]:
    """Every number by its definition, on whole splits in memory."""
    x = {split: gathered(source, split).double() for split in "ABC"}
    made = {split: autoencoder(part.float()).double() for split, part in x.items()}
    e = {split: x[split] - made[split] for split in "ABC"}
    linear = {split: regressed(x["A"], e["A"], x[split]) for split in "ABC"}
    epsilon = {split: e[split] - linear[split] for split in "ABC"}
    centred = made["A"] - autoencoder.b_dec
    alpha = ((x["A"] - autoencoder.b_dec) * centred).sum() / centred.square().sum()
    rescaled = {split: x[split] - autoencoder.b_dec - alpha * (made[split] - autoencoder.b_dec) for split in "ABC"}
    variance = (x["C"] - x["C"].mean(0)).square().sum()

    def norm(v, fitted_on):
        squared = {split: part.square().sum(1) for split, part in v.items()}
        return r2_score(squared["C"], regressed(x[fitted_on], squared[fitted_on], x["C"]))

    def baseline(predictor):
        squared = {split: part.square().sum(1) for split, part in e.items()}
        known = {split: ~values.isnan() for split, values in predictor.items()}
        predicted = torch.full_like(squared["C"], float(squared["A"].mean()))
        fitted = predictor["A"][known["A"]].unsqueeze(1), squared["A"][known["A"]]
        predicted[known["C"]] = regressed(*fitted, predictor["C"][known["C"]].unsqueeze(1))
        return r2_score(squared["C"], predicted)

    tokens = {split: gathered(source, split, "token") for split in "AC"}
    squared = e["A"].square().sum(1)
    means = torch.stack([squared[tokens["A"] == token].mean() for token in range(40)])
    halves = torch.arange(len(x["A"])) // PER_CONTEXT % 2 == 0
    from_half = regressed(x["A"][halves], e["A"][halves], x["C"])
    residual = regressed(x["A"], rescaled["A"], x["C"])
    l0 = {split: reconstruct(autoencoder, x[split].float())[1] for split in "AC"}
    lengths = x["C"].norm(dim=1)
    inside = lengths <= 1.1 * lengths.median()
    inliers = (x["C"][inside] - x["C"][inside].mean(0)).square().sum()
    numbers = {
        "fvu_inliers": float(e["C"][inside].square().sum() / inliers),
        "nonlinear_fvu_inliers": float(epsilon["C"][inside].square().sum() / inliers),
        "fvu": float(e["C"].square().sum() / variance),
        "nonlinear_fvu": float(epsilon["C"].square().sum() / variance),
        "linear_gap": float((e["C"].square().sum() - epsilon["C"].square().sum()) / variance),
        "l0": float(l0["C"].mean()),
        "r2_error": r2_score(e["C"], linear["C"]),
        "r2_error_weighted": r2_score(e["C"], linear["C"], multioutput="variance_weighted"),
        "r2_error_half_fit": r2_score(e["C"], from_half),
        "r2_error_weighted_half_fit": r2_score(e["C"], from_half, multioutput="variance_weighted"),
        "r2_error_rescaled": r2_score(rescaled["C"], residual),
        "r2_error_weighted_rescaled": r2_score(rescaled["C"], residual, multioutput="variance_weighted"),
        "r2_norm_x": norm(x, "A"),
        "r2_norm_reconstruction": norm(made, "A"),
        "r2_error_norm": norm(e, "A"),
        "r2_error_norm_half_fit": r2_score(e["C"].square().sum(1), regressed(x["A"][halves], squared[halves], x["C"])),
        "r2_error_norm_rescaled": norm(rescaled, "B"),
        "r2_norm_nonlinear": norm(epsilon, "B"),
        "r2_norm_reconstruction_plus_nonlinear": norm({split: made[split] + epsilon[split] for split in "ABC"}, "B"),
        "r2_norm_linear": norm(linear, "B"),
        "r2_error_norm_from_token": r2_score(e["C"].square().sum(1), means[tokens["C"]]),
        "r2_error_norm_from_token_loss": baseline({split: gathered(source, split, "token_loss") for split in "AC"}),
        "r2_error_norm_from_x_norm": baseline({split: part.square().sum(1) for split, part in x.items()}),
        "r2_error_norm_from_l0": baseline(l0),
    }
    best = max(value for name, value in numbers.items() if name.startswith("r2_error_norm_from_"))
    return numbers | {
        "r2_error_norm_lead": numbers["r2_error_norm"] - best,
        "r2_norm_nonlinear_lack": numbers["r2_error_norm"] - numbers["r2_norm_nonlinear"],
    }


def test_every_number_equals_its_definition():
    source = activations()
    saes = {"topk": sae(), "relu": sae(k=None, seed=3)}
    found = error_regression(source, HOOK, saes, replicates=30, outlier_norm=1.1)
    for name, autoencoder in saes.items():
        expected = naive(source, autoencoder)
        numbers = found[name].numbers
        assert numbers.keys() == expected.keys()
        for key, value in expected.items():
            assert numbers[key].value == pytest.approx(value, abs=1e-5), key
            assert numbers[key].low <= numbers[key].high
        x = gathered(source, "A")
        torch.testing.assert_close(found[name].probe(x), regressed(x, x - autoencoder(x), x), rtol=1e-5, atol=1e-5)
    assert set(NORMS.values()) | set(BASELINES.values()) <= expected.keys()
    assert numbers["r2_error"].value != pytest.approx(numbers["r2_error_weighted"].value, abs=1e-4)
    row = found["topk"].row()
    assert row["fvu_low"] < row["fvu"] < row["fvu_high"]
    assert row["fit_rows"] == len(gathered(source, "A"))


def test_company_does_not_change_a_result():
    source = activations()
    alone = error_regression(source, HOOK, {"a": sae()}, replicates=5)["a"].row()
    together = error_regression(source, HOOK, {"b": sae(k=None), "a": sae()}, replicates=5)["a"].row()
    for name, value in alone.items():
        assert value == pytest.approx(together[name], nan_ok=True, abs=1e-12), name


def test_one_context_in_a_split():
    """The odd half of split A is empty then."""
    numbers = error_regression(activations(contexts=3), HOOK, {"a": sae(width=8)}, replicates=5)["a"].numbers
    assert numbers["r2_error"].value == numbers["r2_error_half_fit"].value


def test_half_a_fit_is_half_of_the_contexts_where_one_document_is_all_of_a_split():
    source, autoencoder = activations(per_document=50, chunk_rows=25 * PER_CONTEXT), sae()
    assert len(gathered(source, "A", "group").unique()) == 1
    numbers, expected = (
        error_regression(source, HOOK, {"a": autoencoder}, replicates=5)["a"].numbers,
        naive(source, autoencoder),
    )
    for name in ("r2_error", "r2_error_norm"):
        half = numbers[f"{name}_half_fit"].value
        assert half == pytest.approx(expected[f"{name}_half_fit"], abs=1e-5)
        assert half != pytest.approx(numbers[name].value, abs=1e-5)


def test_the_share_of_the_largest_rows_is_that_of_the_rows_evaluated_on():
    x = rows(3000)
    x[::150] *= 100
    source = activations(x=x)
    row = error_regression(source, HOOK, {"a": sae()}, replicates=5)["a"].row()
    held_out = gathered(source, "C").double()
    far = (held_out - held_out.mean(0)).square().sum(1)
    assert row["largest_rows_share"] == pytest.approx(float(far.max() / far.sum()))  # One row in 1,000
    assert row["largest_rows_share"] > 0.1


def test_planted_linear_error_is_all_found():
    """Sae(x) = x·M has the error x(1 − M). It is linear, so nothing is left."""
    mixing = 0.7 * torch.eye(12) + 0.1 * torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    numbers = error_regression(activations(), HOOK, {"linear": linear_sae(mixing)}, replicates=5)["linear"].numbers
    assert numbers["r2_error"].value == pytest.approx(1, abs=1e-6)
    assert numbers["fvu"].value > 0.05
    assert numbers["nonlinear_fvu"].value < 1e-6


def test_rescaling_undoes_shrinkage():
    """An SAE shrunk by 0.6 has e = 0.4·(x − b) + 0.6·(error of the whole SAE).

    Shrinkage adds much linear error. Rescaling removes all that it added.
    """
    source, whole = activations(), linear_sae(torch.eye(12))
    noise = 0.3 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    whole.W_dec.add_(torch.cat([noise, noise]))  # Adds |x|·noise, an error that is not linear in x
    shrunk = linear_sae(torch.eye(12))
    shrunk.W_dec.copy_(0.6 * whole.W_dec)
    found = error_regression(source, HOOK, {"whole": whole, "shrunk": shrunk}, replicates=5)
    assert found["shrunk"].rescale == pytest.approx(found["whole"].rescale / 0.6)
    for name in ("r2_error_rescaled", "r2_error_weighted_rescaled", "r2_error_norm_rescaled"):
        assert found["shrunk"].numbers[name].value == pytest.approx(found["whole"].numbers[name].value, abs=1e-6)
    assert found["shrunk"].numbers["r2_error"].value > found["whole"].numbers["r2_error"].value


def test_a_sparse_sum_of_orthogonal_features_has_a_linear_norm():
    """x = Σ sᵢyᵢ over the active features, which are orthonormal, has ‖x‖² = Σ sᵢ².

    This is a·x where a·yᵢ = sᵢ. So the loading of a latent is its mean value when active.
    """
    generator = torch.Generator().manual_seed(0)
    strength = torch.linspace(1, 4, 12)
    x = (torch.rand(3000, 12, generator=generator) < 0.3) * strength
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q
    perfect = linear_sae(torch.eye(12))
    perfect.W_enc.copy_(torch.cat([directions, -directions]))
    perfect.W_dec.copy_(perfect.W_enc)
    perfect.b_enc.fill_(-1e-3)  # Keeps rounding errors from activating latents
    found = error_regression(activations(x=x @ directions), HOOK, {"perfect": perfect}, replicates=5)["perfect"]
    assert found.numbers["r2_norm_x"].value == pytest.approx(1, abs=1e-4)
    assert found.numbers["r2_norm_reconstruction"].value == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(found.loading[:12], strength.double(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(found.mean_active[:12], strength.double(), rtol=0.01, atol=0.01)
    assert found.loading_correlation > 0.999
    assert (found.active_rows[12:] == 0).all()


def test_loadings_come_from_the_reconstruction_without_its_bias():
    source, autoencoder = activations(), sae()
    found = error_regression(source, HOOK, {"a": autoencoder}, replicates=2)["a"]
    z = (autoencoder(gathered(source, "A")) - autoencoder.b_dec).double()
    probe = torch.linalg.lstsq(z, z.square().sum(1, keepdim=True), driver="gelsd").solution
    torch.testing.assert_close(found.loading, (autoencoder.decoder().double() @ probe).squeeze(1), rtol=1e-4, atol=1e-4)


def test_dead_dimensions_and_no_losses():
    x = rows(3000)
    x[:, 3] = 1.5
    source = ArrayActivations({HOOK: x}, torch.arange(150).repeat_interleave(20))
    mixing = 0.8 * torch.eye(12)
    mixing[3, 3] = 1
    numbers = error_regression(source, HOOK, {"a": linear_sae(mixing)}, replicates=5)["a"].numbers
    assert numbers["r2_error"].value == pytest.approx(1, abs=1e-6), "the mean is over the dimensions that vary"
    assert "r2_error_norm_from_token_loss" not in numbers
