"""Saved autoencoders: a folder in SAELens's format, with raysae's own description beside it.

    cfg.json                  what SAELens reads: architecture, sizes, where the activations come from
    sae_weights.safetensors   the tensors in the class's `SAVED`: W_enc (d, n), W_dec (n, d), b_dec (d,), others (n,)
    raysae.json               the SAEConfig, d, knobs of training that it needs, the SHA-256 of the other two files

Saved SAEs are folded: they take raw activations. `config.ARCHITECTURES` names the SAELens architecture of a file. A
folder appears whole or not at all. Loading refuses files that do not match their checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig, UserError
from raysae.knobs import completed
from raysae.sae.architectures import build
from raysae.sae.base import SAE
from raysae.sae.origins import TRANSFORMER_LENS

# Version of the format written here. SAELens rewrites files that name an older version or none.
SAELENS_VERSION = "6.0.0"
WEIGHTS, CONFIG, OWN = "sae_weights.safetensors", "cfg.json", "raysae.json"


def save_sae(sae: SAE, folder: str | Path, metadata: dict | None = None) -> None:
    """Writes `sae` to `folder` and replaces what is there.

    Args:
        sae: Folded or not. What is written is folded.
        folder: A local folder. Missing parents are made.
        metadata: Entries for SAELens's metadata, such as model_name, context_size, prepend_bos and dataset_path.
            hook_name is filled in where it is missing.
    """
    sae, folder = sae.folded(), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tensors = _in_saelens_layout(sae.saved())
        save_file({name: _to_write(tensor) for name, tensor in tensors.items()}, fresh / WEIGHTS)
        (fresh / CONFIG).write_text(json.dumps(_saelens_config(sae, metadata or {}), indent=2) + "\n")
        own = {
            "config": sae.config.model_dump(),
            "d": sae.d_in,
            **({"train": {knob: getattr(sae.train_config, knob) for knob in sae.KNOBS}} if sae.KNOBS else {}),
            "sha256": {name: _sha256(fresh / name) for name in (WEIGHTS, CONFIG)},
        }
        (fresh / OWN).write_text(json.dumps(own, indent=2) + "\n")
        fresh.chmod(0o755)
        for path in [*fresh.iterdir(), fresh]:
            _sync(path)
        if folder.exists():
            replaced = fresh.with_name(fresh.name + ".replaced")
            folder.rename(replaced)
            fresh.rename(folder)
            shutil.rmtree(replaced)
        else:
            fresh.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_sae(folder: str | Path) -> SAE:
    """Loads the folded autoencoder that `save_sae` wrote, bit for bit.

    Args:
        folder: Local, or a URL (s3://…).

    Raises:
        UserError: `folder` is not such a folder, or its files are damaged.
    """
    if "://" in str(folder):
        files, path = fsspec.core.url_to_fs(str(folder))
        with tempfile.TemporaryDirectory() as copy:
            for name in (OWN, WEIGHTS, CONFIG):
                if files.exists(f"{path}/{name}"):
                    files.get_file(f"{path}/{name}", f"{copy}/{name}")
            return load_sae(copy)
    folder = Path(folder)
    try:
        own = json.loads((folder / OWN).read_text())
        config, d, checksums = SAEConfig(**completed(SAEConfig, own["config"])), own["d"], own["sha256"]
        train = TrainConfig(**own.get("train", {}))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a saved SAE: it has no {OWN}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / OWN} is damaged: it is not the description of a saved SAE") from None
    for name, checksum in checksums.items():
        if not (folder / name).exists():
            raise UserError(f"{folder} is damaged: {name} is missing")
        if _sha256(folder / name) != checksum:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the one in {OWN}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
    sae = build(config, d, train).requires_grad_(False)
    sae.restore(_in_saelens_layout(tensors))
    return sae


def _in_saelens_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Transposes W_enc between our (n, d) and SAELens's (d, n), either way."""
    return {name: tensor.T if name == "W_enc" else tensor for name, tensor in tensors.items()}


def _to_write(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone(memory_format=torch.contiguous_format)


def _saelens_config(sae: SAE, metadata: dict) -> dict:
    architecture = ARCHITECTURES[sae.config.architecture].saelens
    kind, _, layer = sae.config.hook_point.rpartition(".")
    hook_name = TRANSFORMER_LENS[kind].format(layer) if kind in TRANSFORMER_LENS else sae.config.hook_point
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "hook_name": hook_name, **metadata},
    }
    if architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
