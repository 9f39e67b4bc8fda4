"""A function call in a process of its own: what it imports and leaves allocated ends with it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def apart(function: Callable, *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises; all of these must pickle. Interrupted, it ends the process."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "raysae.apart"],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"the process for {function.__name__} ended with status {done.returncode}")
    result, error = pickle.loads(done.stdout)
    if error is not None:
        raise error
    return result


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is interrupted too, and ends this process
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed meanwhile is no part of the answer
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        outcome = function(*arguments), None
    except Exception as error:
        outcome = None, error
    with os.fdopen(answer, "wb") as file:
        pickle.dump(outcome, file)


if __name__ == "__main__":
    _main()
