"""Knobs as text and back: for the command line, YAML files and MLflow's parameters.

A knob is a field of a pydantic model, or of a section of it. Its name is dotted: `train.tokens`.

- `fields` lists the knobs of a model. `kind_of` and `inner_of` say what type a knob has.
- `coerced` turns text into a value that pydantic takes. pydantic itself reads neither `1e6` as an integer nor
  `256,512` as a list.
- `flattened` and `nested` go from sections to dotted names and back.
- `from_flat` makes a config from dotted names and text.
- `explain` turns pydantic's error into one sentence for the user. `shown` shortens a value for such a sentence.

Nothing here knows any particular knob. Values are checked by pydantic alone, with the bounds in `config.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raysae.config import UserError

Model = TypeVar("Model", bound=BaseModel)
# Bounds of a field, as pydantic calls them, with their signs
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LIMITS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
UNSET = ("none", "null")  # Text that unsets a knob


def from_flat(model: type[Model], flat: Mapping[str, str]) -> Model:
    """The config whose knobs are `flat`: dotted name → text, such as the parameters of a run in MLflow.

    Knobs that are missing there have their defaults. Names that are no knobs of `model` (any more) are passed over.

    Raises:
        UserError: a value does not fit its knob.
    """
    knobs = dict(fields(model))
    known: dict[str, Any] = {name: value for name, value in earlier(model).items() if name not in flat}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        if name in knobs:
            known[name] = coerced(name, value, knobs[name].annotation)
        elif section in knobs and kind_of(knobs[section].annotation) is dict:
            known.setdefault(section, {})[key] = value
    try:
        return model.model_validate(nested(known))
    except ValidationError as error:
        raise UserError(explain(error)) from error


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every knob of `model` as (dotted name, field), depth first. A field that is a model itself is a section."""
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


# ---------------------------------------------------------------- sentences for mistakes


def explain(error: ValidationError) -> str:
    """The first mistake of a ValidationError as one sentence: the knob, its value, and what would be right."""
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
        return f"{name} contains {shown(value)}: each must be {needed}"
    return f"{name} is {shown(value)}: it must be {needed}"


def _needed(kind: str, context: Mapping[str, Any]) -> str | None:
    """What would be right, by pydantic's kind of error. None for kinds without words of ours."""
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


def shown(value: object) -> str:
    """A value for a sentence, in at most 60 characters."""
    if value == "" or value == [] or value == {}:
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- sections and dotted names


def flattened(
    content: Mapping[Any, Any], knobs: Mapping[str, FieldInfo], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """The settings in nested sections as (dotted name, value). A dict that is the value of a knob stays whole."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in knobs:
            yield from flattened(value, knobs, f"{name}.")
        else:
            yield name, value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by dotted name as nested sections."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


# ---------------------------------------------------------------- from text to values


def coerced(name: str, value: Any, annotation: Any) -> Any:
    """`value` in the form that pydantic takes for `annotation`.

    `"1e6"` becomes an int, `"256,512"` a list, and `"none"` unsets what may be unset. Text that fits nothing stays as
    it is, and pydantic refuses it.

    Raises:
        UserError: a boolean where a number is wanted, or an infinite number. pydantic would take both.
    """
    kind, inner, optional = kind_of(annotation), inner_of(annotation), _is_optional(annotation)
    if optional and isinstance(value, str) and value.lower() in UNSET:
        return None
    if kind is list and value is not None:
        items = value if isinstance(value, list) else [value]
        parts = [part for item in items for part in (_parts(item) if isinstance(item, str) else [item])]
        return [coerced(name, part, get_args(inner)[0]) for part in parts if part != ""]
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


def _parts(text: str) -> list[str]:
    """The items of a list separated by commas. The name of a file or folder that exists is one item."""
    return [text] if os.path.lexists(os.path.expanduser(text)) else [part.strip() for part in text.split(",")]


def _whole(text: str) -> int | str:
    """`"1e6"` and `"1_000_000"` as integers. Other text stays, for pydantic to refuse."""
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
    """`{"blocks": "h"}` (JSON) or `blocks=h,attn=attn` as a dict. Other text stays, for pydantic to refuse."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    return {key.strip(): value.strip() for key, value in pairs} if all(len(pair) == 2 for pair in pairs) else text


# ---------------------------------------------------------------- what a field is


def inner_of(annotation: Any) -> Any:
    """The annotation without `| None` and `Annotated`."""
    if get_origin(annotation) is Annotated:
        return inner_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return inner_of(next(arm for arm in get_args(annotation) if arm is not NoneType))
    return annotation


def kind_of(annotation: Any) -> Any:
    """What a knob's value is: int, float, str, bool, list, dict or Literal."""
    inner = inner_of(annotation)
    return get_origin(inner) or inner


def _is_optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


# ---------------------------------------------------------------- knobs that older studies lack


def earlier(model: type[BaseModel]) -> dict[str, Any]:
    """What each knob counts as where a study is older than it: dotted name → value. See `config.newer_knob`."""
    extras = ((name, field.json_schema_extra) for name, field in fields(model))
    return {name: extra["before"] for name, extra in extras if isinstance(extra, dict) and "before" in extra}


def completed(model: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `settings` of an older study, with every knob of `model` that is newer than it.

    Raises:
        ValueError: `settings` is no mapping.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{shown(settings)} is no set of knobs")
    knobs = dict(fields(model))
    return nested({**earlier(model), **dict(flattened(settings, knobs))})
