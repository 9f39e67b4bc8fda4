"""The class of every architecture, and the one place that builds them. Facts that need no torch are in `config.py`."""

from __future__ import annotations

from raysae.config import SAEConfig, TrainConfig
from raysae.sae.base import SAE
from raysae.sae.batchtopk import BatchTopK
from raysae.sae.jumprelu import JumpReLU
from raysae.sae.relu import ReLU
from raysae.sae.tied import Tied
from raysae.sae.topk import TopK

CLASSES: dict[str, type[SAE]] = {"topk": TopK, "batchtopk": BatchTopK, "relu": ReLU, "tied": Tied, "jumprelu": JumpReLU}


def build(config: SAEConfig, d: int, train: TrainConfig) -> SAE:
    """The autoencoder that `config` names, on the CPU in float32. Its weights are drawn from config.seed alone."""
    return CLASSES[config.architecture](config, d, train)
