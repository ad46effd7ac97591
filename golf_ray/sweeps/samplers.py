"""Optuna's samplers by name, each made anew for every trial from the sweep's seed.

A sampler carries nothing in memory from one trial to the next: what it draws is a function of the
seed, the trial's number and the study. So a sweep that was interrupted goes on with the points of
one that was not.

What a sampler learns from differs. All learn from trials that have values, and from the
constraints of those (cmaes from no constraints); only tpe learns from a trial that is over a limit
and was never scored. Random and qmc learn nothing. A trial that failed teaches none of them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings

from optuna import samplers
from optuna.exceptions import ExperimentalWarning

from golf_ray.errors import ConfigError, nearest

SAMPLERS = ("tpe", "random", "gp", "nsga2", "qmc", "cmaes")
"""Names that `make_sampler` knows; the first is the default."""

_NEEDS = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}


def draw_seed(seed: int, number: int, draw: int = 0) -> int:
    """A seed of 32 bits for one draw of one trial, unlike that of any neighbour."""
    digest = hashlib.sha256(f"{seed}/{number}/{draw}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def require_groups(name: str, group_size: int) -> None:
    """See that a sampler can serve trials that share a training.

    Raises:
        ConfigError: it cannot.
    """
    if name == "cmaes" and group_size > 1:
        # It draws all knobs or none: trials with some of them given would be random.
        raise ConfigError("sampler 'cmaes' cannot share trainings between trials",
                          "use 1 evaluation per training, or another sampler")  # fmt: skip


def make_sampler(
    name: str, *, seed: int, number: int, draw: int = 0, num_objectives: int = 1
) -> samplers.BaseSampler:
    """A sampler for one trial, or for one knob of it.

    Args:
        name: one of `SAMPLERS`.
        seed: of the sweep.
        number: of the trial, from 1.
        draw: 0 for the knobs that are drawn together, else which knob, from 1.
        num_objectives: of the study.

    Raises:
        ConfigError: there is none of that name, its package is missing, or it cannot serve so many
            objectives.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler '{name}'", nearest(name, SAMPLERS))
    package = _NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"sampler '{name}' needs the package {package}, which is not installed",
                          f"run pip install {package}, or choose another sampler")  # fmt: skip
    if name == "cmaes" and num_objectives > 1:
        raise ConfigError(f"sampler 'cmaes' cannot search {num_objectives} objectives at once",
                          "choose tpe, gp or nsga2")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return _make(name, seed, draw_seed(seed, number, draw))


def _make(name: str, sweep_seed: int, seed: int) -> samplers.BaseSampler:
    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "gp":
        return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if name == "nsga2":
        return samplers.NSGAIISampler(seed=seed)
    # The place in the sequence, and the state of cmaes, lie in the study: their seed is one for
    # the whole sweep. What they cannot draw (choices, conditional knobs) is drawn as for random.
    alone = samplers.RandomSampler(seed=seed)
    if name == "qmc":
        return samplers.QMCSampler(
            seed=draw_seed(sweep_seed, 0),
            scramble=True,
            independent_sampler=alone,
            warn_independent_sampling=False,
        )
    if name == "cmaes":
        return samplers.CmaEsSampler(
            seed=draw_seed(sweep_seed, 0),
            independent_sampler=alone,
            warn_independent_sampling=False,
        )
    # Trials that are at work count as bad ones: those that run together do not repeat one another.
    return samplers.TPESampler(seed=seed, constant_liar=True)
