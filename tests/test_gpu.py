"""The same mathematics on a GPU: stored values in float32, and bfloat16 within its noise of them.

These skip themselves where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference import FOLDER, TOKENIZER, TRAIN_SHARDS, VAL_SHARDS, arrays, final_state
from reference import training_states as stored_states

from evaluators.result import evaluate
from golf_ray.adaptation.adapters import adapter_slots, read_adapter_init
from golf_ray.config import Config
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.model.checkpoint import build_model
from golf_ray.model.compute import Compute
from golf_ray.model.segments import Segments
from golf_ray.optim.world import World
from golf_ray.presets import TINY
from trainers.loop import TrainingRun
from trainers.reporting import Interval, Reporter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32: the stored values are float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


class Losses(Reporter):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def interval(self, interval: Interval) -> None:
        self.values.append(interval.train_loss_nats)


def train(config: Config) -> list[float]:
    losses = Losses()
    world = World(device=torch.device("cuda"))
    with TrainingRun(
        config, TRAIN_SHARDS, world=world, reporter=losses, initial=stored_states()["init"]
    ) as run:
        run.run()
    return losses.values


@pytest.mark.parametrize("loop", [0, 1])
def test_logits(loop: int) -> None:
    stored = arrays("forward")
    model = build_model(TINY.model, final_state(), device="cuda")
    segments = Segments.of_bounds(stored["cu_seqlens"], 64, "cuda")
    tokens = torch.from_numpy(stored["tokens"]).cuda()
    found = model.logits(model.hidden(tokens, segments, loop=bool(loop))).cpu()
    expected = torch.from_numpy(stored[f"logits_varlen_loop{loop}"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_training_in_float32_and_bfloat16() -> None:
    config = TINY.with_overrides({"train.log_every_steps": 1})
    expected = arrays("training")["loss"]
    assert train(config) == pytest.approx(expected, rel=1e-4)
    # bfloat16 keeps 8 bits: logits, and with them losses, are good to about 2^-8 relative.
    half = train(config.with_overrides({"train.precision": "bfloat16"}))
    assert half == pytest.approx(expected, rel=2**-8)


@pytest.mark.parametrize("method", ["packed", "sliding", "ttt"])
def test_scores(method: str) -> None:
    stored = arrays("ttt" if method == "ttt" else "forward")
    expected = float(stored["val_loss" if method == "ttt" else f"{method}_loss"])
    tokens, tables = np.array(load_tokens(VAL_SHARDS, 512)), byte_tables(TOKENIZER, 512)
    slots = adapter_slots(TINY.model, TINY.adaptation.sites)
    init = read_adapter_init(Path(FOLDER / "ttt.npz"), slots, TINY.adaptation.rank)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(TINY.model, final_state(), device="cuda", compute=Compute(dtype=dtype))
        result = evaluate(
            model,
            TINY,
            method,  # type: ignore[arg-type]
            tokens=tokens,
            tables=tables,
            weights="full",
            adapter_init=init if method == "ttt" else None,
        )
        losses[dtype] = result.score.loss_nats
    assert losses[torch.float32] == pytest.approx(expected, abs=1e-5)
    assert losses[torch.bfloat16] == pytest.approx(expected, abs=7.2 * 2**-8)
