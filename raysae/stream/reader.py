"""A consumer's view of the stream at one hook point: batches of rows in order, from any row on.

This module knows nothing of Ray. A position is one number, the global row. Batches may straddle blocks and shards. The
reader copies the rows of a batch once, out of their blocks into one of two reused buffers. Meanwhile a background
thread fetches the next block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raysae.stream.blocks import as_tensor, rows_per_block
from raysae.stream.spec import ActivationSpec


@dataclass(eq=False)
class _Fetch:
    """A block on its way, in a thread of its own.

    The thread is a daemon, so that a block that never comes keeps no process alive.
    """

    shard: int
    block: int
    array: np.ndarray | None = None  # None while it is under way, or if it is skipped
    error: BaseException | None = None
    arrived: threading.Event = field(default_factory=threading.Event)

    def start(self, fetch: Callable[[int, int], np.ndarray | None]) -> _Fetch:
        def work() -> None:
            try:
                self.array = fetch(self.shard, self.block)
            except BaseException as error:
                self.error = error
            self.arrived.set()

        threading.Thread(target=work, name=f"fetch {self.shard}/{self.block}", daemon=True).start()
        return self

    def result(self) -> np.ndarray | None:
        self.arrived.wait()
        if self.error is not None:
            raise self.error
        return self.array


class BatchReader:
    """Batches `(batch, width)`, float32 on `device`, of the rows row, row + 1, … up to `end`.

    Args:
        fetch: `fetch(shard, block)` waits for a block. It returns `(rows, width)` numpy in the wire format of
            `blocks.py`, or None if the shard is skipped. Background threads call it for the blocks in order, for none
            beyond row `end`.
        spec: spec of the stream that is read.
        width: width of the activations.
        block_mib: size of the stream's blocks in MiB.
        batch: rows per batch.
        row: the first row.
        end: the row at which reading ends, exclusive. Unset: the stream's end.
        acknowledge: `acknowledge(done)` is called when the shards below `done` are completely consumed. That is before
            the reader waits for the next shard, which may need their place. It must not wait itself.
        release: called by `close`.
        device: where batches go.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], np.ndarray | None],
        spec: ActivationSpec,
        width: int,
        block_mib: float,
        batch: int,
        row: int = 0,
        *,
        end: int | None = None,
        acknowledge: Callable[[int], None] = lambda done: None,
        release: Callable[[], None] = lambda: None,
        device: torch.device | str = "cpu",
    ):
        self.spec = spec
        self.batch = batch
        self.end = spec.rows if end is None else min(end, spec.rows)
        self.waited_seconds = 0.0  # Seconds that `next` waited for blocks
        self._fetch = fetch
        self._acknowledge = acknowledge
        self._release = release
        self._block_rows = rows_per_block(width, spec.dtype, block_mib)
        self._buffers = [torch.empty(batch, width, device=device) for _ in range(2)]
        self._ahead: _Fetch | None = None
        self.seek(row)

    @property
    def row(self) -> int:
        """The first row of the next batch."""
        return self._row

    def seek(self, row: int) -> None:
        """Go on from `row`. A thread begins to fetch its block at once.

        Raises:
            ValueError: the row lies outside the stream.
        """
        if not 0 <= row <= self.end:
            raise ValueError(f"row {row} lies outside the rows 0 to {self.end} of the stream")
        self._row = row
        self._closed = False
        self._rows: Tensor | None = None  # The current block, (rows, width)
        self._skipped = False  # Whether the current block's shard is skipped
        self._first = self._last = 0  # The current block has the global rows [first, last)
        if row < self.end:
            self._start(row)

    def next(self) -> Tensor | None:
        """The next batch `(batch, width)`, or None if one of its rows is skipped.

        It lives in a buffer that the call after the next overwrites.

        Raises:
            EOFError: fewer than `batch` rows are left, or the reader was closed.
            Exception: whatever `fetch` raised.
        """
        if self._closed:
            raise EOFError("the reader was closed")
        row, stop = self._row, self._row + self.batch
        if stop > self.end:
            raise EOFError(f"the stream ends at row {self.end}: rows {row} to {stop} are not there")
        target, whole = self._buffers[0], True
        while row < stop:
            if row >= self._last or (self._rows is None and not self._skipped):
                self._turn_to(row)
            take = min(stop, self._last) - row
            start = row - self._first
            filled = row - self._row
            if self._skipped:
                whole = False
            else:
                target[filled : filled + take].copy_(self._rows[start : start + take])
            row += take
            if row == self._last:
                self._rows, self._skipped = None, False  # Dropping the block lets the store free it
                if row % self.spec.rows_per_shard == 0:
                    self._acknowledge(row // self.spec.rows_per_shard)
        self._row = row
        if not whole:
            return None
        self._buffers.reverse()
        return target

    def close(self) -> None:
        """Drop the blocks.

        A fetch under way ends by itself and is ignored. A `next` that waits for it in another thread raises.
        """
        self._closed = True
        if (ahead := self._ahead) is not None:
            ahead.error = ahead.error or EOFError("the reader was closed")
            ahead.arrived.set()
        self._rows = self._ahead = None
        self._release()

    def _place(self, row: int) -> tuple[int, int]:
        """(shard, block) of a global row."""
        shard, within = divmod(row, self.spec.rows_per_shard)
        return shard, within // self._block_rows

    def _start(self, row: int) -> None:
        self._ahead = _Fetch(*self._place(row)).start(self._fetch)

    def _turn_to(self, row: int) -> None:
        """Make the block of `row` the current one, and start fetching the one after it."""
        place = self._place(row)
        if self._ahead is None or (self._ahead.shard, self._ahead.block) != place:
            self._start(row)
        began = time.perf_counter()
        try:
            block = self._ahead.result()
        finally:
            self._ahead, waited = None, time.perf_counter() - began
            self.waited_seconds += waited
        shard, index = place
        shard_first = shard * self.spec.rows_per_shard
        self._first = shard_first + index * self._block_rows
        self._last = min(self._first + self._block_rows, shard_first + self.spec.rows_per_shard)
        self._skipped = block is None
        if self._skipped:
            return
        if len(block) != self._last - self._first:
            raise ValueError(
                f"block {index} of shard {shard} has {len(block)} rows instead of {self._last - self._first}"
            )
        self._rows = as_tensor(block, self.spec.dtype)
        if self._last < self.end:
            self._start(self._last)
