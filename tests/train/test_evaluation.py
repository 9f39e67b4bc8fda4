"""Reconstruction metrics against brute force."""

import numpy as np
import pytest
import torch

from raysae.sae.architectures import build
from raysae.sae.base import SAE
from raysae.train import evaluation
from raysae.train.evaluation import DENSITY_EDGES, HeldOut, Variance, density_histogram, reconstruction_metrics
from tests.train.synthetic import ARCHITECTURES, TRAIN, D, config, rows


def trained_looking(architecture: str, **knobs) -> SAE:
    """A folded SAE whose weights are away from their initial values."""
    sae = build(config(architecture, **knobs), D, TRAIN)
    sae.initialise(rows(512))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return sae.folded()


def dense(codes, n: int) -> torch.Tensor:
    if isinstance(codes, torch.Tensor):
        return codes
    return torch.zeros(len(codes.values), n, dtype=codes.values.dtype).scatter_add_(1, codes.indices, codes.values)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_brute_force(architecture, monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", {"cpu": 4 * 64 * 50})
    sae = trained_looking(architecture)
    x = rows(777, seed=5)
    metrics = reconstruction_metrics(sae, iter(x.split(200)))
    with torch.no_grad():
        codes = dense(sae.encode(x), sae.n).double()
    x_hat = (
        codes @ sae.W_dec.double() + sae.b_dec.double()
        if architecture != "tied"
        else sae.decode(codes.float()).double()
    )
    x = x.double()
    assert metrics.rows == 777
    assert metrics.fvu == pytest.approx(float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()), rel=1e-5)
    assert metrics.l0 == pytest.approx(float((codes > 0).sum(1).double().mean()), rel=1e-12)
    assert metrics.dead_fraction == float((~(codes > 0).any(0)).double().mean())
    assert metrics.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat, dim=1).mean()), rel=1e-5)
    assert metrics.norm_ratio == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-5)
    np.testing.assert_array_equal(metrics.frequency, (codes > 0).sum(0).numpy())
    assert metrics.l0 > 0


def test_saes_share_the_variance_of_the_same_rows(monkeypatch):
    """SAEs of any width, in any order, get the same bits as alone."""
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", {"cpu": 8 * D * 40})  # Cuts the wide SAE's chunks further
    saes, x = [trained_looking("topk"), trained_looking("topk", width=256)], rows(777, seed=5)
    alone = [reconstruction_metrics(sae, x.split(200)).scalars() for sae in saes]
    for order in ((0, 1), (1, 0)):
        held_out = HeldOut(lambda: x.split(200), D)
        assert [reconstruction_metrics(saes[i], x.split(200), held_out).scalars() for i in order] == [
            alone[i] for i in order
        ]
        assert held_out.variance.rows == 777


def test_batchtopk_is_evaluated_with_its_threshold():
    """The codes of a row must not depend on the other rows of its chunk."""
    sae = trained_looking("batchtopk")
    x = rows(100, seed=5)
    whole, single = reconstruction_metrics(sae, [x]), reconstruction_metrics(sae, x.split(1))
    np.testing.assert_array_equal(whole.frequency, single.frequency)


def test_variance_is_sane_far_from_zero():
    x = torch.randn(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1e6
    variance = Variance(5)
    for chunk in x.split(37):
        variance.add(chunk)
    assert variance.sum == pytest.approx(float(((x - x.mean(0)) ** 2).sum()), rel=1e-6)


def test_density_histogram_counts_latents_per_half_decade():
    frequency = np.array([0, 0, 1, 10, 11, 31, 1000, 500])
    bins = density_histogram(frequency, 1000)
    assert len(bins) == len(DENSITY_EDGES) - 1 == 12
    assert sum(bins) == 6  # Dead latents are in no bin
    assert bins[6] == 1
    assert bins[8] == 3
    assert bins[11] == 2


def test_rows_of_zeros_and_bfloat16_are_taken():
    metrics = reconstruction_metrics(
        trained_looking("topk"), [torch.zeros(3, D, dtype=torch.bfloat16), rows(20).bfloat16()]
    )
    assert metrics.rows == 23
    assert all(np.isfinite(value) for value in metrics.scalars().values())


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="no rows"):
        reconstruction_metrics(trained_looking("topk"), [])


def with_outliers(x: torch.Tensor, share: float = 0.003, times: float = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` with some rows of `times` their norm, and which these are."""
    planted = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) < share
    return torch.where(planted[:, None], times * x, x), planted


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_fvu_of_inliers_is_that_of_the_other_rows_alone(architecture):
    sae = trained_looking(architecture)
    x, planted = with_outliers(rows(5000, seed=5))
    metrics = reconstruction_metrics(sae, x.split(900))
    alone = reconstruction_metrics(sae, [x[~planted]])
    assert metrics.fvu_inliers == pytest.approx(alone.fvu, rel=1e-9)
    assert metrics.outlier_fraction == pytest.approx(float(planted.double().mean()))
    assert abs(metrics.fvu / alone.fvu - 1) > 0.1, "the outliers say something else"


def test_without_outliers_both_fvu_are_the_same_bits():
    metrics = reconstruction_metrics(trained_looking("topk"), rows(700, seed=5).split(90))
    assert metrics.fvu_inliers == metrics.fvu
    assert metrics.outlier_fraction == 0


def test_the_share_of_the_largest_rows_is_that_of_brute_force():
    x, _ = with_outliers(rows(5000, seed=5))
    far = np.sort(np.square(x.double().numpy() - x.double().numpy().mean(0)).sum(1))
    held_out = HeldOut(lambda: x.split(777), D)
    assert held_out.largest_rows_share == pytest.approx(far[-5:].sum() / far.sum(), rel=1e-9)
    assert held_out.largest_rows_share > 0.2
    assert HeldOut(lambda: [rows(5000, seed=5)], D).largest_rows_share < 0.01


def test_rows_of_zeros_are_no_reason_to_call_the_others_outliers():
    x = rows(300, seed=5) * (torch.arange(300) % 3 == 0)[:, None]
    assert HeldOut(lambda: [x], D).inliers.rows == 300


def test_the_knob_sets_what_an_outlier_is():
    x, planted = with_outliers(rows(2000, seed=5), times=5)
    assert HeldOut(lambda: [x], D).inliers.rows == 2000
    assert HeldOut(lambda: [x], D, outlier_norm=3.5).inliers.rows == 2000 - int(planted.sum())
