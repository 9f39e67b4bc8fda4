"""The k largest pre-activations by screening, against float64. Loose bounds must fall back to computing all."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysae.kernels import screening
from raysae.kernels.buffers import Workspace
from raysae.kernels.screening import fast_integers, top_pre_activations
from raysae.sae.base import StepInfo
from tests.sae.conftest import make

SHIPPED = screening.TOO_MANY
with_fast_integers = pytest.mark.skipif(not fast_integers(), reason="this CPU has no fast products of 8-bit integers")


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Screens always: however few latents there are per k, and however many the bounds leave.

    Each thread takes one strip of rows at a time.
    """
    monkeypatch.setattr(screening, "LATENTS_PER_K", 1)
    monkeypatch.setattr(screening, "FEWEST_ROWS", screening.STRIP)
    monkeypatch.setattr(screening, "TOO_MANY", 10)
    monkeypatch.setattr(screening, "CACHED", 1)


def screened(monkeypatch, *arguments):
    """Result of `top_pre_activations` by screening alone. The fallback fails."""
    monkeypatch.setattr(screening, "top_of_chunks", None)
    return top_pre_activations(*arguments, Workspace())


def are_largest(values, indices, x, weight, bias, k):
    """Asserts that these are the k largest pre-activations, up to float32's rounding in sums of d products."""
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1) + bias.double().abs()
    tolerance = 2.0**-24 * (x.shape[1] + 2) * size + x.shape[1] * 2.0**-126
    assert ((exact.gather(1, indices) - values.double()).abs() <= tolerance.gather(1, indices)).all()
    least = exact.gather(1, indices).min(1, keepdim=True).values
    left_out = torch.ones_like(exact, dtype=torch.bool).scatter(1, indices, False)
    chosen = tolerance.gather(1, indices).amax(1, keepdim=True)
    assert not (left_out & (exact > least + chosen + tolerance)).any()
    assert all(len(set(row)) == k for row in indices.tolist())


@with_fast_integers
@settings(max_examples=100, deadline=None)
@given(st.integers(64, 300), st.integers(1, 500), st.integers(2, 70), st.data())
def test_any_size(b, n, d, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((b, d), (n, d), (n,)))
    if data.draw(st.booleans()):
        x, weight, bias = x.round(), weight.round(), bias.round()  # Many ties, and rows of zeros
    if data.draw(st.booleans()):
        x, weight = x.sign(), weight.sign()  # Integers are exact here, so only float32 rounds
    with pytest.MonkeyPatch.context() as monkeypatch:
        are_largest(*screened(monkeypatch, x, weight, bias, k), x, weight, bias, k)


@with_fast_integers
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "one dimension",
        "one row",
        "one latent",
        "bias",
        "zeros",
        "tiny",
        "vanishing",
        "huge",
        "equal latents",
        "far from 0",
        "uneven bounds",
    ],
)
@pytest.mark.parametrize("k", [1, 30])
def test_awkward_numbers(kind, k, monkeypatch):
    x, weight, bias = torch.randn(200, 48), torch.randn(3000, 48), torch.zeros(3000)
    match kind:
        case "one dimension":
            x[:, 5] *= 1000
        case "one row":
            x[100] *= 1e6
        case "one latent":
            weight[7] *= 1e6
        case "bias":
            bias = 100 * torch.randn(3000)
        case "zeros":
            x[::3], weight[::5], bias[::2] = 0, 0, -1
        case "tiny":
            x, weight = x * 1e-12, weight * 1e-12
        case "vanishing":
            x, weight = x * 1e-21, weight * 1e-14
        case "huge":
            x, weight = x * 1e12, weight * 1e12
        case "equal latents":
            weight[:] = weight[0]
        case "far from 0":
            x += 50
        case "uneven bounds":  # A dimension that no row uses loosens the bounds of every tenth latent
            x[:, 0], weight[::10, 0] = 0, 1e4
    are_largest(*screened(monkeypatch, x, weight, bias, k), x, weight, bias, k)


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_takes_the_other_way(where, value):
    given = {"x": torch.randn(70, 20), "weight": torch.randn(900, 20), "bias": torch.zeros(900)}
    given[where].view(-1)[5] = value
    expected = (given["x"] @ given["weight"].T + given["bias"]).topk(9, dim=1).values
    values, _ = top_pre_activations(*given.values(), 9, Workspace())
    torch.testing.assert_close(values.sort(descending=True).values, expected, equal_nan=True)


@with_fast_integers
def test_bounds_that_say_little_take_the_other_way(monkeypatch):
    monkeypatch.setattr(screening, "TOO_MANY", SHIPPED)
    calls, dense = [], screening.top_of_chunks
    monkeypatch.setattr(screening, "top_of_chunks", lambda chunks, k: calls.append(k) or dense(chunks, k))
    x, weight, bias = torch.randn(100, 48), torch.randn(1, 48) + 1e-4 * torch.randn(3000, 48), torch.zeros(3000)
    are_largest(*top_pre_activations(x, weight, bias, 8, Workspace()), x, weight, bias, 8)
    assert calls


