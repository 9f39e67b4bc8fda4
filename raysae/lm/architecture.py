"""Where a language model's modules are: its blocks, and in each block what it adds to the residual stream.

Three sources, in this order:

1. the table `MODULES_OF`, for architectures whose paths and sizes are known without loading anything,
2. the knob `model.modules`, whose paths are checked,
3. a search on a random twin of the model (see `find`), whose result is kept in `CACHE`.

The last two need torch. They run in a process apart, unless this one has imported torch already.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from raysae.config import ModelConfig, UserError, digest
from raysae.lm.layout import MODULES_OF, UNLIMITED_CONTEXT, Architecture, Block, Modules
from raysae.processes import apart
from raysae.storage import write_atomically

CACHE = "~/.cache/raysae/modules"  # Folder that keeps what a search found
SEARCH = 1  # Raised with every change of what a search finds


def named_modules(config: ModelConfig, model_type: str) -> Modules | None:
    """The paths of the table and of `model.modules`, or None if a search must find the blocks.

    Raises:
        UserError: `model.modules` has an unknown key.
    """
    names = [field.name for field in fields(Modules)]
    unknown = [name for name in config.modules if name not in names]
    if unknown:
        raise UserError(f"model.modules names {unknown[0]!r}, which is none of {', '.join(names)}")
    known = MODULES_OF.get(model_type)
    if known is not None:
        return replace(known, **config.modules)
    if "blocks" in config.modules:
        return Modules(**config.modules)
    if config.modules:
        raise UserError("model.modules lacks 'blocks', the path of the list of decoder blocks: name it too")
    return None


def listed(content: dict, modules: Modules | None) -> Architecture | None:
    """The architecture of a model whose paths the table has, from its config.json, or None if that lacks a size."""
    if modules is None:
        return None

    def size(*names: str) -> int | None:
        return next((content[name] for name in names if content.get(name) is not None), None)

    layers, d_model = size("num_hidden_layers", "n_layer"), size("hidden_size", "n_embd")
    heads, d_mlp = size("num_attention_heads", "n_head"), size("intermediate_size", "n_inner")
    if d_mlp is None and content["model_type"] == "gpt2":
        d_mlp = d_model and 4 * d_model
    sizes = (layers, d_model, heads, d_mlp)
    if not all(isinstance(number, int) and number > 0 for number in sizes):
        return None
    block = Block(
        modules.attn_norm or modules.attn, modules.attn_proj, heads * (size("head_dim") or d_model // heads), 1.0,
        modules.mlp_norm or modules.mlp, modules.mlp_proj, d_mlp, normed=modules.post_normed,
    )  # fmt: skip
    context_length = size("max_position_embeddings", "n_positions") or UNLIMITED_CONTEXT
    return Architecture(modules.blocks, (block,) * layers, d_model, context_length)


def examined(
    config: ModelConfig, path: Path, content: dict, commit: str | None, modules: Modules | None
) -> Architecture:
    """The architecture that a search finds on a random twin of the model, or that checks `modules` on it.

    The result is kept by the content of config.json, code of the model's own and the version of transformers.

    Args:
        config: names the model.
        path: the model's config.json.
        content: what that file holds.
        commit: the model's commit on the hub, None for a folder.
        modules: paths to check instead of a search.

    Raises:
        UserError: no twin can be built, blocks are not found, or `modules` does not fit the model.
    """
    code = {}
    if config.trust_remote_code:
        code = {file.name: file.read_text(encoding="utf-8") for file in sorted(path.parent.glob("*.py"))}
        code["commit"] = commit
    key = digest([SEARCH, content, code, version("transformers"), modules and asdict(modules)])
    kept = Path(os.path.expanduser(CACHE), f"{key}.json")
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        blocks = [
            Block(**block | {field: tuple(block[field]) for field in ("normed", "sums")}) for block in found["blocks"]
        ]
        return Architecture(**found | {"blocks": tuple(blocks)})
    arguments = (config, str(path.parent) if commit is None else config.name, commit, modules)
    architecture = _examine(*arguments) if "torch" in sys.modules else apart(_examine, *arguments)
    if kept.is_absolute():  # Without a home folder there are no caches
        with suppress(UserError):  # Where nothing can be kept, the next job searches again
            write_atomically(LocalFileSystem(), str(kept), json.dumps(asdict(architecture)).encode())
    return architecture


def _examine(config: ModelConfig, name: str, commit: str | None, modules: Modules | None) -> Architecture:
    from raysae.lm.examine import examine  # Imports torch

    return examine(config, name, commit, modules)
