"""A search space: read, checked against the configuration, and split by stage.

Invariant: every point of a space that was read here makes a configuration, or the field that it
breaks is an error before anything starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

import search_spaces
from golf_ray.config import Config, field_type
from golf_ray.errors import ConfigError, nearest

Stage = Literal["train", "quantize", "evaluate"]

STAGE_OF_SECTION: dict[str, Stage] = {
    "model": "train",
    "data": "train",
    "train": "train",
    "quantization": "quantize",
    "adaptation": "evaluate",
    "evaluation": "evaluate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Knobs, their distributions, and the points to begin with."""

    name: str
    distributions: dict[str, BaseDistribution]
    first: tuple[dict[str, Any], ...] = ()

    def knobs(self, stage: Stage | None = None) -> tuple[str, ...]:
        """All knobs, or those of one stage, in the order of the file."""
        return tuple(k for k in self.distributions if stage in (None, stage_of(k)))


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
        name: what to load; a `FIRST` beside it is read too.
        base: the configuration that the knobs change.

    Raises:
        ConfigError: there is none, a field is unknown, or a value that it may take is not allowed.
    """
    module, attribute = _find(name)
    found = getattr(module, attribute, None)
    distributions = dict(found) if isinstance(found, Mapping) else {}
    if not distributions or not all(
        isinstance(d, BaseDistribution) for d in distributions.values()
    ):
        raise ConfigError(f"{attribute} of space '{name}' is no space",
                          "give a dict from field to Optuna distribution")  # fmt: skip
    space = Space(name=name, distributions=distributions, first=tuple(getattr(module, "FIRST", ())))
    check_space(space, base)
    return space


def check_space(space: Space, base: Config) -> None:
    """See that a space's fields exist and that the ends of its ranges are allowed.

    Raises:
        ConfigError: naming the field, the value and the rule.
    """
    for knob, distribution in space.distributions.items():
        stage_of(knob)
        for value in _ends(distribution):
            base.with_overrides({knob: value})
    for point in space.first:
        unknown = [knob for knob in point if knob not in space.distributions]
        if unknown:
            raise ConfigError(f"a first point of space '{space.name}' has '{unknown[0]}'",
                              nearest(unknown[0], space.distributions))  # fmt: skip
        for knob, value in point.items():
            distribution = space.distributions[knob]
            if not distribution._contains(distribution.to_internal_repr(value)):
                raise ConfigError(
                    f"a first point of space '{space.name}' has {knob} = {value!r}, outside of "
                    f"{distribution}",
                    "widen the range or move the point",
                )
        base.with_overrides(point)


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return (distribution.low, distribution.high)


def _find(name: str) -> tuple[types.ModuleType, str]:
    place, colon, attribute = name.rpartition(":")
    if not colon:
        known = [m.name for m in pkgutil.iter_modules(search_spaces.__path__)]
        if name not in known:
            raise ConfigError(f"unknown space '{name}'", nearest(name, known))
        return importlib.import_module(f"search_spaces.{name}"), "SPACE"
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place), attribute
        except ModuleNotFoundError as error:
            raise ConfigError(f"space module '{place}' is not found ({error})",
                              "install it, or give a file.py:SPACE") from None  # fmt: skip
    path = Path(place)
    spec = importlib.util.spec_from_file_location(f"golf_ray_space_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"there is no space file {path}", "check the path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, attribute
