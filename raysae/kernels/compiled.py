"""Compiles Python loops with numba for the CPU at hand, and runs them in several threads.

A compiled loop reads each number once where plain PyTorch makes several passes over memory. The price is some seconds
of compiling. Code is kept in files, so that only the first process on a machine pays it.
"""

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

# Value of `fastmath`: the freedom that the compiler needs to vectorise sums.
SUMS = {"reassoc", "contract", "nsz"}
_pool = ThreadPoolExecutor()
COMPILED = (torch.float32, torch.float64)  # Dtypes that compiled loops take, on a CPU


@functools.cache
def _folder() -> Path | None:
    """The folder of compiled code, or None where no such folder can be written.

    It lies in numba's own cache folder where one is set. Otherwise it lies beside this module, or in the user's caches.

    numba compiles a function anew when its file changes. It does not when the file of a function called from it
    changes. So each state of all files here has a folder of its own.
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
    """Compiles `function` at its first call, which takes a few seconds. `options` go to `numba.njit`.

    The code is kept in a file for the next process, if there is a folder for it.
    """
    if function is None:
        return functools.partial(compiled, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    before, folder = numba.config.CACHE_DIR, _folder()
    numba.config.CACHE_DIR = str(folder or before)
    try:
        return numba.njit(cache=folder is not None, **options)(function)
    finally:
        numba.config.CACHE_DIR = before  # Other users of numba keep their folder


def in_parts(function: Callable, length: int, unit: int, *arguments: object) -> list:
    """Calls function(*arguments, first, last) on ranges of 0 … length, one for each of torch's threads.

    A range is a whole number of units. The last one may end within a unit.

    Returns:
        The results, in the order of the ranges. There are fewer than threads if there are fewer units.
    """
    share = unit * max(1, math.ceil(length / unit / torch.get_num_threads()))
    parts = list(itertools.pairwise([*range(0, length, share), length]))
    running = [_pool.submit(function, *arguments, *part) for part in parts[1:]]
    return [function(*arguments, *part) for part in parts[:1]] + [future.result() for future in running]
