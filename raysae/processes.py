"""What every process needs: exit code, environment, niceness, and a function call in a process of its own."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # Exit code of a job that Ctrl-C or SIGTERM ended
# Environment of Ray's processes. OpenMP threads that spin at barriers slow down every process of a shared machine,
# 15-fold where there are more threads than cores. glibc gives each thread an arena of its own. A large tensor leaves
# more unusable room in many arenas than in one, 50 MiB in a trainer.
ENVIRONMENT = {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "1"}}
NICENESS = 10  # Niceness of producers on CPUs. Trainers come first: shards made ahead of need only wait in memory.


def apart(function: Callable, *arguments: Any) -> Any:
    """Call `function(*arguments)` in a process of its own, and return or raise what it does.

    What the function imports and leaves allocated ends with that process. Arguments, result and exception must pickle.
    """
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn")
    ) as pool:  # A fork may not work: this process may have threads
        return pool.submit(function, *arguments).result()


def command(*words: str | Path) -> str:
    """A line for the user to paste into a shell: this Python with `words`, called from the present folder."""
    return shlex.join([_from_here(sys.executable), *map(str, words)])


def job_script(name: str) -> str:
    """The script of `jobs/` called `name`, as a word of `command`."""
    return _from_here(Path(__file__).parents[1] / "jobs" / name)


def _from_here(path: str | Path) -> str:
    """A path, relative to the present folder where it lies below it."""
    return str(Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else path)


def threads() -> set[int]:
    """The system's ids of this process's threads. Empty where the system does not tell them."""
    return set(map(int, os.listdir("/proc/self/task"))) if os.path.isdir("/proc/self/task") else set()


def be_nice(others: set[int]) -> None:
    """Lower the priority of this thread and of all threads that are not in `others`.

    With `others` from before PyTorch's import, PyTorch's threads are nice.
    """
    for thread in threads() - others | {threading.get_native_id()}:
        with suppress(ProcessLookupError):  # The thread has ended
            os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
