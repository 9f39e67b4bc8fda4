"""The class of every architecture, and the one place that builds them.

Facts that need no torch are in `ARCHITECTURES` of `config.py`, under the same names. `tests/sae/naive.py` has the loss
of every architecture in its readable form.
"""

from __future__ import annotations

from raysae.config import SAEConfig, TrainConfig
from raysae.sae.base import SAE
from raysae.sae.batchtopk import BatchTopK
from raysae.sae.gated import Gated
from raysae.sae.jumprelu import JumpReLU
from raysae.sae.matryoshka import Matryoshka
from raysae.sae.relu import ReLU
from raysae.sae.tied import Tied
from raysae.sae.topk import TopK

CLASSES: dict[str, type[SAE]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "relu": ReLU,
    "tied": Tied,
    "jumprelu": JumpReLU,
    "gated": Gated,
}


def build(config: SAEConfig, d: int, train: TrainConfig) -> SAE:
    """Builds the autoencoder that `config` names, on the CPU in float32. config.seed alone draws its weights.

    Args:
        config: Architecture, width, and what else the SAE is.
        d: Width of the activations.
        train: Knobs of training. Some architectures read theirs.
    """
    return CLASSES[config.architecture](config, d, train)
