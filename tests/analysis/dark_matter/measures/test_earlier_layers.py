"""R² from other hook points equals least squares in NumPy on the same tokens, and planted answers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from raysae.analysis.dark_matter.measures.earlier_layers import (
    beyond_pursuit,
    depends,
    earlier_hook_points,
    earlier_layers,
)
from raysae.analysis.instruments.activations import ArrayActivations
from raysae.analysis.instruments.intervals import with_intervals
from raysae.config import UserError
from tests.analysis.planted import linear_sae, rows, sae
from tests.lm.models import load, random_tokens, save

D, CONTEXTS, LENGTH = 8, 240, 10
TARGET, PREVIOUS, MLP, Z = "resid_post.1", "resid_post.0", "mlp_out.1", "attn_z.1"


def array(x: dict[str, Tensor]) -> ArrayActivations:
    return ArrayActivations(x, torch.arange(len(x[TARGET])) // LENGTH, chunk_rows=700)


def gathered(activations: ArrayActivations, split: str) -> dict[str, np.ndarray]:
    chunks = list(activations.chunks(split))
    return {hook: torch.cat([chunk.x[hook] for chunk in chunks]).double().numpy() for hook in activations.widths}


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]


def applied(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.column_stack([x, np.ones(len(x))]) @ weight


def test_every_number_equals_least_squares():
    previous = rows(CONTEXTS * LENGTH, D)
    mlp = torch.tanh((previous - previous.mean(0)) @ torch.randn(D, D, generator=torch.Generator().manual_seed(5)) / 3)
    x = {TARGET: previous + mlp, PREVIOUS: previous, MLP: mlp, Z: previous[:, :5].square()}
    saes = {TARGET: sae(24, 3, D), PREVIOUS: sae(30, 3, D, seed=1), MLP: sae(20, 2, D, seed=2)}
    activations = array(x)
    table = earlier_layers(activations, TARGET, saes).set_index(["source", "part", "target"])
    assert len(table) == 3 * (5 + 5 + 5 + 1)

    split = {name: gathered(activations, name) for name in "ABC"}
    parts: dict[str, dict[tuple[str, str], np.ndarray]] = {"B": {}, "C": {}}
    for hook in x:
        if hook in saes:
            made = {
                name: saes[hook](torch.from_numpy(values[hook]).float()).double().numpy()
                for name, values in split.items()
            }
            probe = fitted(split["A"][hook], split["A"][hook] - made["A"])
        for name in "BC":
            values = split[name][hook]
            parts[name][hook, "activation"] = values
            if hook in saes:
                e, linear = values - made[name], applied(values, probe)
                named = {
                    "reconstruction": made[name],
                    "error": e,
                    "linear error": linear,
                    "nonlinear error": e - linear,
                }
                parts[name] |= {(hook, part): value for part, value in named.items()}
    for (hook, part), source in parts["B"].items():
        for target, its_part in {"e": "error", "ê": "linear error", "ε": "nonlinear error"}.items():
            y = parts["C"][TARGET, its_part]
            missed = np.square(y - applied(parts["C"][hook, part], fitted(source, parts["B"][TARGET, its_part]))).sum(0)
            total = np.square(y - y.mean(0)).sum(0)
            row = table.loc[(hook, part, target)]
            assert row["r2"] == pytest.approx(np.mean(1 - missed / total), abs=1e-5)
            assert row["r2_weighted"] == pytest.approx(1 - missed.sum() / total.sum(), abs=1e-5)
            assert row["r2_low"] <= row["r2"] <= row["r2_high"]
            assert row["by_definition"] == (hook == TARGET and (row["r2"] > 1 - 1e-6))


def test_planted_answers():
    """The layer adds 2·relu(u) to a residual v, and its SAE reconstructs v exactly.

    So e = 2·relu(u). The MLP output knows all of it, and v knows nothing.
    """
    generator = torch.Generator().manual_seed(0)
    n = CONTEXTS * LENGTH
    v, u = torch.randn(n, D, generator=generator), torch.randn(n, D, generator=generator)
    v[:, D // 2 :] = 0
    mlp = torch.zeros(n, D)
    mlp[:, D // 2 :] = 2 * u[:, D // 2 :].relu()
    x = {TARGET: v + mlp, PREVIOUS: v, MLP: mlp}
    keeps = torch.diag((torch.arange(D) < D // 2).float())
    saes = {TARGET: linear_sae(keeps), MLP: linear_sae(torch.zeros(D, D))}
    table = earlier_layers(array(x), TARGET, saes).set_index(["source", "part", "target"])["r2"]
    assert table[TARGET, "activation", "e"] == pytest.approx(1, abs=1e-6)
    assert table[MLP, "activation", "e"] == pytest.approx(1, abs=1e-6)
    assert table[MLP, "error", "e"] == pytest.approx(1, abs=1e-6)
    assert table[PREVIOUS, "activation", "e"] == pytest.approx(0, abs=0.02)
    assert table[TARGET, "reconstruction", "e"] == pytest.approx(0, abs=0.02)
    assert np.isnan(table[MLP, "reconstruction", "e"]) or table[MLP, "reconstruction", "e"] == pytest.approx(
        0, abs=0.02
    )
    assert (PREVIOUS, "reconstruction", "e") not in table  # This hook point has no SAE


def test_nonlinear_error_that_an_earlier_layer_knows():
    """Sae(x) = relu(x) on Gaussian x leaves ε = (E|x| − |x|)/2.

    The earlier source relu(x) explains a share of it that is known in closed form.
    """
    generator = torch.Generator().manual_seed(1)
    n = 30_000
    a, b = torch.randn(n, 1, generator=generator), torch.randn(n, 1, generator=generator)
    x = {TARGET: torch.cat([a, b], 1), MLP: torch.cat([a.relu(), b.relu()], 1)}
    keeps_positive = linear_sae(torch.zeros(2, 2))  # Its e = −relu(−x) = (x − |x|)/2
    keeps_positive.W_dec[:2] = torch.eye(2)
    table = earlier_layers(array(x), TARGET, {TARGET: keeps_positive}).set_index(["source", "part", "target"])["r2"]
    # Var relu(x) = ½ − 1/2π, Cov(relu(x), |x|) = ½ − 1/π, Var |x| = 1 − 2/π
    expected = (0.5 - 1 / np.pi) ** 2 / ((0.5 - 0.5 / np.pi) * (1 - 2 / np.pi))
    assert table[MLP, "activation", "ε"] == pytest.approx(expected, abs=0.02)
    assert table[TARGET, "activation", "ε"] == pytest.approx(0, abs=0.02)
    assert table[TARGET, "activation", "ê"] == pytest.approx(1, abs=1e-6)
    # For e = −relu(−x): Var e = Var relu(x), and Cov(relu(x), relu(−x)) = −1/2π
    assert table[MLP, "activation", "e"] == pytest.approx((0.5 / np.pi) ** 2 / (0.5 - 0.5 / np.pi) ** 2, abs=0.02)


def test_r2_is_measured_on_the_first_rows_where_so_many_are_wanted():
    x = rows(CONTEXTS * LENGTH, D)
    activations = ArrayActivations({TARGET: x, PREVIOUS: x.square()}, torch.arange(len(x)) // LENGTH, chunk_rows=100)
    saes = {TARGET: sae(24, 3, D)}
    some, every = (earlier_layers(activations, TARGET, saes, rows=count) for count in (200, None))
    assert some["r2"].tolist() != pytest.approx(every["r2"].tolist(), rel=1e-3)


def test_refusals():
    x = rows(CONTEXTS * LENGTH, D)
    with pytest.raises(UserError, match=r"no SAE at resid_post.1.*resid_post.0"):
        earlier_layers(array({TARGET: x}), TARGET, {PREVIOUS: sae(24, 3, D)})
    with pytest.raises(UserError, match=r"no activations at resid_post.0"):
        earlier_layers(array({TARGET: x}), PREVIOUS, {PREVIOUS: sae(24, 3, D)})


# ---------------------------------------------------------------- which hook points come earlier

ALL_KINDS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "attn_z", "mlp_act")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("resid_post.2", ["resid_post.1", "mlp_out.2", "attn_out.2", "attn_z.2"]),
        ("resid_post.0", ["resid_pre.0", "mlp_out.0", "attn_out.0", "attn_z.0"]),
        ("resid_pre.3", ["resid_pre.2", "mlp_out.2", "attn_out.2", "attn_z.2"]),  # It is resid_post.2
        ("resid_pre.0", []),  # Nothing comes before the embeddings
        ("mlp_out.2", ["resid_post.1", "attn_out.2", "attn_z.2"]),
        ("mlp_act.1", ["resid_post.0", "attn_out.1", "attn_z.1"]),
        ("attn_out.2", ["resid_post.1"]),  # attn_z.2 is the same but for a matrix
        ("attn_z.0", ["resid_pre.0"]),
    ],
)
def test_places_before_a_hook_point(target: str, expected: list[str]):
    assert earlier_hook_points(target, ALL_KINDS) == expected


def test_kinds_that_the_model_lacks_are_left_out():
    assert earlier_hook_points("resid_post.2", ["resid_pre", "resid_post", "mlp_out"]) == ["resid_post.1", "mlp_out.2"]


@pytest.mark.parametrize("architecture", ["gpt_neox_parallel", "gpt_neox_sequential"])
def test_every_place_before_a_hook_point_changes_it_and_none_is_its_own_tensor(tmp_path, architecture):
    lm = load(save(architecture, tmp_path))
    tokens = random_tokens()
    for target in [f"{kind}.{layer}" for kind in ALL_KINDS for layer in range(lm.facts.layers)]:
        sequential = depends(lm, tokens, "mlp_out.0", "attn_out.0")
        assert sequential == architecture.endswith("sequential")
        places = earlier_hook_points(target, lm.facts.kinds, sequential)
        seen = lm.activations(tokens, [target, *places])
        for place in places:
            assert depends(lm, tokens, target, place), (target, place)
            assert not depends(lm, tokens, place, target), (target, place)
            own = seen[place].shape == seen[target].shape and torch.equal(seen[place], seen[target])
            assert not own, (target, place)


# ---------------------------------------------------------------- more than pursuit


def with_replicates(name: str, value: float, noise: np.ndarray) -> dict[str, object]:
    return with_intervals({name: torch.from_numpy(np.concatenate([[value], value + noise]))}, groups=40)


def pursuit_that_removes(share: float, noise: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame([with_replicates("encoder_share", share, noise)])


def test_the_lead_over_pursuit_is_paired():
    noise = 0.1 * np.random.default_rng(0).standard_normal(200)  # Common to both, far larger than the difference
    table = pd.DataFrame(
        [
            {"source": source, "part": part, "target": target} | with_replicates("r2_weighted", value, noise)
            for source, part, target, value in (
                (TARGET, "reconstruction", "ε", 0.9),  # Not an earlier place
                (PREVIOUS, "reconstruction", "ε", 0.32),
                (MLP, "reconstruction", "ε", 0.25),
                (MLP, "activation", "ε", 0.8),  # Not a reconstruction
                (MLP, "reconstruction", "e", 0.8),
            )
        ]
    )
    (row,) = beyond_pursuit(table, TARGET, pursuit_that_removes(0.3, noise)).to_dict("records")
    assert row["source"] == PREVIOUS
    assert row["explained"] == pytest.approx(0.32)
    assert row["encoder_share"] == pytest.approx(0.3)
    assert row["lead"] == pytest.approx(0.02)
    assert row["explained_high"] - row["explained_low"] > 0.3
    assert (row["lead_low"], row["lead_high"]) == (pytest.approx(0.02, abs=0.05), pytest.approx(0.02, abs=0.05))
    harmful = beyond_pursuit(table, TARGET, pursuit_that_removes(-0.2, 0 * noise)).iloc[0]
    assert harmful["lead"] == pytest.approx(0.32), "pursuit that does harm is no gain"
    assert beyond_pursuit(table[table["source"] == TARGET], TARGET, pursuit_that_removes(0.3, noise)).empty
