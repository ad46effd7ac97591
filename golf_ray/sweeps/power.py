"""What a sweep can find out, said before it runs: smallest effects, and knobs it cannot resolve.

Scores differ between trainings of one configuration far more than between evaluations of one
artifact. So an effect of a training knob hides in the noise of few trainings, while a knob of
quantisation or evaluation is compared within a training, where that noise is shared and falls out
of the difference. This is arithmetic about noise that is assumed; it looks at no score.

The model: score = sum of linear effects of knobs that are sampled evenly over their ranges
+ noise of the training, shared by its trials + noise of the evaluation. The analysis is the
regression a user would make: knobs after training on what trials differ by within their
training, then training knobs on the means of trainings; with one trial a training, all knobs at
once. A sampler that seeks the best (TPE) spreads its points less evenly and finds less of this.

Invariant: what cannot be estimated at all (more knobs than points) is None, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from golf_ray.errors import UsageError
from golf_ray.stats import (
    ALPHA,
    POWER,
    expected_maximum,
    noncentrality,
    smallest_difference,
    t_power,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from golf_ray.sweeps.space import Stage

WANTED_BPB: Final = 0.001
"""An effect worth finding: the field claims 0.0002 to 0.001 for most single knobs."""
NUM_DESIGNS: Final = 200
"""Sweeps whose points are drawn; their mean chance of finding an effect is within 1%."""
EVEN_VARIANCE: Final = 1 / 12
"""Of a knob that is sampled evenly over a range of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """Standard deviations of a score; the defaults are the field's, of its record's size."""

    training_bpb: float = 0.00075
    """Between trainings of one configuration with different seeds."""
    evaluation_bpb: float = 4e-6
    """Between evaluations of one artifact on the same documents."""
    sample_bpb: float = 0.0
    """Standard error of a difference that a sample of documents has; 0 where all are scored.
    All trials score the same documents, so more trials do not average it out."""

    def __post_init__(self) -> None:
        for name in ("training_bpb", "evaluation_bpb", "sample_bpb"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"noise {name} = {value} is no standard deviation",
                                 "give 0 or more")  # fmt: skip

    @property
    def run_bpb(self) -> float:
        """Of a training that is evaluated once."""
        return math.hypot(self.training_bpb, self.evaluation_bpb)


