"""How other people's files hold an SAE: a reader per layout. `importers.load_any` chooses one by the files in a folder.

| layout | recognised by | encoder's input |
| --- | --- | --- |
| SAELens | cfg.json + sae_weights.safetensors | x − b_dec, or x |
| sparsify | cfg.json + sae.safetensors | x − b_dec |
| Gemma Scope | params.npz (Gemma 2), params.safetensors (Gemma 3) | x |
| dictionary_learning | ae.pt + config.json | x − b_dec, or x (JumpReLU, AutoEncoderNew) |
| Llama Scope | hyperparams.json + checkpoints/final.safetensors | x · √d / mean norm |
| OpenAI | a file N.pt | x − b_dec |

A reader gives the tensors as their owner wrote them, and says what the owner's code does with them. It does not guess,
and refuses what raysae cannot compute, such as transcoders.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from raysae.borders import border
from raysae.config import ARCHITECTURES, UserError
from raysae.sae.architectures import CLASSES
from raysae.sae.files import CONFIG, WEIGHTS
from raysae.sae.origins import (
    Origin,
    from_gemma_scope,
    from_module_path,
    from_submodule_name,
    from_transformer_lens,
    processing_doubt,
)

SPARSIFY, GEMMA_2, GEMMA_3, DICTIONARY, DICTIONARY_CONFIG = (
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "ae.pt",
    "config.json",
)
LLAMA_SCOPE_CONFIG, LLAMA_SCOPE = "hyperparams.json", "checkpoints/final.safetensors"
TRANSCODER = "it is a transcoder, which predicts one hook point from another. raysae loads autoencoders"


@dataclass(frozen=True)
class Source:
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
        content = self.read(name)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UserError(f"{self.where}: {name} does not hold an SAE's tensors by name")
        return content

    def read(self, name: str) -> Any:
        path = self.folder / name
        with border("sae", self.where, f"whose {name} is damaged, or holds more than tensors"):
            if name.endswith(".safetensors"):
                return load_file(path)
            if name.endswith(".npz"):
                with np.load(path) as arrays:
                    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
            return torch.load(path, map_location="cpu", weights_only=True)

    def refused(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")


# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class Parts:
    """An autoencoder as its owner wrote it. Weights are latent-major."""

    architecture: str  # Our name, one that is `native` in config.ARCHITECTURES
    # The tensors in the class's `SAVED`: W_enc (n, d), W_dec (n, d), b_dec (d,), others (n,). None where missing.
    tensors: Mapping[str, Tensor | None]
    names: Mapping[str, str]  # The owner's names of these tensors, for messages
    subtracts_b_dec: bool  # True if the encoder takes x − b_dec, False if it takes x
    origin: Origin
    k: int | None = None
    # A topk that ranks by pre-activation times the decoder row's norm, and decodes with rows of norm 1
    by_decoder_norm: bool = False
    # The owner's code multiplies activations by it before the encoder, and divides reconstructions by it
    input_factor: float = 1.0


def _saelens(source: Source) -> Parts:
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
    _check_normalisation(source, config.get("normalize_activations"))
    said = config | metadata  # Up to version 5 there is no metadata, and its keys are in the configuration
    _apply_fine_tuning(source, said, tensors)
    head = next(
        (said[name] for name in ("hook_head_index", "hook_point_head_index") if said.get(name) is not None), None
    )
    if head is not None:
        raise source.refused(f"it was trained on attention head {head} alone. raysae's hook points hold all heads")
    return Parts(
        known[architecture],
        *_named(tensors, {name: name for name in CLASSES[known[architecture]].SAVED}, transposed=("W_enc",)),
        subtracts_b_dec=config.get("apply_b_dec_to_input", True),
        origin=_saelens_origin(source, said),
        k=k,
        by_decoder_norm=bool(config.get("rescale_acts_by_decoder_norm", False)),
    )


def _check_normalisation(source: Source, step: object) -> None:
    """Raises UserError where SAELens's weights lack a step that normalises activations."""
    if step in (None, False, "none"):
        return
    if step in (True, "expected_average_only_in"):
        raise source.refused(
            "it divides activations by their mean norm (normalize_activations), which its files do not hold. Fold it "
            "into the weights with SAELens and save the SAE again"
        )
    raise source.refused(
        f"it normalises each activation by itself (normalize_activations is {step}), which no weights can do. "
        "raysae loads SAEs without this step"
    )


