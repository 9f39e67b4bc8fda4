"""The architectures that tests run on, and small SAEs of each."""

import pytest

from raysae.config import ARCHITECTURES, SAEConfig, TrainConfig
from raysae.sae.architectures import build
from raysae.sae.base import SAE


def make(architecture: str, d: int, width: int, k: int = 5, sparsity: float = 0.1, seed: int = 0, **train) -> SAE:
    level = ARCHITECTURES[architecture].pick(k=k, sparsity=sparsity)
    config = SAEConfig(
        architecture=architecture, hook_point="resid_post.2", width=width, learning_rate=1e-3, seed=seed, **level
    )
    return build(config, d, TrainConfig(**train))


def with_k() -> list[str]:
    """Architectures with k active latents per row, or on average."""
    return [name for name, facts in ARCHITECTURES.items() if facts.level == "k"]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param
