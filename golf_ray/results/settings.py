"""Fields in which a configuration is not the preset that it is named after, and how to set them.

Works on plain data, so that a configuration of another version, with fields that this one does not
know, is shown as it is.

Invariant: of a configuration that this version knows, the preset with `settings_of` set is the
configuration.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from golf_ray.presets import PRESETS, RECORD


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A field in which a configuration is not the preset that it is named after."""

    field: str
    value: Any
    preset: Any
    searched: bool = False
    """Whether a sweep chose it; then it may well be the preset's value."""


def preset_of(config: Mapping[str, Any]) -> str:
    """The preset that a configuration is named after; the record where it is named otherwise."""
    name = config.get("name")
    return name if isinstance(name, str) and name in PRESETS else RECORD.name


def differences(config: Mapping[str, Any], knobs: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Searched fields, then those that are not as the preset has them."""
    base = _flat(PRESETS[preset_of(config)].to_dict())
    values = {**_flat(config), **knobs}
    values.pop("name", None)
    differing = [
        Difference(field=field, value=value, preset=base.get(field))
        for field, value in values.items()
        if field not in knobs and (field not in base or base[field] != value)
    ]
    searched = [
        Difference(field=field, value=value, preset=base.get(field), searched=True)
        for field, value in knobs.items()
    ]
    return (*searched, *differing)


def settings_of(config: Mapping[str, Any], knobs: Mapping[str, Any]) -> tuple[str, ...]:
    """What `--set` must be given to make a configuration of the preset that it is named after."""
    return tuple(
        f"{d.field}={setting_text(d.value)}"
        for d in differences(config, knobs)
        if d.value != d.preset
    )


def setting_text(value: Any) -> str:
    """A field's value as `--set` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else repr(value)


def command_lines(words: Sequence[str], settings: Sequence[str]) -> list[str]:
    """A command in lines that can be copied together."""
    pairs = [f"--set {shlex.quote(setting)}" for setting in settings]
    lines = [shlex.join(words), *(f"  {pair}" for pair in pairs)]
    return [*(f"{line} \\" for line in lines[:-1]), lines[-1]]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, value in config.items():
        if isinstance(value, Mapping):
            flat.update({f"{section}.{name}": inner for name, inner in value.items()})
        else:
            flat[section] = value
    return flat
