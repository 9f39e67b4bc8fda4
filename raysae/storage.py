"""Paths and lists of paths, files that appear whole or not at all, and JSON that proves itself.

Files may be in local folders, or wherever fsspec can write (s3://…).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import uuid
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from raysae.borders import border, reason
from raysae.config import UserError

PARTIAL = ".partial"  # Ending of a file that is being written
SEAL = "sha256"  # Key of a JSON file's own checksum
LONGEST_NAME = 200  # Characters of a file's name. File systems take 255 bytes.


# ---------------------------------------------------------------- names of files and folders


def local_path(field: str, text: str) -> Path:
    """The path that a user wrote, with `~` replaced by the home folder.

    Raises:
        UserError: it begins with `~`, and there is no such home folder. The message names the config's `field`.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{field} is {text}, and there is no such home folder: set HOME, or name a folder") from error


def open_location(field: str, location: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a folder or URL, and the path in it. A text without `://` is a local path, whatever it holds.

    Raises:
        UserError: there is no such kind of storage here. The message names the config's `field`.
    """
    if "://" not in location:
        return LocalFileSystem(), os.path.abspath(local_path(field, location))
    with border(field, f"'{location}'", "which cannot be opened", "name a folder or an s3:// URL"):
        return fsspec.core.url_to_fs(location)


def check_folder(field: str, value: str, folder: Path) -> None:
    """Check that a folder can be made and written. It need not be there.

    Raises:
        UserError: it cannot. The message names the config's `field` with its `value`.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "read-only" if there.is_dir() else "a file"
        raise UserError(f"{field} is {value}, which cannot be written: {there} is {why}")


def is_there(location: str) -> bool:
    """Whether there is a file or folder at a path or URL. What cannot be reached is not there."""
    try:
        files, path = open_location("output", location)
        return files.exists(path)
    except Exception:  # Every kind of storage has errors of its own
        return False


def inside(files: AbstractFileSystem, folder: str, pattern: str) -> list[str]:
    """Paths in `folder` that match `pattern`. Brackets and stars in the name of the folder stand for themselves."""
    return sorted(files.glob(f"{glob.escape(folder)}/{pattern}"))


def is_name(text: str) -> bool:
    """Whether `text` is safe as the name of a file or folder: no separators, no leading dot, no other surprises."""
    return len(text) <= LONGEST_NAME and re.fullmatch(r"\w[\w.+-]*", text) is not None


def patterns(text: str) -> list[str]:
    """The glob patterns of a list of files, folders and globs, separated by commas.

    A name that exists stands for itself, with its commas and brackets. In the patterns returned, such characters are
    in brackets: `a,b[1]` becomes `a[,]b[[]1]`. So the patterns, joined by commas, are a list of the same files.
    """
    if os.path.lexists(os.path.expanduser(text)):
        return [_pattern(text)]
    entries = []
    parts = re.findall(r"(?:\[[^]]+\]|[^,])+", text)  # Commas in brackets separate nothing
    while parts:
        joined = (_pattern(",".join(parts[:count]).strip()) for count in range(1, len(parts) + 1))
        matching = (at for at in enumerate(joined, 1) if any(True for _ in glob.iglob(at[1], recursive=True)))
        count, entry = next(matching, (1, _pattern(parts[0].strip())))
        entries.append(entry)
        del parts[:count]
    return [entry for entry in entries if entry]


def named(pattern: str) -> Path | None:
    """The one file or folder that a pattern of `patterns` stands for, or None where there is no such one."""
    path = _unquoted(pattern)
    return Path(path) if os.path.lexists(path) else None


def quoted(path: str) -> str:
    """The pattern of `patterns` that stands for this path alone."""
    return re.sub(r"([,*?[])", r"[\1]", path)


def _unquoted(pattern: str) -> str:
    return re.sub(r"\[([,*?[])\]", r"\1", pattern)


def _pattern(text: str) -> str:
    """A glob with its first folders quoted, as far as they exist."""
    folder, parts = Path(), Path(os.path.expanduser(text)).parts
    for number, part in enumerate(parts):
        there = next((name for name in (part, _unquoted(part)) if os.path.lexists(folder / name)), None)
        if there is None:
            return str(Path(quoted(str(folder)), *parts[number:]))
        folder /= there
    return quoted(str(folder)) if parts else ""


# ---------------------------------------------------------------- content


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
    except Exception as error:  # Every kind of storage has errors of its own
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(
            f"{path} cannot be written ({why}): {kept}. Make room or mend it, then go on with --resume."
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
    with border("sae", where, "which cannot be reached", "name a folder, file or URL that can be"):
        if files.exists(path):
            return files, path
    raise UserError(f"{where}: there is no such file or folder")
