"""Find or check a language model's modules before its weights are loaded, on a random twin of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from raysae.borders import border
from raysae.config import ModelConfig, UserError
from raysae.lm import twin
from raysae.lm.check import adds_up, check_modules
from raysae.lm.find import (
    Record,
    below_norms,
    find_blocks,
    find_parts,
    find_summed,
    like,
    mixing,
    norm_like,
    projection,
    record,
)
from raysae.lm.hooks import Site, hooked, passed_over
from raysae.lm.layout import UNLIMITED_CONTEXT, Architecture, Block, Modules

D_MODEL = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim")
CONTEXT_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "context_length")
RESUMED = 1e-3  # Relative error of logits that continue from a block


def examine(config: ModelConfig, name: str, commit: str | None, modules: Modules | None) -> Architecture:
    """The architecture of a model: as `modules` names its paths, or as found on a twin.

    Args:
        config: the knobs.
        name: what transformers loads.
        commit: the commit on the hub, None for a folder.
        modules: paths to check. None means to find them.

    Raises:
        UserError: the model is no causal LM that transformers can build, blocks are not found, or `modules` does not
            fit.
    """
    trust, at_border = config.trust_remote_code, partial(border, "model.name", repr(config.name))
    # Code of the model's own raises whatever it likes
    with at_border("but transformers cannot build a causal language model from its configuration"):
        real = AutoConfig.from_pretrained(name, revision=commit, trust_remote_code=trust)
        shapes = twin.outline(real, trust)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            small, tokens = twin.smallest(real, trust)
        except twin.NoTwin:
            if modules is None:
                fault = "whose modules cannot be found, because no small random copy of it runs"
                with at_border(fault, _HOW):
                    raise
            return _unchecked(shapes, real, modules)
        # The model's own code may not bear other tensors in place of its own
        with at_border("whose modules cannot be searched", "raysae cannot read it"):
            own = examine_twin(small, tokens, modules)
    d_model = _d_model(real, small.config, own.d_model)
    blocks = _with_widths(shapes, own.path, own.blocks, d_model)
    return replace(own, blocks=blocks, d_model=d_model, context_length=_context_length(real))


_HOW = (
    "name the module paths with model.modules, e.g. {'blocks': 'model.layers', 'attn': 'self_attn', 'attn_proj': "
    "'self_attn.o_proj', 'mlp': 'mlp', 'mlp_proj': 'mlp.down_proj'}, and 'attn_norm' and 'mlp_norm' if the model has "
    "post-norms"
)


@torch.no_grad()
def examine_twin(model: nn.Module, tokens: torch.Tensor, modules: Modules | None = None) -> Architecture:
    """The architecture of a twin itself, with the twin's sizes. Its weights change.

    Args:
        model: a twin in float32.
        tokens: (c, t) token ids that it can read.
        modules: paths to check. None means to find them.

    Raises:
        UserError: blocks are not found, or `modules` does not fit.
    """
    seen = record(model, tokens)
    path = modules.blocks if modules else find_blocks(model, seen, tuple(tokens.shape))
    if path is None:
        raise UserError(
            f"no list of blocks in {type(model).__name__} hands one residual stream from block to block, so raysae "
            f"does not find the model's blocks: {_HOW}"
        )
    d_model = seen[f"{path}.0"].given.shape[-1] if f"{path}.0" in seen else 1

    def with_blocks(blocks: list[Block]) -> Architecture:
        return Architecture(path, _with_widths(model, path, blocks, d_model), d_model, tokens.shape[1])

    own = with_blocks(_named(model, seen, modules) if modules else _found(model, tokens, seen, path))
    try:
        extras = check_modules(model, own, tokens)
    except UserError:
        if modules:
            raise
        own = with_blocks([Block() for _ in own.blocks])  # What a search finds must pass the check, or is not offered
        extras = check_modules(model, own, tokens)
    return replace(own, resumes=_resumes(model, tokens, own, extras))


# ---------------------------------------------------------------- blocks


def _found(model: nn.Module, tokens: torch.Tensor, seen: Record, path: str) -> list[Block]:
    """What a search finds in each block, and finds again with other weights."""
    mixers = mixing(model, tokens, seen, path)
    norms = {name for name, module in model.named_modules() if norm_like(module)}
    paths = [f"{path}.{i}" for i in range(len(model.get_submodule(path)))]
    blocks = [_found_block(model, seen, block, mixers, norms) for block in paths]
    twin.randomise(model)
    again = record(model, tokens)
    return [
        found if adds_up(again, block, found, torch.float32) else Block()
        for block, found in zip(paths, blocks, strict=True)
    ]


def _found_block(model: nn.Module, seen: Record, path: str, mixers: set[str], norms: set[str]) -> Block:
    parts, sums = find_parts(seen, path), ()
    if not parts and (found := find_summed(seen, path, norms)):
        parts, sums = found
    mix = [part.call.path in mixers for part in parts]
    if not any(mix) and len(parts) != 1:
        return Block()  # Nothing tells attention from the MLP
    # In a sequential block the MLP takes what attention mixed. So the first that mixes is attention.
    fields = ["attn" if i == mix.index(True) else "mlp" for i in range(len(mix))] if any(mix) else ["mlp"]
    block = Block(sums=tuple(_below(path, norm) for norm in sums))
    for field, part in zip(fields, parts, strict=True):
        proj = projection(model, seen, path, part.call)
        if below_norms(model, seen, path, part.call) is not part.call:
            block = replace(block, normed=(*block.normed, field))
        block = replace(block, **{
            field: _below(path, part.call.path), f"{field}_factor": part.factor,
            f"{field}_proj": proj and _below(path, proj),
        })  # fmt: skip
    return block


def _below(block: str, path: str) -> str:
    return path.removeprefix(f"{block}.")


def _named(model: nn.Module, seen: Record, modules: Modules) -> list[Block]:
    """What each block has of the named paths, with the factors of its parts.

    Raises:
        UserError: a path is in no block.
    """
    blocks = dict(model.named_modules()).get(modules.blocks)
    inside = list(blocks) if isinstance(blocks, nn.ModuleList) else []  # If it is none, the check says so
    for field, path in asdict(modules).items():
        if field != "blocks" and path and inside and not any(_has(block, path) for block in inside):
            kind = type(inside[0]).__name__
            raise UserError(f"model.modules: {field!r} is {path!r}, which {kind} does not have")
    return [_named_block(seen, f"{modules.blocks}.{i}", block, modules) for i, block in enumerate(inside)]


def _has(block: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in block.named_modules())


def _named_block(seen: Record, path: str, block: nn.Module, modules: Modules) -> Block:
    kept = {field: name for field, name in asdict(modules).items() if name and _has(block, name)}
    added = {field: kept.get(f"{field}_norm") or kept.get(field) for field in ("attn", "mlp")}
    normed = tuple(field for field in added if f"{field}_norm" in kept)
    found = Block(**added, attn_proj=kept.get("attn_proj"), mlp_proj=kept.get("mlp_proj"), normed=normed)
    parts = {field: f"{path}.{name}" for field, name in added.items() if name}
    if path not in seen or not all(name in seen and seen[name].given is not None for name in parts.values()):
        return found  # The check says so
    if not parts or not all(like(seen[name].given, seen[path].given) for name in parts.values()):
        return found
    fields = {name: field for field, name in parts.items()}
    for call, factor in find_parts(seen, path, tuple(parts.values())):
        field = fields.get(call.path, "rest")
        found = replace(found, **{field: _below(path, call.path), f"{field}_factor": factor})
    return found


# ---------------------------------------------------------------- sizes


def _with_widths(model: nn.Module, path: str, blocks: list[Block], d_model: int) -> tuple[Block, ...]:
    """The blocks with the widths of what their projections take, from the shapes of the model's weights."""

    def width(i: int, name: str | None) -> int | None:
        weight = name and getattr(model.get_submodule(f"{path}.{i}.{name}"), "weight", None)
        return weight.numel() // d_model if weight is not None and weight.dim() == 2 else None

    return tuple(
        replace(block, d_attn=width(i, block.attn_proj), d_mlp=width(i, block.mlp_proj))
        for i, block in enumerate(blocks)
    )


