"""The table of a sweep: trials as rows, in one stable order of columns, on screen and on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.records import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

COLUMNS = {
    "trial": "Int64",
    "status": "string",
    "reason": "string",
    "seed": "Int64",
    "steps": "Int64",
    "train_loss_nats": "Float64",
    "val_bpb": "Float64",
    "int6_bpb": "Float64",
    "ttt_bpb": "Float64",
    "ttt_loss_nats": "Float64",
    "tokens_scored": "Int64",
    "bytes_scored": "Int64",
    "weights": "string",
    "model_bytes": "Int64",
    "code_bytes": "Int64",
    "total_bytes": "Int64",
    "fits": "boolean",
    "training": "string",
    "trained": "boolean",
    "restarts": "Int64",
    "train_s": "Float64",
    "quantize_s": "Float64",
    "evaluate_s": "Float64",
    "began_unix_s": "Float64",
    "ended_unix_s": "Float64",
    "code_version": "string",
}
"""Columns of every table beside the knobs, with their types."""

_SHORT = {
    "train.warmdown_frac": ("warm\ndown", 2),
    "train.muon_momentum": ("mom.", 3),
    "quantization.mlp_clip_sigmas": ("clip\nMLP", 1),
    "quantization.attention_clip_sigmas": ("clip\nattn", 1),
    "quantization.embedding_clip_sigmas": ("clip\nemb", 1),
    "adaptation.chunk_size": ("TTT\nchunk", 0),
}
"""Heading and digits of well-known knobs on a narrow screen."""


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All records of a sweep's `trials` folder in order of their numbers; it may still grow."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9]*.json"))]


def trials_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a trial: number and status, the knobs, then what was measured."""
    import pandas as pd

    knobs: list[str] = []
    for record in records:
        knobs += [knob for knob in record["knobs"] if knob not in knobs]
    rows = [
        {**{name: record.get(name) for name in COLUMNS}, **record["knobs"]} for record in records
    ]
    names = list(COLUMNS)
    frame = pd.DataFrame(rows, columns=[*names[:3], *knobs, *names[3:]])
    return frame.astype(COLUMNS)


def write_tables(frame: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Write `trials.csv` and `trials.parquet`.

    Returns:
        their paths.
    """
    csv, parquet = folder / "trials.csv", folder / "trials.parquet"
    with atomic_path(csv) as temporary:
        frame.to_csv(temporary, index=False)
    with atomic_path(parquet) as temporary:
        frame.to_parquet(temporary, index=False)
    return csv, parquet


def screen_table(frame: pd.DataFrame) -> Table:
    """The table for a terminal of 80 columns, the best trial marked."""
    from rich import box
    from rich.table import Table

    knobs = [name for name in frame.columns if name not in COLUMNS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("#", justify="right")
    for knob in knobs:
        heading, _ = _SHORT.get(knob, (knob.rpartition(".")[2], 4))
        table.add_column(heading, justify="right")
    for title in ("train\nbpb", "int6\nbpb", "TTT\nbpb", "KB", "train-\ning"):
        table.add_column(title, justify="right")
    done = frame[frame["status"] == "done"]
    best = int(done.loc[done["ttt_bpb"].idxmin(), "trial"]) if len(done) else None
    for row in frame.to_dict("records"):
        cells = [str(row["trial"])]
        cells += [_digits(row[knob], _SHORT.get(knob, ("", 4))[1]) for knob in knobs]
        if row["status"] == "done":
            cells += [_digits(row[name], 4) for name in ("val_bpb", "int6_bpb", "ttt_bpb")]
            cells += [f"{row['total_bytes'] / 1000:.0f}", "new" if row["trained"] else "shared"]
        else:
            cells += ["", "", str(row["status"]), "", ""]
        table.add_row(*cells, style="bold green" if row["trial"] == best else None)
    return table


def _digits(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
