"""One training's start in a process of its own: `golf-ray bench train` times it.

The configuration comes on standard input, shards as arguments; one line of JSON goes out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from golf_ray.config import Config
from golf_ray.optim.world import World
from trainers.loop import TrainingRun


def main() -> None:
    """Take one step."""
    config = Config.from_json(sys.stdin.read())
    # Two steps, so that both kinds are among what a run prepares for.
    config = config.with_overrides({"train.iterations": 2, "train.enable_looping_at": 0.5})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TrainingRun(config, [Path(p) for p in sys.argv[1:]], world=World(device=device)) as run:
        result = run.run()
    print(json.dumps({"to_first_step_s": result.to_first_step_s}))


if __name__ == "__main__":
    main()
