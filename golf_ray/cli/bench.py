"""`golf-ray bench`: what a machine does in a second, as ratios taken in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE, add_verb, examples, make_group
from golf_ray.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
    ConfigOptions,
    DataDir,
    Debug,
    Preset,
    resolve_config,
)
from golf_ray.cli.output import plain_table, print_json, progress_bar
from golf_ray.errors import UsageError

if TYPE_CHECKING:
    from golf_ray.config import Config

EXAMPLES = examples(
    "golf-ray bench train",
    "golf-ray bench kernels",
    "golf-ray bench ttt",
    "golf-ray bench quantize",
)
TRAIN_EXAMPLES = examples(
    "golf-ray bench train",
    "golf-ray bench train --profile --json > today.json",
    "golf-ray bench train --compare yesterday.json",
    "golf-ray bench train --workers 4 --data-dir /mnt/data",
    "golf-ray bench train --preset laptop --steps 3 --no-baseline",
)
KERNEL_EXAMPLES = examples(
    "golf-ray bench kernels",
    "golf-ray bench kernels --set train.micro_batches=16 --no-compiled --json",
)
TTT_EXAMPLES = examples(
    "golf-ray bench ttt",
    "golf-ray bench ttt --profile --json > today.json",
    "golf-ray bench ttt --set adaptation.chunk_size=48 --no-start-up",
    "golf-ray bench ttt --preset laptop --seconds 5",
)
QUANTIZE_EXAMPLES = examples(
    "golf-ray bench quantize",
    "golf-ray bench quantize --settings 16 --out today.json",
    "golf-ray bench quantize --compare yesterday.json --no-compress",
    "golf-ray bench quantize --preset laptop",
)

Compare = Annotated[
    Path | None,
    typer.Option("--compare", metavar="FILE", help="An earlier JSON document, for ratios."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON document there too.")
]


def group() -> typer.Typer:
    """The verbs of `golf-ray bench`."""
    app = make_group(
        "Measure speed: training, test-time training, quantisation, kernels.", EXAMPLES
    )
    add_verb(app, "train", train, TRAIN_EXAMPLES)
    add_verb(app, "kernels", kernels, KERNEL_EXAMPLES)
    add_verb(app, "ttt", ttt, TTT_EXAMPLES)
    add_verb(app, "quantize", quantize, QUANTIZE_EXAMPLES)
    return app


def train(
    steps: Annotated[
        int, typer.Option(min=2, metavar="N", help="Counted steps, loop off and loop on each.")
    ] = 10,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Ray workers; 1 trains in this process.")
    ] = 1,
    profile: Annotated[
        bool, typer.Option("--profile", metavar=NO_VALUE, help="Time of a step by category.")
    ] = False,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            metavar=NO_VALUE,
            help="Run torch's own operations under torch.compile too.",
        ),
    ] = True,
    start_up: Annotated[
        bool,
        typer.Option(
            "--start-up/--no-start-up",
            metavar=NO_VALUE,
            help="Time to the first step, in processes of their own: cold, then warm.",
        ),
    ] = True,
    compare: Compare = None,
    out: Out = None,
    preset: Preset = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure training: tokens a second, memory, time to the first step.

    Runs on random documents as long as the field's, or on the training shards of --data-dir. The
    record preset where none is named.
    """
    chosen = _configuration(preset, config, assignments, data_dir, workers)
    earlier = None if compare is None else _read(compare, "bench train")
    from golf_ray.bench import report

    with progress_bar() as bar:
        found = report.bench_training(
            chosen,
            steps=steps,
            on_data=data_dir is not None,
            profile=profile,
            baseline=baseline,
            start_up=start_up,
            tell=lambda what: bar.update(what, 0, 0),
        )
    if earlier is not None:
        found["against_earlier"] = report.against(found, earlier)
    _give(found, out, as_json, report.training_rows)


def kernels(
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled/--no-compiled",
            metavar=NO_VALUE,
            help="Time torch's own operations under torch.compile too.",
        ),
    ] = True,
    out: Out = None,
    preset: Preset = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure each fused operation against torch's own, forward and backward.

    Shapes are those of one micro-batch. The record preset where none is named. What is computed is
    compared too: exits with 1 where an operation differs by more than rounding explains.
    """
    chosen = _configuration(preset, config, assignments, None, 1)
    from golf_ray.bench import report

    with progress_bar() as bar:
        found = report.bench_kernels(
            chosen, compiled=compiled, tell=lambda what: bar.update(what, 0, 0)
        )
    _give(found, out, as_json, report.kernel_rows)
    fault = report.kernel_fault(found)
    if fault is not None:
        raise fault


def ttt(
    seconds: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds of documents of mixed lengths.")
    ] = 12.0,
    profile: Annotated[
        bool, typer.Option("--profile", metavar=NO_VALUE, help="Time by category, on a GPU.")
    ] = False,
    start_up: Annotated[
        bool,
        typer.Option(
            "--start-up/--no-start-up",
            metavar=NO_VALUE,
            help="Time to the first score, in processes of their own: cold, then warm.",
        ),
    ] = True,
    out: Out = None,
    preset: Preset = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure test-time training: tokens a second by window, the whole set's time, memory.

    Documents are as long as the field's and of random tokens. The record preset where none is
    named.
    """
    chosen = _configuration(preset, config, assignments, None, 1)
    from golf_ray.bench import report

    with progress_bar() as bar:
        found = report.bench_ttt(
            chosen,
            profile=profile,
            mixed_s=seconds,
            start_up=start_up,
            tell=lambda what: bar.update(what, 0, 0),
        )
    _give(found, out, as_json, report.ttt_rows)


def quantize(
    settings: Annotated[
        int, typer.Option(min=2, metavar="N", help="Clip sigmas that are quantised together.")
    ] = 8,
    compress: Annotated[
        bool,
        typer.Option(
            "--compress/--no-compress",
            metavar=NO_VALUE,
            help="Compress an artifact too: a minute at the record's size.",
        ),
    ] = True,
    compare: Compare = None,
    out: Out = None,
    preset: Preset = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure quantisation: factors, codes of one setting and of many, size, compression.

    Weights and calibration tokens are random. The record preset where none is named.
    """
    chosen = _configuration(preset, config, assignments, None, 1)
    from golf_ray.bench import quantization

    earlier = None if compare is None else _read(compare, quantization.KIND)
    with progress_bar() as bar:
        found = quantization.bench_quantization(
            chosen,
            settings=settings,
            compress=compress,
            tell=lambda what: bar.update(what, 0, 0),
        )
    if earlier is not None:
        found["against_earlier"] = quantization.against(found, earlier)
    _give(found, out, as_json, quantization.quantization_rows)


def _configuration(
    preset: str | None,
    config: Path | None,
    assignments: list[str] | None,
    data_dir: Path | None,
    workers: int,
) -> Config:
    options = ConfigOptions(
        preset=preset or (None if config is not None else "record"),
        config=config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    return resolve_config(options, changes={"cluster.num_workers": workers})


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be compared with ({error})", "give a JSON document of an earlier run"
        ) from None
    if not isinstance(found, dict) or found.get("kind") != kind:
        raise UsageError(
            f"{path} is no document of 'golf-ray {kind}'", "give one written with --json"
        )
    return found


def _give(found: dict[str, Any], out: Path | None, as_json: bool, rows: Any) -> None:
    if out is not None:
        from golf_ray.records import atomic_write_json

        atomic_write_json(out, found)
    if as_json:
        print_json(found)
        return
    for title, table in rows(found):
        print(title)
        plain_table(table)
        print()
