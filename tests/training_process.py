"""A rank of a training in a process of its own; run by the tests as a program.

    python training_process.py JOB.json RANK

The job names configuration, shards, initial weights, folders, ranks and where to write losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from golf_ray.config import Config
from golf_ray.model.loading import load_tensors
from golf_ray.optim.world import World
from trainers.loop import TrainingRun
from trainers.reporting import Interval, Reporter, WriteFolder


class FolderReporter(Reporter):
    """Writes losses of every interval and checkpoints into a folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.losses: list[tuple[int, float, float]] = []

    def interval(self, interval: Interval) -> None:
        self.losses.append((interval.step, interval.train_loss_nats, interval.grad_norm))

    def checkpoint(self, step: int, write: WriteFolder, *, final: bool) -> None:
        if self.rank:
            return
        unfinished = self.folder / f".{step:06d}"
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(self.folder / f"{step:06d}")


def main() -> None:
    """Run one rank."""
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, size = int(sys.argv[2]), job["size"]
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{job['rendezvous']}", rank=rank, world_size=size
        )
    folder = Path(job["folder"])
    reporter = FolderReporter(folder, rank)
    initial = load_tensors(Path(job["initial"]), "stored")["init"] if job["initial"] else None
    with TrainingRun(
        Config.from_dict(job["config"]),
        [Path(p) for p in job["shards"]],
        world=World.current(torch.device("cpu")),
        reporter=reporter,
        initial=initial,
    ) as run:
        if job.get("resume"):
            run.resume(Path(job["resume"]))
        run.run()
    (folder / f"losses-{rank}.json").write_text(json.dumps(reporter.losses))
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
