"""What is known of a language model before it is loaded: sizes, hook points and a digest of its weights.

Nothing here imports torch, so that a job can refuse a wrong model, hook point or layer at once. Sizes come from the
model's `config.json`.

Hook points are named KIND.LAYER, with layers counted from 0:

| kind | the tensor | width |
| --- | --- | --- |
| `resid_pre` | the residual stream entering the block, at layer 0 the embeddings | d_model |
| `resid_post` | the residual stream leaving the block, before any final norm | d_model |
| `attn_out` | what attention adds to the residual stream, so after a post-norm (Gemma 2) | d_model |
| `mlp_out` | what the MLP adds to the residual stream, so after a post-norm (Gemma 2) | d_model |
| `attn_z` | input of the attention's output projection: the concatenated heads | d_attn = heads · head size |
| `mlp_act` | input of the MLP's output projection: the neurons | d_mlp |

So resid_pre + attn_out + mlp_out = resid_post, in parallel blocks too.
"""

from __future__ import annotations

import json
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

from raysae.borders import border
from raysae.config import ModelConfig, UserError, digest
from raysae.lm.digests import file_digest
from raysae.lm.gguf import unpacked

EMBEDDED = Path(__file__).parent / "embedded"
UNLIMITED_CONTEXT = 1024  # Context length taken for models that have no limit of their own (ALiBi)


# ---------------------------------------------------------------- where an architecture's modules are


@dataclass(frozen=True)
class Modules:
    """Module paths. `blocks` starts at the causal LM, the others at a block. A path of None has no hook points."""

    blocks: str  # List of decoder blocks
    attn: str | None = None  # The block adds its output, or its post-norm's, to the residual stream
    attn_proj: str | None = None  # Output projection inside attn
    mlp: str | None = None
    mlp_proj: str | None = None
    attn_norm: str | None = None  # Post-norm between attn and the residual stream
    mlp_norm: str | None = None


