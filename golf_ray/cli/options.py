"""Options that verbs share, and the one way from them to a configuration.

Precedence, later wins: the configuration that a checkpoint carries, `--preset`, `--config` (the
fields that the file names), `--upstream-config` (the keys that the file names), `--set`, then
options of their own such as `--data-dir`. Any of the first four that is given takes the place of
the checkpoint's.

Invariant: a name that is no field is an error before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE
from golf_ray.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from golf_ray.config import Config

CONFIGURATION = "Configuration (later wins)"

Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A named configuration: record, tiny or laptop.",
        rich_help_panel=CONFIGURATION,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="JSON as of 'golf-ray config show'; fields that it leaves out keep their values.",
        rich_help_panel=CONFIGURATION,
    ),
]
UpstreamFile = Annotated[
    Path | None,
    typer.Option(
        "--upstream-config",
        metavar="FILE",
        help="The public program's configuration: a JSON of its keys, or one of its logs.",
        rich_help_panel=CONFIGURATION,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=V",
        help="Change one field, as train.warmdown_frac=0.8; may be repeated.",
        rich_help_panel=CONFIGURATION,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder that holds datasets/ and tokenizers/; sets data.dir.",
        rich_help_panel=CONFIGURATION,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        metavar=NO_VALUE,
        help="Print one JSON document on standard output, nothing else.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="HOST:PORT",
        help="Join a running Ray cluster ('auto' finds one); else a local one starts and ends.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        metavar=NO_VALUE,
        help="Use a model configuration other than the one that the checkpoint carries.",
    ),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", metavar=NO_VALUE, help="Show a traceback with an error."),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigOptions:
    """What a user said about the configuration.

    Raises:
        ConfigError: `assignments` or `preset` names what there is not.
    """

    preset: str | None = None
    config: Path | None = None
    upstream_config: Path | None = None
    assignments: tuple[str, ...] = ()
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        from golf_ray.config import field_type, split_assignment
        from golf_ray.presets import preset

        if self.preset is not None:
            preset(self.preset)
        for item in self.assignments:
            field_type(split_assignment(item)[0])

    @property
    def has_base(self) -> bool:
        """Whether a whole configuration was given, so that a checkpoint's own is not used."""
        return not (self.preset is None and self.config is None and self.upstream_config is None)

    @property
    def names_parts(self) -> bool:
        """Whether `model.parts` is the user's word and not a file's."""
        named = (item.partition("=")[0].strip() for item in self.assignments)
        return self.has_base or "model.parts" in named

    @property
    def names_cluster(self) -> bool:
        """Whether the section `cluster` is the user's word: public configurations have none."""
        named = any(item.strip().startswith("cluster.") for item in self.assignments)
        return named or self.preset is not None or self.config is not None


def resolve_config(
    options: ConfigOptions,
    carried: Config | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration that some options ask for.

    Args:
        options: what the user said.
        carried: the configuration that came with a checkpoint.
        changes: fields that further options set, by path.

    Raises:
        ConfigError: a file cannot be read, or a field is unknown, ill-typed or out of bounds.
        UsageError: there is no configuration to begin with.
    """
    from golf_ray.config import split_assignment
    from golf_ray.presets import PRESETS, preset
    from golf_ray.upstream import read_upstream

    if not options.has_base and carried is None:
        raise UsageError(
            "no configuration was given",
            f"add --preset {'|'.join(PRESETS)}, --config FILE or --upstream-config FILE",
        )
    base = carried if carried is not None and not options.has_base else preset("record")
    if options.preset is not None:
        base = preset(options.preset)
    if options.config is not None:
        base = _over_file(base, options.config)
    if options.upstream_config is not None:
        base = read_upstream(options.upstream_config, base)
    # All at once: a field may be allowed only together with another.
    overrides: dict[str, Any] = dict(split_assignment(item) for item in options.assignments)
    overrides.update(changes or {})
    if options.data_dir is not None:
        overrides["data.dir"] = str(options.data_dir)
    return base.with_overrides(overrides)


def _over_file(base: Config, path: Path) -> Config:
    import json

    from golf_ray.config import Config

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", "check --config") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", "give a JSON object") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no JSON object", "write 'golf-ray config show' into it")
    merged = base.to_dict()
    if data and not set(data) & set(merged):
        raise ConfigError(
            f"{path} has none of the sections of a configuration",
            "if it is a public one, give it with --upstream-config",
        )
    for section, value in data.items():
        known = merged.get(section)
        if isinstance(known, dict) and isinstance(value, dict):
            value = {**known, **value}
        merged[section] = value
    return Config.from_dict(merged)
