"""A language model whose activations are a plain function of the tokens. It has the interface that makes shards."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from raysae.stream.spec import ActivationSpec
from raysae.text.contexts import Contexts

CONTEXTS, LENGTH, WIDTHS = 900, 12, {"resid_post.0": 6, "mlp_act.1": 10}


class FakeLanguageModel:
    """Activation (context, position, column) = token + position / 100 + column · 1000, negated at mlp_act.

    It counts the contexts that it forwards. It notes the batch size and the hook points of each call.
    """

    device = torch.device("cpu")
    attention = "none"

    def __init__(self, dtype: torch.dtype = torch.float32, poison: dict[str, float] | None = None):
        self.dtype = dtype
        # Hook point → value at column 3 of the last position of each batch's second context
        self.poison = poison or {}
        self.forwarded = 0
        self.asked: list[tuple[int, tuple[str, ...]]] = []

    def activations(
        self, tokens: torch.Tensor, hook_points: list[str], token_loss: bool = False
    ) -> dict[str, torch.Tensor]:
        assert tokens.dtype == torch.int64
        self.forwarded += len(tokens)
        self.asked.append((len(tokens), tuple(hook_points)))
        found = {hook: activation(tokens, hook).to(self.dtype) for hook in hook_points}
        for hook, value in self.poison.items():
            if hook in found:
                found[hook][1, -1, 3] = value
        if token_loss:
            loss = tokens.float() / 7
            loss[:, 0] = torch.nan
            found["token_loss"] = loss
        return found


def activation(tokens: torch.Tensor, hook: str) -> torch.Tensor:
    columns = torch.arange(WIDTHS[hook]) * 1000.0
    values = tokens[..., None].float() + torch.arange(tokens.shape[1])[:, None] / 100 + columns
    return -values if hook.startswith("mlp_act") else values


def fake_contexts() -> Contexts:
    tokens = np.random.default_rng(0).integers(0, 500, (CONTEXTS, LENGTH), dtype=np.uint16)
    return Contexts(hashlib.sha256(tokens).hexdigest()[:16], tokens)


def fake_spec(text: Contexts, **changes) -> ActivationSpec:
    fields = {
        "model": "fake", "text": text.digest, "contexts": CONTEXTS, "context_length": LENGTH, "skip_positions": 3,
        "dtype": "float32", "seed": 5, "epochs": 2, "shard_contexts": 256, "batch_contexts": 48,
    }  # fmt: skip
    return ActivationSpec(**fields | changes)
