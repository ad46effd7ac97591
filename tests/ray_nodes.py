"""An evaluation on a cluster of three simulated nodes, with things that go wrong; run as a program.

    python ray_nodes.py CHECKPOINT CONFIG.json LEDGER ACTORS [kill=SECONDS [once]] [nodes]

`kill=3` sends SIGKILL to an actor every 3 seconds, or once; `nodes` takes a node away after a fifth
of the documents, with all that runs there, and adds another after two fifths. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from golf_ray.cluster import ENVIRONMENT, connect
from golf_ray.cluster_guard import clean_up

for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
    os.environ.setdefault(name, value)

CPUS = 2
NUM_NODES = 3


class Troubles:
    """What goes wrong, and when."""

    def __init__(self, cluster: Any, kill_s: float | None, nodes: bool) -> None:
        self.cluster = cluster
        self.kill_s = kill_s
        self.actors: dict[int, int] = {}
        self.killed = 0
        self.lost = 0
        self.removed = 0
        self.added = 0
        self._nodes = nodes
        self._last_s = time.monotonic()
        self._chance = random.Random(0)

    def happened(self, event: Any) -> None:
        """An actor is ready or lost."""
        if event.kind == "ready":
            self.actors[event.actor] = event.pid
        elif event.kind == "lost":
            self.actors.pop(event.actor, None)
            self.lost += 1

    def told(self, status: Any) -> None:
        """A unit has its result: time to do harm."""
        now_s = time.monotonic()
        due = self.kill_s is not None and now_s - self._last_s >= self.kill_s
        if due and self.actors and not (self.killed and "once" in sys.argv):
            self._last_s = now_s
            self.killed += 1
            os.kill(self._chance.choice(list(self.actors.values())), signal.SIGKILL)
        if self._nodes and not self.removed and status.done >= status.count / 5:
            self.removed += 1
            self.cluster.remove_node(self.cluster.worker_nodes.copy().pop(), allow_graceful=False)
        if self._nodes and not self.added and status.done >= status.count * 2 / 5:
            self.added += 1
            self.cluster.add_node(num_cpus=CPUS)


def main() -> None:
    """Evaluate, and say how it went."""
    from ray.cluster_utils import Cluster

    checkpoint, config_file, ledger, actors = sys.argv[1:5]
    kill_s = next((float(a[5:]) for a in sys.argv if a.startswith("kill=")), None)
    folder = Path(tempfile.mkdtemp(prefix="gr-nodes-", dir="/tmp"))
    head = {"num_cpus": CPUS, "num_gpus": 0, "include_dashboard": False, "temp_dir": str(folder)}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NUM_NODES - 1):
            cluster.add_node(num_cpus=CPUS)
        cluster.wait_for_nodes(timeout=60)
        with connect(cluster.address):
            print(
                json.dumps(evaluate(cluster, checkpoint, config_file, ledger, int(actors), kill_s))
            )
    finally:
        cluster.shutdown()
        clean_up(folder, grace_s=3.0)


def evaluate(
    cluster: Any, checkpoint: str, config_file: str, ledger: str, actors: int, kill_s: float | None
) -> dict[str, Any]:
    """The evaluation of a checkpoint, and figures of it."""
    from evaluators.jobs import Job
    from evaluators.ledger import Ledger
    from evaluators.ray_evaluation import evaluate_jobs_on_ray
    from golf_ray.api import open_weights, validation_stream
    from golf_ray.config import Config

    config = Config.from_json(Path(config_file).read_text())
    tokens, tables = validation_stream(config)
    weights = open_weights(checkpoint)
    kept = Ledger(ledger, {"checkpoint": Path(checkpoint).name})
    before = len(kept.scores)
    job = Job(
        name=checkpoint, state=lambda: weights.state(config.model), weights=weights.kind,
        config=config, method="ttt", tokens=tokens, tables=tables, ledger=kept,
    )  # fmt: skip
    troubles = Troubles(cluster, kill_s, "nodes" in sys.argv)
    reports: list[Any] = []
    [found] = evaluate_jobs_on_ray(
        [job], num_actors=actors, on_event=troubles.happened, on_status=troubles.told,
        on_report=reports.append,
    )  # fmt: skip
    if isinstance(found, Exception):
        raise found
    assert found.documents is not None
    return {
        "nats": found.score.nats.hex(),
        "documents": len(found.documents),
        "kept_before": before,
        "killed": troubles.killed,
        "removed": troubles.removed,
        "added": troubles.added,
        "actors_lost": troubles.lost,
        **({} if not reports else reports[0].to_dict()),
    }


if __name__ == "__main__":
    main()
