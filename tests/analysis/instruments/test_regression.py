"""Streamed least squares against torch.linalg.lstsq and scikit-learn on the same tokens.

R² on other tokens must equal scikit-learn's.
"""

import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from raysae.analysis.instruments.intervals import GroupSums
from raysae.analysis.instruments.regression import (
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


def test_maps_through_the_origin_have_no_intercept():
    x, y = data(900, offset=1)
    found = moments(x, y).through_origin().solve().maps["y"]
    expected = torch.linalg.lstsq(x.double(), y.double()).solution
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=1e-8)
    assert (found.bias == 0).all()


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
        made = moments(x, y)
        return sum(tensor.numel() for tensor in [made.mean, made.xx, *made.xy.values(), *made.target_mean.values()])

    assert size(200) == size(4000)


def test_r2_means_over_dimensions_and_weighted():
    _, y = data(2000, m=4)
    y[:, 3] = 2.5  # This dimension does not vary
    predicted = y + torch.tensor([0.1, 8, 1, 0]) * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    sums = GroupSums(10)
    for part in range(0, 2000, 300):
        rows = slice(part, part + 300)
        add_target(sums, torch.arange(2000)[rows] // 100, "y", y[rows], {"x": predicted[rows]})
    mean, weighted = r2(sums, "y", "x")
    truth = y[:, :3].double(), predicted[:, :3].double()
    assert float(mean[0]) == pytest.approx(r2_score(*truth), abs=1e-9)
    assert float(weighted[0]) == pytest.approx(r2_score(*truth, multioutput="variance_weighted"), abs=1e-9)
    assert float(mean[0]) != pytest.approx(float(weighted[0]), abs=0.01)
    left_out = torch.arange(2000) // 100 != 7
    assert float(weighted[1 + 7]) == pytest.approx(
        r2_score(truth[0][left_out], truth[1][left_out], multioutput="variance_weighted"), abs=1e-9
    )


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
