"""`golf-ray data`: build, fetch and verify data sets of the published layout."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE, add_verb, examples, make_group
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import count, duration, print_json, print_report, progress_bar

if TYPE_CHECKING:
    from golf_ray.data.build import SplitCounts

EXAMPLES = examples(
    "golf-ray data build ~/texts --vocab-size 1024",
    "golf-ray data fetch --variant sp8192 --train-shards 10",
    "golf-ray data verify --data-dir data",
)
BUILD_EXAMPLES = examples(
    "golf-ray data build ~/texts --vocab-size 1024",
    "golf-ray data build web.parquet --text-column body --val-documents 500",
    "golf-ray data build more.jsonl --tokenizer fineweb_1024_bpe.model",
)

_STAGES = {
    "read": "reading",
    "tokenizer": "tokenizer",
    "tokenize": "tokenising",
    "write": "writing",
}

Folder = Annotated[
    Path,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder that gets, or holds, datasets/ and tokenizers/."
    ),
]


def group() -> typer.Typer:
    """The verb with its own verbs."""
    app = make_group("Build, fetch and verify data: tokenizer and token shards.", EXAMPLES)
    add_verb(app, "build", build, BUILD_EXAMPLES)
    return app


def build(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE", help="Files and folders: text, .jsonl, .parquet."),
    ],
    data_dir: Folder = Path("data"),
    vocab_size: Annotated[
        int, typer.Option(metavar="N", help="Pieces of the tokenizer: model.vocab_size.")
    ] = 1024,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use this SentencePiece model; else one is trained."),
    ] = None,
    text_column: Annotated[
        str, typer.Option(metavar="NAME", help="Field of JSON lines, column of Parquet files.")
    ] = "text",
    val_documents: Annotated[
        int | None, typer.Option(metavar="N", help="Documents for validation.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(metavar="F", help="Or this part of them; 0.01 where neither is given."),
    ] = None,
    shard_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a shard at most.")
    ] = 100_000_000,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Folder below datasets/; else by vocabulary.")
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of the sample that the tokenizer is trained on.")
    ] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes; all cores where not given.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar=NO_VALUE, help="Replace a data set that exists.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a data set of any text: tokenizer, shards, manifest; whole or not at all.

    A text file is one document, a line of a .jsonl file and a row of a .parquet file are one each.
    """
    import time

    from golf_ray.data.build import build_dataset

    began_s = time.perf_counter()
    with progress_bar() as bar:

        def told(stage: str, done: int, total: int) -> None:
            unit = "tokens" if stage == "write" else "bytes"
            bar.update(_STAGES.get(stage, stage), done, total, f"{count(done)} {unit}")

        made = build_dataset(
            sources,
            data_dir,
            tokenizer=tokenizer,
            workers=workers or _cores(),
            overwrite=overwrite,
            progress=told,
            vocab_size=vocab_size,
            dataset=dataset,
            val_fraction=val_fraction,
            val_documents=val_documents,
            shard_tokens=shard_tokens,
            seed=seed,
            text_column=text_column,
        )
    seconds = time.perf_counter() - began_s
    if as_json:
        data: dict[str, Any] = dataclasses.asdict(made)
        data["dataset_dir"], data["tokenizer"] = str(made.dataset_dir), str(made.tokenizer)
        print_json({**data, "seconds": seconds})
        return
    skipped = ", ".join(f"{n} {reason}" for reason, n in made.skipped.items())
    print_report(
        str(made.dataset_dir),
        [
            ("training", _split(made.train)),
            ("validation", _split(made.val)),
            ("tokenizer", f"{made.tokenizer}, {count(vocab_size)} pieces"),
            *([("skipped", skipped)] if skipped else []),
            ("time", duration(seconds)),
        ],
    )


def _split(counts: SplitCounts) -> str:
    return (
        f"{count(counts.documents)} documents, {count(counts.text_bytes)} bytes, "
        f"{count(counts.tokens)} tokens in {count(counts.num_shards)} shards"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
