"""Small random models of every architecture. Their folders load like any other model's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from raysae.config import ModelConfig
from raysae.lm.model import LanguageModel

VOCABULARY, LAYERS, LENGTH = 61, 3, 20
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 24,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "gpt2": GPT2Config(**_GPT2_SIZES),
    "gpt_neox_parallel": GPTNeoXConfig(**_SIZES, use_parallel_residual=True),
    "gpt_neox_sequential": GPTNeoXConfig(**_SIZES, use_parallel_residual=False),
    "llama": LlamaConfig(**_GROUPED),
    # The sliding window is shorter than a context, and heads · head size ≠ d_model
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, pad_token_id=0),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "mistral": MistralConfig(**_GROUPED, sliding_window=6),
}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
# Architectures without an entry in raysae's table
STRANGERS = {
    "olmo2": Olmo2Config(**_GROUPED, pad_token_id=0),  # Has post-norms only
    "granite": GraniteConfig(**_GROUPED, residual_multiplier=0.3),  # Scales what a block adds
    "gptj": GPTJConfig(**_GPT2_SIZES, rotary_dim=4),  # Returns tuples from its blocks
    # Sizes have names of their own
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_layers=2, num_heads=4, max_position_embeddings=64, window_size=6,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    ),
    # Has no module for the MLP, whose layers take (c · t, d)
    "opt": OPTConfig(**{**_SIZES, "ffn_dim": 40}, word_embed_proj_dim=24, pad_token_id=0),
    "falcon": FalconConfig(**_SIZES),  # Has parallel blocks that add in place
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=8, mlp_only_layers=[1]),  # Mixes MoE and dense blocks
    "phi3": Phi3Config(**_GROUPED, pad_token_id=0),
    # Has latent attention, and experts from layer 1 up
    "deepseek_v3": DeepseekV3Config(
        **_SIZES, num_key_value_heads=4, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=10, n_routed_experts=8, n_group=2, topk_group=1,
        moe_intermediate_size=16, num_experts_per_tok=2, n_shared_experts=1,
    ),
    "cohere": CohereConfig(**_GROUPED, pad_token_id=0),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=LAYERS, state_size=4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    ),
    "bert": BertConfig(**_SIZES, is_decoder=True, pad_token_id=0),  # Norms after adding
}  # fmt: skip
CONFIGS_OF_ALL = {**CONFIGS, **STRANGERS}


def save(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Saves a random model. Noise on every parameter makes biases, norms and post-norms matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS_OF_ALL[architecture])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **config) -> LanguageModel:
    return LanguageModel.load(ModelConfig(name=str(folder), **config))


def random_tokens(contexts: int = 3, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (contexts, length), generator=torch.Generator().manual_seed(seed))
