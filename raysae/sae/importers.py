"""Loads autoencoders that others have trained. `load_any` tells the format by the files in a folder.

| format | recognised by | encoder's input |
| --- | --- | --- |
| raysae | raysae.json | x − b_dec |
| SAELens | cfg.json + sae_weights.safetensors | x − b_dec, or x |
| sparsify | cfg.json + sae.safetensors | x − b_dec |
| Gemma Scope | params.npz (Gemma 2), params.safetensors (Gemma 3) | x |
| dictionary_learning | ae.pt + config.json | x − b_dec, or x (JumpReLU, AutoEncoderNew) |

A loaded SAE reconstructs as its owner's code does, up to rounding. If the encoder takes x itself, W_enc·b_dec goes into
b_enc. Norms of decoder rows move into the encoder, so W_dec's rows have norm 1. A TopK keeps its norms, because moving
them would change which latents it selects. The exception is a TopK of SAELens that ranks with the norms already.

This module converts weights and does not guess. It refuses what raysae cannot compute, such as transcoders.
"""

from __future__ import annotations

import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig, UserError
from raysae.sae.architectures import CLASSES, build
from raysae.sae.base import SAE
from raysae.sae.files import CONFIG, OWN, TRANSFORMER_LENS, WEIGHTS, load_sae
from raysae.storage import file_system

SPARSIFY, GEMMA_2, GEMMA_3, DICTIONARY, DICTIONARY_CONFIG = (
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
    "config.json",
)
UNREADABLE = (  # Errors that readers of damaged files raise
    SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError,
    OSError, ValueError, TypeError, RuntimeError, EOFError, LookupError,
)  # fmt: skip
FILES = (OWN, CONFIG, WEIGHTS, SPARSIFY, GEMMA_2, GEMMA_3, DICTIONARY, DICTIONARY_CONFIG)


class NamedSAE(NamedTuple):
    """A folded autoencoder for raw activations, and a name that tells it from others.

    The name is safe as a file name.
    """

    name: str
    sae: SAE


def load_any(where: str | Path, hook_point: str | None = None) -> NamedSAE:
    """Loads the autoencoder in a folder.

    Args:
        where: A folder, or a file in it. Local, or a URL (s3://…, hf://…).
        hook_point: Where its activations come from, e.g. `resid_post.3`. It overrides what the files say. It is needed
            if they say nothing.

    Raises:
        UserError: There is nothing at `where`, or no SAE, or no known hook point. Or raysae lacks its architecture. Or
            tensors are missing, damaged, or of shapes that do not fit each other.
    """
    where = str(where)
    if "://" in where:
        with tempfile.TemporaryDirectory() as folder:
            _fetch(where, Path(folder))
            return _load(_Source(Path(folder), where, _places(where.split("://")[1])), hook_point)
    path = Path(where).expanduser()
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder")
    return _load(_Source(path.parent if path.is_file() else path, where, _places(path.resolve())), hook_point)


def require_width(named: NamedSAE, width: int) -> None:
    """Checks that the autoencoder takes activations as wide as its hook point.

    Args:
        named: The autoencoder.
        width: Width of the activations at its hook point in this model.

    Raises:
        UserError: It takes another width.
    """
    if named.sae.d_in != width:
        raise UserError(
            f"{named.name} takes activations {named.sae.d_in} wide, but {named.sae.config.hook_point} of this model is "
            f"{width} wide. Name the hook point and the model that it was trained on"
        )


def _fetch(url: str, folder: Path) -> None:
    files, path = file_system(url)
    source = PurePosixPath(path) if files.isdir(path) else PurePosixPath(path).parent
    for name in FILES:
        if files.exists(str(source / name)):
            files.get_file(str(source / name), str(folder / name))


def _places(path: str | Path) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(path).parts if part not in FILES and part != "/")


def _load(source: _Source, hook_point: str | None) -> NamedSAE:
    has = {name for name in FILES if (source.folder / name).exists()}
    if OWN in has:
        sae = load_sae(source.folder)
        if hook_point is not None:
            sae.config = sae.config.model_copy(update={"hook_point": hook_point})
        return NamedSAE(sae.config.name, sae)
    for needed, read, depth in READERS:
        if needed <= has:
            name = "_".join(re.sub(r"[^\w.-]", "-", place) for place in source.places[-depth:])
            return NamedSAE(name, _assemble(read(source), source.where, hook_point))
    raise UserError(
        f"{source.where} is not a saved SAE. Name a folder that has {OWN} (raysae), {CONFIG} and {WEIGHTS} (SAELens), "
        f"{CONFIG} and {SPARSIFY} (sparsify), {GEMMA_2} or {GEMMA_3} (Gemma Scope), "
        f"or {DICTIONARY} and {DICTIONARY_CONFIG} (dictionary_learning)"
    )


