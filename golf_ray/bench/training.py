"""Speed of training: real runs of a few steps, their start-up, and where a step's time goes.

A run takes steps without looping, then as many with; what is reported is what any run reports of
itself. More than one worker run through Ray Train, as users' runs do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from golf_ray.bench.corpus import write_random_shards
from golf_ray.bench.processes import cold_and_warm
from golf_ray.bench.profile import profile_work
from golf_ray.config import Config
from golf_ray.errors import TrainingFailed
from golf_ray.optim.world import World
from trainers.loop import TrainingResult, TrainingRun

Tell = Callable[[str], None]
WARM_UP_STEPS = 2
"""Steps of either kind that are not counted: the first of a kind, and the one after."""
SHARD_STEPS = 8
"""Steps of tokens in a random shard."""


def bench_config(config: Config, steps: int) -> Config:
    """A run of `steps` counted steps without looping, then as many with."""
    return config.with_overrides(
        {
            "train.max_wallclock_s": None,
            "train.iterations": 2 * (steps + WARM_UP_STEPS),
            "train.enable_looping_at": 0.5,
            "train.val_every_steps": None,
            "train.checkpoint_every_steps": None,
            "train.log_every_steps": 10_000,
        }
    )


@contextmanager
def random_shards(config: Config) -> Iterator[Sequence[Path]]:
    """Shards of random documents, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="golf-ray-bench-") as folder:
        tokens = (SHARD_STEPS + 1) * config.train.batch_tokens
        yield write_random_shards(Path(folder), 1, tokens, config.model.vocab_size)


def run_here(
    config: Config, shards: Sequence[Path], device: torch.device, *, profiled: bool = False
) -> dict[str, Any]:
    """One rank in this process: what the run says of itself, and a profile if asked for."""
    with TrainingRun(config, shards, world=World(device=device)) as run:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found = facts(run.run())
        if profiled and device.type == "cuda":
            parts = {"loop off": 0.0, "loop on": 0.99}
            found["profile"] = {
                name: [asdict(share) for share in profile_work(partial(run.take_step, part))]
                for name, part in parts.items()
            }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def run_on_ray(config: Config, shards: Sequence[Path]) -> dict[str, Any]:
    """The workers of `config.cluster` on the connected cluster."""
    from trainers.ray_train import train_on_ray

    with tempfile.TemporaryDirectory(prefix="golf-ray-bench-") as folder:
        outcome = train_on_ray(config, Path(folder) / "run", shards=shards)
        return {**facts(outcome.result), "start_s": outcome.start_s}


def facts(result: TrainingResult) -> dict[str, Any]:
    """What a benchmark keeps of a run."""
    return {
        "tokens_per_s": result.tokens_per_s,
        "tokens_per_s_looping": result.tokens_per_s_looping,
        "peak_memory_bytes": result.peak_memory_bytes,
        "compile_s": result.compile_s,
        "to_first_step_s": result.to_first_step_s,
        "steps": result.steps,
        "compute": dict(result.compute),
    }


def plain_config(config: Config) -> Config:
    """The same run from torch's own operations, under torch.compile: what there is without kernels
    of one's own. Attention is the same."""
    return config.with_overrides(
        {"kernels.backend": "torch", "kernels.compile": True, "kernels.graphs": False}
    )


def time_start_up(config: Config, shards: Sequence[Path]) -> dict[str, float]:
    """Seconds from entering the training function to its first step, in processes of their own:
    with nothing compiled yet, and once more.

    Raises:
        TrainingFailed: such a process failed.
    """
    return cold_and_warm(
        "golf_ray.bench.start_up",
        config,
        lambda line, began_unix_s: float(line["to_first_step_s"]),
        cache="XDG_CACHE_HOME",
        error=TrainingFailed,
        arguments=[str(path) for path in shards],
    )


def ratios(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float]:
    """Mine over theirs, of every figure of speed that both have."""
    names = ("tokens_per_s", "tokens_per_s_looping")
    return {n: mine[n] / theirs[n] for n in names if mine.get(n) and theirs.get(n)}
