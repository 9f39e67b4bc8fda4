"""Streamed least squares against torch.linalg.lstsq and scikit-learn on the same tokens.

Intervals must equal those of an ordinary bootstrap.
"""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from raysae.analysis.instruments.regression import (
    ContextSums,
    Estimate,
    Linear,
    Moments,
    add_target,
    load_linear,
    r2,
    save_linear,
)


def data(n: int, d: int = 20, m: int = 7, seed: int = 0, offset: float = 100.0):
    """Rows (n, d) and targets (n, m) in float32.

    Rows lie far from the origin, and their dimensions differ much in size. Targets are partly linear in the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = (
        x @ torch.randn(d, m, generator=maps, dtype=torch.float64)
        + x[:, :m] ** 2
        + 2 * torch.randn(n, m, generator=generator, dtype=torch.float64)
        + 5
    )
    return (x * torch.logspace(-2, 2, d) + offset).float(), y.float()


def moments(x, y, chunk=170) -> Moments:
    made = Moments()
    for part in range(0, len(x), chunk):
        made.add(x[part : part + chunk], {"y": y[part : part + chunk], "norm": y[part : part + chunk].square().sum(1)})
    return made


def lstsq(x, y, test):
    """Predictions for `test`.

    Directions below 1e-5 of the largest singular value are left out. They are float32's rounding.
    """
    centre, scale = x.double().mean(0), x.double().std(0).clamp_min(1e-9)
    standard = [torch.cat([(part.double() - centre) / scale, torch.ones(len(part), 1)], 1) for part in (x, test)]
    return (
        standard[1]
        @ torch.linalg.lstsq(standard[0], y.double().reshape(len(x), -1), driver="gelsd", rcond=1e-5).solution
    )


def test_equal_to_lstsq_and_scikit_learn():
    x, y = data(3000)
    test, truth = data(2000, seed=5)
    fit = moments(x, y).solve()
    assert fit.method == "cholesky"
    assert (fit.rows, fit.rank) == (3000, 20)
    theirs = LinearRegression().fit(x.double().numpy(), y.double().numpy()).predict(test.double().numpy())
    found = fit.maps["y"](test)
    for other in (torch.from_numpy(theirs), lstsq(x, y, test)):
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-6)
        assert r2_score(truth, found) == pytest.approx(r2_score(truth, other), abs=1e-6)
    torch.testing.assert_close(fit.maps["norm"](test), lstsq(x, y.square().sum(1), test), rtol=1e-6, atol=1e-5)


def test_chunks_and_merging_do_not_matter():
    x, y = data(900)
    whole = moments(x, y, 900)
    first, second = moments(x[:400], y[:400], 7), moments(x[400:], y[400:], 450)
    empty = Moments()
    for part in (first, second):
        empty.merge(part)
    assert empty.rows == 900
    torch.testing.assert_close(empty.xx, whole.xx)
    torch.testing.assert_close(empty.xy["y"], whole.xy["y"])
    torch.testing.assert_close(empty.target_mean["norm"], whole.target_mean["norm"])
    assert first.rows == 400
    first.merge(Moments())
    assert first.rows == 400
    assert first.solve().maps.keys() == {"y", "norm"}


@pytest.mark.parametrize("case", ["duplicated", "constant", "sum of others", "fewer rows than columns", "all constant"])
def test_singular_predictors(case):
    x, y = data(2000 if case != "fewer rows than columns" else 15, offset=1)
    if case == "duplicated":
        x = torch.cat([x, x[:, :5], 3 * x[:, 2:3]], 1)
    elif case == "constant":
        x = torch.cat([x, torch.full((len(x), 2), 7.3)], 1)
    elif case == "sum of others":
        x = torch.cat([x, x[:, -3:].sum(1, keepdim=True)], 1)
    elif case == "all constant":
        x = torch.full_like(x, 0.1)
    fit = moments(x, y).solve()
    found = fit.maps["y"](x)
    assert found.isfinite().all()
    assert fit.maps["y"].weight.abs().max() < 1e4, "no direction without variance has a weight"
    assert r2_score(y, found) == pytest.approx(r2_score(y, lstsq(x, y, x)), abs=1e-4)
    if case == "constant":
        assert fit.method == "cholesky"
        assert (fit.maps["y"].weight[-2:] == 0).all()
        assert fit.rank == 20
    elif case != "all constant":
        assert fit.method == "eigen"
        assert fit.rank == (14 if case == "fewer rows than columns" else 20)
        assert fit.ridge == 0
    with pytest.raises(ValueError, match="at least 2 rows"):
        moments(x[:1], y[:1]).solve()


def test_state_does_not_grow_with_the_tokens():
    def size(rows: int) -> int:
        x, y = data(rows)
        made, sums = moments(x, y), ContextSums(20)
        for part in range(0, rows, 100):
            add_target(sums, torch.full((100,), part), "y", y[part : part + 100], {"x": y[part : part + 100]})
        held = [
            made.mean,
            made.xx,
            *made.xy.values(),
            *made.target_mean.values(),
            *sums.sums.values(),
            *sums.rows.values(),
        ]
        return sum(tensor.numel() for tensor in held)

    assert size(200) == size(4000)


def filled(replicates: int, contexts: int = 300) -> tuple[ContextSums, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    context = torch.arange(contexts).repeat_interleave(torch.randint(3, 30, (contexts,), generator=generator))
    effect = torch.randn(contexts, 4, generator=generator)[context]  # Rows of a context are alike
    y = effect * torch.tensor([1.0, 5, 0.2, 2]) + 0.3 * torch.randn(len(context), 4, generator=generator) + 8
    y[:, 3] = 2.5  # This dimension does not vary
    predicted = y + (0.5 + context[:, None] % 3) * torch.randn(y.shape, generator=generator)
    predicted[:, 3] = 2.5
    sums = ContextSums(replicates, seed=1)
    for part in range(0, contexts, 7):
        rows = (context >= part) & (context < part + 7)
        add_target(sums, context[rows], "y", y[rows], {"x": predicted[rows]})
    return sums, context, y.double(), predicted.double()


def test_r2_means_over_dimensions_and_weighted():
    sums, _, y, predicted = filled(10)
    mean, weighted = r2(sums, "y", "x")
    assert float(mean[0]) == pytest.approx(r2_score(y[:, :3], predicted[:, :3]), abs=1e-9)
    assert float(weighted[0]) == pytest.approx(
        r2_score(y[:, :3], predicted[:, :3], multioutput="variance_weighted"), abs=1e-9
    )
    assert float(mean[0]) != pytest.approx(float(weighted[0]), abs=0.01)


def test_intervals_are_those_of_a_bootstrap_over_contexts():
    sums, context, y, predicted = filled(1000)
    _, weighted = r2(sums, "y", "x")
    estimate = Estimate.of(weighted)
    truth, predicted = y[:, :3].numpy(), predicted[:, :3].numpy()

    def interval(groups: list[np.ndarray]) -> np.ndarray:
        rng, drawn = np.random.default_rng(0), []
        for _ in range(400):
            rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
            missed, total = (
                np.square(truth[rows] - predicted[rows]).sum(),
                np.square(truth[rows] - truth[rows].mean(0)).sum(),
            )
            drawn.append(1 - missed / total)
        return np.percentile(drawn, [2.5, 97.5])

    low, high = interval([np.flatnonzero(context == c) for c in range(300)])
    assert estimate.low < estimate.value < estimate.high
    assert estimate.low == pytest.approx(low, abs=0.2 * (high - low))
    assert estimate.high == pytest.approx(high, abs=0.2 * (high - low))
    per_row = interval(list(np.arange(len(truth))[:, None]))
    assert estimate.high - estimate.low > 1.3 * (per_row[1] - per_row[0]), "rows of a context are not independent"


def test_resamples_are_paired():
    first, context, y, _ = filled(50)
    second = ContextSums(50, seed=1)
    for c in reversed(range(300)):  # A second pass in another order and other chunks
        second.add(context[context == c], twice=2 * y[context == c])
    ratio = second.mean("twice") if second["twice"].shape[1] == 1 else second["twice"] / first["y"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0))
    assert (ContextSums(50, seed=2)._weights(torch.arange(9)) != second._weights(torch.arange(9))).any()


def test_maps_are_saved(tmp_path):
    maps = {
        "a/e": Linear(torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)),
        "b": Linear(torch.eye(2).double(), torch.zeros(2).double()),
    }
    save_linear(maps, tmp_path / "maps.safetensors")
    found = load_linear(tmp_path / "maps.safetensors")
    assert found.keys() == maps.keys()
    x = torch.randn(5, 4)
    assert torch.equal(found["a/e"](x), maps["a/e"](x))
