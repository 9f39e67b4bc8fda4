"""Loops that numba compiles for the CPU at hand, and runs in several threads."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import torch

SUMS = {"reassoc", "contract", "nsz"}  # as `fastmath`: what the compiler may do so that sums are vectorised
_pool = ThreadPoolExecutor()

# numba compiles anew when the file of a function changes, and would not when that of a function called from it does: a folder for each state of all
_state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:16]
numba.config.CACHE_DIR = os.path.join(numba.config.CACHE_DIR or Path(__file__).parent / "__pycache__", f"numba-{_state}")


def compiled(function: Callable | None = None, **options: object) -> Callable:
    """Compiled at its first call, for a few seconds, and kept in a file for the next process, where there is a place for that."""
    if function is None:
        return functools.partial(compiled, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(**options)(function)


def in_parts(function: Callable, length: int, unit: int, *arguments: object) -> list:
    """The results of function(*arguments, first, last) for parts of 0 … length, whole units but for the last: one for each of torch's threads."""
    share = unit * max(1, math.ceil(length / unit / torch.get_num_threads()))
    parts = list(itertools.pairwise([*range(0, length, share), length]))
    running = [_pool.submit(function, *arguments, *part) for part in parts[1:]]
    return [function(*arguments, *part) for part in parts[:1]] + [future.result() for future in running]
