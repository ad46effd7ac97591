"""`golf-ray quantize`: make a checkpoint's artifact and say what it weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from golf_ray.cli.evaluate import codes_line, quantization_times, resolved_for
from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    ConfigOptions,
    DataDir,
    Debug,
    Force,
    Preset,
    UpstreamFile,
)
from golf_ray.cli.output import count, print_json, print_report, progress_bar, sizes_line
from golf_ray.errors import GolfRayError

EXAMPLES = examples(
    "golf-ray quantize runs/first/final_model.pt",
    "golf-ray quantize runs/first/final_model.pt --code train_gpt.py --json",
    "golf-ray quantize final_model.pt --upstream-config train.log --plain",
    "golf-ray quantize final_model.pt --set quantization.mlp_clip_sigmas=12",
)


def quantize(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A state dict (.pt) or a run's folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The artifact; CHECKPOINT's name and .int6.ptz if not."),
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Count this code, wrapped, in place of quantization.code_bytes."
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            metavar=NO_VALUE,
            help="Leave the configuration out, as public artifacts do.",
        ),
    ] = False,
    force: Force = False,
    preset: Preset = None,
    config: ConfigFile = None,
    upstream_config: UpstreamFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a checkpoint's artifact: Hessians of training text, GPTQ, container.

    Ends with status 1 where model and code are over the limit; the artifact is there all the
    same.
    """
    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )

    from golf_ray import api

    weights = api.open_weights(checkpoint)
    with progress_bar() as bar:
        made = api.quantize(
            weights,
            resolved_for(weights, options),
            out=out,
            code=code,
            plain=plain,
            force=force,
            progress=bar.phase,
        )
    data = made.to_dict()
    if as_json:
        print_json(data)
    else:
        rows = [("size", sizes_line(data)), ("time", quantization_times(data))]
        print_report(f"{made.artifact}", [*rows, ("codes", codes_line(data))])
    if not made.sizes.fits:
        raise GolfRayError(
            f"{made.artifact} and code are {count(-made.sizes.margin_bytes)} bytes over the limit"
            f" of {count(made.sizes.limit_bytes)}",
            "use fewer bits or larger clip sigmas",
        )
