"""Small activations and autoencoders for the tests of analyses."""

from __future__ import annotations

import torch
from torch import Tensor

from raysae.analysis.instruments.activations import ArrayActivations
from raysae.config import SAEConfig, TrainConfig
from raysae.sae.architectures import build
from raysae.sae.base import SAE

HOOK = "resid_post.0"
D, PER_CONTEXT = 12, 20


def sae(width: int = 32, k: int | None = 4, d: int = D, seed: int = 0, bias: float = 0.3) -> SAE:
    """An untrained TopK SAE, or a ReLU SAE if `k` is None. Its biases are far from zero."""
    kind = {"architecture": "topk", "k": k} if k else {"architecture": "relu", "sparsity": 1.0}
    made = build(
        SAEConfig(hook_point=HOOK, width=width, learning_rate=1e-3, seed=seed, **kind), d, TrainConfig()
    ).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    made.b_dec.copy_(bias * torch.randn(d, generator=generator))
    made.b_enc.copy_(0.1 * torch.randn(width, generator=generator))
    return made


def linear_sae(weight: Tensor) -> SAE:
    """A ReLU SAE with Sae(x) = x·weight exactly. It has a pair of latents ±xᵢ per dimension."""
    d = len(weight)
    made = sae(2 * d, None, d)
    made.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    made.W_dec.copy_(torch.cat([weight, -weight]))
    made.b_enc.zero_()
    made.b_dec.zero_()
    return made


def rows(n: int, d: int = D, seed: int = 0) -> Tensor:
    """Correlated, skewed rows (n, d) far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator)
    return (torch.rand(n, d, generator=generator) ** 2 @ mixing) + 3 * torch.randn(d, generator=generator)


def activations(
    contexts: int = 150,
    d: int = D,
    seed: int = 0,
    x: Tensor | None = None,
    chunk_rows: int = 500,
    per_document: int = 1,
) -> ArrayActivations:
    """Activations of contexts with PER_CONTEXT rows each, with tokens and losses.

    A document has `per_document` contexts, and is a group.
    """
    n = contexts * PER_CONTEXT
    context = torch.arange(contexts).repeat_interleave(PER_CONTEXT)
    generator = torch.Generator().manual_seed(seed + 7)
    token = torch.randint(0, 40, (n,), generator=generator)
    loss = torch.rand(n, generator=generator)
    loss[PER_CONTEXT - 1 :: PER_CONTEXT] = torch.nan  # The last position predicts nothing
    return ArrayActivations(
        {HOOK: rows(n, d, seed) if x is None else x},
        context=context,
        token=token,
        token_loss=loss,
        document=context // per_document,
        chunk_rows=chunk_rows,
    )


def gathered(source: ArrayActivations, split: str, field: str = "x") -> Tensor:
    """One field of a whole split, by default its activations (n, d)."""
    return torch.cat([chunk.x[HOOK] if field == "x" else getattr(chunk, field) for chunk in source.chunks(split)])
