"""Training on an SAE's error is training on a transformed stream.

Rows, evaluation and fingerprint must equal a direct computation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raysae.analysis.dark_matter.measures.error_saes import error_parts
from raysae.analysis.instruments.regression import Linear, save_linear
from raysae.config import ERROR_KINDS, ErrorsConfig, SAEConfig, TrainConfig, UserError, error_kind
from raysae.sae.architectures import build
from raysae.sae.base import SAE
from raysae.sae.files import load_sae, save_sae
from raysae.train.errors import ErrorOf, Transformed
from raysae.train.loop import Loop
from tests.train.synthetic import EVALUATION, SPEC, TRAIN, ArraySource, D, config, rows

HOOK = "resid_post.0"


@pytest.fixture
def errors(tmp_path: Path) -> tuple[SAE, Linear, ErrorsConfig]:
    """An SAE with biases that matter, a probe, and the config that names their files."""
    torch.manual_seed(0)
    sae = build(SAEConfig(hook_point=HOOK, width=40, k=4, learning_rate=1e-3), D, TrainConfig()).requires_grad_(False)
    sae.b_dec.copy_(torch.randn(D))
    sae.b_enc.copy_(0.1 * torch.randn(40))
    probe = Linear(torch.randn(D, D, dtype=torch.float64) / D, torch.randn(D, dtype=torch.float64))
    save_sae(sae, tmp_path / "sae")
    save_linear({"probe": probe}, tmp_path / "probe.safetensors")
    return sae, probe, ErrorsConfig(sae=str(tmp_path / "sae"), probe=str(tmp_path / "probe.safetensors"))


def direct(x: torch.Tensor, sae: SAE, probe: Linear) -> dict[str, torch.Tensor]:
    """The errors by their definitions, dense and in float64.

    Each row keeps its k largest pre-activations where they are positive.
    """
    w_enc, w_dec, b_enc, b_dec = (t.double() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    made = []
    for row in x.double():
        scores = w_enc @ (row - b_dec) + b_enc
        codes = torch.zeros_like(scores)
        best = scores.topk(sae.config.k).indices
        codes[best] = scores[best].relu()
        made.append(codes @ w_dec + b_dec)
    e = x.double() - torch.stack(made)
    linear = x.double() @ probe.weight + probe.bias
    return {"error": e, "linear": linear, "nonlinear": e - linear}


def test_each_kind_is_what_its_definition_says(errors: tuple[SAE, Linear, ErrorsConfig]) -> None:
    sae, probe, named = errors
    x = rows(64)
    expected = direct(x, sae, probe)
    for kind in ERROR_KINDS:
        made = ErrorOf(f"{HOOK}.{kind}", named, D)(x)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.double(), expected[kind], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(error_parts(x, sae, probe)[kind].double(), expected[kind], atol=2e-5, rtol=1e-4)


def test_the_digest_is_that_of_kind_sae_and_probe(errors: tuple[SAE, Linear, ErrorsConfig]) -> None:
    _, probe, named = errors
    first = ErrorOf(f"{HOOK}.error", named, D).digest
    assert first == ErrorOf(f"{HOOK}.error", named, D).digest
    assert first != ErrorOf(f"{HOOK}.linear", named, D).digest
    save_linear({"probe": Linear(probe.weight + 1e-3, probe.bias)}, named.probe)
    assert first != ErrorOf(f"{HOOK}.error", named, D).digest


def test_hook_points_of_errors() -> None:
    assert error_kind("resid_post.2.nonlinear") == ("nonlinear", "resid_post.2")
    assert error_kind("resid_post.2") == (None, "resid_post.2")


class ErrorSource(ArraySource):
    """Puts rows in memory through the transform, as `StreamSource` does with a stream."""

    def __init__(self, transform: ErrorOf):
        super().__init__()
        self.transform = transform
        self.numerics = {**self.numerics, "transform": [transform.digest]}

    def open(self, row):
        return Transformed(super().open(row), self.transform)

    def first_rows(self):
        return torch.cat([self.transform(part) for part in super().first_rows().split(TRAIN.batch)])

    def evaluation(self, rows):
        return map(self.transform, super().evaluation(rows))


def test_a_loop_on_the_transform_is_a_loop_on_its_rows(
    errors: tuple[SAE, Linear, ErrorsConfig], tmp_path: Path
) -> None:
    """Training through the transform gives the same bits as training on transformed rows."""
    _, _, named = errors
    transform = ErrorOf(f"{HOOK}.nonlinear", named, D)
    plain = ArraySource()
    plain.data, plain.held_out = (
        torch.cat([transform(part) for part in whole.split(TRAIN.batch)]) for whole in (plain.data, plain.held_out)
    )
    sources = {"transformed": ErrorSource(transform), "rows": plain}
    for name, source in sources.items():
        loop = Loop(str(tmp_path / name), D, SPEC, TRAIN, EVALUATION, source)
        loop.add(config())
        loop.run()
    ours, theirs = (load_file(tmp_path / name / "saes" / config().name / "sae_weights.safetensors") for name in sources)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)
    assert load_sae(tmp_path / "transformed/saes" / config().name).d_in == D
    assert transform.digest in (tmp_path / "transformed/saes" / config().name / "cfg.json").read_text()


def test_mistakes_are_told_in_a_sentence(errors: tuple[SAE, Linear, ErrorsConfig], tmp_path: Path) -> None:
    _, _, named = errors
    with pytest.raises(UserError, match=r"errors\.probe is .*missing"):
        ErrorOf(f"{HOOK}.error", named.model_copy(update={"probe": str(tmp_path / "missing")}), D)
    with pytest.raises(UserError, match=rf"{D} wide"):
        ErrorOf(f"{HOOK}.error", named, D + 1)
    with pytest.raises(UserError, match="no such file or folder"):
        ErrorOf(f"{HOOK}.error", named.model_copy(update={"sae": str(tmp_path / "missing")}), D)
