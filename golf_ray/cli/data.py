"""`golf-ray data`: build, fetch and verify data sets of the published layout."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE, add_verb, examples, make_group
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import (
    Bar,
    count,
    duration,
    number_of,
    print_json,
    print_report,
    progress_bar,
)
from golf_ray.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from golf_ray.data.build import SplitCounts
    from golf_ray.data.fetch import FetchReport
    from golf_ray.data.verify import SplitReport, VerifyReport
    from golf_ray.data_nodes import FetchOrder, NodeFetch, NodeProgress

EXAMPLES = examples(
    "golf-ray data build ~/texts --vocab-size 1024",
    "golf-ray data fetch --repo OWNER/NAME --variant sp8192 --train-shards 10",
    "golf-ray data verify",
)
BUILD_EXAMPLES = examples(
    "golf-ray data build ~/texts --vocab-size 1024",
    "golf-ray data build web.parquet --text-column body --val-documents 500",
    "golf-ray data build more.jsonl --tokenizer fineweb_1024_bpe.model",
)

FETCH_EXAMPLES = examples(
    "golf-ray data fetch --repo OWNER/NAME --variant sp8192 --train-shards 10",
    "golf-ray data fetch --repo OWNER/NAME --data-dir /mnt/data --json",
    "golf-ray data fetch --repo OWNER/NAME --data-dir /mnt/data --address auto",
)
VERIFY_EXAMPLES = examples(
    "golf-ray data verify",
    "golf-ray data verify --vocab-size 1024 --data-dir /mnt/data --json",
)

_STAGES = {
    "read": "reading",
    "tokenizer": "tokenizer",
    "tokenize": "tokenising",
    "write": "writing",
}
_DOING = {"fetch": "fetching", "wait": "waiting for another fetch into this folder"}

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
    add_verb(app, "fetch", fetch, FETCH_EXAMPLES)
    add_verb(app, "verify", verify, VERIFY_EXAMPLES)
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
    from golf_ray.api import cpu_count
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
            workers=workers or cpu_count(),
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
        print_json({**_plain(made), "seconds": seconds})
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
        f"{number_of(counts.documents, 'document')}, {number_of(counts.text_bytes, 'byte')}, "
        f"{number_of(counts.tokens, 'token')} in {number_of(counts.num_shards, 'shard')}"
    )


def fetch(
    repo: Annotated[
        str,
        typer.Option(metavar="OWNER/NAME", help="Data-set repository on the hub."),
    ],
    variant: Annotated[
        str, typer.Option(metavar="spN", help="sp and the vocabulary size.")
    ] = "sp8192",
    train_shards: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Training shards to get; all where not given."),
    ] = None,
    data_dir: Folder = Path("data"),
    revision: Annotated[
        str, typer.Option(metavar="REF", help="Branch, tag or commit of the repository.")
    ] = "main",
    folder: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Its folder with the shards, where there are several."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH", help="Its tokenizer, where it has another name.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Address of the hub; HF_ENDPOINT's where not given."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="Fetch onto every node of this running Ray cluster ('auto' finds one), into the "
            "same folder on each.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Get published shards and their tokenizer from a hub; what is there is not fetched again.

    Sizes and hashes are checked, and the disk's space before anything is fetched. A fetch that
    was stopped goes on where it was. With --address each node asks the hub itself, with its own
    HF_TOKEN; one that fails is named, the others go on, and the status is 1.
    """
    from golf_ray.data.fetch import RepoLayout, fetch_dataset

    if address is not None:
        from golf_ray.data_nodes import FetchOrder

        order = FetchOrder(
            repo=repo,
            variant=variant,
            train_shards=train_shards,
            out_dir=str(data_dir.absolute()),
            endpoint=endpoint,
            revision=revision,
            layout=RepoLayout(folder=folder, tokenizer=tokenizer),
        )
        _fetch_on_nodes(order, address, as_json)
        return
    began_s = time.perf_counter()
    with progress_bar() as bar:

        def told(stage: str, done: int, total: int) -> None:
            bar.update(_DOING[stage], done, total, _megabytes(done, total))

        report = fetch_dataset(
            variant,
            train_shards,
            repo=repo,
            out_dir=data_dir,
            endpoint=endpoint,
            revision=revision,
            layout=RepoLayout(folder=folder, tokenizer=tokenizer),
            progress=told,
        )
    seconds = time.perf_counter() - began_s
    if as_json:
        print_json({**_plain(report), "seconds": seconds})
        return
    print_report(
        str(report.dataset_dir),
        [
            ("shards", f"{report.num_train_shards} training, {report.num_val_shards} validation"),
            ("tokenizer", str(report.tokenizer)),
            ("fetched", _fetched(report)),
            ("revision", report.revision),
            ("time", duration(seconds)),
        ],
    )


