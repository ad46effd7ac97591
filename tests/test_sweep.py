"""Stage outputs and the table of a sweep: all without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from golf_ray.results.schema import IDENTITY, types_of
from golf_ray.sweeps.table import read_records, screen_table, trials_frame, write_tables


def record(number: int, **values: Any) -> dict[str, Any]:
    knobs = {"train.warmdown_frac": 0.6 + number / 100, "adaptation.chunk_size": 32}
    return {"trial": number, "status": "done", "reason": None, "seed": 1, "knobs": knobs, **values}


def test_the_table_keeps_types_and_failures(tmp_path: Path) -> None:
    records = [
        record(0, ttt_bpb=2.5, int6_bpb=2.6, val_bpb=2.55, total_bytes=150_000, fits=True,
               trained=True),
        record(1, status="failed", reason="the loss is not finite at step 3: nan"),
        record(2, ttt_bpb=2.4, int6_bpb=2.6, val_bpb=2.55, total_bytes=151_000, fits=False,
               trained=False),
    ]  # fmt: skip
    for item in records:
        (tmp_path / f"{item['trial']:05d}.json").write_text(json.dumps(item))
    frame = trials_frame(read_records(tmp_path))
    knobs = ["train.warmdown_frac", "adaptation.chunk_size"]
    identity = list(types_of(IDENTITY))
    assert list(frame.columns[: len(identity) + 2]) == identity + knobs
    csv, parquet = write_tables(frame, tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), frame, check_dtype=True)
    again = pd.read_csv(csv)
    assert again["ttt_bpb"].tolist()[::2] == [2.5, 2.4] and again["ttt_bpb"].isna()[1]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(screen_table(frame))
    text = console.export_text()
    assert "failed" in text and "2.4000" in text and "shared" in text
    assert max(len(line) for line in text.splitlines()) <= 80
