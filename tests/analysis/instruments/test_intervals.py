"""Intervals over groups of documents cover the truth, and paired numbers have paired intervals."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from raysae.analysis.instruments.intervals import (
    Estimate,
    GroupSums,
    median_of,
    over_rows,
    replicated,
    with_intervals,
)


def summed(group: np.ndarray, replicates: int = 200, chunk: int = 500, **rows: np.ndarray) -> GroupSums:
    sums = GroupSums(replicates, seed=1)
    for start in range(0, len(group), chunk):
        part = slice(start, start + chunk)
        sums.add(torch.from_numpy(group[part]), **{name: torch.from_numpy(y[part]) for name, y in rows.items()})
    return sums


def coverage(group: np.ndarray, missed: np.ndarray, total: np.ndarray, truth: float) -> float:
    """How often the interval of a ratio of sums, such as an FVU, covers the truth. A column is a world."""
    sums = summed(group, 400, len(group), missed=missed, total=total)
    estimates = [Estimate.of(values, sums.groups) for values in (sums["missed"] / sums["total"]).T]
    return float(np.mean([each.low <= truth <= each.high for each in estimates]))


@pytest.mark.parametrize(("documents", "contexts"), [(10, 150), (20, 280), (30, 400), (31, 400), (40, 500), (90, 1500)])
def test_intervals_cover_the_truth_where_contexts_of_a_document_are_alike(documents, contexts):
    """Documents differ in length as texts do, and in how much of a context's variance an SAE misses."""
    rng = np.random.default_rng(documents)
    share = rng.lognormal(0, 0.6, documents)
    group = np.repeat(np.arange(documents), np.maximum(1, np.round(contexts * share / share.sum()).astype(int)))
    alike, own = rng.normal(size=(documents, 1500))[group], rng.normal(size=(len(group), 1500))
    total = np.exp(0.3 * rng.normal(size=own.shape))
    missed = 0.3 * total * np.exp(0.4 * (alike + own))
    truth = 0.3 * math.exp(0.4**2)  # The mean of exp(0.4·z) for z of variance 2
    assert 0.9 <= coverage(group, missed, total, truth) <= 0.97
    assert coverage(np.arange(len(group)), missed, total, truth) < 0.8, "contexts of a document are not independent"


@pytest.mark.parametrize("groups", [1, 9])
def test_few_groups_have_no_interval(groups):
    sums = summed(np.arange(90) % groups, y=np.arange(90.0))
    estimate = Estimate.of(sums.mean("y"), sums.groups)
    assert estimate.value == pytest.approx(44.5)
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert f"{estimate:.1f}" == f"44.5 (no interval: {groups} groups of documents, and 10 are wanted)"


def test_the_jackknife_leaves_out_a_group_at_a_time():
    group, y = np.arange(400) // 7 % 20 * 3, np.random.default_rng(0).normal(size=400)
    sums = summed(group, chunk=33, y=y)
    expected = [y.mean(), *(y[group != g].mean() for g in range(0, 60, 3))]
    np.testing.assert_allclose(sums.mean("y"), expected)
    estimate = Estimate.of(sums.mean("y"), sums.groups)
    assert (estimate.groups, len(estimate.replicates)) == (20, 20)
    assert estimate.high - estimate.value == pytest.approx(estimate.value - estimate.low)


def test_the_jackknife_of_a_mean_is_the_t_interval():
    y = np.random.default_rng(0).normal(size=25)
    estimate = Estimate.of(summed(np.arange(25), y=y).mean("y"), 25)
    half = 2.0639 * y.std(ddof=1) / 5  # The 97.5 % quantile of t with 24 degrees of freedom
    assert (estimate.low, estimate.high) == pytest.approx((y.mean() - half, y.mean() + half), rel=1e-4)


def test_many_groups_have_the_intervals_of_an_ordinary_bootstrap():
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(300), rng.integers(3, 30, 300))
    y = rng.normal(size=300)[group] + 0.3 * rng.normal(size=len(group)) + 8
    estimate = Estimate.of(summed(group, 1000, 100, y=y).mean("y"), 300)
    sums, rows = np.bincount(group, y), np.bincount(group)
    drawn = [sums[i].sum() / rows[i].sum() for i in rng.integers(0, 300, (2000, 300))]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert estimate.low == pytest.approx(low, abs=0.15 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.15 * (high - low))


@pytest.mark.parametrize("groups", [20, 31, 300])
def test_replicates_are_paired_whatever_the_order_and_the_chunks(groups):
    group = np.arange(3000) % groups
    y = np.random.default_rng(0).normal(8, 1, 3000)
    first, second = summed(group, 50, 70, y=y), GroupSums(50, seed=1)
    for g in reversed(range(groups)):
        second.add(torch.full((int((group == g).sum()),), g), twice=torch.from_numpy(2 * y[group == g]))
    np.testing.assert_allclose(second["twice"] / first["y"], 2.0)
    np.testing.assert_allclose(second.mean("twice"), 2 * first.mean("y"))
    assert "y" in first
    assert "twice" not in first


@pytest.mark.parametrize("groups", [20, 40])
def test_a_chunk_without_rows_changes_nothing(groups):
    group, y = np.arange(400) % groups, np.arange(400.0)
    sums, same = summed(group, y=y), summed(group, y=y)
    sums.add(torch.zeros(0, dtype=torch.int64), y=torch.zeros(0))
    assert torch.equal(sums["y"], same["y"])


def test_another_seed_draws_other_resamples():
    sums = [GroupSums(50, seed) for seed in (1, 2)]
    for each in sums:
        each.add(torch.arange(100), y=torch.rand(100, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(sums[0]["y"], sums[1]["y"])


def test_memory_does_not_grow_with_groups():
    def size(groups: int) -> int:
        sums = summed(np.arange(4000) % groups, 20, y=np.zeros((4000, 3)))
        return sum(each.numel() for each in sums._resampled.values())

    assert size(40) == size(4000) == 21 * 4


def test_medians_are_taken_per_replicate():
    """Two SAEs that take turns: the median over them varies less than either."""
    swing = np.array([0, *([1, -1] * 20)])
    values = {name: torch.from_numpy(0.5 + sign * 0.1 * swing) for name, sign in (("a", 1), ("b", -1))}
    table = pd.DataFrame([with_intervals({"r2": each}, 40) for each in values.values()])
    assert table["r2_high"].tolist() == pytest.approx([0.6, 0.6])
    median = median_of(table, "r2")
    assert (median.low, median.value, median.high) == pytest.approx((0.5, 0.5, 0.5))
    assert replicated(table, "r2").shape == (2, 41)
    with pytest.raises(KeyError):
        median_of(table, "fvu")


def test_a_row_without_a_number_does_not_count_in_a_median():
    table = pd.DataFrame({"groups": [40, 40]})
    values = np.array([[0.5, *[0.4, 0.6] * 20], [math.nan] * 41])
    assert over_rows(values, table).value == 0.5
    assert math.isnan(over_rows(values[1:], table).value)
