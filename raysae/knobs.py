"""TODO docstring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from raysae.config import UserError

Model = TypeVar("Model", bound=BaseModel)
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
LIMITS = {"greater_than": "greater than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}
UNSET = ("none", "null")


def from_flat(model: type[Model], flat: Mapping[str, str]) -> Model:
    """The config of which `flat` are the knobs as text, e.g. as MLflow has them as a run's parameters; what is unset there has its default.

    Knobs that `model` does not have (any more) are left out. Raises UserError where a value does not fit.
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


def flattened(content: Mapping[Any, Any], knobs: Mapping[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in knobs:
            yield from flattened(value, knobs, f"{name}.")
        else:
            yield name, value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = value
    return tree


def coerced(name: str, value: Any, annotation: Any) -> Any:
    """`value` in the form pydantic takes for `annotation`: `"1e6"` for an int, `"256,512"` for a list, `"none"` for what may be unset."""
    kind, inner, optional = kind_of(annotation), inner_of(annotation), _is_optional(annotation)
    if optional and isinstance(value, str) and value.lower() in UNSET:
        return None
    if kind is list and value is not None:
        items = value if isinstance(value, list) else [value]
        parts = [part for item in items for part in (map(str.strip, item.split(",")) if isinstance(item, str) else [item])]
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


def inner_of(annotation: Any) -> Any:
    """The annotation without `| None` and `Annotated`."""
    if get_origin(annotation) is Annotated:
        return inner_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return inner_of(next(arm for arm in get_args(annotation) if arm is not NoneType))
    return annotation


def kind_of(annotation: Any) -> Any:
    """int, float, str, bool, list, dict or Literal."""
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
    """Nested `settings` of an older study, with every knob of `model` that is newer than it."""
    knobs = dict(fields(model))
    return nested({**earlier(model), **dict(flattened(settings, knobs))})
