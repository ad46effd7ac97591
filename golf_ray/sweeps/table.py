"""The table of a sweep: trials as rows, in one stable order of columns, on screen and on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainers.storage import Storage

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

COLUMNS = {
    "trial": "Int64",
    "status": "string",
    "reason": "string",
    "group": "Int64",
    "seed": "Int64",
    "steps": "Int64",
    "train_loss_nats": "Float64",
    "val_bpb": "Float64",
    "int6_bpb": "Float64",
    "ttt_bpb": "Float64",
    "ttt_standard_error_bpb": "Float64",
    "ttt_loss_nats": "Float64",
    "tokens_scored": "Int64",
    "bytes_scored": "Int64",
    "documents_scored": "Int64",
    "weights": "string",
    "model_bytes": "Int64",
    "predicted_model_bytes": "Int64",
    "bytes_exact": "boolean",
    "code_bytes": "Int64",
    "total_bytes": "Int64",
    "fits": "boolean",
    "final_ttt_bpb": "Float64",
    "final_total_bytes": "Int64",
    "final_fits": "boolean",
    "artifact": "string",
    "training": "string",
    "trained": "boolean",
    "restarts": "Int64",
    "attempts": "Int64",
    "train_s": "Float64",
    "calibrate_s": "Float64",
    "quantize_s": "Float64",
    "evaluate_s": "Float64",
    "waited_s": "Float64",
    "control_s": "Float64",
    "wall_s": "Float64",
    "train_gpu_s": "Float64",
    "evaluate_gpu_s": "Float64",
    "began_unix_s": "Float64",
    "ended_unix_s": "Float64",
    "golf_ray_version": "string",
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


def read_records(folder: Storage | Path) -> list[dict[str, Any]]:
    """All records of a sweep's `trials` folder in order of their numbers; it may still grow."""
    storage = folder if isinstance(folder, Storage) else Storage(folder)
    records = []
    for name in storage.names():
        if name.endswith(".json") and name[0].isdigit():
            data = storage.read_bytes(name)
            if data is not None:
                records.append(json.loads(data))
    return records


def trials_frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a trial: number and status, the knobs, then what was measured."""
    import pandas as pd

    knobs: list[str] = []
    for record in records:
        knobs += [knob for knob in record["knobs"] if knob not in knobs]
    rows = [
        {**{name: record.get(name) for name in COLUMNS}, **_final(record), **record["knobs"]}
        for record in records
    ]
    names = list(COLUMNS)
    frame = pd.DataFrame(rows, columns=[*names[:3], *knobs, *names[3:]])
    return frame.astype(COLUMNS)


def _final(record: dict[str, Any]) -> dict[str, Any]:
    final = record.get("final")
    if final is None:
        return {}
    return {
        "final_ttt_bpb": final["ttt_bpb"],
        "final_total_bytes": final["total_bytes"],
        "final_fits": final["fits"],
        "artifact": " ".join(final["artifacts"]),
    }


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
    done = done[done["fits"].fillna(True) & done[objective].notna()]
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
            cells.append(str(row["status"]).replace("over_limit", "over"))
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
