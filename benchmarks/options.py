"""What the scripts of this folder take on their command lines.

These are `type=` functions for argparse, so mistakes are told before any work starts. The peers' environment imports
them too, so they use the standard library alone.
"""

from __future__ import annotations

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


def _number(word: str) -> float:
    """The number in a word, or NaN where it is none."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def positive(word: str) -> float:
    number = _number(word)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{word!r} is not a number above 0")
    return number


def fraction(word: str) -> float:
    number = _number(word)
    if not 0 < number <= 1:
        raise ArgumentTypeError(f"{word!r} is not a number above 0 and at most 1")
    return number


def at_least(least: int) -> Callable[[str], int]:
    """A type for a whole number from `least` on. It is written as for the jobs: 100000, 100_000 or 1e5."""

    def whole(word: str) -> int:
        number = _number(word)
        if not (number >= least and number.is_integer()):
            raise ArgumentTypeError(f"{word!r} is not a whole number of at least {least}")
        return int(number)

    return whole


def numbers(words: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    found = []
    for word in words.split(","):
        try:
            found.append(at_least(1)(word))
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"in {words!r}, {error}: give such numbers with commas between them") from None
    if len(set(found)) < len(found):
        raise ArgumentTypeError(f"{words!r} has a number twice: give each once")
    return found


def writable(word: str) -> Path:
    """A file that can be written."""
    path = Path(word)
    if path.is_dir():
        raise ArgumentTypeError(f"{word!r} is a folder: name a file")
    if not path.parent.is_dir():
        raise ArgumentTypeError(
            f"{word!r} cannot be written, there is no folder {str(path.parent)!r}: make it first, or name another file"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{word!r} cannot be written: name a file of your own")
    return path
