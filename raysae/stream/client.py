"""A consumer's end of the queue: it joins, fetches and acknowledges.

It goes on by itself when the queue, or a machine that stored blocks, has died.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, ObjectLostError

from raysae.config import FaultsConfig
from raysae.determinism import Seen, together
from raysae.stream.queue import EVALUATION, TRAIN, patiently
from raysae.stream.reader import BatchReader
from raysae.stream.spec import ActivationSpec
from raysae.stream.state import Life, NotJoinedError, StreamError


@dataclass(eq=False)
class _Reading:
    """A reader's part of the stream, from `open` to its end."""

    life: Life
    done: int  # Shards completely consumed
    until: int | None
    # References by (shard, block), kept until the shard is consumed. Two threads may fetch the same block: the one that
    # reads ahead, and one that wants the first rows. A process may drop its last reference to an object while another
    # thread receives one. Then that thread may never get the object (Ray 2.60).
    refs: dict[tuple[int, int], ray.ObjectRef] = field(default_factory=dict)

    def forget(self, which: Callable[[int], bool]) -> None:
        """Drop the references to the shards that `which` picks. Other threads may add some meanwhile."""
        for place in list(self.refs):
            if which(place[0]):
                self.refs.pop(place, None)


class StreamClient:
    """Reads one hook point of a stream under the name `consumer`.

    Args:
        queue: handle of the queue, as `queue.start_stream` returns it, or of a relay.
        consumer: name of this consumer in the queue.
        hook_point: the hook point to read.
        training: spec of the training stream.
        width: width of the activations at the hook point.
        block_mib: size of the stream's blocks in MiB.
        faults: timeouts and limits. Unset: the defaults.
    """

    def __init__(
        self,
        queue: ActorHandle,
        consumer: str,
        hook_point: str,
        training: ActivationSpec,
        width: int,
        block_mib: float,
        faults: FaultsConfig | None = None,
    ):
        self.queue = queue
        self.consumer = consumer
        self.hook_point = hook_point
        self.training = training
        self.width = width
        self.block_mib = block_mib
        self.faults = faults or FaultsConfig()
        self.numerics: Seen = {}  # Numerics of the producers of the blocks read since `open`
        self._process: int | None = None  # Our number, see `Life`
        self._readings = 0
        self._reading: _Reading | None = None  # Set while a reader is open

    def open(self, row: int, batch: int, end: int | None = None, device: torch.device | str = "cpu") -> BatchReader:
        """Join the training stream at `row` and return a reader of its batches up to row `end`.

        Only one reader may be open at a time. Closing it leaves the stream.

        Raises:
            SupersededError: a later process reads under our name.
        """
        reading = self._begin(row, end)
        return BatchReader(
            partial(self._block, reading), self.training, self.width, self.block_mib, batch, row,
            end=end, acknowledge=partial(self._acknowledge, reading), release=self.leave, device=device,
        )  # fmt: skip

    def leave(self) -> None:
        """Tell the queue that the open reader, if there is one, needs nothing more. Others no longer wait for it."""
        reading, self._reading = self._reading, None
        if reading is not None:
            self.queue.leave.remote(reading.life)

    def block(self, shard: int, block: int) -> np.ndarray | None:
        """Wait for a block of the training stream. A reader must be open.

        The block is `(rows, width)`, read-only, and lies in the object store's memory. It is None if the shard is
        skipped.

        Raises:
            SupersededError: a later process reads under our name.
            StreamError: the queue cannot give the block and says why, it could not be read, or the reader was closed.
        """
        if (reading := self._reading) is None:
            raise StreamError(f"consumer {self.consumer} has left the stream")
        return self._block(reading, shard, block)

    def _block(self, reading: _Reading, shard: int, block: int) -> np.ndarray | None:
        refs = reading.refs

        def open_still() -> bool:
            return self._reading is reading

        def fetch() -> ray.ObjectRef | None:
            if (ref := refs.get((shard, block))) is not None:
                return ref
            try:
                found, numerics = ray.get(self.queue.fetch.remote(reading.life, shard, block, reading.done))
            except NotJoinedError:
                if not open_still():
                    raise StreamError(f"consumer {self.consumer} has left the stream") from None
                self._join(reading)  # The queue was restarted. `patiently` then fetches again
                if not open_still():  # We left while joining. A queue that was restarted since does not know it
                    self.queue.leave.remote(reading.life)
                raise
            if open_still():
                self.numerics = together(self.numerics, {key: [value] for key, value in numerics.items()})
            for i, ref in enumerate(found):
                refs.setdefault((shard, block + i), ref)
            return found[0] if found else None

        return self._get(TRAIN, shard, block, fetch, lambda: reading.forget(lambda other: other == shard), open_still)

    def evaluation_block(self, shard: int, block: int) -> np.ndarray | None:
        """Wait for a block of the held-out stream. It is like the result of `block`."""

        def fetch() -> ray.ObjectRef | None:
            return ray.get(self.queue.evaluation_block.remote(self.hook_point, shard, block))[0]

        return self._get(EVALUATION, shard, block, fetch)

    def _begin(self, row: int, end: int | None) -> _Reading:
        """Join the training stream in a new life."""
        if self._process is None:
            self._process = self._patiently(lambda: ray.get(self.queue.new_process.remote()))
        self._readings += 1
        self.numerics = {}
        self._reading = reading = _Reading(
            Life(self.consumer, self._process, self._readings),
            done=row // self.training.rows_per_shard,
            until=None if end is None else -(-end // self.training.rows_per_shard),
        )
        self._patiently(lambda: self._join(reading))
        return reading

    def _join(self, reading: _Reading) -> None:
        row = reading.done * self.training.rows_per_shard
        ray.get(self.queue.join.remote(reading.life, self.hook_point, row, reading.until))

    def _acknowledge(self, reading: _Reading, done: int) -> None:
        reading.done = done
        reading.forget(lambda shard: shard < done)
        self.queue.acknowledge.remote(reading.life, done)

    def _get(
        self,
        stream: str,
        shard: int,
        block: int,
        fetch: Callable[[], ray.ObjectRef | None],
        forget: Callable[[], None] = lambda: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> np.ndarray | None:
        for attempt in range(self.faults.shard_attempts):
            ref = patiently(fetch, self.faults.queue_seconds, wanted)
            try:
                # The block may only be slow to come, so the limit doubles with each attempt.
                return None if ref is None else ray.get(ref, timeout=self.faults.block_seconds * 2**attempt)
            except (ObjectLostError, GetTimeoutError) as error:
                if not wanted():
                    raise
                why = f"{type(error).__name__} {self.faults.shard_attempts} times, see faults.block_seconds"
                forget()
                lost = ref.hex()
                # The lambda is called at once, so it sees this `lost`.
                self._patiently(lambda: ray.get(self.queue.lost.remote(stream, shard, lost)))  # noqa: B023
        raise StreamError(
            f"block {block} of shard {shard} of the {stream} stream could not be read by {self.consumer}: {why}"
        )

    def _patiently(self, call: Callable[[], Any]) -> Any:
        return patiently(call, self.faults.queue_seconds)
