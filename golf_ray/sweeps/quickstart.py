"""The whole pipeline at once, on real text that every machine has, in a few minutes on two cores.

Python's own library -> tokenizer and shards -> a search over warmdown, Muon momentum, clip sigmas
and TTT chunk size, each training on Ray Train workers, quantised, and scored with test-time
training on an actor pool -> a table.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.presets import LAPTOP
from golf_ray.records import make_folder
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.progress import OnStatus, OnTrial, SweepWatch
from golf_ray.sweeps.runner import SweepOutcome, local_cluster, run_sweep
from golf_ray.sweeps.space import load_space
from golf_ray.sweeps.table import read_records, trials_frame

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.data.build import BuildReport, Progress

TEXT_BYTES = 4_000_000
VAL_DOCUMENTS = 12
NUM_TRIALS = 6
EVALS_PER_TRAINING = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Quickstart:
    """What a quickstart left behind."""

    plan: SweepPlan
    frame: pd.DataFrame
    outcome: SweepOutcome


def begin(folder: Path) -> None:
    """See that the folder is new or empty, and make it.

    Raises:
        UsageError: something is in it.
        StorageError: it cannot be written.
    """
    with contextlib.suppress(OSError):
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty", "choose another --dir or remove it")
    make_folder(folder)


def build_data(folder: Path, progress: Progress | None = None) -> BuildReport:
    """Make a data set of Python's own library below the folder."""
    from golf_ray.data.build import build_dataset
    from golf_ray.data.library_text import python_library_text

    return build_dataset(
        python_library_text(TEXT_BYTES),
        folder / "data",
        vocab_size=LAPTOP.model.vocab_size,
        val_documents=VAL_DOCUMENTS,
        progress=progress,
    )


def plan_quickstart(folder: Path) -> SweepPlan:
    """The sweep over the data of `build_data`."""
    from golf_ray.data.fingerprints import data_fingerprint

    base: Config = LAPTOP.with_overrides({"data.dir": str(folder / "data")})
    return SweepPlan(
        name="quickstart",
        base=base,
        space=load_space("laptop", base),
        num_trials=NUM_TRIALS,
        evals_per_training=EVALS_PER_TRAINING,
        finalists=1,
        data=data_fingerprint(base),
        storage=str(folder),
    )


def run_quickstart(plan: SweepPlan, on_trial: OnTrial, on_status: OnStatus) -> Quickstart:
    """Search on a local cluster that ends with this, and write the tables.

    Raises:
        ClusterError: the cluster cannot be started.
    """
    with local_cluster(plan), SweepWatch(plan, on_trial, on_status):
        outcome = run_sweep(plan)
    frame = trials_frame(read_records(plan.trials_folder), plan.name)
    return Quickstart(plan=plan, frame=frame, outcome=outcome)
