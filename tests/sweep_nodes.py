"""A sweep on a cluster of three simulated nodes with made-up GPUs; run as a program.

    python sweep_nodes.py CONFIG.json SPACE STORAGE TRIALS CONCURRENT GPUS [node]

Each node gives out GPUS GPUs. `node` takes one away, with all that runs there, once trainings are
under way on it, and adds another. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from golf_ray.cluster import ENVIRONMENT, connect
from golf_ray.cluster_guard import clean_up
from golf_ray.config import Config
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.runner import run_sweep
from golf_ray.sweeps.space import load_space
from golf_ray.sweeps.table import read_records
from trainers.storage import parse_lines

for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
    os.environ.setdefault(name, value)

CPUS = 8
NUM_NODES = 3


def training_now(plan: SweepPlan) -> int:
    """Trainings whose workers have begun and that are not finished."""
    count = 0
    for name in plan.stages_folder.names("train-"):
        folder = plan.stages_folder.child(name)
        events = parse_lines(folder.child("run").read_bytes("events.jsonl") or b"")
        began = any(event["kind"] == "began" for event in events)
        count += began and not folder.exists("stage.json")
    return count


def watch(plan: SweepPlan, cluster: Any, take_node: bool, seen: dict[str, int]) -> None:
    """Note how many trainings run side by side; do harm when there are two."""
    while True:
        now = training_now(plan)
        seen["most_trainings"] = max(seen["most_trainings"], now)
        if take_node and now >= 2 and not seen["removed"]:
            seen["removed"] = 1
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            cluster.add_node(num_cpus=CPUS, num_gpus=int(sys.argv[6]))
        time.sleep(0.1)


def main() -> None:
    """Search, and say how it went."""
    from ray.cluster_utils import Cluster

    config_file, space, storage, trials, concurrent, gpus = sys.argv[1:7]
    base = Config.from_json(Path(config_file).read_text())
    folder = Path(tempfile.mkdtemp(prefix="gr-nodes-", dir="/tmp"))
    head = {"num_cpus": CPUS, "num_gpus": int(gpus), "include_dashboard": False,
            "temp_dir": str(folder)}  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    plan = SweepPlan(
        name="nodes",
        storage=storage,
        base=base,
        space=load_space(space, base),
        num_trials=int(trials),
        evals_per_training=1,
        max_concurrent=int(concurrent),
        finalists=0,
        data="nodes",
    )
    seen = {"most_trainings": 0, "removed": 0}
    try:
        for _ in range(NUM_NODES - 1):
            cluster.add_node(num_cpus=CPUS, num_gpus=int(gpus))
        cluster.wait_for_nodes(timeout=60)
        with connect(cluster.address):
            threading.Thread(
                target=watch, args=(plan, cluster, "node" in sys.argv, seen), daemon=True
            ).start()
            outcome = run_sweep(plan)
        records = read_records(plan.trials_folder)
        print(
            json.dumps(
                {
                    "done": outcome.num_done,
                    "failed": outcome.num_failed,
                    "reasons": [r["reason"] for r in records if r["reason"]],
                    "disagreements": list(outcome.disagreements),
                    "wall_s": outcome.wall_s,
                    "restarts": [r.get("restarts") for r in records],
                    "attempts": [r.get("attempts", 1) for r in records],
                    "bpb": [r.get("ttt_bpb") for r in records],
                    **seen,
                }
            )
        )
    finally:
        cluster.shutdown()
        clean_up(folder, grace_s=3.0)


if __name__ == "__main__":
    main()
