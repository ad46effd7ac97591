"""Configuration: frozen dataclasses, one a stage, and how they are read, changed and written.

A `Config` is a plain value. It does no I/O, reads no environment, and is changed only by
`replace`, `with_overrides` (what `--set a.b=v` does) or a preset of `golf_ray.presets`. Every
field has a docstring with its unit; bounds are checked when a value is made, so a configuration
that exists is one that can run.

Invariant: `Config.from_dict(config.to_dict()) == config`, through JSON as well.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from golf_ray.errors import ConfigError, nearest
from golf_ray.fields import from_mapping, parse_text, require, to_plain
from golf_ray.sections import (
    ADAPTER_SITES,
    AdaptationConfig,
    AdapterSite,
    AttentionConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    KernelConfig,
    ModelConfig,
    QuantizationConfig,
    TrainConfig,
)

__all__ = [
    "ADAPTER_SITES",
    "AdaptationConfig",
    "AdapterSite",
    "AttentionConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "KernelConfig",
    "ModelConfig",
    "QuantizationConfig",
    "TrainConfig",
    "field_paths",
    "field_type",
    "get_field",
    "split_assignment",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One whole trial: train, quantise, evaluate."""

    name: str = "custom"
    """Name of the preset that this began as; carries no meaning for a stage."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        require(
            self.quantization.calibration_batch_tokens % self.data.seq_len == 0,
            "quantization.calibration_batch_tokens",
            self.quantization.calibration_batch_tokens,
            f"a multiple of data.seq_len = {self.data.seq_len}",
        )
        require(
            self.train.micro_batches % self.cluster.num_workers == 0,
            "cluster.num_workers",
            self.cluster.num_workers,
            f"a divisor of train.micro_batches = {self.train.micro_batches}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data, fit for JSON."""
        return {f.name: to_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ConfigError: a field is unknown (its nearest known name is given), ill-typed or out of
                bounds.
        """
        return from_mapping(cls, data, "")

    def to_json(self) -> str:
        """`to_dict` as indented JSON with a final newline."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """The inverse of `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the configuration is not JSON: {error}") from None
        return cls.from_dict(data)

    def with_overrides(self, overrides: Mapping[str, Any] | Iterable[str]) -> Config:
        """A configuration with some fields changed.

        Args:
            overrides: `{"train.warmdown_frac": 0.8}` or `["train.warmdown_frac=0.8"]`; text is
                read as the field's type demands.
        """
        if not isinstance(overrides, Mapping):
            overrides = dict(split_assignment(item) for item in overrides)
        data = self.to_dict()
        for path, value in overrides.items():
            kind = field_type(path)
            section, _, name = path.partition(".")
            value = parse_text(value, kind, path) if isinstance(value, str) else value
            if name:
                data[section][name] = to_plain(value)
            else:
                data[section] = value
        return Config.from_dict(data)


def split_assignment(item: str) -> tuple[str, str]:
    """Split `a.b=v` as given to `--set`.

    Raises:
        ConfigError: there is no `=` or no name before it.
    """
    path, equals, value = item.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {item!r} is no assignment", "write --set section.field=value")
    return path.strip(), value.strip()


def field_paths() -> dict[str, Any]:
    """Every settable field as `section.field` with its type."""
    paths: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            paths.update({f"{name}.{inner}": hint for inner, hint in hints.items()})
        else:
            paths[name] = kind
    return paths


def field_type(path: str) -> Any:
    """The type of `section.field`.

    Raises:
        ConfigError: there is no such field; the nearest known name is given.
    """
    paths = field_paths()
    if path not in paths:
        candidates = list(paths)
        tail = path.rpartition(".")[2]
        same = [p for p in candidates if p.rpartition(".")[2] == tail]
        listed = "'golf-ray config show' lists them all"
        remedy = f"did you mean '{same[0]}'?" if same else nearest(path, candidates, listed)
        raise ConfigError(f"unknown configuration field '{path}'", remedy)
    return paths[path]


def get_field(config: Config, path: str) -> Any:
    """The value of `section.field` in a configuration."""
    field_type(path)
    section, _, name = path.partition(".")
    value = getattr(config, section)
    return getattr(value, name) if name else value
