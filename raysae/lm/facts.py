"""What is known of a language model before it is loaded: sizes, hook points and a digest of its weights.

Nothing here imports torch, so that a job can refuse a wrong model, hook point or layer at once. What raysae does not
know of an architecture it finds in a process apart, once (see `architecture`).

Hook points are named KIND.LAYER, with layers counted from 0:

| kind | the tensor | width |
| --- | --- | --- |
| `resid_pre` | the residual stream entering the block, at layer 0 the embeddings | d_model |
| `resid_post` | the residual stream leaving the block, before any final norm | d_model |
| `attn_out` | what attention adds to the residual stream: after post-norms (Gemma 2) and factors (Granite) | d_model |
| `mlp_out` | what the MLP adds to the residual stream, likewise | d_model |
| `attn_z` | input of the attention's output projection: the concatenated heads | d_attn = heads · head size |
| `mlp_act` | input of the MLP's output projection: the neurons | d_mlp |

So resid_pre + attn_out + mlp_out = resid_post, in parallel blocks too. "Attention" is what mixes positions, so a
state-space mixer as well. Blocks may differ in what they have. A block of one part has only that part's hook points.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from raysae.borders import border
from raysae.config import ModelConfig, UserError, digest
from raysae.lm.architecture import examined, listed, named_modules
from raysae.lm.digests import file_digest
from raysae.lm.gguf import unpacked
from raysae.lm.layout import KINDS, Architecture
from raysae.storage import local_path

EMBEDDED = Path(__file__).parent / "embedded"


# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class ModelFacts:
    folder_or_name: str  # Name that transformers loads
    commit: str | None  # Commit of a model on the hub, None for a folder
    model_type: str  # From config.json
    dtype: str  # Number format that the checkpoint's config.json names, float32 where it names none
    digest: str  # Equal for equal weights, configuration and module paths
    architecture: Architecture

    @property
    def layers(self) -> int:
        return len(self.architecture.blocks)

    @property
    def d_model(self) -> int:
        return self.architecture.d_model

    @property
    def context_length(self) -> int:
        """Longest context in tokens."""
        return self.architecture.context_length

    @property
    def kinds(self) -> list[str]:
        """The kinds of hook point that some layer of this model has."""
        return [kind for kind in KINDS if self.layers_with(kind)]

    def layers_with(self, kind: str) -> list[int]:
        """The layers that have a kind of hook point: those whose module and width are known."""
        return [layer for layer, block in enumerate(self.architecture.blocks) if block.width(kind, self.d_model)]


def model_facts(config: ModelConfig) -> ModelFacts:
    """Facts of the model that `config` names, from its config.json and the content of its weight files.

    Raises:
        UserError: the model is not found, or it has no decoder blocks that raysae finds.
    """
    path, commit = _config_file(config)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model_type = content["model_type"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        raise UserError(
            f"model.name is {config.name!r}: its config.json is not the configuration of a transformers model"
        ) from None
    named = named_modules(config, model_type)
    architecture = None if config.modules else listed(content, named)
    if architecture is None:
        architecture = examined(config, path, content, commit, named)
    weights = _weights(path.parent, config) if commit is None else f"{config.name}@{commit}"
    modules = asdict(named) if named else [architecture.path, *map(asdict, architecture.blocks)]
    return ModelFacts(
        folder_or_name=str(path.parent) if commit is None else config.name,
        commit=commit,
        model_type=model_type,
        digest=digest([weights, modules]),
        architecture=architecture,
        dtype=str(content.get("dtype") or content.get("torch_dtype") or "float32"),
    )


def model_folder(config: ModelConfig) -> Path | None:
    """The folder that `config` names, or None for the name of a model on the hub.

    A .gguf file stands for the folder that it is unpacked to.

    Raises:
        UserError: the .gguf file is not there or cannot be unpacked. Or the name begins with the `~` of no home folder.
    """
    folder = EMBEDDED if config.name == "embedded" else local_path("model.name", config.name)
    if folder.suffix == ".gguf":
        return unpacked(folder)
    return folder.resolve() if folder.is_dir() else None


def hub_commit(config: ModelConfig) -> str:
    """The commit of a model on the hub.

    Raises:
        UserError: the model cannot be loaded.
    """
    return _config_file(config)[1]


def not_loadable(config: ModelConfig, reason: str = "") -> UserError:
    """The error for a model or tokenizer that cannot be found or loaded. `reason` is a clause."""
    if config.name == "embedded":
        return UserError(
            f"model.name is 'embedded', but this copy of raysae has no model in {EMBEDDED}: "
            "name a folder or a Hugging Face model"
        )
    because = f" ({reason})" if reason else ""
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
    kind, layer = match.groups() if (match := re.fullmatch(r"([a-z_]+)\.(0|[1-9][0-9]*)", name)) else (None, "0")
    kinds = ", ".join(facts.kinds)
    if kind not in KINDS or int(layer) >= facts.layers:
        raise UserError(
            f"hook point {name!r} is not one of this model's: "
            f"give KIND.LAYER with a kind of {kinds} and a layer from 0 to {facts.layers - 1}"
        )
    having = facts.layers_with(kind)
    if not having:
        raise UserError(
            f"hook point {name!r} needs a module {KINDS[kind].module!r}, which neither the table, model.modules nor "
            f"raysae's search names in this model. It has {kinds}"
        )
    if int(layer) not in having:
        raise UserError(f"hook point {name!r}: layer {layer} has no {kind}. The layers {ranges(having)} have one")
    return kind, int(layer)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as text, e.g. "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def hook_width(name: str, facts: ModelFacts) -> int:
    """Width of the activations at a hook point: d_model, or what the output projection of its layer takes."""
    kind, layer = parse_hook_point(name, facts)
    return facts.architecture.blocks[layer].width(kind, facts.d_model)


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
    if os.path.isfile(os.path.expanduser(config.name)):
        raise not_loadable(config, "it is a file: name its folder")
    if config.name.startswith(("/", ".", "~")) or config.name.count("/") > 1:
        raise not_loadable(config, "there is no such folder")
    from huggingface_hub import hf_hub_download  # Imported only for models from the hub

    with not_loading(config):
        path = Path(hf_hub_download(config.name, "config.json", revision=config.revision))
    return path, path.parent.name  # The hub's local copy is .../snapshots/COMMIT/config.json


def _weights(folder: Path, config: ModelConfig) -> dict[str, str]:
    """Digest of every file of a model's folder that its activations depend on, by file name."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise not_loadable(config, f"there are no weights (*.safetensors) in {folder}")
    code = sorted(folder.glob("*.py")) if config.trust_remote_code else []
    return {path.name: file_digest(path) for path in [folder / "config.json", *code, *weights]}
