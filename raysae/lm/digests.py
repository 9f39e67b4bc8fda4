"""Digests of a language model's files. That of a large file takes minutes, so it is kept in the user's caches."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from raysae.config import UserError
from raysae.storage import write_atomically

LARGE = 1 << 30  # Bytes from which on a file's digest is kept
KEPT = "~/.cache/raysae/digests"  # Folder of the digests of large files
CHUNK = 1 << 24  # Bytes read at a time
TOLD_SECONDS = 5.0  # Time between two lines on how far a digest is
SETTLED = 2 * 10**9  # Nanoseconds after which a change no longer hides behind the same time stamp


def file_digest(path: Path) -> str:
    """SHA-256 of a file's whole content, so that machines with copies of their own agree."""
    if path.stat().st_size > LARGE:
        return _large(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _large(path: Path) -> str:
    """The digest of a large file: the one kept for its path, size and time stamps, or else a new one."""
    facts = _facts(path)
    kept = Path(os.path.expanduser(KEPT), hashlib.sha256(repr(facts).encode()).hexdigest())
    with suppress(OSError):
        if re.fullmatch("[0-9a-f]{64}", found := kept.read_text()):
            return found
    began = time.time_ns()
    found = _hashed(path)
    settled = began - max(facts[2:]) > SETTLED and _facts(path) == facts
    if settled and kept.is_absolute():  # Without a home folder there are no caches
        with suppress(UserError):  # Caches that cannot be written are done without
            write_atomically(LocalFileSystem(), str(kept), found.encode())
    return found


def _facts(path: Path) -> tuple[str, int, int, int]:
    """Path, size, and times of the last changes of content and of anything else. The last one cannot be set back."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _hashed(path: Path) -> str:
    """SHA-256 of a file. Where it takes longer than some seconds, stderr tells how far it is."""
    whole, done, told = path.stat().st_size, 0, time.monotonic()
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            content.update(chunk)
            done += len(chunk)
            if time.monotonic() > told + TOLD_SECONDS:
                told = time.monotonic()
                print(f"Digest of {path}: {done / 2**30:.1f} of {whole / 2**30:.1f} GiB", file=sys.stderr, flush=True)
    return content.hexdigest()
