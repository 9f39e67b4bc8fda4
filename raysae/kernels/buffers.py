"""TODO docstring."""

from __future__ import annotations

import math
import threading

from torch import Tensor

CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # of pre-activations at a time …
MINIMUM_ROWS = 64  # … or more at great widths: with few rows the dense product waits for W_enc to come from memory
MAXIMUM_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
OUTER_BYTES = 8 << 20  # of rows of features that are summed, or gathered, at a time
PASS_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}  # of a matrix at a time in several operations in turn, which on a CPU find it in its cache


class Workspace(threading.local):
    """Buffers of one autoencoder, kept between steps; each thread has its own. A copy or a pickle starts empty."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this shape with the dtype and device of `like`; its content is whatever the last use of `name` left."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)

    def __reduce__(self):
        return Workspace, ()


def chunk_rows(n: int, element_size: int, device: str = "cpu") -> int:
    """Rows whose `n` pre-activations are handled at a time: a power of two, which the dense product is up to a third faster with."""
    row = n * element_size
    return power_of_two(max(1, CHUNK_BYTES[device] // row, min(MINIMUM_ROWS, MAXIMUM_BYTES[device] // row)))


def rows_of(size: int, like: Tensor) -> int:
    """How many rows as those of the matrix `like` are of `size` bytes."""
    return max(1, size // (like.shape[1] * like.element_size()))


def power_of_two(number: int) -> int:
    """The largest one that is not above `number`."""
    return 1 << number.bit_length() - 1
