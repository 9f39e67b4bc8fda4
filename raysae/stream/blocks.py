"""Layout of a shard in blocks, and their wire format: numpy, because object stores share numpy arrays without a copy.

A block is `(rows, width)`, C-contiguous: float32, or the bits of bfloat16 as int16 (numpy has no bfloat16). Importing this does not import torch:
the driver and the queue do without.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from raysae.config import StreamConfig, UserError
from raysae.stream.spec import ActivationSpec

if TYPE_CHECKING:
    import torch


WIRE_DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<i2")}


# Blocks out of an object store are read-only, and so must be the tensors over them; torch cannot express that and warns.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


def rows_per_block(width: int, dtype: str, block_mib: float) -> int:
    """Rows of a full block of at most `block_mib` MiB; a row wider than that is a block of its own."""
    return max(1, int(block_mib * 2**20) // (width * WIRE_DTYPES[dtype].itemsize))


def blocks_per_shard(spec: ActivationSpec, width: int, block_mib: float) -> int:
    """Blocks of a shard at a hook point of this width; all are full but the last, which may be short."""
    return -(-spec.rows_per_shard // rows_per_block(width, spec.dtype, block_mib))


def bytes_per_shard(spec: ActivationSpec, width: int) -> int:
    """Bytes of a shard at a hook point of this width."""
    return spec.rows_per_shard * width * WIRE_DTYPES[spec.dtype].itemsize


def cut(rows: np.ndarray, dtype: str, block_mib: float) -> list[np.ndarray]:
    """The blocks of a shard's rows `(rows_per_shard, width)`, as views: nothing is copied."""
    size = rows_per_block(rows.shape[1], dtype, block_mib)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def as_array(rows: torch.Tensor) -> np.ndarray:
    """A CPU tensor in the wire format, without a copy."""
    import torch

    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def as_tensor(block: np.ndarray, dtype: str) -> torch.Tensor:
    """A block as a tensor over the same memory. Where the block is read-only, writing to the tensor is undefined."""
    import torch

    tensor = torch.from_numpy(block)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def shards_in_flight(stream: StreamConfig, spec: ActivationSpec, widths: Mapping[str, int]) -> int:
    """How many shards, over all hook points (hook point → width), `stream.mib_in_flight` has room for, ≥ 1.

    With room for one, production and consumption alternate; from two on they overlap.

    Raises:
        UserError: not even one.
    """
    mib = _shard_bytes(spec, widths) / 2**20
    cap = int(stream.mib_in_flight // mib)
    if cap < 1:
        raise UserError(
            f"stream.mib_in_flight is {stream.mib_in_flight:g} but one shard of {spec.shard_contexts} contexts at {len(widths)} "
            f"hook point{'s' * (len(widths) > 1)} takes {mib:.1f} MiB: set it to {math.ceil(mib)} at least, {math.ceil(2 * mib)} to let production "
            "and training overlap."
        )
    return cap


def _shard_bytes(spec: ActivationSpec, widths: Mapping[str, int]) -> int:
    """Bytes of a shard over all hook points."""
    return spec.rows_per_shard * sum(widths.values()) * (2 if spec.dtype == "bfloat16" else 4)
