"""Files that appear whole or not at all, and JSON that proves itself.

They may be in local folders, or wherever fsspec can write (s3://…).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from raysae.config import UserError

PARTIAL = ".partial"  # Ending of a file that is being written
SEAL = "sha256"  # Key of a JSON file's own checksum


def open_location(field: str, location: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it.

    Raises:
        UserError: there is no such kind of storage here. The message names the config's `field`.
    """
    try:
        return fsspec.core.url_to_fs(os.path.expanduser(location))
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{field} is '{location}', which cannot be opened ({error}): name a folder or an s3:// URL"
        ) from error


def sealed(content: dict) -> bytes:
    """`content` as JSON that includes its own checksum."""
    return json.dumps({**content, SEAL: _checksum(content)}).encode()


def unsealed(data: bytes, path: str) -> dict:
    """The content that was `sealed`.

    Raises:
        UserError: it is damaged. The message names `path`.
    """
    try:
        content = json.loads(data)
        if content.pop(SEAL) == _checksum(content):
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{path} is damaged: its SHA-256 is not the one in it")


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_atomically(
    files: fsspec.AbstractFileSystem, path: str, content: bytes, kept: str = "nothing there has changed"
) -> None:
    """Write so that after a crash the file is absent or whole.

    Locally it writes a temporary file, syncs it, renames it, and syncs the folder. Object stores put atomically.

    Raises:
        UserError: the storage takes no more, whatever the reason. The message says with `kept` what is still there.
    """
    try:
        folder = path.rpartition("/")[0]
        files.makedirs(folder, exist_ok=True)
        if isinstance(files, LocalFileSystem):
            _write_locally(folder, path, content)
        else:
            files.pipe_file(path, content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written ({reason}): {kept}. Make room or mend it, then go on with --resume."
        ) from error


def _write_locally(folder: str, path: str, content: bytes) -> None:
    temporary = f"{folder}/.{path.rpartition('/')[2]}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- files


def file_system(where: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a file or folder, local or at a URL, and its path there.

    Raises:
        UserError: nothing there, no such kind of storage, or storage that cannot be reached.
    """
    files, path = open_location("sae", where)
    try:
        there = files.exists(path)
    except Exception as error:  # every kind of storage has errors of its own
        raise UserError(
            f"{where} cannot be reached ({' '.join(str(error).split())[:200]}): name a folder, file or URL that can be"
        ) from error
    if not there:
        raise UserError(f"{where}: there is no such file or folder")
    return files, path