@with_fast_integers
@pytest.mark.parametrize(("n", "k"), [(1024, 32), (2048, 32), (4096, 128)])
def test_as_shipped_few_latents_to_a_k_are_not_too_many(n, k, monkeypatch):
    monkeypatch.undo()
    assert n == screening.LATENTS_PER_K * k or n == 2 * screening.LATENTS_PER_K * k
    screened(monkeypatch, torch.randn(256, 256), torch.randn(n, 256), torch.zeros(n), k)


@with_fast_integers
def test_few_are_computed(monkeypatch):
    computed, real = [], screening.in_parts
    monkeypatch.setattr(
        screening,
        "in_parts",
        lambda function, *arguments: computed.append((function, real(function, *arguments))) or computed[-1][1],
    )
    top_pre_activations(torch.randn(256, 256), torch.randn(8192, 256), torch.zeros(8192), 32, Workspace())
    totals = [sum(totals) for function, totals in computed if function is screening._select]
    assert 32 * 256 < sum(totals) < 5 * 32 * 256


@with_fast_integers
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_and_company_change_nothing(threads, monkeypatch):
    x, weight, bias, before = torch.randn(300, 40), torch.randn(2000, 40), torch.randn(2000), torch.get_num_threads()
    values, indices = screened(monkeypatch, x, weight, bias, 20)
    torch.set_num_threads(threads)
    try:
        for rows in (slice(None), slice(100, 190)):
            again = screened(monkeypatch, x[rows], weight, bias, 20)
            assert torch.equal(again[0].sort().values, values[rows].sort().values)
            assert torch.equal(again[1].sort().values, indices[rows].sort().values)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_more_than_there_are(k):
    with pytest.raises(ValueError, match=f"k is {k}: from 1 to 10 is right"):
        top_pre_activations(torch.randn(3, 4), torch.randn(10, 4), torch.zeros(10), k, Workspace())


@with_fast_integers
@pytest.mark.parametrize("dead", [None, 150])
def test_gradients_are_those_of_all_pre_activations(dead, monkeypatch):
    """A step of TopK with AuxK gives the same in float32 with and without screening."""
    torch.manual_seed(0)
    x, found = torch.randn(100, 24), {}
    step = StepInfo(dead=None if dead is None else torch.arange(400) >= 400 - dead)
    for latents_per_k in (1, 10**6):
        monkeypatch.setattr(screening, "LATENTS_PER_K", latents_per_k)
        sae = make("topk", 24, 400)
        terms = sae.loss_and_grads(x, x, step)
        found[latents_per_k] = {**terms, **{name: parameter.grad for name, parameter in sae.named_parameters()}}
    # Different bits prove that the two runs took different ways
    assert any(not torch.equal(value, found[10**6][name]) for name, value in found[1].items())
    for name, value in found[1].items():
        torch.testing.assert_close(
            value, found[10**6][name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_products_that_overflow_are_noticed(monkeypatch):
    """oneDNN's products overflow when it is told to do without the instructions for them."""
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b).clamp(-(1 << 15), (1 << 15) - 1))
    assert not fast_integers.__wrapped__()


@pytest.mark.parametrize("kind", ["normal", "what latents lose", "what rows lose", "nothing is lost", "bias"])
def test_upper_bounds_hold(kind):
    """Bounds hold for every latent and row, also where they are tight.

    They are tight where all that one loses in rounding points in the other's direction.
    They are tight, too, where only float32 rounds.
    """
    x, weight, bias, factors = torch.randn(64, 48), torch.randn(900, 48), torch.zeros(900), torch.ones(48)

    def rounded(matrix):
        return screening._rounded(matrix, factors, len(matrix), "integers", Workspace())

    def lost(matrix):
        integers, (scale, *_) = rounded(matrix)
        return matrix - integers * torch.from_numpy(scale)[:, None]

    match kind:
        case "what latents lose":
            x = lost(weight)[:64].sign()  # Rounding to integers loses nothing of x
        case "what rows lose":
            weight[:64] = lost(x).sign()
        case "nothing is lost":
            x, weight = torch.rand(64, 1) * x.sign(), torch.rand(900, 1) * weight.sign()
        case "bias":
            bias = 1e4 * torch.randn(900)
    (Q, latents), (P, rows) = rounded(weight), rounded(x)
    latents, rows = screening._of_latents(*latents, bias.numpy(), 48), screening._of_rows(*rows)
    upper = screening._upper.py_func((Q.int() @ P.int().T).numpy(), *latents.T[:, :, None], *rows[:, None, :])
    for j, row in enumerate(x.numpy()):
        found, of = np.empty(900, np.float32), np.arange(900)
        screening._compute(weight.numpy(), bias.numpy(), row, 900, of, 900, found)
        lower = np.array([screening._lower(value, rows[0, j]) for value in found], np.float32)
        assert (upper[of, j] >= lower).all(), (upper[of, j] - lower).min()