_LLAMA = Modules("model.layers", attn="self_attn", attn_proj="self_attn.o_proj", mlp="mlp", mlp_proj="mlp.down_proj")
MODULES_OF: dict[str, Modules] = {
    "gpt2": Modules("transformer.h", attn="attn", attn_proj="attn.c_proj", mlp="mlp", mlp_proj="mlp.c_proj"),
    "gpt_neox": Modules(
        "gpt_neox.layers", attn="attention", attn_proj="attention.dense", mlp="mlp", mlp_proj="mlp.dense_4h_to_h"
    ),
    "llama": _LLAMA,
    "gemma2": replace(_LLAMA, attn_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm"),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


class Kind(NamedTuple):
    """Where a kind of hook point is read: a field of `Modules`, and the module's side.

    `width` is the field of `ModelFacts` that holds the kind's width.
    """

    module: Literal["blocks", "attn", "attn_proj", "mlp", "mlp_proj"]
    side: Literal["input", "output"]
    width: Literal["d_model", "d_attn", "d_mlp"]


KINDS: dict[str, Kind] = {
    "resid_pre": Kind("blocks", "input", "d_model"),
    "resid_post": Kind("blocks", "output", "d_model"),
    "attn_out": Kind("attn", "output", "d_model"),
    "mlp_out": Kind("mlp", "output", "d_model"),
    "attn_z": Kind("attn_proj", "input", "d_attn"),
    "mlp_act": Kind("mlp_proj", "input", "d_mlp"),
}


# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class ModelFacts:
    folder_or_name: str  # Name that transformers loads
    commit: str | None  # Commit of a model on the hub, None for a folder
    architecture: str  # The model_type of config.json
    layers: int
    d_model: int
    d_attn: int | None  # Heads · head size, or None if config.json does not give it
    d_mlp: int | None
    context_length: int  # Longest context in tokens
    dtype: str  # Number format that the checkpoint's config.json names, float32 where it names none
    digest: str  # Equal for equal weights, configuration and module paths
    modules: Modules

    @property
    def kinds(self) -> list[str]:
        """The kinds of hook point this model has: those whose module and width are known."""
        return [
            name for name, kind in KINDS.items() if getattr(self.modules, kind.module) and getattr(self, kind.width)
        ]


def model_facts(config: ModelConfig) -> ModelFacts:
    """Facts of the model that `config` names, from its config.json and the content of its weight files.

    Raises:
        UserError: the model is not found, its architecture is unknown, or its configuration lacks a size.
    """
    path, commit = _config_file(config)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        architecture = content["model_type"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(
            f"model.name is {config.name!r}: its config.json is not the configuration of a transformers model"
        ) from None
    modules = _modules(config, architecture)

    def size(*names: str) -> int | None:
        return next((content[name] for name in names if content.get(name) is not None), None)

    layers = size("num_hidden_layers", "n_layer")
    d_model = size("hidden_size", "n_embd")
    if not layers or not d_model:
        raise UserError(
            f"model.name is {config.name!r}: its config.json lacks num_hidden_layers or hidden_size, which raysae needs"
        )
    heads = size("num_attention_heads", "n_head")
    d_mlp = size("intermediate_size", "n_inner")
    return ModelFacts(
        folder_or_name=str(path.parent) if commit is None else config.name,
        commit=commit,
        architecture=architecture,
        layers=layers,
        d_model=d_model,
        d_attn=heads * (size("head_dim") or d_model // heads) if heads else None,
        d_mlp=4 * d_model if d_mlp is None and architecture == "gpt2" else d_mlp,
        context_length=size("max_position_embeddings", "n_positions") or UNLIMITED_CONTEXT,
        dtype=str(content.get("dtype") or content.get("torch_dtype") or "float32"),
        digest=digest(
            [_weights(path.parent, config) if commit is None else f"{config.name}@{commit}", asdict(modules)]
        ),
        modules=modules,
    )


def model_folder(config: ModelConfig) -> Path | None:
    """The folder that `config` names, or None for the name of a model on the hub.

    A .gguf file stands for the folder that it is unpacked to.

    Raises:
        UserError: the .gguf file is not there or cannot be unpacked.
    """
    folder = EMBEDDED if config.name == "embedded" else Path(config.name).expanduser()
    if folder.suffix == ".gguf":
        return unpacked(folder)
    return folder.resolve() if folder.is_dir() else None


def hub_commit(config: ModelConfig) -> str:
    """The commit of a model on the hub.

    Raises:
        UserError: the model cannot be loaded.
    """
    return _config_file(config)[1]


def not_loadable(config: ModelConfig, reason: object = "") -> UserError:
    """The error for a model or tokenizer that cannot be found or loaded. `reason` is an exception or a clause."""
    if config.name == "embedded":
        return UserError(
            f"model.name is 'embedded', but this copy of raysae has no model in {EMBEDDED}: "
            "name a folder or a Hugging Face model"
        )
    because = f" ({str(reason).strip().splitlines()[0].rstrip('.')})" if str(reason).strip() else ""
    return UserError(
        f"model.name is {config.name!r}: neither a model's folder nor a model that can be loaded from the Hugging Face "
        f"hub{because}"
    )


def not_loading(config: ModelConfig) -> AbstractContextManager:
    """Turns any error of a library that loads this model or its tokenizer into a UserError. See `borders.border`."""
    fault = "which is neither a model's folder nor a model that can be loaded from the Hugging Face hub"
    if model_folder(config):
        fault = "a model's folder that transformers cannot load"
    return border("model.name", repr(config.name), fault)


def parse_hook_point(name: str, facts: ModelFacts) -> tuple[str, int]:
    """Kind and layer of a hook point, e.g. `("resid_post", 3)`.

    Raises:
        UserError: this model has no such kind or layer. The message names the valid ones.
    """
    kinds = ", ".join(facts.kinds)
    kind, layer = match.groups() if (match := re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", name)) else (None, "0")
    if kind in KINDS and kind not in facts.kinds:
        needed = KINDS[kind].module
        raise UserError(
            f"hook point {name!r} needs model.modules to name {needed!r} and config.json to give its width. "
            f"This model has {kinds}"
        )
    if kind not in KINDS or int(layer) >= facts.layers:
        raise UserError(
            f"hook point {name!r} is not one of this model's: "
            f"give KIND.LAYER with a kind of {kinds} and a layer from 0 to {facts.layers - 1}"
        )
    return kind, int(layer)


def hook_width(name: str, facts: ModelFacts) -> int:
    """Width of the activations at a hook point: d_model, d_attn or d_mlp."""
    kind, _ = parse_hook_point(name, facts)
    return getattr(facts, KINDS[kind].width)


# ---------------------------------------------------------------- reading


def _config_file(config: ModelConfig) -> tuple[Path, str | None]:
    """Path of the model's config.json, and its commit on the hub, which is None for a folder."""
    folder = model_folder(config)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise not_loadable(config, f"there is no config.json in {folder}")
        return folder / "config.json", None
    if config.name == "embedded":
        raise not_loadable(config)
    from huggingface_hub import hf_hub_download  # Imported only for models from the hub

    with not_loading(config):
        path = Path(hf_hub_download(config.name, "config.json", revision=config.revision))
    return path, path.parent.name  # The hub's local copy is .../snapshots/COMMIT/config.json


def _modules(config: ModelConfig, architecture: str) -> Modules:
    names = [field.name for field in fields(Modules)]
    unknown = [name for name in config.modules if name not in names]
    if unknown:
        raise UserError(f"model.modules names {unknown[0]!r}, which is none of {', '.join(names)}")
    known = MODULES_OF.get(architecture)
    if known is not None:
        return replace(known, **config.modules)
    if "blocks" not in config.modules:
        raise UserError(
            f"model.name is {config.name!r} of architecture {architecture!r}, but raysae only knows "
            f"{', '.join(sorted(MODULES_OF))}. Name the module paths with model.modules, e.g. {{'blocks': "
            "'model.layers', 'attn': 'self_attn', 'attn_proj': 'self_attn.o_proj', 'mlp': 'mlp', 'mlp_proj': "
            "'mlp.down_proj'}, and 'attn_norm' and 'mlp_norm' if the model has post-norms"
        )
    return Modules(**config.modules)


def _weights(folder: Path, config: ModelConfig) -> dict[str, str]:
    """Digest of every file of a model's folder that its activations depend on, by file name."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise not_loadable(config, f"there are no weights (*.safetensors) in {folder}")
    code = sorted(folder.glob("*.py")) if config.trust_remote_code else []
    return {path.name: file_digest(path) for path in [folder / "config.json", *code, *weights]}
