"""A search space: read, checked against the configuration, split by stage, and written as data.

A space is data: it draws nothing (`golf_ray.sweeps.search` does) and runs nothing.

Invariant: every point of a space that was read here makes a configuration, or the field that it
breaks is an error before anything starts. That is seen for all ends of ranges and choices, alone,
in pairs and as the corners of each section.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

import search_spaces
from golf_ray.config import Config, field_paths, field_type, get_field
from golf_ray.errors import ConfigError, nearest
from golf_ray.fields import checked, parse_text

Stage = Literal["train", "quantize", "evaluate"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)

STAGE_OF_SECTION: dict[str, Stage] = {
    "model": "train",
    "data": "train",
    "train": "train",
    "quantization": "quantize",
    "adaptation": "evaluate",
    "evaluation": "evaluate",
}

MAX_CORNERS = 256
"""Corners of one section that are looked at; of a larger section, all pairs and so many corners."""
MAX_VALUES = 64
"""Whole-number ranges of at most so many values are looked at value by value."""

Condition = tuple[str, tuple[Any, ...]]
"""A parent knob and those of its values with which the child is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Knobs, their distributions, and the points to begin with."""

    name: str
    """Name that it was loaded by."""
    distributions: dict[str, BaseDistribution]
    """Distribution by knob, in the order of sampling."""
    first: tuple[dict[str, Any], ...] = ()
    """Points to begin with; knobs that a point leaves out are sampled."""
    conditions: dict[str, Condition] = field(default_factory=dict)
    """Knobs that are sampled only where an earlier knob has one of some values."""

    def knobs(self, stage: Stage | None = None) -> tuple[str, ...]:
        """All knobs, or those of one stage, in the order of the file."""
        return tuple(k for k in self.distributions if stage in (None, stage_of(k)))

    def is_active(self, knob: str, point: Mapping[str, Any]) -> bool:
        """Whether a point has a knob, as the knobs before it say."""
        if knob not in self.conditions:
            return True
        parent, values = self.conditions[knob]
        return parent in point and point[parent] in values and self.is_active(parent, point)

    def active(self, point: Mapping[str, Any]) -> tuple[str, ...]:
        """The knobs that a point has, in the order of sampling."""
        return tuple(knob for knob in self.distributions if self.is_active(knob, point))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "name": self.name,
            "distributions": {
                knob: json.loads(distribution_to_json(distribution))
                for knob, distribution in self.distributions.items()
            },
            "first": [dict(point) for point in self.first],
            "conditions": {k: [parent, list(v)] for k, (parent, v) in self.conditions.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Space:
        """The inverse of `to_dict`, through JSON as well.

        Raises:
            ConfigError: the data are not those of a space.
        """
        try:
            return cls(
                name=data["name"],
                distributions={
                    knob: json_to_distribution(json.dumps(plain))
                    for knob, plain in data["distributions"].items()
                },
                first=tuple(dict(point) for point in data["first"]),
                conditions={k: (p, tuple(v)) for k, (p, v) in data["conditions"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the stored space cannot be read ({type(error).__name__}: {error})",
                              "restore the file") from None  # fmt: skip


def stage_of(knob: str) -> Stage:
    """The first stage that depends on a knob: what comes before it need not run again.

    Raises:
        ConfigError: it is no field that a trial's result depends on.
    """
    field_type(knob)
    section = knob.partition(".")[0]
    if section not in STAGE_OF_SECTION:
        raise ConfigError(f"'{knob}' is no knob to search", "search a field of "
                          + ", ".join(STAGE_OF_SECTION))  # fmt: skip
    return STAGE_OF_SECTION[section]


def load_space(name: str, base: Config) -> Space:
    """A space by name, or from a user's file or module as `file.py:SPACE` or `module:SPACE`.

    Args:
        name: what to load; `FIRST` and `CONDITIONS` beside it are read too.
        base: the configuration that the knobs change.

    Raises:
        ConfigError: there is none, its code is broken, a field is unknown, or a value that it may
            take is not allowed.
    """
    module, attribute = _find(name)
    found = getattr(module, attribute, None)
    distributions = dict(found) if isinstance(found, Mapping) else {}
    if not distributions or not all(
        isinstance(d, BaseDistribution) for d in distributions.values()
    ):
        raise ConfigError(f"{attribute} of space '{name}' is no space",
                          "give a dict from field to Optuna distribution")  # fmt: skip
    space = Space(
        name=name,
        distributions=distributions,
        first=_first_points(module, name),
        conditions=_conditions(module, name),
    )
    check_space(space, base)
    return space


def check_space(space: Space, base: Config) -> None:
    """See that a space's fields exist and that the points it may give are allowed.

    Raises:
        ConfigError: naming the field, the value and the rule.
    """
    for knob, distribution in space.distributions.items():
        _check_distribution(knob, distribution)
    _check_conditions(space)
    for point in space.first:
        _check_first_point(space, point)
    _check_corners(space, base)


def _first_points(module: types.ModuleType, name: str) -> tuple[dict[str, Any], ...]:
    first = getattr(module, "FIRST", ())
    if not isinstance(first, (list, tuple)) or not all(isinstance(p, Mapping) for p in first):
        raise ConfigError(f"FIRST of space '{name}' is no list of points",
                          "give a list of dicts from field to value")  # fmt: skip
    return tuple(dict(point) for point in first)


def _conditions(module: types.ModuleType, name: str) -> dict[str, Condition]:
    conditions = getattr(module, "CONDITIONS", {})
    try:
        pairs = {knob: (parent, values) for knob, (parent, values) in conditions.items()}
        if not all(isinstance(values, (list, tuple)) for _, values in pairs.values()):
            raise TypeError
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(f"CONDITIONS of space '{name}' cannot be read",
                          "give a dict {knob: (parent knob, [its values])}") from None  # fmt: skip
    return {knob: (parent, tuple(values)) for knob, (parent, values) in pairs.items()}


@functools.cache
def _kind(knob: str) -> Any:
    """A field's type, what it is beside None."""
    kind = field_paths()[knob]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _typed(knob: str, value: Any) -> Any:
    """A knob's value as its field has it."""
    if value is None:
        return checked(None, field_type(knob), knob)
    if isinstance(value, str):
        if _kind(knob) in (int, float, bool):
            raise ConfigError(
                f"{knob} = {value!r} is a text", f"give a value of type {_kind(knob).__name__}"
            )
        return checked(parse_text(value, _kind(knob), knob), field_type(knob), knob)
    return checked(value, _kind(knob), knob)


