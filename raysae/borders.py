"""Where a user's input meets a library, any error becomes one sentence.

Libraries raise errors of every class at a name, file or address that they cannot use. Their tracebacks tell a user
little, so they go to a file that the sentence names.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from raysae.config import UserError

LONGEST_REASON = 200  # Characters of a library's message that a sentence repeats


@contextmanager
def border(field: str, value: object, fault: str, instead: str = "") -> Iterator[None]:
    """Turn any error raised inside into a UserError: `FIELD is VALUE, FAULT (REASON): INSTEAD. The traceback is in …`.

    A UserError passes as it is. So do Ctrl-C and exits, which are no errors.

    Args:
        field: the knob or flag that the input came from, such as `model.name`.
        value: the input.
        fault: what is wrong with it, such as `which cannot be opened`.
        instead: what would be right. Empty where the fault says so.

    Raises:
        UserError: something failed inside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        right = f": {instead}" if instead else ""
        raise UserError(f"{field} is {value}, {fault} ({reason(error)}){right}{_traceback_kept(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the name of its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:LONGEST_REASON]


def _traceback_kept(error: Exception) -> str:
    """Write the traceback to a file of its own. The sentence that names it, empty where no file can be written."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="raysae-", suffix=".log", delete=False, encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return ""
    return f". The traceback is in {file.name}"
