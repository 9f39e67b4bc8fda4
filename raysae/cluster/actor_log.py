"""What actors have to say.

Ray writes their warnings to files where nobody looks. So the driver asks for them and shows them.
"""

from __future__ import annotations

import logging
from collections import deque

import ray

KEPT = 100  # Lines kept at most, until they are taken


class Heard(logging.Handler):
    """The warnings of raysae in this actor's process, from now on.

    If Ray has restarted the actor, the first one says so.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=KEPT)
        logging.getLogger("raysae").addHandler(self)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._lines.append("its process had ended, and was restarted")

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info and record.exc_info[1]
        self._lines.append(f"{record.getMessage()}: {one_line(error)}" if error else record.getMessage())

    def take(self) -> list[str]:
        """The warnings that have not been taken yet."""
        return [self._lines.popleft() for _ in range(len(self._lines))]


def one_line(error: BaseException) -> str:
    """An error in one line. Ray's messages may hold whole stack traces, whose last line is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1] if any(line.startswith('File "') for line in lines) else f"{type(error).__name__}: {lines[0]}"
