"""SAEs trained on errors (analysis 6) against direct computation on whole splits in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysae.analysis.dark_matter.measures.error_saes import error_parts, error_saes, over_seeds, ranked
from raysae.analysis.instruments.activations import reconstruct
from raysae.analysis.instruments.intervals import Estimate
from raysae.analysis.instruments.regression import Linear, Moments
from raysae.sae.base import Codes
from tests.analysis.planted import HOOK, activations, gathered, linear_sae, sae


def probe_of(source, subject) -> Linear:
    moments, x = Moments(), gathered(source, "A")
    moments.add(x, {"e": x - reconstruct(subject, x)[0]})
    return moments.solve().maps["e"]


def test_the_tables_are_those_of_whole_splits() -> None:
    source, subject = activations(120), sae()
    probe = probe_of(source, subject)
    kinds = ("error", "linear", "nonlinear")
    trained = {kind: [sae(24, 3, seed=5 + i + 3 * j) for j in range(3)] for i, kind in enumerate(kinds)}
    table, of_saes = error_saes(source, HOOK, subject, probe, trained, replicates=50)
    each = of_saes.set_index(["kind", "seed"])
    for kind, group in trained.items():
        y = error_parts(gathered(source, "C"), subject, probe)[kind].double()
        variance = (y - y.mean(0)).square().sum()
        for i, made in enumerate(group):
            missed = (y - reconstruct(made, y.float())[0].double()).square().sum()
            assert each.loc[(kind, i), "fvu"] == pytest.approx(float(missed / variance), rel=1e-6)
            everything = torch.cat([error_parts(gathered(source, split), subject, probe)[kind] for split in "ABC"])
            codes = made.encode(everything)
            alive = torch.zeros(made.n, dtype=torch.bool)
            alive[codes.indices[codes.values > 0]] = True
            assert each.loc[(kind, i), "dead_fraction"] == pytest.approx(float((~alive).double().mean()))
    table = table.set_index("kind")
    for column in ("fvu", "fvu_equal_l0", "l0", "dead_fraction"):
        assert table[column].to_dict() == pytest.approx(each.groupby("kind")[column].mean().to_dict())
    assert (table["fvu_equal_l0_low"] < table["fvu_equal_l0"]).all()
    assert (table["fvu_equal_l0"] < table["fvu_equal_l0_high"]).all()
    ratios = each.loc["nonlinear", "fvu_equal_l0"] / each.loc["linear", "fvu_equal_l0"]
    assert table.loc["nonlinear", "worse"] == pytest.approx(np.exp(np.log(ratios).mean()) - 1)
    assert table.loc["error", "share"] == pytest.approx(1)
    # The sum is exactly 1 on the rows of the fit
    assert table.loc["linear", "share"] + table.loc["nonlinear", "share"] == pytest.approx(1, abs=0.1)


def test_saes_are_compared_at_the_fewest_active_latents_of_each_row() -> None:
    source, subject = activations(60), sae()
    probe = probe_of(source, subject)
    few, many = sae(24, 2, seed=5), sae(24, 6, seed=6)
    table, of_saes = error_saes(source, HOOK, subject, probe, {"linear": [few], "nonlinear": [many]}, replicates=20)
    of_saes = of_saes.set_index("kind")
    parts = error_parts(gathered(source, "C"), subject, probe)
    counts = {
        kind: (made.encode(parts[kind]).values > 0).sum(1) for kind, made in (("linear", few), ("nonlinear", many))
    }
    fewest = torch.minimum(counts["linear"], counts["nonlinear"])
    y = parts["nonlinear"].double()
    codes = many.encode(parts["nonlinear"])
    values, order = codes.values.sort(descending=True)
    kept = torch.where(torch.arange(values.shape[1]) < fewest.unsqueeze(1), values, 0)
    missed = (y - many.decode(Codes(kept, codes.indices.gather(1, order)))).square().sum()
    expected = float(missed / (y - y.mean(0)).square().sum())
    assert of_saes.loc["nonlinear", "fvu_equal_l0"] == pytest.approx(expected, rel=1e-6)
    assert of_saes.loc["nonlinear", "fvu"] != pytest.approx(expected, rel=0.01)
    assert of_saes.loc["linear", "fvu_equal_l0"] == pytest.approx(of_saes.loc["linear", "fvu"], rel=0.01)
    assert table["equal_l0"].tolist() == pytest.approx([float(fewest.double().mean())] * 2)
    assert table["worse"].notna().all()
    assert table["worse_low"].isna().all(), "one seed gives no interval"


@pytest.mark.parametrize("k", [4, None])
def test_ranked_codes_decode_to_the_reconstruction(k: int | None) -> None:
    made, x = sae(32, k), gathered(activations(20), "A")
    codes = ranked(made, x)
    assert (codes.values.diff(dim=1) <= 0).all()
    torch.testing.assert_close(made.decode(codes), reconstruct(made, x)[0], rtol=1e-5, atol=1e-5)


def test_an_interval_over_documents_and_seeds_covers() -> None:
    """Simulates a value with an effect of each of 40 documents and one of each of 3 seeds."""
    generator, hits, runs = np.random.default_rng(0), 0, 600
    for _ in range(runs):
        documents = generator.standard_normal(40)
        drawn = documents[generator.integers(0, 40, (200, 40))].mean(1)
        both = np.concatenate([[documents.mean()], drawn])
        values = [torch.from_numpy(both + 0.15 * generator.standard_normal()) for _ in range(3)]
        found = over_seeds("v", values, groups=40)
        hits += found["v_low"] <= 0 <= found["v_high"]
    assert 0.92 <= hits / runs <= 0.99


def test_without_an_effect_of_seeds_the_interval_is_that_over_documents() -> None:
    values = torch.cat([torch.zeros(1), torch.linspace(-1, 1, 401)]).double()
    found = over_seeds("v", [values, values, values], groups=40)
    documents = Estimate.of(values, 40)
    assert (found["v_low"], found["v_high"]) == (pytest.approx(documents.low), pytest.approx(documents.high))


def test_an_sae_that_returns_its_input_has_no_error() -> None:
    source, subject = activations(30), sae()
    identity = linear_sae(torch.eye(12))
    table, _ = error_saes(source, HOOK, subject, probe_of(source, subject), {"linear": [identity] * 3}, replicates=20)
    assert table.loc[0, "fvu"] < 1e-10