def _apply_fine_tuning(source: Source, said: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
    """Multiplies decoder rows by the factors that SAELens's files of 2024 hold. Factors of 1 are no fine-tuning."""
    factors = [tensors.pop(name) for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    for factor in factors:
        if torch.allclose(factor, torch.ones_like(factor)):
            continue
        if said.get("finetuning_scaling_factor") is False:
            raise source.refused(
                "it holds a scaling factor, and its configuration says that there is none (finetuning_scaling_factor "
                "is false). Remove the tensor, or set the option to true"
            )
        if "W_dec" not in tensors or factor.shape != tensors["W_dec"].shape[:1]:
            raise source.refused(f"its scaling factor is {tuple(factor.shape)}, which is not one number per latent")
        tensors["W_dec"] = tensors["W_dec"] * factor.unsqueeze(1)


def _saelens_origin(source: Source, said: Mapping[str, object]) -> Origin:
    hook_name = said.get("hook_name") or said.get("hook_point")
    hook_point = from_transformer_lens(hook_name)
    origin = from_module_path(hook_name) if hook_point is None else Origin(hook_point)
    try:
        doubt = processing_doubt(said, origin.hook_point)
    except UserError as error:
        raise source.refused(str(error)) from None
    return replace(origin, model=_text(said.get("model_name")), doubt=doubt)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _sparsify(source: Source) -> Parts:
    config, tensors = source.json(CONFIG), source.tensors(SPARSIFY)
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in tensors:
        raise source.refused(TRANSCODER)
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        activation = "signed topk" if config.get("signed") else config["activation"]
        raise source.refused(f"its activation is {activation}. raysae loads topk from sparsify")
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    origin = from_module_path("".join(source.places[-1:]))
    return Parts("topk", *_named(tensors, names), subtracts_b_dec=True, origin=origin, k=config.get("k"))


def _gemma_scope(source: Source) -> Parts:
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
        raise source.refused(TRANSCODER)
    spelt = str if file == GEMMA_2 else str.lower
    parts, names = _named(tensors, {name: name for name in CLASSES["jumprelu"].SAVED}, transposed=("W_enc",))
    return Parts(
        "jumprelu",
        parts,
        {name: spelt(given) for name, given in names.items()},
        subtracts_b_dec=False,
        origin=from_gemma_scope(source.places, config.get("hf_hook_point_in")),
    )


def _dictionary_learning(source: Source) -> Parts:
    trainer, tensors = source.section(source.json(DICTIONARY_CONFIG), "trainer"), source.tensors(DICTIONARY)
    kind = str(trainer.get("dict_class"))
    linear = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "b_dec"}
    plain = {name: name for name in CLASSES["jumprelu"].SAVED}
    gated = {"b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
    known = {
        "AutoEncoder": ("relu", linear | {"b_dec": "bias"}, ("W_dec",), True),
        "AutoEncoderNew": ("relu", linear | {"b_dec": "decoder.bias"}, ("W_dec",), False),
        "AutoEncoderTopK": ("topk", linear, ("W_dec",), True),
        "BatchTopKSAE": ("jumprelu", linear | {"threshold": "threshold"}, ("W_dec",), True),
        "MatryoshkaBatchTopKSAE": ("jumprelu", plain, ("W_enc",), True),
        "JumpReluAutoEncoder": ("jumprelu", plain, ("W_enc",), False),
        "GatedAutoEncoder": ("gated", linear | gated, ("W_dec",), True),
    }
    if kind not in known:
        raise source.refused(f"its dict_class is {kind}. raysae loads {', '.join(known)} from dictionary_learning")
    architecture, names, transposed, subtracts = known[kind]
    if "threshold" in names and "threshold" in tensors and tensors["threshold"].ndim == 0 and names["b_enc"] in tensors:
        # BatchTopK has one threshold for all latents.
        tensors["threshold"] = tensors["threshold"].expand_as(tensors[names["b_enc"]])
    k = trainer.get("k", tensors["k"].item() if "k" in tensors else None)
    names = {ours: theirs for ours, theirs in names.items() if ours in CLASSES[architecture].SAVED}
    origin = replace(from_submodule_name(trainer.get("submodule_name")), model=_text(trainer.get("lm_name")))
    return Parts(architecture, *_named(tensors, names, transposed), subtracts_b_dec=subtracts, origin=origin, k=k)


def _llama_scope(source: Source) -> Parts:
    """OpenMOSS's layout of Llama Scope (He et al. 2024, arXiv 2410.20526).

    Activations are multiplied by √d / mean norm. The threshold is in raw units, as SAELens 6.54 reads it.
    """
    config, tensors = source.json(LLAMA_SCOPE_CONFIG), source.tensors(LLAMA_SCOPE)
    place = config.get("hook_point_in")
    if config.get("hook_point_out", place) != place:
        raise source.refused(TRANSCODER)
    if config.get("act_fn") != "jumprelu" or config.get("use_glu_encoder"):
        kind = "a gated linear unit" if config.get("use_glu_encoder") else config.get("act_fn")
        raise source.refused(f"its activation function is {kind}. raysae loads jumprelu from Llama Scope")
    norms, threshold = source.section(config, "dataset_average_activation_norm"), config.get("jump_relu_threshold")
    norm, d = norms.get("in"), config.get("d_model")
    if config.get("norm_activation") != "dataset-wise" or not all(_positive(x) for x in (norm, threshold, d)):
        raise source.refused(
            f"its {LLAMA_SCOPE_CONFIG} needs norm_activation 'dataset-wise', and d_model, jump_relu_threshold and "
            "dataset_average_activation_norm.in above 0"
        )
    factor = math.sqrt(d) / norm
    names = {
        "W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias",
        "threshold": "threshold",
    }  # fmt: skip
    if "encoder.bias" in tensors:
        tensors["threshold"] = torch.full_like(tensors["encoder.bias"], threshold * factor, dtype=torch.float64)
    return Parts(
        "jumprelu",
        *_named(tensors, names, transposed=("W_dec",)),
        subtracts_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder")),
        origin=Origin(from_transformer_lens(place), model="meta-llama/Llama-3.1-8B"),
        input_factor=factor,
    )


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0


def openai(source: Source, name: str) -> Parts:
    """A file of OpenAI's GPT-2 autoencoders (Gao et al. 2024), LOCATION/autoencoders/LAYER.pt.

    Those with ReLU are loaded. Those with TopK normalise each activation by itself, which no weights can do.
    """
    content = source.read(name)
    if not isinstance(content, dict) or "latent_bias" not in content:
        raise source.refused(f"{name} is not an autoencoder of OpenAI's, which holds a tensor latent_bias")
    activation = content.get("activation", "ReLU")
    if activation != "ReLU":
        raise source.refused(
            f"its activation is {activation}, with which OpenAI's code normalises each activation by itself. raysae "
            "loads those with ReLU"
        )
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    names = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
    kinds = {"mlp_post_act": "mlp_act", "resid_delta_mlp": "mlp_out", "resid_delta_attn": "attn_out",
             "resid_post_mlp": "resid_post"}  # fmt: skip
    location, layer = "".join(source.places[-3:-2]).partition("_v")[0], Path(name).stem
    hook_point = f"{kinds[location]}.{layer}" if location in kinds and layer.isdigit() else None
    return Parts(
        "relu",
        *_named(tensors, names, transposed=("W_dec",)),
        subtracts_b_dec=True,
        origin=Origin(hook_point, model="gpt2"),
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


# Files that tell a layout, its reader, and how many of the path's last folders make the SAE's name
READERS: tuple[tuple[set[str], Callable[[Source], Parts], int], ...] = (
    ({CONFIG, WEIGHTS}, _saelens, 1),
    ({CONFIG, SPARSIFY}, _sparsify, 2),
    ({GEMMA_2}, _gemma_scope, 3),
    ({GEMMA_3}, _gemma_scope, 2),
    ({DICTIONARY, DICTIONARY_CONFIG}, _dictionary_learning, 2),
    ({LLAMA_SCOPE_CONFIG, LLAMA_SCOPE}, _llama_scope, 1),
)
