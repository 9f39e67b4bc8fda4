"""The architectures by name."""

from __future__ import annotations

from raysae.sae.base import SAE
from raysae.sae.batchtopk import BatchTopK
from raysae.sae.jumprelu import JumpReLU
from raysae.sae.relu import ReLU
from raysae.sae.tied import Tied
from raysae.sae.topk import TopK

ARCHITECTURES: dict[str, type[SAE]] = {"topk": TopK, "batchtopk": BatchTopK, "relu": ReLU, "tied": Tied, "jumprelu": JumpReLU}
