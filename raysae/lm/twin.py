"""Small random copies of a language model, for finding and checking modules before the weights are loaded.

A twin has the model's code and as many blocks of the same kinds, so it needs no rule about layer patterns. Only widths
shrink: numbers of heads and all that is proportional to them, experts and the vocabulary. Head sizes stay, and with
them rotary sections and the like.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 1024  # Tokens of a twin
CONTEXTS, LENGTH = 2, 7  # Size of the batch that a twin reads
LARGEST = 400_000_000  # Parameters of a twin. More would not fit into the memory of a small machine
HEADS = re.compile(r"(^|_)(n_head|n_heads|num_heads|heads|num_head|n_layer_heads)$|_heads$|^num_.*_heads(_.*)?$")
WIDTHS = re.compile(
    r"hidden_(size|dim)(_|$)|d_model|n_embd|intermediate|ffn_dim|n_inner|d_ff|ffn_hidden|mlp_(dim|size|hidden)"
    r"|embedding_size|word_embed_proj|mamba_d_ssm|mamba_intermediate|attention_hidden|inner_dim|emb_dim|embedding_dim|lru_width|d_inner|(^|_)n_embed$|^dim$"
)
EXPERTS = re.compile(r"num_experts$|num_local_experts|n_routed_experts|n_experts$|moe_num_experts$")
CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "num_experts_per_token", "moe_top_k", "topk")


class NoTwin(Exception):  # noqa: N818 - it names what is missing
    """No twin of a configuration can be built and run. The message says why."""


def smallest(config: PretrainedConfig, trust_remote_code: bool = False) -> tuple[nn.Module, Tensor]:
    """The smallest twin that runs, with random weights in float32, and (CONTEXTS, LENGTH) tokens that it read.

    Raises:
        NoTwin: none runs.
    """
    reason = f"all have more than {LARGEST:,} parameters"
    for small in shrunk(config):
        try:
            if sum(weight.numel() for weight in outline(small, trust_remote_code).parameters()) > LARGEST:
                continue
            model = AutoModelForCausalLM.from_config(
                small, trust_remote_code=trust_remote_code, dtype=torch.float32, attn_implementation="eager"
            )
            randomise(model.eval().requires_grad_(False))
            tokens = _tokens(small)
            if model(input_ids=tokens, use_cache=False).logits.isfinite().all():
                return model, tokens
            reason = "its logits are not finite"
        except Exception as error:  # The model's own code raises whatever it likes
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise NoTwin(reason)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Add noise to all that a checkpoint would hold, so that nothing is one, zero or the same in two blocks."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            scale = 0.5 / math.sqrt(tensor.shape[-1]) if tensor.dim() > 1 else 0.1
            tensor += scale * torch.randn_like(tensor)


def outline(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model of `config` without memory for its weights, which shows every shape."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)


def shrunk(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Configurations of twins, smallest first. The last has the model's own widths."""
    text = config.get_text_config(decoder=True)
    heads = next(
        (v for k, v in vars(text).items() if HEADS.search(k) and "key_value" not in k and isinstance(v, int) and v > 0),
        16,
    )
    divisors = [f for f in range(heads, 0, -1) if heads % f == 0]
    several = [f for f in divisors if heads // f >= 2]
    for factor in dict.fromkeys([*several[:3], heads, *several[3:6], 1]):
        small = copy.deepcopy(config)
        for part in _parts(small):
            _shrink(part, factor)
        yield small


def _tokens(config: PretrainedConfig) -> Tensor:
    """(CONTEXTS, LENGTH) token ids of a twin, none of them a special token."""
    special = {v for part in _parts(config) for k, v in vars(part).items() if "token_id" in k and isinstance(v, int)}
    vocabulary = config.get_text_config(decoder=True).vocab_size
    usual = [i for i in range(10, min(vocabulary, 1000)) if i not in special]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(usual)[torch.randint(len(usual), (CONTEXTS, LENGTH), generator=generator)]


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configuration and those nested in it."""
    nested = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for inner in nested for part in _parts(inner))]


def _shrink(part: PretrainedConfig, factor: int) -> None:
    content = vars(part)
    chosen = max([v for k in CHOSEN if isinstance(v := content.get(k), int)], default=2)
    groups = content.get("n_group") or 1
    for name, value in list(content.items()):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            continue
        if name == "vocab_size" or name.startswith("vocab_size_"):
            setattr(part, name, min(value, VOCABULARY))
        elif EXPERTS.search(name):
            setattr(part, name, _fewest(value, chosen, groups if isinstance(groups, int) else 1))
        elif HEADS.search(name):
            setattr(part, name, max(1, value // factor))
        elif WIDTHS.search(name):
            setattr(part, name, value // factor if value % factor == 0 else max(8, value // factor // 8 * 8))
    if (content.get("pad_token_id") or 0) >= VOCABULARY:
        part.pad_token_id = 0


def _fewest(experts: int, chosen: int, groups: int) -> int:
    """The fewest experts with two per group and twice as many as are chosen, ."""
    return min(experts, groups * max(2, -(-2 * chosen // groups)))
