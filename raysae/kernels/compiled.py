"""Loops that numba compiles for the CPU at hand, and runs in several threads."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numba
import torch

SUMS = {"reassoc", "contract", "nsz"}  # as `fastmath`: what the compiler may do so that sums are vectorised
_pool = ThreadPoolExecutor()
COMPILED = (torch.float32, torch.float64)  # dtypes, on a CPU


@functools.cache
def _folder() -> Path | None:
    """Where compiled code is kept: beside this package's own, else with the user's caches; None where neither can be written.

    numba compiles anew when the file of a function changes, and would not when that of a function called from it does: so a folder for each state of
    all files.
    """
    here = Path(__file__).parent
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    for parent in filter(None, (numba.config.CACHE_DIR, here / "__pycache__", os.path.expanduser("~/.cache/raysae"))):
        folder = Path(parent, f"numba-{state}")
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


def compiled(function: Callable | None = None, **options: object) -> Callable:
    """Compiled at its first call, for a few seconds, and kept in a file for the next process, where there is a place for that."""
    if function is None:
        return functools.partial(compiled, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    before, folder = numba.config.CACHE_DIR, _folder()
    numba.config.CACHE_DIR = str(folder or before)
    try:
        return numba.njit(cache=folder is not None, **options)(function)
    finally:
        numba.config.CACHE_DIR = before  # that of others who use numba


def in_parts(function: Callable, length: int, unit: int, *arguments: object) -> list:
    """The results of function(*arguments, first, last) for parts of 0 … length, whole units but for the last: one for each of torch's threads."""
    share = unit * max(1, math.ceil(length / unit / torch.get_num_threads()))
    parts = list(itertools.pairwise([*range(0, length, share), length]))
    running = [_pool.submit(function, *arguments, *part) for part in parts[1:]]
    return [function(*arguments, *part) for part in parts[:1]] + [future.result() for future in running]
