"""The words for where a language model's modules are: paths, what each block has, and kinds of hook points."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

UNLIMITED_CONTEXT = 1024  # Context length taken for models that have no limit of their own (ALiBi)


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

    @property
    def post_normed(self) -> tuple[str, ...]:
        """Which of attn and mlp have a post-norm."""
        return tuple(field for field in ("attn", "mlp") if getattr(self, f"{field}_norm"))


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
    """Where a kind of hook point is read: the blocks or a field of `Block`, and the module's side.

    `width` is "d_model", or the field of `Block` that holds the kind's width.
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


@dataclass(frozen=True)
class Block:
    """What one decoder block has. Paths start at the block, and None means that it has no such module.

    `attn` and `mlp` are the modules whose output is added to the residual stream, so post-norms where there are any.
    The block multiplies their output by the factor.
    """

    attn: str | None = None
    attn_proj: str | None = None
    d_attn: int | None = None  # Width of what attn_proj takes: heads · head size
    attn_factor: float = 1.0
    mlp: str | None = None
    mlp_proj: str | None = None
    d_mlp: int | None = None
    mlp_factor: float = 1.0
    # The other part of a block of which model.modules names one part. It has no hook points.
    rest: str | None = None
    rest_factor: float = 1.0
    normed: tuple[str, ...] = ()  # Which of attn and mlp are post-norms of the module that computes
    # Norms of the sums in blocks that norm after adding (BERT), in the order in which they run. The first norms
    # in + part, the second norms the first's output + the other part and gives what the block gives.
    sums: tuple[str, ...] = ()

    def width(self, kind: str, d_model: int) -> int | None:
        """Width of a kind of hook point here, or None if this block has none."""
        module, _, width = KINDS[kind]
        if module != "blocks" and getattr(self, module) is None:
            return None
        return d_model if width == "d_model" else getattr(self, width)

    def adds_as_is(self, field: Literal["attn", "mlp"]) -> bool:
        """Whether the block adds a module's own output, without a post-norm or a factor."""
        return field not in self.normed and getattr(self, f"{field}_factor") == 1

    @property
    def parts(self) -> list[tuple[str, float]]:
        """Path and factor of the modules that the block adds to the residual stream."""
        every = ((self.attn, self.attn_factor), (self.mlp, self.mlp_factor), (self.rest, self.rest_factor))
        return [(path, factor) for path, factor in every if path]


@dataclass(frozen=True)
class Architecture:
    path: str  # Of the list of decoder blocks, from the causal LM
    blocks: tuple[Block, ...]
    d_model: int
    context_length: int  # Longest context in tokens
    # Whether blocks above a hook point need nothing of those below it but the residual stream. Layers that share keys
    # and values need more.
    resumes: bool = True
