"""The command line of every job: one pydantic config from defaults, a YAML file and overrides.

A mistake is told in one sentence, and the exit code is 2.

The parser is made from the model's fields. pydantic-settings has a command line of its own. It prints a usage wall and
a traceback where a sentence is due, and takes neither `1e6` for an integer nor `256,512` for a list.

This module imports neither torch, Ray nor MLflow, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from raysae.borders import reason
from raysae.commands.help import help_text
from raysae.config import UserError
from raysae.knobs import Model, coerced, explain, fields, flattened, kind_of, nested, shown
from raysae.processes import INTERRUPTED

USAGE_ERROR = 2  # Exit code for a mistake of the user


def parse(
    model: type[Model], argv: Sequence[str], description: str, extra: Mapping[str, dict] | None = None
) -> tuple[Model, argparse.Namespace]:
    """The job's config and its other flags, from `argv` (without the program's name).

    Overrides (`--train.tokens 2e6`, `--widths 256 512` or `--widths 256,512`) count more than `--config FILE.yaml`, and
    that more than the model's defaults. `--help` prints every knob and exits with 0.

    Args:
        extra: further flags with their arguments of argparse's `add_argument`, such as
            `{"--resume": {"metavar": "STUDY", "help": "go on with STUDY"}}`.

    Returns:
        The config, and a namespace. It holds the further flags, `config` (the YAML file's path or None) and `given`:
        the knobs that file or command line set, as `{dotted name: value}`.

    Raises:
        UserError: a sentence for whatever is wrong.
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
        kind = kind_of(field.annotation)
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
        # An unset variable of the shell gives an empty word
        if isinstance(value, list) and not any(word.strip(" ,") for word in value):
            raise UserError(f"{name} is empty: give at least one value, or leave the flag out")
        given[name] = value
    flags.given = {name: coerced(name, value, knobs[name].annotation) for name, value in given.items()}
    try:
        return model.model_validate(nested(flags.given)), flags
    except ValidationError as error:
        raise UserError(explain(error)) from error


def main(job: Callable[[list[str]], int | None]) -> NoReturn:
    """Run `job(sys.argv[1:])` and exit with what it returns.

    A mistake of the user becomes one sentence on stderr and exit code 2.
    """
    try:
        sys.exit(job(sys.argv[1:]) or 0)
    except (UserError, ValidationError) as error:
        cause = getattr(error, "cause", error)  # Ray wraps a remote exception. Its text is a traceback.
        sentence = explain(cause) if isinstance(cause, ValidationError) else str(cause)
        print("error: " + " ".join(sentence.split()), file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `--help | head` closes stdout. Python would complain when it flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _unexpected(words: Sequence[str], known: Sequence[str]) -> str:
    word = next((w for w in words if w.startswith("-")), words[0])
    if not word.startswith("--"):
        return f"unexpected {word!r} on the command line: knobs are set as --train.tokens 2000000"
    key = word.lstrip("-").split("=")[0]
    return f"unknown option --{key}{_suggestion(key, known, prefix='--')}"


def _suggestion(key: str, known: Sequence[str], prefix: str = "") -> str:
    """`: did you mean X?`, where X has the same last part in another section, or else the most similar name."""
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    similar = difflib.get_close_matches(key, known, 1, 0.7) or [
        leaves[leaf] for leaf in difflib.get_close_matches(leaf, leaves, 1, 0.6)
    ]
    close = same_leaf or similar
    return f": did you mean {prefix}{close[0]}?" if close else ": --help lists every knob"


# ---------------------------------------------------------------- reading


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # Lists such as -0.25,1 and -1e-3 are no options either

    def error(self, message: str) -> NoReturn:
        flag, colon, rest = message.removeprefix("argument ").partition(": ")
        if rest == "expected one argument":
            rest = f"a value is missing. One that begins with - is given as {flag}=VALUE"
        raise UserError(f"{flag}{colon}{rest}")


def _underscored(word: str) -> str:
    """`--train.sparsity-warmup=0.1` → `--train.sparsity_warmup=0.1`. Values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _read_yaml(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """The file's settings as `{dotted name: value}`. Every name is a knob of `model`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--config {path}: the file cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {error.problem})" if mark else ""
        raise UserError(f"--config {path}: this is not valid YAML{place}") from error
    except Exception as error:  # A value that looks like a date but is none, or lists too deep within each other
        raise UserError(f"--config {path}: this is not valid YAML ({reason(error)})") from error
    if not isinstance(content, dict):
        if content is None:
            return {}
        raise UserError(f"--config {path}: it must hold keys and values, e.g. 'widths: [256, 512]'")
    knobs = dict(fields(model))
    sections = {name.rsplit(".", 1)[0] for name in knobs if "." in name}
    settings = dict(flattened(content, knobs))
    for name in [n for n in settings if n not in knobs]:
        value = settings.pop(name)
        if name in sections and value is not None:
            raise UserError(f"{name} in {path} is {shown(value)}: it must be a section with keys of its own")
        if name not in sections:
            raise UserError(f"unknown key {name} in {path}{_suggestion(name, list(knobs))}")
    return settings
