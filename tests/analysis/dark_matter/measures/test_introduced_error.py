"""Introduced errors: the grid against explicit regressions, and estimates against closed forms and planted truth."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LinearRegression

from raysae.analysis.dark_matter.measures.introduced_error import (
    ABLATED,
    LEVELS,
    IntroducedError,
    Parts,
    SyntheticModel,
    closed_form,
    correlation_table,
    introduced_error,
    noise_grid,
    noise_unit,
)
from raysae.config import UserError
from tests.analysis.planted import HOOK, activations, gathered, linear_sae, rows, sae


def random_parts(n: int, seed: int) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    truth = rows(n, seed=4)[torch.randperm(n, generator=generator)].double()
    noise = [torch.randn(n, 12, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Parts(truth, [truth + 0.1 * truth.sin(), truth.clamp_min(0)], *noise, torch.arange(n) // 10)


def test_the_grid_equals_regressions_one_by_one():
    train, test = random_parts(700, 1), random_parts(500, 2)
    grid = noise_grid(iter([train]), iter([test]), (0.0, 0.5), (0.0, 1.0, 3.0), unit=0.4).table()
    assert len(grid) == 18
    for row in grid.itertuples():
        f, x, r = int(row.ablated * 2), 0.4 * row.sigma_x, 0.4 * row.sigma_r
        seen = {name: parts.truth + x * parts.dense for name, parts in (("train", train), ("test", test))}
        e = {
            name: seen[name] - parts.reconstructions[f] - r * parts.introduced
            for name, parts in (("train", train), ("test", test))
        }
        predicted = LinearRegression().fit(seen["train"], e["train"]).predict(seen["test"])
        variance = (seen["test"] - seen["test"].mean(0)).square().sum()
        missed = float((e["test"] - predicted).square().sum() / variance)
        assert row.fvu == pytest.approx(float(e["test"].square().sum() / variance), rel=1e-9)
        assert row.nonlinear == pytest.approx(missed, rel=1e-8)
        assert row.linear == pytest.approx(row.fvu - missed, rel=1e-7, abs=1e-9)
        assert row.nonlinear_low <= row.nonlinear <= row.nonlinear_high
        assert row.absent == pytest.approx(float((test.truth - test.reconstructions[f]).square().sum() / variance))
        assert row.dense == pytest.approx(float((x * test.dense).square().sum() / variance))
        assert row.introduced == pytest.approx(float((r * test.introduced).square().sum() / variance))


def judged(result: IntroducedError) -> pd.Series:
    return result.judged.iloc[0]


def test_closed_form_where_the_sae_is_exact():
    result = introduced_error(
        activations(contexts=1500, chunk_rows=8000), HOOK, linear_sae(torch.eye(12)), ablated=(0.0,)
    )
    assert judged(result)["reencoding_fvu"] < 1e-9
    assert judged(result)["deviation"] < 0.02
    assert judged(result)["deviation_high"] < 0.03
    assert len(result.closed_form) == len(LEVELS) ** 2
    for row in result.closed_form.itertuples():
        assert row.linear == pytest.approx(row.linear_closed_form, rel=0.02, abs=2e-3)
        assert row.nonlinear == pytest.approx(row.nonlinear_closed_form, rel=0.02, abs=2e-3)
    grid = result.grid
    assert grid[(grid.sigma_x == 4) & (grid.sigma_r == 0)]["dense"].item() == pytest.approx(0.5, abs=0.01), (
        "σ = 4 has the variance of x′"
    )


def test_an_sae_that_changes_its_own_reconstructions_is_found_out():
    """It keeps 0.7 of most dimensions at every pass. The correlations are those of a perfect SAE all the same."""
    source, bad = (
        activations(contexts=600, chunk_rows=8000),
        linear_sae(torch.diag(torch.tensor([1.0] * 4 + [0.7] * 8))),
    )
    result = introduced_error(source, HOOK, bad, ablated=(0.0,))
    truth = bad(gathered(source, "C"))
    lack = truth - bad(truth)
    fvu = float(lack.square().sum() / (truth - truth.mean(0)).square().sum())
    assert judged(result)["reencoding_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert judged(result)["reencoding_fvu_low"] > 0.05
    assert judged(result)["deviation_low"] > 0.1
    assert min(result.table.loc["sigma_x", "linear"], result.table.loc["sigma_r", "nonlinear"]) > 0.9
    assert max(abs(result.table.loc["sigma_x", "nonlinear"]), abs(result.table.loc["sigma_r", "linear"])) < 0.1


def test_deviation_is_that_of_all_estimates_at_no_ablation():
    result = introduced_error(activations(), HOOK, sae(), levels=(0.0, 2.0), ablated=(0.0, 0.5))
    table = result.closed_form
    deviations = [
        np.linalg.norm(table[name] - table[f"{name}_closed_form"]) / np.linalg.norm(table[f"{name}_closed_form"])
        for name in ("linear", "nonlinear")
    ]
    assert judged(result)["deviation"] == pytest.approx(max(deviations))


def test_closed_form_by_its_matrices():
    covariance = torch.cov(rows(400).T).double()
    spectrum = torch.linalg.eigvalsh(covariance)
    noise = 0.7**2 * torch.eye(12, dtype=torch.float64)
    linear, nonlinear = closed_form(spectrum, 0.7, 1.1)
    expected = float((noise @ torch.linalg.inv(covariance + noise) @ noise).trace() / (covariance + noise).trace())
    assert linear == pytest.approx(expected)
    assert nonlinear == pytest.approx(float((noise.trace() + 12 * 1.1**2) / (covariance + noise).trace()) - expected)
    assert closed_form(spectrum, 0.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("k", [4, None])
def test_latents_of_least_mean_value_are_ablated_first(k):
    autoencoder = sae(k=k)
    source = activations()
    grid = introduced_error(source, HOOK, autoencoder, levels=(0.0,), ablated=(0.0, 0.25, 0.5)).grid
    truth = {s: torch.cat([autoencoder(chunk.x[HOOK]) for chunk in source.chunks(s)]) for s in "AC"}

    def dense(x):
        codes = autoencoder.encode(x)
        return torch.zeros(len(x), 32).scatter(1, codes.indices, codes.values) if k else codes

    order = dense(truth["A"]).mean(0).argsort(stable=True)
    for row, gone in zip(grid.itertuples(), (0, 8, 16), strict=True):
        codes = dense(truth["C"])
        codes[:, order[:gone]] = 0
        lack = truth["C"] - autoencoder.decode(codes)
        variance = (truth["C"] - truth["C"].mean(0)).square().sum()
        assert row.fvu == pytest.approx(float(lack.square().sum() / variance), rel=1e-4)
    assert torch.equal(
        torch.tensor(grid["fvu"].tolist()),
        torch.tensor(introduced_error(source, HOOK, autoencoder, (0.0,), (0.0, 0.25, 0.5)).grid["fvu"].tolist()),
    )


@pytest.fixture(scope="module")
def synthetic():
    model = SyntheticModel.random(d=32, features=64)
    unit = noise_unit(model.covariance())
    fit, evaluate = (model.sample(400_000, seed=seed) for seed in (1, 2))
    return model, unit, noise_grid(fit, evaluate, ABLATED, LEVELS, unit).table()


def test_the_synthetic_models_moments():
    model = SyntheticModel.random(d=8, features=12, seed=3)
    parts = list(model.sample(40_000, (0.0, 0.5)))
    truth = torch.cat([part.truth for part in parts])
    torch.testing.assert_close(torch.cov(truth.T), model.covariance(), rtol=0.05, atol=0.01)
    torch.testing.assert_close(truth.mean(0), model.mean @ model.dictionary, rtol=0.05, atol=0.02)
    absent = truth - torch.cat([part.reconstructions[1] for part in parts])
    torch.testing.assert_close(torch.cov(absent.T), model.covariance(model.lacking(0.5)), rtol=0.05, atol=0.01)
    assert model.lacking(0.5).tolist() == [False] * 6 + [True] * 6


def test_estimates_agree_with_the_synthetic_models_closed_form(synthetic):
    model, unit, grid = synthetic
    compared = model.compare(grid, unit)
    assert compared["deviation"].max() < 0.02
    assert compared["deviation"].notna().sum() > 0.95 * len(compared)
    for row in compared.itertuples():
        for name in ("linear", "nonlinear"):
            value, expected = getattr(row, name), getattr(row, f"{name}_closed_form")
            assert value == pytest.approx(expected, rel=0.02, abs=0.02 * 0.01), (row, name)


def test_deviations_are_relative_to_each_estimate():
    model = SyntheticModel.random(d=8, features=12)
    exact = pd.DataFrame([{"ablated": f, "sigma_x": x, "sigma_r": 1.0} for f in (0.0, 0.5) for x in (0.0, 2.0)])
    exact[["linear", "nonlinear"]] = [model.expected(row.ablated, row.sigma_x, 1.0) for row in exact.itertuples()]
    assert model.compare(exact, 1.0)["deviation"].max() < 1e-12
    off = exact.assign(linear=exact["linear"] * 1.05)
    compared = model.compare(off, 1.0)
    assert compared["linear_closed_form"].iloc[0] == 0
    assert compared["deviation"].iloc[0] < 1e-12, "the linear error is negligible there"
    assert compared["deviation"].iloc[1:].tolist() == pytest.approx([0.05] * 3)


def test_estimates_correlate_with_what_was_planted(synthetic):
    _, _, grid = synthetic
    for ablated in ABLATED[:1]:
        table = correlation_table(grid, ablated)
        assert table.loc["sigma_x", "linear"] > 0.9
        assert table.loc["sigma_r", "nonlinear"] > 0.9
        assert abs(table.loc["sigma_r", "linear"]) < 0.5
        assert abs(table.loc["sigma_x", "nonlinear"]) < 0.5
    part = grid[grid["ablated"] == 0]
    truth = np.corrcoef(part[["dense", "introduced", "linear", "nonlinear"]].T)
    assert truth[0, 2] > 0.9
    assert truth[1, 3] > 0.9
    assert abs(truth[0, 3]) < 0.5
    assert abs(truth[1, 2]) < 0.5


def test_absent_features_are_known(synthetic):
    model, _, grid = synthetic
    none = grid[(grid["sigma_x"] == 0) & (grid["sigma_r"] == 0)]
    assert none["absent"].is_monotonic_increasing
    np.testing.assert_allclose(none["fvu"], none["absent"])
    half = model.lacking(0.5)
    mean = ((model.mean * half) @ model.dictionary).square().sum()
    expected = float((model.covariance(half).trace() + mean) / model.covariance().trace())
    assert none["absent"].iloc[-1] == pytest.approx(expected, rel=0.02)


def test_bad_shares_are_refused():
    with pytest.raises(UserError, match="must begin with 0"):
        introduced_error(activations(), HOOK, sae(), ablated=(0.5,))