@dataclass(frozen=True, kw_only=True, slots=True)
class KnobPower:
    """What a sweep can say of a knob."""

    knob: str
    stage: Stage
    smallest_bpb: float | None
    """The smallest effect over the knob's whole range that is found with 80% power at one-sided
    5%; None where there are too few points for any."""
    resolvable: bool
    """Whether that is as small as what is wanted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPower:
    """What a sweep can find out."""

    num_trials: int
    num_trainings: int
    noise: Noise
    wanted_bpb: float
    knobs: tuple[KnobPower, ...]
    optimism_bpb: float
    """What the best score is too good by, at most and on average, because it was picked."""
    single_runs_bpb: float
    """The smallest difference that two single runs show."""
    needed_trainings: int | None
    """About how many trainings resolve every training knob; None where they do already."""

    @property
    def unresolvable(self) -> tuple[str, ...]:
        """Knobs whose wanted effect this sweep would miss too often."""
        return tuple(k.knob for k in self.knobs if not k.resolvable)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "num_trials": self.num_trials,
            "num_trainings": self.num_trainings,
            "training_sd_bpb": self.noise.training_bpb,
            "evaluation_sd_bpb": self.noise.evaluation_bpb,
            "sample_error_bpb": self.noise.sample_bpb,
            "power": POWER,
            "alpha": ALPHA,
            "wanted_bpb": self.wanted_bpb,
            "knobs": {
                k.knob: {
                    "stage": k.stage,
                    "smallest_bpb": k.smallest_bpb,
                    "resolvable": k.resolvable,
                }
                for k in self.knobs
            },
            "optimism_bpb": self.optimism_bpb,
            "single_runs_bpb": self.single_runs_bpb,
            "needed_trainings": self.needed_trainings,
        }

    def lines(self) -> tuple[str, ...]:
        """For people: what can be found, what cannot, and how far to trust the best."""
        noise = self.noise
        told = [
            f"assumed noise: {_bpb(noise.training_bpb)} bpb between trainings, "
            f"{_bpb(noise.evaluation_bpb)} between evaluations of one artifact"
            + (f", {_bpb(noise.sample_bpb)} by the sample" if noise.sample_bpb else "")
        ]
        for what, knobs in self._alike():
            if knobs[0].smallest_bpb is None:
                told.append(f"{what}: too few points to tell any effect")
            else:
                told.append(
                    f"{what}: found from {_bpb(knobs[0].smallest_bpb)} bpb over the whole range "
                    f"({POWER:.0%} power, one-sided {ALPHA:.0%})"
                )
        if self.unresolvable:
            more = self.needed_trainings
            told.append(
                f"an effect of {_bpb(self.wanted_bpb)} bpb is out of reach for "
                + ", ".join(self.unresolvable)
                + (f"; about {more} trainings would do for training knobs" if more else "")
            )
        if self.num_trainings == self.num_trials and any(
            k.stage != "train" and not k.resolvable for k in self.knobs
        ):
            told.append(
                "two or more trials a training would compare the other knobs without its noise"
            )
        told.append(f"two single runs show a difference from {_bpb(self.single_runs_bpb)} bpb")
        told.append(self.optimism_line())
        return tuple(told)

    def optimism_line(self) -> str:
        """What picking the best does to its score."""
        what, number = ("trainings", self.num_trainings)
        if number == 1:
            what, number = ("evaluations", self.num_trials)
        if number == 1:
            return "with one run nothing is picked, so its score is as good as it looks"
        return (
            f"the best of {number} {what} looks {_bpb(self.optimism_bpb)} bpb better than it is "
            "if no knob matters, and less so if some do"
        )

    def _alike(self) -> list[tuple[str, list[KnobPower]]]:
        groups = [
            ("training knobs", [k for k in self.knobs if k.stage == "train"]),
            ("other knobs", [k for k in self.knobs if k.stage != "train"]),
        ]
        return [(what, knobs) for what, knobs in groups if knobs]


def sweep_power(
    knobs: Mapping[str, Stage],
    *,
    num_trials: int,
    evals_per_training: int,
    noise: Noise | None = None,
    wanted_bpb: float = WANTED_BPB,
    seed: int = 0,
) -> SweepPower:
    """What a sweep of some knobs can find out.

    Args:
        knobs: the first stage that depends on each.
        evals_per_training: trials of a training at most.
        noise: the field's where not given.
        wanted_bpb: the effect over a knob's whole range that is worth finding.
        seed: of the points that are drawn.

    Raises:
        UsageError: a count is below 1, or the wanted effect is not above 0.
    """
    noise = noise or Noise()
    found = resolve(
        knobs, num_trials=num_trials, evals_per_training=evals_per_training, noise=noise,
        wanted_bpb=wanted_bpb, seed=seed,
    )  # fmt: skip
    num = _num_trainings(knobs, num_trials, evals_per_training)
    missed = [k for k in found if k.stage == "train" and not k.resolvable]
    num_knobs = sum(stage == "train" for stage in knobs.values())
    return SweepPower(
        num_trials=num_trials,
        num_trainings=num,
        noise=noise,
        wanted_bpb=wanted_bpb,
        knobs=tuple(found),
        optimism_bpb=optimism(noise, num_trials=num_trials, num_trainings=num),
        single_runs_bpb=best_against_baseline(noise, 1),
        needed_trainings=needed_trainings(noise, num_knobs, wanted_bpb) if missed else None,
    )


def resolve(
    knobs: Mapping[str, Stage],
    *,
    num_trials: int,
    evals_per_training: int,
    noise: Noise | None = None,
    wanted_bpb: float = WANTED_BPB,
    seed: int = 0,
) -> list[KnobPower]:
    """The smallest effect of each knob that a sweep finds, in the order of the knobs.

    Points are drawn as the sweep would, `NUM_DESIGNS` times. Given its points, the chance that a
    sweep finds an effect is that of a noncentral t variable, exactly where no sample of documents
    adds its error; chances are averaged over the draws. A knob of few choices, as integers and
    categories, varies more than evenly, and a little less is found of it than could be.

    Raises:
        UsageError: a count is below 1, or the wanted effect is not above 0.
    """
    import numpy as np

    if min(num_trials, evals_per_training) < 1 or not wanted_bpb > 0:
        raise UsageError(
            f"{num_trials} trials, {evals_per_training} a training, for {wanted_bpb} bpb is no "
            "sweep",
            "give counts of 1 or more and an effect above 0",
        )
    noise, generator = noise or Noise(), np.random.default_rng(seed)
    trained = sum(stage == "train" for stage in knobs.values())
    other = len(knobs) - trained
    num = _num_trainings(knobs, num_trials, evals_per_training)
    members = np.full(num, math.ceil(num_trials / num))
    if trained:
        members[:] = evals_per_training
        members[-1] = num_trials - evals_per_training * (num - 1)
    smallest: dict[bool, float | None] = {True: None, False: None}
    if num == num_trials > 1:
        # One trial a training: all knobs at once.
        points = np.array([num_trials])
        both = _smallest(points, len(knobs), noise.run_bpb, noise, generator)
        smallest = {True: both, False: both}
    else:
        if other:
            smallest[False] = _smallest(members, other, noise.evaluation_bpb, noise, generator)
        # Where effects of the other knobs are not known, they are not to be taken off the means.
        if trained and (not other or smallest[False] is not None):
            mean_bpb = noise.evaluation_bpb * math.sqrt(float(np.mean(1 / members)))
            sd_bpb = math.hypot(noise.training_bpb, mean_bpb)
            smallest[True] = _smallest(np.array([num]), trained, sd_bpb, noise, generator)
    found = []
    for knob, stage in knobs.items():
        value = smallest[stage == "train"]
        found.append(
            KnobPower(
                knob=knob, stage=stage, smallest_bpb=value,
                resolvable=value is not None and value <= wanted_bpb,
            )
        )  # fmt: skip
    return found


def best_against_baseline(noise: Noise, num_seeds: int = 1) -> float:
    """The smallest difference that two samples of so many seeds show, their noise being known.

    Raises:
        UsageError: there is no seed.
    """
    return smallest_difference(noise.run_bpb, num_seeds, num_seeds)


def optimism(noise: Noise, *, num_trials: int, num_trainings: int) -> float:
    """What the best of some trials is too good by, on average, where they are all equal.

    The best by a noisy score is picked for its luck too: by E[max of n normals] standard
    deviations. The luck of trainings and that of evaluations add up to no more than this sum.

    Raises:
        UsageError: a count is below 1.
    """
    # Either end of a difference has its share of the sample's error.
    own_bpb = math.hypot(noise.evaluation_bpb, noise.sample_bpb / math.sqrt(2))
    return (
        expected_maximum(num_trainings) * noise.training_bpb
        + expected_maximum(num_trials) * own_bpb
    )


def needed_trainings(noise: Noise, num_knobs: int, wanted_bpb: float = WANTED_BPB) -> int:
    """About how many trainings find a wanted effect of every one of some training knobs.

    With points drawn from a normal distribution of variance V the squared standard error of a
    slope is sd^2 / (V (n - knobs - 2)) on average; evenly drawn ones come close to it.
    """
    ratio = noncentrality(math.inf) * noise.run_bpb / wanted_bpb
    return math.ceil(ratio**2 / EVEN_VARIANCE) + num_knobs + 2


def _num_trainings(knobs: Mapping[str, Stage], num_trials: int, evals_per_training: int) -> int:
    if "train" not in knobs.values():
        return 1
    return math.ceil(num_trials / evals_per_training)


def _smallest(
    members: NDArray[np.integer],
    num_knobs: int,
    sd_bpb: float,
    noise: Noise,
    generator: np.random.Generator,
) -> float | None:
    """The smallest slope that a regression finds, with an intercept for each group of points.

    Args:
        members: points of each group.
        sd_bpb: of a point's noise.
    """
    import numpy as np

    degrees: float = int(members.sum()) - len(members) - num_knobs
    if degrees < 1:
        return None
    errors_bpb = sd_bpb * _slope_errors(members, num_knobs, generator)
    whole_bpb = np.hypot(errors_bpb, noise.sample_bpb)
    if not whole_bpb.any():
        return 0.0
    if noise.sample_bpb:
        # Satterthwaite's, the sample's own error being known.
        share = float(np.median(errors_bpb) / np.median(whole_bpb))
        degrees = degrees / share**4 if share else math.inf
    times = noncentrality(degrees)
    at = np.linspace(0, 4 * times, 161)
    chances = [t_power(shift, degrees) for shift in at.tolist()]
    low, high = 0.0, 2 * times * float(whole_bpb.max())
    for _ in range(60):
        middle = (low + high) / 2
        chance = float(np.interp(middle / whole_bpb, at, chances).mean())
        low, high = (low, middle) if chance >= POWER else (middle, high)
    return high


def _slope_errors(
    members: NDArray[np.integer], num_knobs: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Standard errors of the slopes of evenly drawn points, over the noise's: a row a draw."""
    import numpy as np

    starts, rows = np.cumsum(members) - members, []
    for _ in range(NUM_DESIGNS):
        points = generator.random((int(members.sum()), num_knobs))
        means = np.add.reduceat(points, starts) / members[:, None]
        points -= np.repeat(means, members, axis=0)
        rows.append(np.sqrt(np.diag(np.linalg.inv(points.T @ points))))
    return np.array(rows)


def _bpb(value: float) -> str:
    """Two digits that count, never as a power of ten."""
    if not value:
        return "0"
    digits = max(1, 1 - math.floor(math.log10(value)))
    return f"{value:.{digits}f}".rstrip("0")
