"""A replaced file of an SAE is other content, so results of tasks on the old one do not count."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from raysae.analysis.lab.subjects import content_of

LAYOUTS = [  # Every file of a layout, and what a user names
    (["resid_post_mlp/autoencoders/7.pt"], "resid_post_mlp/autoencoders/7.pt"),
    (["hyperparams.json", "checkpoints/final.safetensors"], "checkpoints/final.safetensors"),
    (["hyperparams.json", "checkpoints/final.safetensors"], ""),
    (["params.npz"], "params.npz"),
    (["cfg.json", "sae_weights.safetensors"], "cfg.json"),
    (["cfg.json", "sae_weights.safetensors"], ""),
]


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize(("names", "named"), LAYOUTS)
def test_a_replaced_file_is_other_content(names: list[str], named: str, scheme: str, tmp_path: Path) -> None:
    root = f"{scheme}{tmp_path}/sae"
    files, folder = fsspec.url_to_fs(root)

    def written(name: str, content: bytes) -> None:
        files.makedirs(f"{folder}/{name}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{folder}/{name}", content)

    for name in names:
        written(name, b"old")
    where = f"{root}/{named}".rstrip("/")
    before = content_of(where)
    assert content_of(where) == before
    for name in names:
        written(name, b"of another size")
        assert content_of(where) != before, name
        before = content_of(where)


def test_the_file_that_is_named_tells_two_in_a_folder_apart(tmp_path: Path) -> None:
    for layer in (6, 7):
        (tmp_path / f"{layer}.pt").write_bytes(b"the same")
    assert content_of(str(tmp_path / "6.pt")) != content_of(str(tmp_path / "7.pt"))