def _check_distribution(knob: Any, distribution: BaseDistribution) -> None:
    if not isinstance(knob, str):
        raise ConfigError(f"{knob!r} is no configuration field", "name it as section.field")
    stage_of(knob)
    given, kind = type(distribution).__name__, _kind(knob)
    if isinstance(distribution, CategoricalDistribution):
        for choice in distribution.choices:
            if isinstance(choice, (list, tuple)):
                # Optuna's storages keep plain values only.
                raise ConfigError(f"{knob} = {choice!r} is a list, which a study cannot keep",
                                  "write it as a text 'a,b'")  # fmt: skip
            _typed(knob, choice)
    elif isinstance(distribution, IntDistribution):
        if kind not in (int, float):
            raise ConfigError(f"{knob} is no number, and its distribution is {given}",
                              "use CategoricalDistribution")  # fmt: skip
    elif kind is not float:
        better = "IntDistribution" if kind is int else "CategoricalDistribution"
        raise ConfigError(f"{knob} does not take every number of {given}", f"use {better}")


def _check_conditions(space: Space) -> None:
    order = list(space.distributions)
    for knob, (parent, values) in space.conditions.items():
        for name in (knob, parent):
            if name not in space.distributions:
                raise ConfigError(f"CONDITIONS of space '{space.name}' has '{name}', which is not "
                                  "in the space", nearest(str(name), order))  # fmt: skip
        where = f"{knob} of space '{space.name}' depends on {parent}"
        if order.index(parent) >= order.index(knob):
            raise ConfigError(f"{where}, which does not come before it",
                              f"put {parent} before {knob}")  # fmt: skip
        if STAGES.index(stage_of(parent)) > STAGES.index(stage_of(knob)):
            # Trials that share a training would differ in a knob of the training.
            raise ConfigError(f"{where}, a knob of a later stage", "drop the condition")
        if isinstance(space.distributions[parent], FloatDistribution):
            raise ConfigError(f"{where}, whose values are not countable",
                              "let it depend on a CategoricalDistribution")  # fmt: skip
        if not values:
            raise ConfigError(f"{where} having no value at all", "list the parent's values")
        for value in values:
            if not _contains(space.distributions[parent], value):
                raise ConfigError(f"{where} = {value!r}, which it cannot have",
                                  f"choose from {space.distributions[parent]}")  # fmt: skip


