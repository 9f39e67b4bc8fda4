"""Saved folders come back as they were, and damaged ones are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from raysae.config import ARCHITECTURES, UserError
from raysae.sae.architectures import CLASSES
from raysae.sae.files import load_sae, save_sae
from tests.sae.conftest import make
from tests.sae.test_base import briefly_trained, dense


def test_round_trip_is_bitwise(architecture, tmp_path):
    sae, x = briefly_trained(architecture)
    save_sae(sae, tmp_path / "a" / "sae", {"model_name": "embedded"})
    folded, loaded = sae.folded(), load_sae(tmp_path / "a" / "sae")
    assert loaded.config == sae.config
    own = folded.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(dense(loaded.encode(x), 64), dense(folded.encode(x), 64))
    assert torch.equal(loaded(x), folded(x))
    save_sae(loaded, tmp_path / "b")
    for name in CLASSES[architecture].SAVED:
        first, second = (
            load_file(path / "sae_weights.safetensors")[name] for path in (tmp_path / "a" / "sae", tmp_path / "b")
        )
        torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_layout_is_saelens(architecture, tmp_path):
    sae, _ = briefly_trained(architecture)
    save_sae(sae, tmp_path / "sae", {"model_name": "embedded", "context_size": 256})
    config, tensors = (
        json.loads((tmp_path / "sae" / "cfg.json").read_text()),
        load_file(tmp_path / "sae" / "sae_weights.safetensors"),
    )
    assert config["architecture"] == ARCHITECTURES[architecture].saelens
    assert (config["d_in"], config["d_sae"]) == (32, 64)
    assert config["metadata"] == {
        "sae_lens_version": "6.0.0",
        "hook_name": "blocks.2.hook_resid_post",
        "model_name": "embedded",
        "context_size": 256,
    }
    shapes = {"W_enc": (32, 64), "W_dec": (64, 32), "b_dec": (32,)}
    names = CLASSES[architecture].SAVED
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shapes.get(name, (64,)) for name in names
    }


def test_replaces_what_is_there_and_leaves_nothing_beside(tmp_path):
    first, _ = briefly_trained("topk")
    second, x = briefly_trained("relu")
    for sae in (first, second):
        save_sae(sae, tmp_path / "sae")
    assert torch.equal(load_sae(tmp_path / "sae")(x), second.folded()(x))
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "raysae.json",
        "sae_weights.safetensors",
    ]


def test_a_failed_save_leaves_the_old_one(tmp_path, monkeypatch):
    sae, x = briefly_trained("topk")
    save_sae(sae, tmp_path / "sae")

    def full(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("raysae.sae.files.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_sae(sae, tmp_path / "sae")
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
    assert torch.equal(load_sae(tmp_path / "sae")(x), sae.folded()(x))


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json", "raysae.json"])
def test_torn_or_missing_files_are_refused_by_name(name, tmp_path):
    sae, _ = briefly_trained("topk")
    save_sae(sae, tmp_path / "sae")
    path = tmp_path / "sae" / name
    content = path.read_bytes()
    for torn in (content[: len(content) // 2], content[:-1] + b"?"):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=name):
            load_sae(tmp_path / "sae")
    path.unlink()
    with pytest.raises(UserError, match=name):
        load_sae(tmp_path / "sae")


@pytest.mark.parametrize("config", [None, [1], "topk", 3])
def test_a_description_without_a_config_is_damaged(config, tmp_path):
    save_sae(briefly_trained("topk")[0], tmp_path / "sae")
    own = json.loads((tmp_path / "sae" / "raysae.json").read_text())
    (tmp_path / "sae" / "raysae.json").write_text(json.dumps(own | {"config": config}))
    with pytest.raises(UserError, match="it is not the description of a saved SAE"):
        load_sae(tmp_path / "sae")


def test_a_loaded_matryoshka_sae_knows_its_groups(tmp_path):
    sae = make("matryoshka", 8, 40, group_shares=[0.1, 0.9])
    save_sae(sae, tmp_path / "sae")
    assert load_sae(tmp_path / "sae").groups == [range(4), range(4, 40)]
    save_sae(make("topk", 8, 40), tmp_path / "other")
    assert "train" not in json.loads((tmp_path / "other" / "raysae.json").read_text())
