"""SAEs trained on errors (analysis 6) against direct computation on whole splits in memory."""

from __future__ import annotations

import pytest
import torch

from raysae.analysis.dark_matter.measures.error_saes import error_parts, error_saes
from raysae.analysis.instruments.activations import reconstruct
from raysae.analysis.instruments.regression import Moments
from tests.analysis.planted import HOOK, activations, gathered, linear_sae, sae


def test_the_table_is_that_of_whole_splits() -> None:
    source = activations(60)
    subject = sae()
    moments = Moments()
    x = gathered(source, "A")
    moments.add(x, {"e": x - reconstruct(subject, x)[0]})
    probe = moments.solve().maps["e"]
    trained = {"error": sae(24, 3, seed=5), "linear": sae(24, 3, seed=6), "nonlinear": sae(24, 3, seed=7)}
    table = error_saes(source, HOOK, subject, probe, trained, replicates=50).set_index("kind")
    for kind, made in trained.items():
        y = error_parts(gathered(source, "C"), subject, probe)[kind].double()
        missed = (y - reconstruct(made, y.float())[0].double()).square().sum()
        assert table.loc[kind, "fvu"] == pytest.approx(float(missed / (y - y.mean(0)).square().sum()), rel=1e-6)
        assert table.loc[kind, "fvu_low"] < table.loc[kind, "fvu"] < table.loc[kind, "fvu_high"]
        everything = torch.cat([error_parts(gathered(source, split), subject, probe)[kind] for split in "ABC"])
        codes = made.encode(everything)
        alive = torch.zeros(made.n, dtype=torch.bool)
        alive[codes.indices[codes.values > 0]] = True
        assert table.loc[kind, "dead_fraction"] == pytest.approx(float((~alive).double().mean()))
    assert table.loc["nonlinear", "worse"] == pytest.approx(
        table.loc["nonlinear", "fvu"] / table.loc["linear", "fvu"] - 1
    )
    assert table.loc["error", "share"] == pytest.approx(1)
    # The sum is exactly 1 on the rows of the fit
    assert table.loc["linear", "share"] + table.loc["nonlinear", "share"] == pytest.approx(1, abs=0.1)


def test_an_sae_that_returns_its_input_has_no_error() -> None:
    source, subject = activations(30), sae()
    x = gathered(source, "A")
    moments = Moments()
    moments.add(x, {"e": x - reconstruct(subject, x)[0]})
    identity = linear_sae(torch.eye(x.shape[1]))
    table = error_saes(source, HOOK, subject, moments.solve().maps["e"], {"linear": identity}, replicates=20)
    assert table.loc[0, "fvu"] < 1e-10
