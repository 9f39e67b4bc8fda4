"""Layout of a shard in blocks, and their wire format.

Blocks are numpy arrays, because object stores share those without a copy. A block is `(rows, width)` and C-contiguous.
It holds float32, or the bits of bfloat16 as int16, since numpy has no bfloat16. Importing this module does not import
torch, because the driver and the queue do without it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from raysae.config import ActivationSpec

if TYPE_CHECKING:
    import torch

WIRE_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2")}

# Blocks from an object store are read-only, and so are the tensors over them. Torch cannot express that and warns.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def rows_per_block(width: int, dtype: str, block_mib: float) -> int:
    """Rows of a full block of at most `block_mib` MiB. A row wider than that is a block of its own."""
    return max(1, int(block_mib * 2**20) // (width * WIRE_DTYPES[dtype].itemsize))


def blocks_per_shard(spec: ActivationSpec, width: int, block_mib: float) -> int:
    """Blocks of a shard at a hook point of this width. Only the last may be short."""
    return -(-spec.rows_per_shard // rows_per_block(width, spec.dtype, block_mib))


def bytes_per_shard(spec: ActivationSpec, width: int) -> int:
    """Bytes of a shard at a hook point of this width."""
    return spec.rows_per_shard * width * WIRE_DTYPES[spec.dtype].itemsize


def cut(rows: np.ndarray, dtype: str, block_mib: float) -> list[np.ndarray]:
    """The blocks of a shard's rows `(rows_per_shard, width)`. They are views: nothing is copied."""
    size = rows_per_block(rows.shape[1], dtype, block_mib)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def as_array(rows: torch.Tensor) -> np.ndarray:
    """A CPU tensor in the wire format, without a copy."""
    import torch

    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def as_tensor(block: np.ndarray, dtype: str) -> torch.Tensor:
    """A block as a tensor over the same memory. If the block is read-only, writing to the tensor is undefined."""
    import torch

    tensor = torch.from_numpy(block)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