def _fetched(report: FetchReport) -> str:
    return (
        f"{number_of(report.fetched_files, 'file')}, {count(report.fetched_bytes)} bytes; "
        f"{count(report.present_files)} were there"
    )


def _megabytes(done: int, total: int) -> str:
    return f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"


def _fetch_on_nodes(order: FetchOrder, address: str, as_json: bool) -> None:
    from golf_ray.cluster import connect
    from golf_ray.data_nodes import fetch_on_nodes, require_all

    began_s = time.perf_counter()
    with progress_bar() as bar, connect(address):

        def done(outcome: NodeFetch) -> None:
            if not as_json:
                said = outcome.problem if outcome.report is None else _fetched(outcome.report)
                bar.say(f"node {outcome.node}: {said}")

        found = fetch_on_nodes(order, on_progress=lambda at: _show_nodes(bar, at), on_done=done)
    seconds = time.perf_counter() - began_s
    good = [outcome for outcome in found if outcome.report is not None]
    if as_json:
        nodes = [outcome.to_dict() for outcome in found]
        print_json({"ok": len(good) == len(found), "nodes": nodes, "seconds": seconds})
    elif good:
        print_report(
            order.out_dir,
            [
                ("nodes", f"{len(good)} of {len(found)} have the data"),
                ("revision", good[0].report.revision if good[0].report else ""),
                ("time", duration(seconds)),
            ],
        )
    require_all(found)


def _show_nodes(bar: Bar, at: Mapping[str, NodeProgress]) -> None:
    """Bytes of all nodes together, and how far each is."""
    done = sum(node.done_bytes for node in at.values())
    total = sum(node.total_bytes for node in at.values())
    each = ", ".join(
        f"{name} {node.done_bytes / node.total_bytes:.0%}" if node.total_bytes else f"{name} waits"
        for name, node in at.items()
    )
    bar.update("fetching", done, total, each, phase="fetching")


def verify(
    data_dir: Folder = Path("data"),
    vocab_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Its vocabulary, where the folder holds several."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Folder below datasets/; else by vocabulary.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="File below tokenizers/; else by vocabulary."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a data set: headers, sizes, ids, tokenizer, hashes, and training apart from validation.

    Reads everything once. Ends with status 1 where there is a problem.
    """
    from golf_ray.config import DataConfig
    from golf_ray.data.verify import verify_dataset

    with progress_bar() as bar:

        def told(stage: str, done: int, total: int) -> None:
            bar.update("verifying", done, total, _megabytes(done, total))

        data = DataConfig(dir=str(data_dir), dataset=dataset, tokenizer=tokenizer)
        report = verify_dataset(data, vocab_size or _only_vocabulary(data_dir), progress=told)
    if as_json:
        print_json({"ok": report.ok, **_plain(report)})
    else:
        rows = [(name, _checked(side)) for name, side in _sides(report)]
        rows.append(("manifest", "agrees" if report.has_manifest else "none"))
        rows += [("PROBLEM", problem) for problem in report.problems]
        print_report(str(report.dataset_dir), rows)
    if not report.ok:
        more = f" and {len(report.problems) - 1} more" if report.problems[1:] else ""
        raise DataError(f"{report.problems[0]}{more}", "fetch or build the data set again")


def _only_vocabulary(data_dir: Path) -> int:
    from golf_ray.data.shards import dataset_name

    prefix = dataset_name(0).removesuffix("0")
    names = [path.name for path in sorted(data_dir.glob(f"datasets/{prefix}*"))]
    found = [int(n.removeprefix(prefix)) for n in names if n.removeprefix(prefix).isdigit()]
    if len(found) == 1:
        return found[0]
    many = ", ".join(map(str, found))
    raise UsageError(
        f"{data_dir} holds data sets of vocabularies {many}"
        if found
        else f"{data_dir} holds no data set of a known name",
        "say which with --vocab-size" if found else "give --data-dir, or --vocab-size",
    )


def _sides(report: VerifyReport) -> list[tuple[str, SplitReport]]:
    return [("training", report.train), ("validation", report.val)]


def _checked(side: SplitReport) -> str:
    return (
        f"{number_of(side.shards, 'shard')}, {number_of(side.tokens, 'token')}, "
        f"{number_of(side.documents, 'document')}, {count(side.repeated_documents)} repeated"
    )


def _plain(report: Any) -> dict[str, Any]:
    data = dataclasses.asdict(report)
    return {name: str(v) if isinstance(v, Path) else v for name, v in data.items()}