@dataclass(frozen=True)
class _Source:
    """The files of one SAE, in a local folder. What cannot be read is a UserError that names `where`."""

    folder: Path
    where: str  # The folder or file as the user named it
    places: tuple[str, ...]  # Names of the folders that lead to it in the owner's layout, outermost first

    def json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_text())
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{self.where}: {name} is damaged: it is not a JSON object")
        return content

    def optional_json(self, name: str) -> dict:
        return self.json(name) if (self.folder / name).exists() else {}

    def section(self, content: dict, name: str) -> dict:
        """The object `name` inside a JSON file's `content`, or an empty one if it is missing."""
        found = content.get(name) or {}
        if not isinstance(found, dict):
            raise self.refused(f"its {name} is {found!r}, which is not a JSON object")
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        try:
            if name.endswith(".safetensors"):
                return load_file(path)
            if name.endswith(".npz"):
                with np.load(path) as arrays:
                    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
            content = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
            raise UserError(f"{self.where}: {name} is damaged, or holds more than tensors ({reason})") from None
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.where}: {name} does not hold an SAE's tensors by name")
        return content

    def refused(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")


# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class _Parts:
    """An autoencoder as its owner wrote it. Weights are latent-major."""

    architecture: str  # Our name, one that is `native` in config.ARCHITECTURES
    # The tensors in the class's `SAVED`: W_enc (n, d), W_dec (n, d), b_dec (d,), others (n,). None where missing.
    tensors: Mapping[str, Tensor | None]
    names: Mapping[str, str]  # The owner's names of these tensors, for messages
    subtracts_b_dec: bool  # True if the encoder takes x − b_dec, False if it takes x
    hook_point: str | None
    k: int | None = None
    # A topk that ranks by pre-activation times the decoder row's norm, and decodes with rows of norm 1
    by_decoder_norm: bool = False


def _saelens(source: _Source) -> _Parts:
    config, tensors = source.json(CONFIG), source.tensors(WEIGHTS)
    metadata = source.section(config, "metadata")
    architecture = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))  # A key up to version 5
    k = config.get("k", source.section(config, "activation_fn_kwargs").get("k"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    elif architecture == "standard" and activation != "relu":
        raise source.refused(f"its activation function is {activation}. raysae loads relu and topk")
    known = {facts.saelens: name for name, facts in ARCHITECTURES.items() if facts.native}
    if architecture not in known:
        raise source.refused(f"its architecture is {architecture}. raysae loads {', '.join(known)} from SAELens")
    normalised = config.get("normalize_activations") or "none"
    if normalised not in ("none", False):
        raise source.refused(
            f"it normalises activations ({normalised}), and its weights do not contain that step. "
            "Fold the step into the weights with SAELens and save the SAE again"
        )
    if "scaling_factor" in tensors or "finetuning_scaling_factor" in tensors:
        raise source.refused("it has a fine-tuning scaling factor, which raysae does not apply")
    said = config | metadata  # Up to version 5 there is no metadata, and its keys are in the configuration
    processed = source.section(said, "model_from_pretrained_kwargs")
    for option in ("center_writing_weights", "fold_ln"):
        if processed.get(option):
            raise source.refused(
                f"it was trained on a model with processed weights ({option}), which gives other activations. "
                "Name an SAE that was trained on the model's own weights"
            )
    head = next(
        (said[name] for name in ("hook_head_index", "hook_point_head_index") if said.get(name) is not None), None
    )
    if head is not None:
        raise source.refused(f"it was trained on attention head {head} alone. raysae's hook points hold all heads")
    hook_name = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    return _Parts(
        known[architecture],
        *_named(tensors, {name: name for name in CLASSES[known[architecture]].SAVED}, transposed=("W_enc",)),
        subtracts_b_dec=config.get("apply_b_dec_to_input", True),
        hook_point=_from_transformer_lens(hook_name),
        k=k,
        by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )


def _sparsify(source: _Source) -> _Parts:
    config, tensors = source.json(CONFIG), source.tensors(SPARSIFY)
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in tensors:
        raise source.refused(
            "it is a transcoder, which predicts one hook point from another. raysae loads autoencoders"
        )
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        activation = "signed topk" if config.get("signed") else config["activation"]
        raise source.refused(f"its activation is {activation}. raysae loads topk from sparsify")
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    hook_point = _from_module_path("".join(source.places[-1:]))
    return _Parts("topk", *_named(tensors, names), subtracts_b_dec=True, hook_point=hook_point, k=config.get("k"))


def _gemma_scope(source: _Source) -> _Parts:
    file = GEMMA_2 if (source.folder / GEMMA_2).exists() else GEMMA_3
    tensors = {
        ("W" + name[1:] if name.startswith("w_") else name): tensor for name, tensor in source.tensors(file).items()
    }
    config = source.optional_json(DICTIONARY_CONFIG)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise source.refused(f"its architecture is {config['architecture']}. raysae loads jump_relu from Gemma Scope")
    if "affine_skip_connection" in tensors or config.get(
        "hf_hook_point_out", config.get("hf_hook_point_in")
    ) != config.get("hf_hook_point_in"):
        raise source.refused(
            "it is a transcoder, which predicts one hook point from another. raysae loads autoencoders"
        )
    spelt = str if file == GEMMA_2 else str.lower
    parts, names = _named(tensors, {name: name for name in CLASSES["jumprelu"].SAVED}, transposed=("W_enc",))
    return _Parts(
        "jumprelu",
        parts,
        {name: spelt(given) for name, given in names.items()},
        subtracts_b_dec=False,
        hook_point=_from_gemma(source, config),
    )


def _dictionary_learning(source: _Source) -> _Parts:
    trainer, tensors = source.section(source.json(DICTIONARY_CONFIG), "trainer"), source.tensors(DICTIONARY)
    kind = str(trainer.get("dict_class"))
    linear = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
    plain = {name: name for name in CLASSES["jumprelu"].SAVED}
    known = {
        "AutoEncoder": ("relu", linear | {"b_dec": "bias"}, ("W_dec",), True),
        "AutoEncoderNew": ("relu", linear | {"b_dec": "decoder.bias"}, ("W_dec",), False),
        "AutoEncoderTopK": ("topk", linear, ("W_dec",), True),
        "BatchTopKSAE": ("jumprelu", linear | {"threshold": "threshold"}, ("W_dec",), True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", plain, ("W_enc",), True),
        "JumpReluAutoEncoder": ("jumprelu", plain, ("W_enc",), False),
    }
    if kind not in known:
        raise source.refused(f"its dict_class is {kind}. raysae loads {', '.join(known)} from dictionary_learning")
    architecture, names, transposed, subtracts = known[kind]
    if "threshold" in names and "threshold" in tensors and tensors["threshold"].ndim == 0 and names["b_enc"] in tensors:
        # BatchTopK has one threshold for all latents.
        tensors["threshold"] = tensors["threshold"].expand_as(tensors[names["b_enc"]])
    k = trainer.get("k", tensors["k"].item() if "k" in tensors else None)
    hook_point = _from_submodule_name(str(trainer.get("submodule_name")))
    return _Parts(
        architecture, *_named(tensors, names, transposed), subtracts_b_dec=subtracts, hook_point=hook_point, k=k
    )


# Files that tell a format, its reader, and how many of the path's last folders make the SAE's name
READERS: tuple[tuple[set[str], Callable[[_Source], _Parts], int], ...] = (
    ({CONFIG, WEIGHTS}, _saelens, 1),
    ({CONFIG, SPARSIFY}, _sparsify, 2),
    ({GEMMA_2}, _gemma_scope, 3),
    ({GEMMA_3}, _gemma_scope, 2),
    ({DICTIONARY, DICTIONARY_CONFIG}, _dictionary_learning, 2),
)


def _named(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], transposed: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor | None], Mapping[str, str]]:
    """Picks an SAE's tensors.

    Args:
        tensors: What the owner's file holds.
        names: Our name of each tensor → the owner's name.
        transposed: Our names of weights that the owner stores the other way round.

    Returns:
        Our name → tensor, latent-major, None where it is missing. And `names`.
    """
    found = {ours: tensors.get(theirs) for ours, theirs in names.items()}
    return {
        ours: tensor.T if ours in transposed and tensor is not None else tensor for ours, tensor in found.items()
    }, names


# ---------------------------------------------------------------- hook points


def _from_transformer_lens(name: object) -> str | None:
    """`blocks.3.hook_resid_post` → `resid_post.3`. raysae's own names stay. None for other places."""
    for kind, pattern in TRANSFORMER_LENS.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)") + rf"|{kind}\.(\d+)", str(name)):
            return f"{kind}.{match[1] or match[2]}"
    return None


