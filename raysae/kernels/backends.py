"""Picks and loads the GPU kernels, and holds the version of all training arithmetic.

`cuda.py` needs Triton, which PyTorch for GPUs brings along on Linux. So this module imports `cuda.py` only when a
tensor is there for it. Elsewhere callers use plain PyTorch, or CPU loops that `compiled.py` compiles. Nothing is
computed here.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# Raise this with every change here, in sae/ or in train/ that gives SAEs other bits. Earlier checkpoints are then
# refused.
VERSION = 9


def for_triton(like: Tensor) -> ModuleType | None:
    """The module `cuda` if its kernels take tensors like this one: float32, on a GPU, with Triton. Otherwise None."""
    if not like.is_cuda or like.dtype != torch.float32 or triton_version() is None:
        return None
    from raysae.kernels import cuda

    return cuda


@cache
def triton_version() -> str | None:
    """The version of Triton, or None where it is not installed. Then plain PyTorch does everything on a GPU."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__
