"""The text of `--help`: every knob of a config, made from the model's fields. It imports nothing slow."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raysae.knobs import BOUNDS, fields, inner_of, kind_of

NO_BREAK = "\N{NO-BREAK SPACE}"  # Stands for a space until the lines are wrapped


def help_text(
    model: type[BaseModel], description: str, extra: Mapping[str, dict] | None = None, width: int | None = None
) -> str:
    """Every knob by section, with its meaning, default and bounds.

    Args:
        description: the job, at the head of the text.
        extra: further flags, as for `parse.parse`.
        width: columns of a line at most. None: the terminal's, between 80 and 120.
    """
    width = width or max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    program = Path(sys.argv[0]).name
    flags = [("--config FILE", "settings from a YAML file; the command line overrides them")]
    flags += [
        (f"{flag} {more['metavar']}" if "metavar" in more else flag, more.get("help", ""))
        for flag, more in (extra or {}).items()
    ]
    flags += [("--help", "this page")]
    sections: dict[str, list[tuple[str, str]]] = {"": []}
    for name, field in fields(model):
        note = f"[{'; '.join(_together(part) for part in (f'default {_default(field)}', _bounds(field)) if part)}]"
        sections.setdefault(name.rpartition(".")[0], []).append(
            (f"--{name} {_metavar(field.annotation)}", f"{field.description or name} {note}")
        )
    note = "Lists: --widths 256 512 or --widths 256,512. Numbers: 1e6, 1_000_000. "
    note += "Text that begins with -: --text.delimiter=---. 'none' unsets a knob that is unset by default."
    description = inspect.cleandoc(description)
    paragraphs = [
        description if "\n" in description else textwrap.fill(description, width),
        f"usage: {program} [--config FILE] [--KNOB VALUE ...]",
        textwrap.fill(note, width),
    ]
    paragraphs += [_section("flags", flags, width)]
    paragraphs += [_section(section or "general", rows, width) for section, rows in sections.items() if rows]
    return "\n\n".join(paragraphs)


def _section(title: str, rows: Sequence[tuple[str, str]], width: int) -> str:
    column = 36
    lines = [f"{title}:"]
    for option, text in rows:
        wrapped = [
            line.replace(NO_BREAK, " ") for line in textwrap.wrap(text, width - column, break_on_hyphens=False)
        ] or [""]
        if len(option) + 2 < column:
            lines.append(f"  {option}".ljust(column) + wrapped.pop(0))
        else:
            lines.append(f"  {option}")
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines)


def _together(text: str) -> str:
    """The text, with spaces at which no line breaks if it is short."""
    return text.replace(" ", NO_BREAK) if len(text) < 40 else text


def _metavar(annotation: Any) -> str:
    kind = kind_of(annotation)
    if kind is Literal:
        return "|".join(map(str, get_args(inner_of(annotation))))
    if kind is list:
        item = get_args(inner_of(annotation))[0]
        return ("TEXT" if kind_of(item) is Literal else _metavar(item)) + " ..."
    return {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false", dict: "KEY=VALUE,..."}.get(kind, "VALUE")


def _default(field: FieldInfo) -> str:
    value = "" if field.is_required() else field.get_default(call_default_factory=True)
    if field.is_required():
        return "none: it must be given"
    if value is None:
        return "unset"
    return _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_plain(item) for item in value) or "empty"
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items()) or "empty"
    if isinstance(value, str):
        return value if value.strip() and value.isprintable() else json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value).lower()
    return f"{value:_}" if value >= 10_000 else str(value)


def _bounds(field: FieldInfo) -> str:
    metadata = list(field.metadata)
    if kind_of(field.annotation) is list and get_origin(item := get_args(inner_of(field.annotation))[0]) is Annotated:
        metadata += [bound for info in get_args(item)[1:] for bound in info.metadata]
    return ", ".join(
        f"{sign} {getattr(bound, key):g}" for bound in metadata for key, sign in BOUNDS.items() if hasattr(bound, key)
    )
