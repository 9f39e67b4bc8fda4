"""The per-token table, written and read back, equals direct computation."""

import numpy as np
import pytest
import torch

from raysae.analysis.dark_matter.measures.error_regression import error_regression
from raysae.analysis.dark_matter.measures.per_token import read_per_token, write_per_token
from raysae.config import UserError
from tests.analysis.planted import HOOK, activations, gathered, sae


@pytest.mark.parametrize("k", [4, None])
def test_the_table(tmp_path, k):
    source, autoencoder = activations(), sae(k=k)
    probe = error_regression(source, HOOK, {"a": autoencoder}, replicates=2)["a"].probe
    path = write_per_token(source, HOOK, autoencoder, probe, tmp_path / "deep" / "a.parquet")
    assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]
    table = read_per_token(path)
    x = gathered(source, "C")
    assert len(table) == len(x)
    e = x.double() - autoencoder(x).double()
    expected = {"x_norm": x.double(), "error_norm": e, "linear_norm": probe(x), "nonlinear_norm": e - probe(x)}
    for name, vectors in expected.items():
        np.testing.assert_allclose(table[name], vectors.square().sum(1), rtol=1e-5)
    for name in ("token", "position", "context", "token_loss"):
        np.testing.assert_array_equal(table[name], gathered(source, "C", name))
    codes = autoencoder.encode(x)
    dense = torch.zeros(len(x), 32).scatter(1, codes.indices, codes.values) if k else codes
    assert table["l0"].tolist() == (dense > 0).sum(1).tolist()
    for i in (0, 17, len(x) - 1):
        active = torch.nonzero(dense[i]).squeeze(1)
        assert table["latents"][i].tolist() == active.tolist()
        np.testing.assert_allclose(table["values"][i], dense[i, active], rtol=1e-5)
    assert read_per_token(path, ["l0", "x_norm"]).columns.tolist() == ["l0", "x_norm"]
    light = write_per_token(source, HOOK, autoencoder, probe, tmp_path / "light.parquet", split="B", latents=False)
    assert "latents" not in read_per_token(light)
    assert len(read_per_token(light)) == len(gathered(source, "B"))


def test_a_table_that_is_broken_off_does_not_appear(tmp_path):
    class Breaks:
        def chunks(self, split):
            yield next(iter(activations().chunks(split)))
            raise RuntimeError

    probe = error_regression(activations(), HOOK, {"a": sae()}, replicates=2)["a"].probe
    with pytest.raises(RuntimeError):
        write_per_token(Breaks(), HOOK, sae(), probe, tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="does not exist"):
        read_per_token(tmp_path / "a.parquet")
