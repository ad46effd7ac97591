"""What a sweep will do, as a value: made before anything starts, stored, and read for a resume.

    STORAGE/stages/             outputs of stages by fingerprint, shared by all sweeps there
    STORAGE/sweeps/NAME/        sweep.json (this plan), optuna.db, trials/ (records), tables

STORAGE is a path or a URI that all nodes can write.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.config import Config
from golf_ray.errors import StorageError, UsageError, nearest
from golf_ray.sweeps.commands import command
from golf_ray.sweeps.pruning import require_prunable
from golf_ray.sweeps.space import Space, stage_of
from trainers.storage import Storage

PLAN_FILE = "sweep.json"
SCHEMA = 2
OBJECTIVES = ("ttt_bpb", "int6_bpb", "total_bytes")
"""What may be made small: the score with test-time training, that without, and the size."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """A sweep."""

    name: str
    storage: str
    """Path or URI of the storage."""
    base: Config
    space: Space
    num_trials: int
    evals_per_training: int = 4
    """Trials that share one training."""
    objectives: tuple[str, ...] = ("ttt_bpb",)
    sampler: str = "tpe"
    seed: int = 0
    """Of the sampler."""
    checkpoints: tuple[tuple[str, str], ...] = ()
    """Stored checkpoints in place of trainings, each with its fingerprint; a trial's score is the
    mean over them."""
    points: tuple[dict[str, Any], ...] = ()
    """Knobs of all trials, where they are given and not searched for."""
    labels: tuple[str, ...] = ()
    """What to call these points, one each; nothing where there are none."""
    data: str = ""
    """Fingerprint of shards and tokenizer."""
    finalists: int = 3
    """Best trials whose artifacts are written, and which are scored on everything."""
    max_concurrent: int | None = None
    """Trials at a time; None for as many as the cluster has room for."""
    optuna_url: str | None = None
    """Storage of the study; None for sqlite in the sweep's folder."""
    max_gpu_hours: float | None = None
    """No trial begins once so much is used."""
    max_hours: float | None = None
    """No trial begins later than that."""
    prune: bool = False
    """End trainings that stand worse on the way than others did: see `golf_ray.sweeps.pruning`."""

    def __post_init__(self) -> None:
        # Trials run elsewhere, in other folders than whoever gave a relative path.
        object.__setattr__(self, "storage", Storage(self.storage).uri)
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"'{self.name}' is no name of a sweep",
                "use letters, digits, '.', '_' and '-', 64 at most",
            )
        for name, value in (
            ("trials", self.num_trials),
            ("evals-per-training", self.evals_per_training),
        ):
            if value < 1:
                raise UsageError(f"--{name} {value} is too few", "give 1 or more")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise UsageError(f"'{objective}' is no objective", nearest(objective, OBJECTIVES))
        if not self.objectives:
            raise UsageError("there is no objective", "name one of " + ", ".join(OBJECTIVES))
        if self.checkpoints and self.training_knobs:
            raise UsageError(
                f"space '{self.space.name}' searches {self.training_knobs[0]}, and a stored "
                "checkpoint is not trained",
                "leave those knobs out",
            )
        if self.prune:
            require_prunable(self.space, self.base)

    @property
    def training_knobs(self) -> tuple[str, ...]:
        """Knobs that a training depends on."""
        return self.space.knobs("train")

    @property
    def num_trainings(self) -> int:
        """Trainings at most."""
        if self.checkpoints:
            return 0
        if self.points:
            trained = [{k: v for k, v in p.items() if stage_of(k) == "train"} for p in self.points]
            return len({json.dumps(point, sort_keys=True) for point in trained})
        if not self.training_knobs:
            return 1
        return -(-self.num_trials // self.group_size)

    @property
    def group_size(self) -> int:
        """Trials whose numbers follow one another and that share a training."""
        # Where nothing else is searched, those that share a training would be one and the same.
        shares = 0 < len(self.training_knobs) < len(self.space.distributions)
        return self.evals_per_training if shares else 1

    def group_of(self, number: int) -> int:
        """The group of a trial."""
        return (number - 1) // self.group_size

    @property
    def folder(self) -> Storage:
        """The sweep's own."""
        return Storage(self.storage).child("sweeps").child(self.name)

    @property
    def trials_folder(self) -> Storage:
        """Where the trials' records are."""
        return self.folder.child("trials")

    @property
    def stages_folder(self) -> Storage:
        """Where stage outputs are."""
        return Storage(self.storage).child("stages")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the storage is left out, which may be moved."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["storage"]
        return {
            "schema": SCHEMA,
            **fields,
            "base": self.base.to_dict(),
            "space": self.space.to_dict(),
            "num_trainings": self.num_trainings,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], storage: str) -> SweepPlan:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is unknown or out of bounds.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {k: v for k, v in data.items() if k in known}
        fields.update(
            storage=storage,
            base=Config.from_dict(data["base"]),
            space=Space.from_dict(data["space"]),
            objectives=tuple(data["objectives"]),
            checkpoints=tuple((path, name) for path, name in data["checkpoints"]),
            points=tuple(data["points"]),
            labels=tuple(data["labels"]),
        )
        return cls(**fields)

    def write(self) -> None:
        """Store it in the sweep's folder.

        Raises:
            UsageError: there is a sweep of that name.
        """
        folder = self.folder
        if folder.exists(PLAN_FILE):
            again = command("sweep --resume", self.name, self.storage)
            raise UsageError(
                f"there is a sweep '{self.name}' in {self.storage}",
                f"go on with it by '{again}', or choose another --name",
            )
        folder.write_bytes(PLAN_FILE, (json.dumps(self.to_dict(), indent=2) + "\n").encode())


def without_training(space: Space) -> Space:
    """A space without the knobs of trainings: a stored checkpoint keeps those that it has."""
    kept = [knob for knob in space.distributions if stage_of(knob) != "train"]
    if not kept:
        raise UsageError(
            f"space '{space.name}' searches trainings alone, and a stored checkpoint is not "
            "trained",
            "choose another space, or leave --checkpoint out",
        )
    return dataclasses.replace(
        space,
        distributions={knob: space.distributions[knob] for knob in kept},
        first=tuple({k: v for k, v in point.items() if k in kept} for point in space.first),
        conditions={
            knob: (parent, values)
            for knob, (parent, values) in space.conditions.items()
            if knob in kept and parent in kept
        },
    )


def sweep_names(storage: str | Path) -> list[str]:
    """Sweeps of a storage."""
    sweeps = Storage(storage).child("sweeps")
    return [name for name in sweeps.names() if sweeps.child(name).exists(PLAN_FILE)]


def read_plan(storage: str | Path, name: str) -> SweepPlan:
    """The plan of a sweep that is there.

    Raises:
        UsageError: there is none of that name.
        StorageError: it cannot be read.
    """
    sweeps = Storage(storage).child("sweeps")
    data = sweeps.child(name).read_bytes(PLAN_FILE)
    if data is None:
        known = sweeps.names()
        remedy = nearest(name, known) if known else "look at --storage"
        raise UsageError(f"there is no sweep '{name}' in {storage}", remedy)
    try:
        plain = json.loads(data)
        if plain["schema"] > SCHEMA:
            raise StorageError(
                f"sweep '{name}' was written by a newer golf_ray (schema {plain['schema']})",
                "install that version",
            )
        return SweepPlan.from_dict(plain, str(storage))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, (StorageError, UsageError)):
            raise
        raise StorageError(
            f"{sweeps.child(name).uri_of(PLAN_FILE)} is damaged ({error})", "restore the file"
        ) from None
