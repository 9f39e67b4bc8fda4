"""A function call in a process of its own: what it imports and leaves allocated ends with it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises; all of these must pickle."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # not forked: this process may have threads
        return pool.submit(function, *arguments).result()
