"""Small random models of every architecture. Their folders load like any other model's."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
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
# Architectures without an entry in raysae's table
STRANGERS = {
    "olmo2": Olmo2Config(**_GROUPED),  # Has post-norms only
    "granite": GraniteConfig(**_GROUPED, residual_multiplier=0.3),  # Scales what a block adds
    "gptj": GPTJConfig(**_GPT2_SIZES, rotary_dim=4),  # Returns tuples from its blocks
}
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
