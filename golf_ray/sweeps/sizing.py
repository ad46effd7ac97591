"""Sizes known before anything is trained: from another trial's, by bits and clip widths."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from golf_ray.config import Config
from golf_ray.errors import GolfRayError, UsageError
from trainers.storage import Storage

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan
    from golf_ray.sweeps.space import Space

SURE = 0.02
"""A size that is foretold is trusted to be over the limit where it is so by this part: of an
artifact of 1.6 MB one was seen that is 1.2% too large."""
DRAWS = 100
MOST_SWEEPS, MOST_TRIALS = 20, 8
"""Other sweeps of a storage, and trials of each, that are looked at for a size."""
WORTH_TELLING = 0.05


def predicted_from_records(config: Config, records: Storage) -> int | None:
    """Bytes of the model that a configuration will give, from any trial of the same model whose
    codes are known; None where there is none.

    Training changes a size by far less than bits and clip widths do.
    """
    for record in _with_codes(records):
        size = _changed(Config.from_dict(record["config"]), record["model_bytes"], config)
        if size is not None:
            return size
    return None


def _changed(reference: Config, model_bytes: int, config: Config) -> int | None:
    """Bytes of a configuration from those of another; None where they are of different models, or
    differ in more of quantisation than bits and clips."""
    from golf_ray.quantization.sizes import predict_change

    try:
        return predict_change(reference, model_bytes, config)
    except UsageError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeOutlook:
    """How many points of a space are foretold over the limit of bytes for sure."""

    num_over: int
    num_drawn: int
    limit_bytes: int
    sweep: str
    """Whose trial's size it is foretold from."""
    trial: int

    @property
    def share(self) -> float:
        """Part of the points."""
        return self.num_over / self.num_drawn

    def lines(self) -> list[str]:
        """For people; nothing where hardly a point is over."""
        if self.share < WORTH_TELLING:
            return []
        return [
            f"about {self.share:.0%} of the space is foretold to be over the {self.limit_bytes:,} "
            f"bytes of quantization.limit_bytes, by the size of trial {self.trial} of sweep "
            f"'{self.sweep}': such trials are not trained, so less is spent than is counted here"
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "share": self.share, "limit_bytes": self.limit_bytes,
            "sweep": self.sweep, "trial": self.trial,
        }  # fmt: skip


def size_outlook(plan: SweepPlan) -> SizeOutlook | None:
    """How many random points of a plan's space would be over the limit, by the size of a like trial
    of any sweep of its storage; None where there is none, or where nothing would be refused."""
    if plan.checkpoints or plan.points:
        return None
    found = _like_trial(plan)
    if found is None:
        return None
    quantization = plan.base.quantization
    most = quantization.limit_bytes * (1 + SURE) - quantization.code_bytes
    points = [plan.base.with_overrides(point) for point in _random_points(plan.space, DRAWS)]
    sizes = [_changed(found.config, found.model_bytes, config) for config in points]
    known = [size for size in sizes if size is not None]
    if len(known) < DRAWS:
        return None
    return SizeOutlook(
        num_over=sum(size > most for size in known),
        num_drawn=DRAWS,
        limit_bytes=quantization.limit_bytes,
        sweep=found.sweep,
        trial=found.trial,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sized:
    """A trial whose size is known."""

    sweep: str
    trial: int
    config: Config
    model_bytes: int


def _like_trial(plan: SweepPlan) -> _Sized | None:
    """A trial with codes of the same model after a training as long, this sweep's own first."""
    from golf_ray.sweeps.plan import sweep_names

    sweeps = Storage(plan.storage).child("sweeps")
    names = sorted(sweep_names(plan.storage)[-MOST_SWEEPS:], key=lambda name: name != plan.name)
    for sweep in names:
        # What others wrote may be of another version, or damaged: then it is of no help here.
        with contextlib.suppress(GolfRayError, ValueError, LookupError, TypeError, AttributeError):
            for record in _with_codes(sweeps.child(sweep).child("trials"), MOST_TRIALS):
                sized = _Sized(
                    sweep=sweep,
                    trial=int(record["trial"]),
                    config=Config.from_dict(record["config"]),
                    model_bytes=int((record.get("final") or record)["model_bytes"]),
                )
                theirs, mine = sized.config.train, plan.base.train
                as_long = theirs.iterations == mine.iterations
                as_long &= theirs.batch_tokens == mine.batch_tokens
                if as_long and _changed(sized.config, sized.model_bytes, plan.base) is not None:
                    return sized
    return None


def _with_codes(records: Storage, most: int | None = None) -> Iterator[dict[str, Any]]:
    for name in records.names()[:most]:
        data = records.read_bytes(name) if name.endswith(".json") else None
        record = {} if data is None else json.loads(data)
        if record.get("codes"):
            yield record


def _random_points(space: Space, count: int) -> Iterator[dict[str, Any]]:
    """Points drawn evenly, the same ones each time."""
    import optuna

    from golf_ray.sweeps.study import suggest_knob

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial, point = study.ask(), dict[str, Any]()
        for knob, distribution in space.distributions.items():
            if space.is_active(knob, point):
                point[knob] = suggest_knob(trial, knob, distribution)
        yield point