def _from_module_path(name: str) -> str | None:
    """`layers.5` → `resid_post.5`, `h.5.mlp` → `mlp_out.5`: the hook point of a module's output."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?", name)
    if match is None:
        return None
    return {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out") + f".{match[1]}"


def _from_submodule_name(name: str) -> str | None:
    """dictionary_learning's names of outputs.

    `resid_post_layer_8` → `resid_post.8`, `mlp_layer_8` → `mlp_out.8`, `attn_layer_8` → `attn_out.8`.
    """
    match = re.fullmatch(r"(resid_post|mlp|attn|attention)_layer_(\d+)", name)
    if match is None:
        return None
    return {"resid_post": "resid_post", "mlp": "mlp_out"}.get(match[1], "attn_out") + f".{match[2]}"


def _from_gemma(source: _Source, config: dict) -> str | None:
    """Reads the hook point from Gemma 3's config.json.

    Failing that, it reads the names of the repository's folders, e.g. gemma-scope-2b-pt-att/layer_20/….
    """
    modules = {
        r"model\.layers\.(\d+)\.output": "resid_post",
        r"model\.layers\.(\d+)\.self_attn\.o_proj\.input": "attn_z",
        r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output": "mlp_out",
    }
    for pattern, kind in modules.items():
        if match := re.fullmatch(pattern, str(config.get("hf_hook_point_in"))):
            return f"{kind}.{match[1]}"
    repository, layer = "/".join(source.places), re.search(r"layer_(\d+)", "/".join(source.places[-3:]))
    places = {r"-res/|/resid_post/": "resid_post", r"-att/|/attn_out/": "attn_z", r"-mlp/|/mlp_out/": "mlp_out"}
    kinds = [kind for pattern, kind in places.items() if re.search(pattern, repository)]
    return f"{kinds[0]}.{layer[1]}" if len(kinds) == 1 and layer else None


# ---------------------------------------------------------------- assembly


@torch.no_grad()
def _assemble(parts: _Parts, where: str, hook_point: str | None) -> SAE:
    missing = [parts.names[name] for name, tensor in parts.tensors.items() if tensor is None]
    if missing:
        raise UserError(
            f"{where} lacks the tensor{'s' * (len(missing) > 1)} {', '.join(missing)}, "
            f"which {parts.architecture} SAEs have"
        )
    tensors = {name: tensor.double() for name, tensor in parts.tensors.items()}
    _check_shapes(tensors, parts.names, where)
    hook_point = hook_point or parts.hook_point
    if hook_point is None:
        raise UserError(
            f"{where} does not say where its activations come from, or raysae does not know the place: "
            "name its hook point, e.g. resid_post.3"
        )
    n, d = tensors["W_dec"].shape
    by_k = ARCHITECTURES[parts.architecture].level == "k"
    if by_k and (not isinstance(parts.k, int) or not 0 < parts.k <= n):
        raise UserError(
            f"{where}: k is {parts.k}, but a {parts.architecture} SAE of {n} latents needs a number from 1 to {n}"
        )
    # A learning rate and a coefficient must be given. They belong to training and have no use here.
    level = ARCHITECTURES[parts.architecture].pick(k=parts.k, sparsity=0)
    config = SAEConfig(architecture=parts.architecture, hook_point=hook_point, width=n, learning_rate=1, **level)
    sae = build(config, d, TrainConfig()).requires_grad_(False).double()  # Rounding happens once, at the end
    sae.restore(tensors)
    if not parts.subtracts_b_dec:
        sae.subtract_b_dec_()
    if not by_k or parts.by_decoder_norm:
        sae.unit_decoder_rows_()
    return sae.float()


def _check_shapes(tensors: dict[str, Tensor], names: Mapping[str, str], where: str) -> None:
    if tensors["W_dec"].ndim != 2:
        raise UserError(f"{where}: {names['W_dec']} has {tensors['W_dec'].ndim} dimensions, but a decoder has 2")
    n, d = tensors["W_dec"].shape
    for name, tensor in tensors.items():
        shape = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)}.get(name, (n,))
        if tuple(tensor.shape) != shape:
            found = " × ".join(map(str, tensor.shape)) or "a single number"
            raise UserError(
                f"{where}: {names[name]} is {found}, which does not fit a decoder of {n} latents and {d} dimensions"
            )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {names[name]} has numbers that are not finite")
