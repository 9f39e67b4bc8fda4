"""Block layout and wire format."""

import warnings

import numpy as np
import pytest
import torch

from raysae.stream.blocks import as_array, as_tensor, blocks_per_shard, bytes_per_shard, cut, rows_per_block
from raysae.stream.spec import ActivationSpec

SPEC = ActivationSpec(
    model="m",
    text="t",
    contexts=600,
    context_length=128,
    skip_positions=8,
    dtype="bfloat16",
    seed=0,
    epochs=1,
    shard_contexts=256,
    batch_contexts=32,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("width", "block_mib"), [(64, 1), (64, 32), (2304, 0.5), (100, 0.37), (1000, 0.0001)])
def test_layout(dtype, width, block_mib):
    spec = SPEC.model_copy(update={"dtype": dtype})
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    rows = rows_per_block(width, dtype, block_mib)
    assert rows == 1 or rows * width * size <= block_mib * 2**20
    assert (rows + 1) * width * size > block_mib * 2**20
    shard = np.zeros((spec.rows_per_shard, width), np.int16 if size == 2 else np.float32)
    blocks = cut(shard, dtype, block_mib)
    assert len(blocks) == blocks_per_shard(spec, width, block_mib)
    assert {len(block) for block in blocks[:-1]} <= {rows}
    assert 0 < len(blocks[-1]) <= rows
    assert sum(block.nbytes for block in blocks) == bytes_per_shard(spec, [width]) == shard.nbytes
    assert all(block.flags.c_contiguous and np.shares_memory(block, shard) for block in blocks)


def test_blocks_hold_the_rows_in_order():
    rows = np.arange(100, dtype=np.float32).reshape(20, 5)
    blocks = cut(rows, "float32", 7 * 5 * 4 / 2**20)
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert np.array_equal(np.concatenate(blocks), rows)


def test_bfloat16_survives_bit_for_bit():
    # Every bfloat16 value, NaNs included
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    wire = as_array(bits.view(torch.bfloat16))
    assert wire.dtype == np.int16
    back = as_tensor(wire, "bfloat16")
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), bits)
    assert back.data_ptr() == bits.data_ptr(), "nothing is copied"


def test_float32_is_shared_and_read_only_blocks_do_not_warn():
    rows = torch.randn(4, 3)
    wire = as_array(rows)
    assert wire.dtype == np.float32
    wire.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The module sets the same filter
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        back = as_tensor(wire, "float32")
    assert torch.equal(back, rows)
    assert back.data_ptr() == rows.data_ptr()
