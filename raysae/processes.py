"""A function call in a process of its own: what it imports and leaves allocated ends with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

INTERRUPTED = 130
# OpenMP threads that spin at barriers slow every process of a shared machine down, 15-fold where there are more of them than cores. glibc gives
# threads arenas of their own, in which a large tensor leaves more unusable room than in one: 50 MiB in a trainer.
ENVIRONMENT = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}}
NICENESS = 10  # on CPU, trainers come first: shards made ahead of need only wait in memory


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises; all of these must pickle."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # not forked: this process may have threads
        return pool.submit(function, *arguments).result()


def command(words: str) -> str:
    """How to call this Python with `words` from the present folder: to be pasted."""
    interpreter = Path(sys.executable)
    return f"{interpreter.relative_to(Path.cwd()) if interpreter.is_relative_to(Path.cwd()) else interpreter} {words}"


def threads() -> set[int]:
    """The system's ids of this process's threads, where it tells them."""
    return set(map(int, os.listdir("/proc/self/task"))) if os.path.isdir("/proc/self/task") else set()


def be_nice(others: set[int]) -> None:
    """This thread is, and all others of the process but the ones in `others`: those that PyTorch has started since are."""
    for thread in threads() - others | {threading.get_native_id()}:
        with suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
