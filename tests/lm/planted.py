"""A causal language model of a few lines, whose blocks add what the tests plant."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

VOCABULARY, WIDTH, LAYERS = 50, 8, 3


class Mixer(nn.Module):
    """Adds the mean of earlier positions."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class PlantedBlock(nn.Module):
    def __init__(self, plant: str, shared: dict) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(WIDTH), Mixer(), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(()))
        self.plant, self.shared = plant, shared

    def forward(self, x: Tensor) -> Tensor:
        first = self.mixer(self.norm(x))
        if self.plant == "shares":  # As layers do that use the keys and values of another
            self.shared.setdefault("first", first)
            return x + first + self.mlp(x) + self.shared["first"].tanh()
        if self.plant == "learned factor":
            return x + self.scale * first + self.mlp(x)
        if self.plant == "in place":
            second = self.mlp(x.tanh())
            second += first
            first += 100
            x += second
            return x
        if self.plant == "three parts":
            return x + first + self.mlp(x) + self.norm(x).tanh()
        return x + 0.25 * (first + self.mlp(x))


class Planted(nn.Module):
    """A model with `LAYERS` planted blocks."""

    def __init__(self, plant: str = "") -> None:
        super().__init__()
        self.config = PretrainedConfig(vocab_size=VOCABULARY, hidden_size=WIDTH)
        self.shared: dict = {}
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(PlantedBlock(plant, self.shared) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.eval().requires_grad_(False)

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_) -> SimpleNamespace:
        self.shared.clear()
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))
