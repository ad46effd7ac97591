"""The table of a sweep, on screen and on disk; what its columns are is `golf_ray.results`'."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.results.limits import fits_of
from golf_ray.results.records import read_records
from golf_ray.results.schema import IDENTITY, MEASURES, types_of
from trainers.storage import Storage

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from golf_ray.results.migration import Record

__all__ = ["COLUMNS", "read_records", "screen_table", "trials_frame", "write_tables"]

COLUMNS = types_of((*IDENTITY, *MEASURES))
"""Columns of every table beside the knobs, with their types."""

_ENDS = {"over_limit": "over", "interrupted": "stopped"}
"""Statuses that are too long for their column."""
_SHORT = {
    "train.warmdown_frac": ("warm\ndown", 2),
    "train.muon_momentum": ("mom.", 3),
    "quantization.mlp_clip_sigmas": ("clip\nMLP", 1),
    "quantization.attention_clip_sigmas": ("clip\nattn", 1),
    "quantization.embedding_clip_sigmas": ("clip\nemb", 1),
    "adaptation.chunk_size": ("TTT\nchunk", 0),
}
"""Heading and digits of well-known knobs on a narrow screen."""


def trials_frame(records: Sequence[Record], source: str | None = None) -> pd.DataFrame:
    """One row a trial, as `golf_ray.load_results` gives it.

    Args:
        source: the sweep's name.
    """
    from golf_ray.results import reading

    return reading.trials_frame(records, source)


def write_tables(frame: pd.DataFrame, folder: Storage | Path) -> tuple[str, str]:
    """Write `trials.csv` and `trials.parquet`.

    Returns:
        their paths or URIs.
    """
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    storage.write_bytes("trials.csv", frame.to_csv(index=False).encode())
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    storage.write_bytes("trials.parquet", buffer.getvalue())
    return storage.uri_of("trials.csv"), storage.uri_of("trials.parquet")


def screen_table(frame: pd.DataFrame, objective: str = "ttt_bpb") -> Table:
    """The table for a terminal of 80 columns, the best trial marked.

    Args:
        objective: the column by which it is the best; of those within the limits.
    """
    import pandas as pd
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
    done = done[fits_of(done) & done[objective].notna()]
    best = int(done.loc[done[objective].idxmin(), "trial"]) if len(done) else None
    for row in frame.to_dict("records"):
        cells = [str(row["trial"])]
        cells += [_digits(row[knob], _SHORT.get(knob, ("", 4))[1]) for knob in knobs]
        cells += [_digits(row[name], 4) for name in ("val_bpb", "int6_bpb", "ttt_bpb")]
        size = row["total_bytes"]
        cells.append("" if pd.isna(size) else f"{size / 1000:.0f}")
        if row["status"] == "done":
            cells.append("" if pd.isna(row["trained"]) else "new" if row["trained"] else "shared")
        else:
            cells.append(_ENDS.get(row["status"], str(row["status"])))
        table.add_row(*cells, style="bold green" if row["trial"] == best else None)
    return table


def _digits(value: Any, digits: int) -> str:
    import pandas as pd

    if value is None or pd.isna(value):
        return ""
    if not isinstance(value, float):
        return str(value)
    # Among values that are missing, whole numbers are floats too.
    return f"{value:.0f}" if value.is_integer() and digits > 3 else f"{value:.{digits}f}"
