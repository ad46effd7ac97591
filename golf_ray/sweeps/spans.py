"""What a trial's stages held of the cluster, noted as it happens: what a sweep costs is told by it.

Invariant: a stage that began leaves a span, also one that fails; who is killed leaves none of the
stage that was under way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from golf_ray.config import Config
from golf_ray.sweeps.keys import Stage
from golf_ray.sweeps.rooms import Rooms


def workers_of(stage: Stage, config: Config) -> int:
    """Workers or actors that a stage is given."""
    if stage == "train":
        return config.cluster.num_workers
    # A sample of documents is scored by the process that has the codes.
    whole = config.adaptation.sample_documents is None
    return config.cluster.eval_actors if stage == "evaluate" and whole else 1


@contextlib.contextmanager
def noted(
    spans: list[dict[str, Any]],
    stage: Stage,
    config: Config,
    rooms: Rooms,
    result: Mapping[str, Any],
) -> Iterator[None]:
    """Note which GPUs a stage holds in this block, and from when to when.

    Args:
        spans: of the trial's record; one is added.
        rooms: where it waits for what it needs: it holds nothing meanwhile.
        result: the stage's, once the block has ended.
    """
    began_unix_s, waited_s = time.time(), rooms.waited_s
    try:
        yield
    finally:
        spans.append(
            {
                "stage": stage,
                "began_unix_s": began_unix_s + rooms.waited_s - waited_s,
                "ended_unix_s": time.time(),
                "gpus": workers_of(stage, config) * config.cluster.gpus_per_worker,
                "host": result.get("host"),
            }
        )
