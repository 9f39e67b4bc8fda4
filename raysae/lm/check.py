"""Check on a model itself that module paths are what they are taken for, in every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from raysae.config import UserError
from raysae.lm.find import Call, Record, below_norms, like, projects, record, same
from raysae.lm.layout import KINDS, Architecture, Block

CONTEXTS, LENGTH = 2, 7  # Size of the batch that checks a model
STRAY = 0.02  # Most elements of a sum that may be off by more than rounding
FITTED = 1e-4  # Relative error of a factor that was measured on a twin


def probe(config: PretrainedConfig) -> Tensor:
    """(CONTEXTS, LENGTH) different token ids, none of them a special token where the vocabulary is large."""
    vocabulary = config.get_text_config(decoder=True).vocab_size
    ids = 10 + 37 * torch.arange(CONTEXTS * LENGTH)
    return (ids % vocabulary).view(CONTEXTS, LENGTH)


def check_modules(model: nn.Module, architecture: Architecture, tokens: Tensor) -> list[int | None]:
    """Run the model once on `tokens` (c, t) to check the module paths of every block.

    Every hook point must have its width, parts must add up to the block, and projections must give what their parts
    give.

    Returns:
        for each block, how many elements follow the residual stream in what it returns, or None if it returns a tensor
        alone.

    Raises:
        UserError: the module paths do not fit. The message names the first block and path that do not.
    """
    try:
        blocks = model.get_submodule(architecture.path)
    except AttributeError:
        raise UserError(
            f"model.modules: 'blocks' is {architecture.path!r}, which {type(model).__name__} does not have"
        ) from None
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != len(architecture.blocks):
        raise UserError(
            f"model.modules: 'blocks' is {architecture.path!r}, which is not the list of the model's decoder blocks"
        )
    seen = record(model, tokens)
    for layer, block in enumerate(architecture.blocks):
        _check_block(model, seen, architecture, layer, block)
    return [seen[f"{architecture.path}.{layer}"].extras for layer in range(len(blocks))]


def _check_block(model: nn.Module, seen: Record, architecture: Architecture, layer: int, block: Block) -> None:
    path = f"{architecture.path}.{layer}"
    whole = _call(model, seen, "blocks", path, path)
    for field in ("attn", "mlp", "rest", "attn_proj", "mlp_proj"):
        if name := getattr(block, field):
            _call(model, seen, field, path, name)
    if not adds_up(seen, path, block, model.dtype):
        raise UserError(
            f"model.modules: resid_pre + {' + '.join(name for name, _ in block.parts)} is not resid_post in block "
            f"{layer}, so 'attn' or 'mlp' is not what the block adds to the residual stream. Name its post-norms as "
            "'attn_norm' and 'mlp_norm', or leave 'attn' and 'mlp' out"
        )
    for field in ("attn", "mlp"):
        if getattr(block, field) and (name := getattr(block, f"{field}_proj")):
            _check_projection(model, seen, path, f"{field}_proj", seen[f"{path}.{name}"], getattr(block, field))
    for kind, (field, side, _) in KINDS.items():
        expected = block.width(kind, architecture.d_model)
        call = whole if field == "blocks" else seen.get(f"{path}.{getattr(block, field)}")
        tensor = call and (call.taken if side == "input" else call.given)
        found = None if tensor is None else tensor.shape[-1]
        if expected not in (None, found):
            raise UserError(
                f"hook point '{kind}.{layer}' is {found} wide, but the model's configuration says {expected}: "
                "check model.modules"
            )


def _call(model: nn.Module, seen: Record, field: str, block: str, name: str) -> Call:
    path = name if field == "blocks" else f"{block}.{name}"
    try:
        model.get_submodule(path)
    except AttributeError:
        kind = type(model.get_submodule(block)).__name__
        raise UserError(f"model.modules: {field!r} is {name!r}, which {kind} does not have") from None
    if path not in seen:
        raise UserError(
            f"model.modules: {field!r} is {name!r}, but the model's forward pass does not go through it exactly once "
            f"in {block}"
        )
    return seen[path]


def adds_up(seen: Record, path: str, block: Block, dtype: torch.dtype) -> bool:
    """Whether the parts of the block at `path` add up to what it adds to the residual stream."""
    whole = seen[path]
    parts = [(seen[f"{path}.{name}"], factor) for name, factor in block.parts]
    if not all(like(call.given, whole.given) for call, _ in parts):
        return False
    if not block.sums:
        return not parts or _adds_up(whole.taken, parts, whole.given, dtype)
    entering = whole.taken
    for part, norm in zip(sorted(parts, key=lambda part: part[0].order), block.sums, strict=True):
        if not _adds_up(entering, [part], seen[f"{path}.{norm}"].taken, dtype):
            return False
        entering = seen[f"{path}.{norm}"].given
    return same(entering, whole.given)


def _adds_up(entering: Tensor, parts: list[tuple[Call, float]], total: Tensor, dtype: torch.dtype) -> bool:
    """Whether entering + Σ factor · part is `total`, up to rounding to the dtype.

    Each element has a bound of its own. So large elements, as at a context's first position, do not cover up errors in
    the others.
    """
    before, after = entering.double().flatten(), total.double().flatten()
    scaled = [factor * call.given.double().flatten() for call, factor in parts]
    size = sum(part.abs() for part in scaled)
    bound = torch.finfo(dtype).eps * (before.abs() + after.abs() + size) + FITTED * size
    off = (after - before - sum(scaled)).abs() > bound
    return off.double().mean().item() <= STRAY


def _check_projection(model: nn.Module, seen: Record, path: str, field: str, call: Call, part: str) -> None:
    computes = below_norms(model, seen, path, seen[f"{path}.{part}"])
    if not same(call.given, computes.given) or not projects(model.get_submodule(call.path), call):
        raise UserError(
            f"model.modules: {field!r} is {call.path.removeprefix(path + '.')!r}, whose output is not that of "
            f"{computes.path.removeprefix(path + '.')!r}: name the output projection, or leave {field!r} out"
        )