def _d_model(real: PretrainedConfig, small: PretrainedConfig, width: int) -> int:
    """The model's own width: the size whose counterpart in the twin's configuration is `width`."""
    text, of_twin = real.get_text_config(decoder=True), small.get_text_config(decoder=True)
    for name in (*D_MODEL, *vars(of_twin)):
        if getattr(of_twin, name, None) == width and isinstance(size := getattr(text, name, None), int):
            return size
    raise UserError(f"the configuration of {type(real).__name__} does not tell the width of the residual stream")


def _context_length(real: PretrainedConfig) -> int:
    text = real.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in CONTEXT_LENGTH)
    return next((size for size in sizes if isinstance(size, int) and size > 0), UNLIMITED_CONTEXT)


def _unchecked(shapes: nn.Module, real: PretrainedConfig, modules: Modules) -> Architecture:
    """The named paths of a model of which no twin runs. They are checked on its weights."""
    found = list(_named(shapes, {}, modules))
    d_model = _d_model(real, real, real.get_text_config(decoder=True).hidden_size)
    return Architecture(modules.blocks, _with_widths(shapes, modules.blocks, found, d_model), d_model,
                        _context_length(real))  # fmt: skip


# ---------------------------------------------------------------- continuing


def _resumes(model: nn.Module, tokens: torch.Tensor, own: Architecture, extras: list[int | None]) -> bool:
    """Whether the model gives the same logits if blocks below a changed residual stream are passed over."""
    seen = record(model, tokens)
    passes = [seen[f"{own.path}.{layer}"] for layer in range(len(extras))]
    if not all(torch.equal(below.given, above.taken) for below, above in pairwise(passes)):
        return False  # Something between blocks would act twice
    blocks, generator = model.get_submodule(own.path), torch.Generator().manual_seed(0)
    hidden = torch.randn(*tokens.shape, own.d_model, generator=generator)
    for first in sorted({1, (len(blocks) + 1) // 2, len(blocks)}):
        with hooked([(Site(blocks[first - 1], "output"), lambda _: hidden)], tokens.shape):
            whole = model(input_ids=tokens, use_cache=False).logits
        try:
            with passed_over(blocks[:first], hidden, extras[:first]):
                continued = model(input_ids=tokens, use_cache=False).logits
        except Exception:  # The model's code misses what the blocks below give
            return False
        if not (continued - whole).norm() <= RESUMED * whole.norm():
            return False
    return True
