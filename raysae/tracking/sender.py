"""The thread that empties an outbox into MLflow while the sweep goes on."""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from pathlib import Path
from typing import TextIO

from raysae.tracking.delivery import Delivery
from raysae.tracking.outbox import Outbox

INTERVAL = 1.0  # Seconds between looks into the outbox
LONGEST_BACKOFF = 10.0  # Seconds between tries while the server is away

log = logging.getLogger(__name__)


class Sender(threading.Thread):
    """Drains the outbox until it is stopped.

    A server that is away holds up this thread only. A lock allows one sender per outbox.
    """

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(name="raysae-tracking", daemon=True)
        self.outbox = outbox
        self._wake = threading.Event()
        self._stopping = False

    def run(self) -> None:
        lock = self._locked()
        delivery, failures = None, 0
        while lock:
            try:
                delivery = delivery or Delivery(self.outbox)
                delivery.deliver()
                failures = 0
            except Exception as error:
                # MLflow, its HTTP client and its database raise errors of many kinds. Keep the data and try again.
                delivery, failures = None, failures + 1
                if failures == 1:
                    reason = " ".join(str(error).split())[:200]
                    log.warning(
                        "nothing can be sent to MLflow now (%s). Everything is kept in %s and sent later.",
                        reason,
                        self.outbox.path,
                    )
            if self._stopping:
                break
            self._wake.wait(min(LONGEST_BACKOFF, INTERVAL * 2**failures) if failures else INTERVAL)
            self._wake.clear()
        if lock:
            lock.close()

    def flush(self, timeout: float) -> int:
        """Waits up to `timeout` seconds for the outbox to be empty. Returns what is still unsent."""
        start = nudge = time.monotonic()
        while (unsent := self.outbox.unsent()) and self.is_alive() and (now := time.monotonic()) < start + timeout:
            if now >= nudge:  # Make a sender that waits for its server try again at once, and every second
                self._wake.set()
                nudge = now + INTERVAL
            time.sleep(0.05)
        return unsent

    def stop(self, timeout: float) -> None:
        """Ends the thread after its present attempt.

        One stuck longer than `timeout` seconds is left behind, because it is a daemon.
        """
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join(timeout)

    def _locked(self) -> TextIO | None:
        """Waits for the outbox's lock. None means that the sender was stopped before the lock was free."""
        while not self._stopping:
            if lock := try_lock(self.outbox):
                return lock
            self._wake.wait(INTERVAL)
            self._wake.clear()
        return None


def try_lock(outbox: Outbox) -> TextIO | None:
    """The right to send this outbox, held until the returned file is closed.

    Returns None while another process or thread has it.
    """
    lock = Path(f"{outbox.path}.lock").open("w")  # noqa: SIM115 (stays open while the lock is held)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
