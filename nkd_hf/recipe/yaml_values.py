"""Converts the values of a YAML file to the types of the fields that they set."""

import contextlib
import types
from collections.abc import Iterable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import ConfigError, suggest
from .yaml_file import Loader, describe_value

_YAML_BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}


def check_value(value: Any, type_hint: Any, choices: Iterable[str] | None, where: str) -> Any:
    """Converts a value to the type of its field, or raises ConfigError with a message that begins with `where`."""
    got = f"got {describe_value(value)}"
    try:
        checked = _convert(value, type_hint)
    except TypeError:
        expected = _describe_type(type_hint)
        raise ConfigError(f"{where}: expected {expected}, {got}{_advise(value, type_hint)}") from None
    for item in checked if isinstance(checked, list) else [checked]:
        if choices is not None and item is not None and item not in choices:
            expected = ", ".join(map(repr, choices))
            raise ConfigError(f"{where}: expected one of {expected}, {got}{suggest(str(item), choices)}")
    return checked


def _advise(value: Any, type_hint: Any) -> str:
    """Returns advice to write a value so that it has the type of its field; an empty text where nothing helps."""
    if value is None:
        return ": omit it to keep the default"
    with contextlib.suppress(TypeError):
        if not isinstance(value, list | dict):
            _convert(str(value), type_hint)
            return ": put it in quotes"
    with contextlib.suppress(TypeError, ValueError, yaml.YAMLError):
        if isinstance(value, str):
            _convert(yaml.load(value, Loader=Loader), type_hint)
            return ": remove the quotes"
    return ""


def _convert(value: Any, type_hint: Any) -> Any:
    """Converts a value to a type, or raises TypeError where it does not fit."""
    origin, type_args = get_origin(type_hint) or type_hint, get_args(type_hint)
    if origin in (Union, types.UnionType):
        converted = []
        for member in type_args:
            with contextlib.suppress(TypeError):
                converted.append(_convert(value, member))
        if not converted:
            raise TypeError
        return next((item for item in converted if type(item) is type(value)), converted[0])
    if (origin is Any and _is_plain(value)) or (origin in (str, type(None)) and isinstance(value, origin)):
        return value
    if origin is Literal and any(type(value) is type(item) and value == item for item in type_args):  # 0 == False
        return value
    if isinstance(origin, type) and issubclass(origin, Enum) and value in [item.value for item in origin]:
        return value
    if origin is bool and isinstance(value, bool | str) and (isinstance(value, bool) or value in _YAML_BOOLEANS):
        return value if isinstance(value, bool) else _YAML_BOOLEANS[value]
    if origin is int and type(value) is int:
        return value
    if origin is float and type(value) in (int, float):
        return float(value)
    if origin is list and isinstance(value, list):
        return [_convert(item, type_args[0] if type_args else Any) for item in value]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _convert(item, type_args[1] if type_args else Any) for key, item in value.items()}
    raise TypeError


def _is_plain(value: Any) -> bool:
    """Whether JSON can represent a value."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)


def _describe_type(type_hint: Any) -> str:
    origin, type_args = get_origin(type_hint) or type_hint, get_args(type_hint)
    if origin in (Union, types.UnionType):
        if str in type_args:  # "a list, each item a string or a string" could be read in two ways
            type_args = sorted(type_args, key=lambda member: get_origin(member) is list)
        return " or ".join(_describe_type(member) for member in type_args)
    if origin is list:
        return f"a list, each item {_describe_type(type_args[0])}" if type_args else "a list"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping"}
    return names.get(origin) or ("null" if origin is type(None) else getattr(origin, "__name__", str(origin)))
