"""Fields of configuration dataclasses: bounds, types, plain data and texts.

What is generic about configurations, with no knowledge of any one of them. Every refusal is one
line that names the field, its value and what would be right.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from golf_ray.errors import ConfigError, nearest

Section = typing.TypeVar("Section")


def require(ok: bool, where: str, value: object, rule: str) -> None:
    """An error that names the field, its value and the rule, unless `ok`."""
    if not ok:
        raise ConfigError(f"{where} = {value!r} is not allowed", f"it must be {rule}")


def require_positive(section: str, obj: object, *names: str) -> None:
    """The named fields, where set, are greater than 0."""
    for name in names:
        value = getattr(obj, name)
        if value is not None:
            require(value > 0, f"{section}.{name}", value, "greater than 0")


def require_at_least(section: str, obj: object, low: float, *names: str) -> None:
    """The named fields, where set, are at least `low`."""
    for name in names:
        value = getattr(obj, name)
        if value is not None:
            require(value >= low, f"{section}.{name}", value, f"at least {low}")


def require_between(section: str, obj: object, low: float, high: float, *names: str) -> None:
    """The named fields, where set, lie in [low, high]."""
    for name in names:
        value = getattr(obj, name)
        if value is not None:
            require(low <= value <= high, f"{section}.{name}", value, f"from {low} to {high}")


def to_plain(value: Any) -> Any:
    """A value as plain data, fit for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value


def from_mapping(cls: type[Section], data: Any, where: str) -> Section:
    """A dataclass from plain data; absent fields take their defaults.

    Args:
        cls: the dataclass.
        data: its fields by name.
        where: path of this section, for errors.

    Raises:
        ConfigError: a field is unknown (the nearest known name is given) or of the wrong type.
    """
    if not isinstance(data, Mapping):
        place = where or "the configuration"
        raise ConfigError(f"{place} = {data!r} is not an object", "give its fields in braces")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in data if key not in hints]
    if unknown:
        path = f"{where}.{unknown[0]}" if where else str(unknown[0])
        prefix = f"{where}." if where else ""
        known = [prefix + name for name in hints]
        raise ConfigError(f"unknown configuration field '{path}'", nearest(path, known))
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            values[key] = from_mapping(kind, value, path)
        else:
            values[key] = checked(value, kind, path)
    return cls(**values)


def checked(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`, or an error that says what was expected."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if value is None else checked(value, options[0], path)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(
                f"{path} = {value!r} is not one of its choices",
                "choose from " + ", ".join(map(str, choices)),
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} = {value!r} is not a list", "give a list of names")
        return tuple(checked(v, typing.get_args(kind)[0], path) for v in value)
    if kind is bool:
        good = isinstance(value, bool)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if good and not math.isfinite(value):
            raise ConfigError(f"{path} = {value!r} is not finite", "give a finite number")
        value = float(value) if good else value
    else:
        good = isinstance(value, kind)
    if not good:
        raise ConfigError(
            f"{path} = {value!r} is not of type {kind.__name__}", f"give {_example(kind)}"
        )
    return value


def _example(kind: type) -> str:
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return named[kind]


def parse_text(text: str, kind: Any, path: str) -> Any:
    """Read a command-line text as a field's type; ConfigError where it is none."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() in ("null", "none"):
            return None
        options = [k for k in typing.get_args(kind) if k is not type(None)]
        return parse_text(text, options[0], path)
    if origin is tuple:
        items = text.strip("[]() ")
        return tuple(t.strip(" '\"") for t in items.split(",")) if items else ()
    if kind is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
        return text.lower() in ("true", "1", "yes")
    if kind in (int, float):
        try:
            return kind(text.replace("_", ""))
        except ValueError:
            pass
    return checked(text, kind, path)
