"""TODO docstring."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

VERSION = 8  # raised with what gives SAEs other bits, here, in compiled, cuda, selection, screening, elements: earlier checkpoints are then refused


def for_triton(like: Tensor) -> ModuleType | None:
    """`cuda.py`, whose kernels are for tensors like this one: float32 on a GPU. None: they are not."""
    if not like.is_cuda or like.dtype != torch.float32 or triton_version() is None:
        return None
    from raysae.kernels import cuda

    return cuda


@cache
def triton_version() -> str | None:
    """None where there is none: PyTorch for GPUs brings it along on Linux. All is done in plain PyTorch then."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
