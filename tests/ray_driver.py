"""A driver in a process of its own, which tests end in different ways; run as a program.

    python ray_driver.py connect NOTES
    python ray_driver.py train NOTES RUN_DIR CONFIG.json
    python ray_driver.py evaluate NOTES LEDGER CONFIG.json

NOTES is written when a local cluster is up: its processes' ids and its folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil

from golf_ray.cluster import connect
from golf_ray.config import Config
from golf_ray.records import atomic_write_json


def main() -> None:
    """Do what the first argument says."""
    verb, notes = sys.argv[1], Path(sys.argv[2])
    with connect(num_cpus=4) as cluster:
        import ray

        folder = ray.get_runtime_context().get_temp_dir()
        processes = psutil.Process().children(recursive=True)
        atomic_write_json(
            notes,
            {"address": cluster.address, "folder": folder, "pids": [p.pid for p in processes]},
        )
        if verb == "train":
            from reference import TRAIN_SHARDS

            from trainers.ray_train import train_on_ray

            config = Config.from_json(Path(sys.argv[4]).read_text())
            train_on_ray(config, sys.argv[3], shards=TRAIN_SHARDS)
        elif verb == "evaluate":
            from reference import TOKENIZER, VAL_SHARDS, final_state

            from evaluators.ledger import Ledger
            from evaluators.ray_evaluation import evaluate_on_ray
            from golf_ray.data.shards import load_tokens
            from golf_ray.data.tokenizer import byte_tables

            evaluate_on_ray(
                final_state(),
                Config.from_json(Path(sys.argv[4]).read_text()),
                "ttt",
                tokens=load_tokens(VAL_SHARDS, 512),
                tables=byte_tables(TOKENIZER, 512),
                weights="full",
                num_actors=2,
                keep_token_nats=True,
                ledger=Ledger(sys.argv[3], {"weights": "tiny"}),
            )
        elif "--wait" in sys.argv:
            time.sleep(600)
    print(json.dumps({"ended": True}))


if __name__ == "__main__":
    main()
