"""A function call in a process of its own. What it imports and leaves allocated ends with the process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises. All of these must pickle."""
    # Spawn, because this process may have threads, which a fork would break.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
