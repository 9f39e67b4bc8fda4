"""The command line of every job: one pydantic config from defaults, a YAML file and overrides; mistakes told in one sentence, exit code 2.

The parser is generated from the model's fields. (pydantic-settings' own CLI prints a usage wall and a traceback where a sentence is due,
and takes neither `1e6` for an integer nor `256,512` for a list.) Imports neither torch, Ray nor MLflow, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raysae.config import UserError

Model = TypeVar("Model", bound=BaseModel)

USAGE_ERROR = 2
INTERRUPTED = 130
NO_BREAK = "\N{NO-BREAK SPACE}"
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LIMITS = {"greater_than": "greater than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}
UNSET = ("none", "null")


def parse(model: type[Model], argv: Sequence[str], description: str, extra: Mapping[str, dict] | None = None) -> tuple[Model, argparse.Namespace]:
    """The job's config and its other flags, from `argv` (without the program's name).

    Strongest first: overrides (`--train.tokens 2e6`, `--widths 256 512` or `--widths 256,512`), `--config FILE.yaml`, the model's defaults.
    `extra` maps further flags to arguments of argparse's `add_argument`, e.g. `{"--resume": {"metavar": "STUDY", "help": "go on with STUDY"}}`.
    The namespace holds them, `config` (the YAML file's path or None) and `given` (the knobs that file or command line set, `{dotted name: value}`).
    `--help` prints every knob and exits with 0. Raises UserError, one sentence, for whatever is wrong.
    """
    extra = dict(extra or {})
    if {"-h", "--help"} & set(argv):
        print(help_text(model, description, extra))
        raise SystemExit(0)
    knobs = dict(fields(model))
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=None)
    parser.add_argument("--config")
    for flag, arguments in extra.items():
        parser.add_argument(_underscored(flag), **arguments)
    for name, field in knobs.items():
        kind = _kind(field.annotation)
        if kind is list:
            parser.add_argument(f"--{name}", dest=f"knob {name}", nargs="*", action="extend", default=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(f"--{name}", dest=f"knob {name}", nargs="?", const="true", default=argparse.SUPPRESS)
        else:
            parser.add_argument(f"--{name}", dest=f"knob {name}", default=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args([_underscored(word) for word in argv])
    if rest:
        raise UserError(_unexpected(rest, [*knobs, "config", *(flag.lstrip("-") for flag in extra)]))

    given = _read_yaml(Path(flags.config), model) if flags.config else {}
    for dest in [d for d in vars(flags) if d.startswith("knob ")]:
        name, value = dest.removeprefix("knob "), vars(flags).pop(dest)
        if isinstance(value, list) and not any(word.strip(" ,") for word in value):  # as an unset variable of the shell gives it
            raise UserError(f"{name} is empty: give at least one value, or leave the flag out")
        given[name] = value
    flags.given = {name: _coerced(name, value, knobs[name].annotation) for name, value in given.items()}
    try:
        return model.model_validate(_nested(flags.given)), flags
    except ValidationError as error:
        raise UserError(explain(error)) from error


def from_flat(model: type[Model], flat: Mapping[str, str]) -> Model:
    """The config of which `flat` are the knobs as text, e.g. as MLflow has them as a run's parameters; what is unset there has its default.

    Knobs that `model` does not have (any more) are left out. Raises UserError where a value does not fit.
    """
    knobs = dict(fields(model))
    known: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        if name in knobs:
            known[name] = _coerced(name, value, knobs[name].annotation)
        elif section in knobs and _kind(knobs[section].annotation) is dict:
            known.setdefault(section, {})[key] = value
    try:
        return model.model_validate(_nested(known))
    except ValidationError as error:
        raise UserError(explain(error)) from error


def main(job: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `job(sys.argv[1:])` and exits with what it returns; a mistake of the user's becomes one sentence on stderr and exit code 2."""
    try:
        sys.exit(job(sys.argv[1:]) or 0)
    except (UserError, ValidationError) as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a remote function raised, with its traceback as text
        sentence = explain(cause) if isinstance(cause, ValidationError) else str(cause)
        print("error: " + " ".join(sentence.split()), file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `--help | head`: Python would complain once more while it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def command(words: str) -> str:
    """How to call this Python with `words` from the present folder: to be pasted."""
    interpreter = Path(sys.executable)
    return f"{interpreter.relative_to(Path.cwd()) if interpreter.is_relative_to(Path.cwd()) else interpreter} {words}"


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob of `model` as (dotted name, field), depth first; sections are the fields that are models themselves."""
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


# ---------------------------------------------------------------- sentences for mistakes


def explain(error: ValidationError) -> str:
    """The first mistake of a ValidationError as one sentence: the field, its value, what would be right."""
    mistake = error.errors(include_url=False)[0]
    *path, last = mistake["loc"] or ("",)
    in_list = isinstance(last, int)
    name = ".".join(str(part) for part in (path if in_list else [*path, last]))
    kind, context, value = mistake["type"], mistake.get("ctx", {}), mistake["input"]
    if kind == "value_error":
        sentence = str(context["error"])
        return f"{name}: {sentence}" if name else sentence
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        return f"unknown key {name}"
    needed = _needed(kind, context) or mistake["msg"][:1].lower() + mistake["msg"][1:]
    if in_list:
        return f"{name} contains {_shown(value)}: each must be {needed}"
    return f"{name} is {_shown(value)}: it must be {needed}"


def _needed(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind == "literal_error":
        return "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    if kind in LIMITS:
        bound = next(context[key] for key in BOUNDS if key in context)
        return f"{LIMITS[kind]} {bound:g}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']} value{'s' if context['min_length'] > 1 else ''}"
    if kind == "dict_type":
        return "pairs such as blocks=transformer.h,attn=attn"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}
    return next((word for prefix, word in words.items() if kind.startswith(prefix)), None)


def _shown(value: object) -> str:
    if value == "" or value == [] or value == {}:
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _unexpected(words: Sequence[str], known: Sequence[str]) -> str:
    word = next((w for w in words if w.startswith("-")), words[0])
    if not word.startswith("--"):
        return f"unexpected {word!r} on the command line: knobs are set as --train.tokens 2000000"
    key = word.lstrip("-").split("=")[0]
    return f"unknown option --{key}{_suggestion(key, known, prefix='--')}"


def _suggestion(key: str, known: Sequence[str], prefix: str = "") -> str:
    """`: did you mean X?`, X being the knob with the same last part in another section, else the one with the most similar name."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    similar = difflib.get_close_matches(key, known, 1, 0.7) or [leaves[leaf] for leaf in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    close = same_leaf or similar
    return f": did you mean {prefix}{close[0]}?" if close else ": --help lists every knob"


# ---------------------------------------------------------------- reading


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument ").replace("expected one argument", "a value is missing"))


def _underscored(word: str) -> str:
    """`--train.sparsity-warmup=0.1` → `--train.sparsity_warmup=0.1`; values are left alone."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _read_yaml(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The file's settings as `{dotted name: value}`; every name is a knob of `model`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: the file cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise UserError(f"--config {path}: this is not valid YAML{place}") from error
    if not isinstance(content, dict):
        if content is None:
            return {}
        raise UserError(f"--config {path}: it must hold keys and values, e.g. 'widths: [256, 512]'")
    knobs = dict(fields(model))
    sections = {name.rsplit(".", 1)[0] for name in knobs if "." in name}
    settings = dict(_flat(content, knobs))
    for name in [n for n in settings if n not in knobs]:
        value = settings.pop(name)
        if name in sections and value is not None:
            raise UserError(f"{name} in {path} is {_shown(value)}: it must be a section with keys of its own")
        if name not in sections:
            raise UserError(f"unknown key {name} in {path}{_suggestion(name, list(knobs))}")
    return settings


def _flat(content: Mapping[Any, Any], knobs: Mapping[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in knobs:
            yield from _flat(value, knobs, f"{name}.")
        else:
            yield name, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def _coerced(name: str, value: Any, annotation: Any) -> Any:
    """`value` in the form pydantic takes for `annotation`: `"1e6"` for an int, `"256,512"` for a list, `"none"` for what may be unset."""
    kind, inner, optional = _kind(annotation), _inner(annotation), _is_optional(annotation)
    if optional and isinstance(value, str) and value.lower() in UNSET:
        return None
    if kind is list and value is not None:
        items = value if isinstance(value, list) else [value]
        parts = [part for item in items for part in (map(str.strip, item.split(",")) if isinstance(item, str) else [item])]
        return [_coerced(name, part, get_args(inner)[0]) for part in parts if part != ""]
    if kind is dict and isinstance(value, str):
        return _mapping(value)
    if kind is Literal and isinstance(value, bool):  # YAML reads a bare `off` as false
        return {True: "on", False: "off"}[value]
    if kind is int and isinstance(value, str):
        return _whole(value)
    if kind in (int, float) and isinstance(value, bool):  # pydantic would read it as 1 or 0
        raise UserError(f"{name} is {str(value).lower()}: it must be {_needed(kind.__name__, {})}")
    if kind is float and str(value).lstrip("+-").lower() in ("inf", "infinity", ".inf"):
        raise UserError(f"{name} is {value}: it must be a finite number")
    return value


def _whole(text: str) -> int | str:
    """`"1e6"` and `"1_000_000"` as integers; the text itself where it is no whole number, for the sentence about it."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else text


def _mapping(text: str) -> dict[str, str] | str:
    """`{"blocks": "h"}` (JSON) or `blocks=h,attn=attn` as a dict; other text is left for the sentence about it."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    return {key.strip(): value.strip() for key, value in pairs} if all(len(pair) == 2 for pair in pairs) else text


# ---------------------------------------------------------------- what a field is


def _inner(annotation: Any) -> Any:
    """The annotation without `| None` and `Annotated`."""
    if get_origin(annotation) is Annotated:
        return _inner(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _inner(next(arm for arm in get_args(annotation) if arm is not NoneType))
    return annotation


def _kind(annotation: Any) -> Any:
    """int, float, str, bool, list, dict or Literal."""
    inner = _inner(annotation)
    return get_origin(inner) or inner


def _is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


# ---------------------------------------------------------------- help


def help_text(model: type[BaseModel], description: str, extra: Mapping[str, dict] | None = None, width: int | None = None) -> str:
    """Every knob by section with its meaning, default and bounds, in lines of at most `width` columns (the terminal's, at most 120)."""
    width = width or max(80, min(120, shutil.get_terminal_size((110, 24)).columns))
    program = Path(sys.argv[0]).name
    flags = [("--config FILE", "settings from a YAML file; the command line overrides them")]
    flags += [(f"{flag} {more['metavar']}" if "metavar" in more else flag, more.get("help", "")) for flag, more in (extra or {}).items()]
    flags += [("--help", "this page")]
    sections: dict[str, list[tuple[str, str]]] = {"": []}
    for name, field in fields(model):
        note = f"[{'; '.join(_together(part) for part in (f'default {_default(field)}', _bounds(field)) if part)}]"
        sections.setdefault(name.rpartition(".")[0], []).append((f"--{name} {_metavar(field.annotation)}", f"{field.description or name} {note}"))
    note = "Lists: --widths 256 512 or --widths 256,512. Numbers: 1e6, 1_000_000. 'none' unsets a knob that is unset by default."
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
        wrapped = [line.replace(NO_BREAK, " ") for line in textwrap.wrap(text, width - column, break_on_hyphens=False)] or [""]
        if len(option) + 2 < column:
            lines.append(f"  {option}".ljust(column) + wrapped.pop(0))
        else:
            lines.append(f"  {option}")
        lines += [" " * column + line for line in wrapped]
    return "\n".join(lines)


def _together(text: str) -> str:
    """Short text that stays on one line when it is wrapped."""
    return text.replace(" ", NO_BREAK) if len(text) < 40 else text


def _metavar(annotation: Any) -> str:
    kind = _kind(annotation)
    if kind is Literal:
        return "|".join(map(str, get_args(_inner(annotation))))
    if kind is list:
        item = get_args(_inner(annotation))[0]
        return ("TEXT" if _kind(item) is Literal else _metavar(item)) + " ..."
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
    if _kind(field.annotation) is list and get_origin(item := get_args(_inner(field.annotation))[0]) is Annotated:
        metadata += [bound for info in get_args(item)[1:] for bound in info.metadata]
    return ", ".join(f"{sign} {getattr(bound, key):g}" for bound in metadata for key, sign in BOUNDS.items() if hasattr(bound, key))
