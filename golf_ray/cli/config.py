"""`golf-ray config`: look at configurations."""

from __future__ import annotations

import typer

from golf_ray.cli.frame import add_verb, examples, make_group
from golf_ray.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    ConfigOptions,
    DataDir,
    Debug,
    Preset,
    UpstreamFile,
    resolve_config,
)
from golf_ray.cli.output import plain_table, print_json

SHOW_EXAMPLES = examples(
    "golf-ray config show --preset record",
    "golf-ray config show --preset laptop --set train.iterations=200 > my.json",
    "golf-ray config show --upstream-config train.log",
)
PRESETS_EXAMPLES = examples("golf-ray config presets")


def group() -> typer.Typer:
    """The verb with its own verbs."""
    app = make_group("Look at configurations.", SHOW_EXAMPLES)
    add_verb(app, "show", show, SHOW_EXAMPLES)
    add_verb(app, "presets", presets, PRESETS_EXAMPLES)
    return app


def show(
    preset: Preset = None,
    config: ConfigFile = None,
    upstream_config: UpstreamFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a whole configuration as JSON, fit for --config."""
    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    print_json(resolve_config(options).to_dict())


def presets(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the named configurations."""
    from golf_ray.presets import PRESETS

    rows = [
        {
            "name": name,
            "vocab_size": config.model.vocab_size,
            "model_dim": config.model.model_dim,
            "num_layers": config.model.num_layers,
            "batch_tokens": config.train.batch_tokens,
            "iterations": config.train.iterations,
            "max_wallclock_s": config.train.max_wallclock_s,
            "num_workers": config.cluster.num_workers,
            "gpus_per_worker": config.cluster.gpus_per_worker,
        }
        for name, config in PRESETS.items()
    ]
    if as_json:
        print_json(rows)
    else:
        table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
        plain_table([list(column) for column in zip(*table, strict=True)])