def _check_first_point(space: Space, point: Mapping[str, Any]) -> None:
    where = f"a first point of space '{space.name}'"
    for knob, value in point.items():
        if knob not in space.distributions:
            raise ConfigError(f"{where} has '{knob}'", nearest(str(knob), space.distributions))
        _typed(knob, value)
        distribution = space.distributions[knob]
        if not _contains(distribution, value):
            raise ConfigError(f"{where} has {knob} = {value!r}, outside of {distribution}",
                              "widen the range or move the point")  # fmt: skip
        if not space.is_active(knob, point):
            parent, values = space.conditions[knob]
            raise ConfigError(f"{where} has {knob}, which is there only with {parent} one of "
                              f"{list(values)}", f"drop it or set {parent}")  # fmt: skip


def _check_corners(space: Space, base: Config) -> None:
    """Make the configurations of the first points, of single values, of pairs and of corners.

    Each is a whole point: a knob that is not at an end has the base's value where that is in its
    range, so that what is refused is a point that the space may give.
    """
    anchor = {k: _anchor(d, get_field(base, k)) for k, d in space.distributions.items()}
    changes: list[dict[str, Any]] = [{}, *map(dict, space.first)]
    for knob, distribution in space.distributions.items():
        changes += [{knob: value} for value in _values(distribution)]
    ends = {knob: _ends(d) for knob, d in space.distributions.items()}
    for pair in itertools.combinations(ends, 2):
        changes += _corners({knob: ends[knob] for knob in pair})
    for section in STAGE_OF_SECTION:
        changes += _corners({k: v for k, v in ends.items() if k.startswith(f"{section}.")})
    for change in changes:
        try:
            _configure(base, _whole_point(space, anchor, change))
        except ConfigError as error:
            shown = ", ".join(f"{knob} = {value!r}" for knob, value in change.items())
            same = not shown or error.problem.startswith(shown)
            place = f"space '{space.name}'" + ("" if same else f" with {shown}")
            raise ConfigError(f"{place}: {error.problem}", error.remedy) from None


def _corners(ends: Mapping[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    corners = itertools.islice(itertools.product(*ends.values()), MAX_CORNERS)
    return [dict(zip(ends, corner, strict=True)) for corner in corners]


def _whole_point(
    space: Space, anchor: Mapping[str, Any], change: Mapping[str, Any]
) -> dict[str, Any]:
    """The change with all other knobs at the anchor, and with parents that let its knobs be."""
    point = {**anchor, **change}
    for knob in change:
        child = knob
        while child in space.conditions:
            parent, values = space.conditions[child]
            if parent not in change and point[parent] not in values:
                point[parent] = values[0]
            child = parent
    return {knob: point[knob] for knob in space.active(point)}


def _configure(base: Config, point: Mapping[str, Any]) -> Config:
    """`base.with_overrides(point)` without the way through plain data, which takes 100 times as
    long."""
    sections: dict[str, dict[str, Any]] = {}
    for knob, value in point.items():
        section, _, name = knob.partition(".")
        sections.setdefault(section, {})[name] = _typed(knob, value)
    changed = {
        section: dataclasses.replace(getattr(base, section), **values)
        for section, values in sections.items()
    }
    return dataclasses.replace(base, **changed)


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


def _anchor(distribution: BaseDistribution, value: Any) -> Any:
    return value if _contains(distribution, value) else _ends(distribution)[0]


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return (distribution.low, distribution.high)


def _values(distribution: BaseDistribution) -> tuple[Any, ...]:
    """All values of a small distribution, the ends of another."""
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        if len(values) <= MAX_VALUES:
            return tuple(values)
    return _ends(distribution)


def _find(name: str) -> tuple[types.ModuleType, str]:
    place, colon, attribute = name.rpartition(":")
    if not colon:
        known = [m.name for m in pkgutil.iter_modules(search_spaces.__path__)]
        if name not in known:
            raise ConfigError(f"unknown space '{name}'", nearest(name, known))
        return importlib.import_module(f"search_spaces.{name}"), "SPACE"
    try:
        return (_of_file if place.endswith(".py") else importlib.import_module)(place), attribute
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(f"space module '{place}' is not found ({error})",
                          "install it, or give a file.py:SPACE") from None  # fmt: skip
    except (Exception, SystemExit) as error:
        # What a user's file does when it is run is the user's: any error is one line.
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"space '{place}' cannot be read ({type(error).__name__}: {line})",
                          "mend the file") from None  # fmt: skip


def _of_file(place: str) -> types.ModuleType:
    path = Path(place)
    spec = importlib.util.spec_from_file_location(f"golf_ray_space_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"there is no space file {path}", "check the path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
