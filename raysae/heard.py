"""What actors have to say: their warnings go to files of Ray's, where nobody looks, so the driver asks for them and shows them."""

from __future__ import annotations

import logging
from collections import deque

import ray

KEPT = 100  # lines at most, until they are taken


class Heard(logging.Handler):
    """The warnings of raysae in this actor's process, from now on; the first one, where it is so, that Ray has restarted the actor."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=KEPT)
        logging.getLogger("raysae").addHandler(self)
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._lines.append("its process had ended, and was restarted")

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> list[str]:
        """Those that have not been taken yet."""
        return [self._lines.popleft() for _ in range(len(self._lines))]
