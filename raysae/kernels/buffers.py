"""Reused buffers, and how many rows of a matrix to handle at a time.

Large temporaries are reused buffers: memory fresh from the system costs a page fault per 4 KiB. The price is that a
buffer's content lasts only until the next use of its name. Chunks bound memory. Small chunks make dense products slow.
The sizes below trade one for the other. Other sizes may give SAEs other bits.
"""

from __future__ import annotations

import math
import threading

from torch import Tensor

# Bytes of pre-activations in a chunk. At great widths MINIMUM_ROWS makes a chunk larger.
CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
# Fewest rows of a chunk, if MAXIMUM_BYTES has room. With fewer, the dense product waits for W_enc to come from memory.
MINIMUM_ROWS = 64
# Bytes of the largest temporary: such a chunk, gathered weights, or a dense code matrix.
MAXIMUM_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
OUTER_BYTES = 8 << 20  # Bytes of latents' rows that are summed or gathered at a time
# Bytes of a matrix that goes through several operations in turn. A CPU then finds them in its cache.
PASS_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}


class Workspace(threading.local):
    """Buffers of one autoencoder, kept between steps. Each thread has its own. A copy or a pickle starts empty."""

    def __init__(self):
        self._buffers: dict[str, Tensor] = {}
        self._parts: dict[int, Workspace] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this shape with the dtype and device of `like`.

        It holds whatever the last use of `name` left, and may share its memory with that use.
        """
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype or buffer.device != like.device:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)

    def part(self, number: int) -> Workspace:
        """A workspace within this one, for codes that are in use at the same time as others."""
        return self._parts.setdefault(number, Workspace())

    def __reduce__(self):
        return Workspace, ()


def chunk_rows(n: int, element_size: int, device: str = "cpu") -> int:
    """Rows in a chunk, where each row has `n` pre-activations of `element_size` bytes.

    It is a power of two, which makes the dense product up to a third faster.
    """
    row = n * element_size
    return power_of_two(max(1, CHUNK_BYTES[device] // row, min(MINIMUM_ROWS, MAXIMUM_BYTES[device] // row)))


def rows_of(size: int, like: Tensor) -> int:
    """How many rows like those of the matrix `like` fit into `size` bytes: at least one."""
    return max(1, size // (like.shape[1] * like.element_size()))


def power_of_two(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << number.bit_length() - 1
