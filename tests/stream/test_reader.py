"""BatchReader against the plain concatenation of all rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysae.stream.blocks import as_array, cut
from raysae.stream.reader import BatchReader
from raysae.stream.spec import ActivationSpec


def a_spec(rows_per_context: int, contexts: int, shards: int, dtype: str = "float32") -> ActivationSpec:
    return ActivationSpec(
        model="m", text="t", contexts=contexts * shards, context_length=rows_per_context + 3, skip_positions=3,
        dtype=dtype, seed=0, epochs=1, shard_contexts=contexts, batch_contexts=contexts,
    )  # fmt: skip


class FakeStream:
    """All rows of a stream, and its blocks as a producer would cut them."""

    def __init__(self, spec: ActivationSpec, width: int, block_rows: int):
        self.spec = spec
        self.item = 2 if spec.dtype == "bfloat16" else 4
        self.block_mib = block_rows * width * self.item / 2**20
        rows = torch.randn(spec.rows, width, generator=torch.Generator().manual_seed(1))
        self.rows = rows.bfloat16().float() if spec.dtype == "bfloat16" else rows
        typed = rows.bfloat16() if spec.dtype == "bfloat16" else rows
        self.blocks = [cut(as_array(shard), spec.dtype, self.block_mib) for shard in typed.split(spec.rows_per_shard)]
        self.asked: list[tuple[int, int]] = []

    def fetch(self, shard: int, block: int) -> np.ndarray:
        self.asked.append((shard, block))
        array = self.blocks[shard][block].copy()
        array.flags.writeable = False  # Arrays from an object store are read-only
        return array


@given(
    rows_per_context=st.integers(1, 5), contexts=st.integers(1, 6), shards=st.integers(1, 4),
    block_rows=st.integers(1, 40), batch=st.integers(1, 50), dtype=st.sampled_from(["float32", "bfloat16"]),
    data=st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_batches_are_the_rows_in_order(rows_per_context, contexts, shards, block_rows, batch, dtype, data):
    spec = a_spec(rows_per_context, contexts, shards, dtype)
    stream = FakeStream(spec, 3, block_rows)
    first = row = data.draw(st.integers(0, spec.rows))
    end = data.draw(st.integers(row, spec.rows))
    done = []
    reader = BatchReader(stream.fetch, spec, 3, stream.block_mib, batch, row, end=end, acknowledge=done.append)
    while row + batch <= end:
        assert reader.row == row
        x = reader.next()
        assert x.dtype == torch.float32
        assert torch.equal(x, stream.rows[row : row + batch])
        row += batch
    with pytest.raises(EOFError):
        reader.next()
    assert reader.row == row
    started = first // spec.rows_per_shard
    assert done == list(range(started + 1, row // spec.rows_per_shard + 1))
    reader.close()


@given(
    batch=st.integers(1, 30),
    block_rows=st.integers(1, 30),
    seeks=st.lists(st.integers(0, 96), min_size=1, max_size=5),
    steps=st.integers(0, 4),
)
@settings(max_examples=100, deadline=None)
def test_seek_to_any_row(batch, block_rows, seeks, steps):
    spec = a_spec(4, 6, 4)
    stream = FakeStream(spec, 2, block_rows)
    reader = BatchReader(stream.fetch, spec, 2, stream.block_mib, batch)
    for row in seeks:
        reader.seek(row)
        for _ in range(min(steps, (spec.rows - row) // batch)):
            assert torch.equal(reader.next(), stream.rows[row : row + batch])
            row += batch


@given(
    rows_per_context=st.integers(1, 5), contexts=st.integers(1, 6), shards=st.integers(1, 5),
    block_rows=st.integers(1, 40), batch=st.integers(1, 50), skipped=st.sets(st.integers(0, 4)), data=st.data(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_skipped_shards_take_away_the_batches_they_touch_and_nothing_else(
    rows_per_context, contexts, shards, block_rows, batch, skipped, data
):
    spec = a_spec(rows_per_context, contexts, shards)
    stream = FakeStream(spec, 3, block_rows)
    row = first = data.draw(st.integers(0, spec.rows))
    done = []

    def fetch(shard: int, block: int) -> np.ndarray | None:
        return None if shard in skipped else stream.fetch(shard, block)

    reader = BatchReader(fetch, spec, 3, stream.block_mib, batch, row, acknowledge=done.append)
    while row + batch <= spec.rows:
        touched = {r // spec.rows_per_shard for r in range(row, row + batch)}
        x = reader.next()
        row += batch
        assert reader.row == row
        assert (x is None) == bool(touched & skipped)
        assert x is None or torch.equal(x, stream.rows[row - batch : row])
    assert done == list(range(first // spec.rows_per_shard + 1, row // spec.rows_per_shard + 1))
    reader.close()


def test_each_block_is_fetched_once_and_none_beyond_the_end():
    spec = a_spec(4, 6, 4)  # 24 rows per shard
    stream = FakeStream(spec, 2, 10)  # Blocks of 10, 10 and 4 rows
    reader = BatchReader(stream.fetch, spec, 2, stream.block_mib, 6, end=48)
    for _ in range(8):
        reader.next()
    assert stream.asked == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_the_next_block_comes_while_this_one_is_read():
    spec = a_spec(4, 6, 1)
    stream = FakeStream(spec, 2, 8)
    asked = {block: threading.Event() for block in range(3)}

    def fetch(shard, block):
        asked[block].set()
        return stream.fetch(shard, block)

    reader = BatchReader(fetch, spec, 2, stream.block_mib, 4)
    assert asked[0].wait(5)
    reader.next()
    assert asked[1].wait(5)
    assert not asked[2].is_set()


def test_waiting_is_counted_and_two_batches_live_at_once():
    spec = a_spec(4, 6, 1)
    stream = FakeStream(spec, 2, 24)
    release = threading.Event()
    threading.Timer(0.2, release.set).start()

    def fetch(shard, block):
        release.wait()
        return stream.fetch(shard, block)

    reader = BatchReader(fetch, spec, 2, stream.block_mib, 4)
    first, second = reader.next(), reader.next()
    assert 0.1 < reader.waited_seconds < 5
    assert torch.equal(first, stream.rows[:4])
    assert torch.equal(second, stream.rows[4:8])
    assert reader.next() is first


def test_errors_of_fetch_are_raised_by_next():
    spec = a_spec(4, 6, 2)
    stream = FakeStream(spec, 2, 24)

    def fetch(shard, block):
        if shard == 1:
            raise RuntimeError("shard 1 is gone")
        return stream.fetch(shard, block)

    reader = BatchReader(fetch, spec, 2, stream.block_mib, 16)
    reader.next()
    with pytest.raises(RuntimeError, match="shard 1 is gone"):
        reader.next()
    assert reader.row == 16


def test_a_shard_is_acknowledged_before_the_next_is_awaited():
    """The stream has room for one shard. It produces the next one only after the acknowledgement."""
    spec = a_spec(4, 6, 3)
    stream = FakeStream(spec, 2, 10)
    done = [0]
    changed = threading.Condition()

    def acknowledge(shards):
        with changed:
            done[0] = shards
            changed.notify_all()

    def fetch(shard, block):
        with changed:
            assert changed.wait_for(lambda: done[0] >= shard, timeout=5), "deadlock"
        return stream.fetch(shard, block)

    reader = BatchReader(fetch, spec, 2, stream.block_mib, 9, acknowledge=acknowledge)
    for row in range(0, 72, 9):
        assert torch.equal(reader.next(), stream.rows[row : row + 9])


def test_a_block_of_another_size_is_refused():
    spec = a_spec(4, 6, 1)
    stream = FakeStream(spec, 2, 8)
    reader = BatchReader(stream.fetch, spec, 2, 2 * stream.block_mib, 4)
    with pytest.raises(ValueError, match="block 0 of shard 0 has 8 rows instead of 16"):
        reader.next()


def test_rows_outside_the_stream_are_refused():
    spec = a_spec(4, 6, 1)
    stream = FakeStream(spec, 2, 8)
    with pytest.raises(ValueError, match="row 25"):
        BatchReader(stream.fetch, spec, 2, stream.block_mib, 4, row=25)
