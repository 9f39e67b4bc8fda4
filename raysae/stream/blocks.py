"""Layout of a shard in blocks, and their wire format.

Blocks are numpy arrays, because object stores share those without a copy. A block is `(rows, width)` and C-contiguous.
It holds float32, float16, or the bits of bfloat16 as int16, since numpy has no bfloat16. Importing this module does
not import torch, because the driver and the queue do without it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from raysae.config import StreamConfig, UserError
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    import torch


WIRE_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2"), "float16": np.dtype("<f2")}

# Blocks from an object store are read-only, and so are the tensors over them. Torch cannot express that and warns.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def rows_per_block(width: int, dtype: str, block_mib: float) -> int:
    """Rows of a full block of at most `block_mib` MiB. A row wider than that is a block of its own."""
    return max(1, int(block_mib * 2**20) // (width * WIRE_DTYPES[dtype].itemsize))


def blocks_per_shard(spec: ActivationSpec, width: int, block_mib: float) -> int:
    """Blocks of a shard at a hook point of this width. Only the last may be short."""
    return -(-spec.rows_per_shard // rows_per_block(width, spec.dtype, block_mib))


def bytes_per_shard(spec: ActivationSpec, widths: Iterable[int]) -> int:
    """Bytes of a shard at hook points of these widths."""
    return spec.rows_per_shard * sum(widths) * WIRE_DTYPES[spec.dtype].itemsize


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


def shards_in_flight(stream: StreamConfig, spec: ActivationSpec, widths: Mapping[str, int]) -> int:
    """How many shards `stream.mib_in_flight` has room for, at least 1. A shard counts with all its hook points.

    With room for one shard, production and consumption alternate. From two on they overlap.

    Args:
        stream: the stream's configuration.
        spec: the spec of the training stream.
        widths: hook point → width.

    Raises:
        UserError: there is no room for a single shard.
    """
    mib = bytes_per_shard(spec, widths.values()) / 2**20
    cap = int(stream.mib_in_flight // mib)
    if cap < 1:
        raise UserError(
            f"stream.mib_in_flight is {stream.mib_in_flight:g} but one shard of {spec.shard_contexts} contexts at "
            f"{len(widths)} hook point{'s' * (len(widths) > 1)} takes {mib:.1f} MiB: set it to {math.ceil(mib)} at "
            f"least, or to {math.ceil(2 * mib)} to let production and training overlap"
        )
    return cap
