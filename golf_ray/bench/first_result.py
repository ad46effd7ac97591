"""One evaluation's start in a process of its own: `golf-ray bench ttt` times it.

The configuration comes on standard input; when the first document is scored, one line of JSON goes
out.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from golf_ray.bench.adaptation import TttBench
from golf_ray.config import Config

DOCUMENTS = 64
CHUNKS = 3


def main() -> None:
    """Score documents of a few chunks."""
    config = Config.from_json(sys.stdin.read())
    torch.set_num_threads(config.evaluation.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = TttBench(config, device)
    bench.run([CHUNKS * config.adaptation.chunk_size] * DOCUMENTS)
    print(json.dumps({"unix_s": time.time()}))


if __name__ == "__main__":
    main()
