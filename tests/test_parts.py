"""Two parts, a file each, that the package does not know: they work in every stage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import TOKENIZER, TRAIN_SHARDS, VAL_SHARDS, final_state

from evaluators.result import evaluate
from golf_ray.config import Config
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.model.checkpoint import build_model
from golf_ray.model.model import GolfModel
from golf_ray.model.parameters import initial_state, matrix_specs, tensor_specs
from golf_ray.model.segments import Segments
from golf_ray.presets import TINY
from golf_ray.quantization.artifact import quantize_checkpoint, restore_state
from golf_ray.quantization.container import read_artifact, write_artifact
from golf_ray.quantization.hessian import collect_hessians
from trainers.loop import TrainingRun

PARTS = Path(__file__).parent / "parts"
SMEAR, GATE = (f"{PARTS / name}.py:PART" for name in ("smear", "output_gate"))
WITH_PARTS = TINY.with_overrides({"model.parts": [SMEAR, GATE]})
GATES = [f"blocks.{i}.attn.gate.weight" for i in range(TINY.model.num_layers)]


def model_with(config: Config, scale: float = 1.0) -> GolfModel:
    """The stored weights, and parts that do something."""
    state = {**initial_state(config.model, 0), **final_state()}
    generator = torch.Generator().manual_seed(1)
    for name in state:
        if name in GATES or name.startswith("smear"):
            state[name] = torch.randn(state[name].shape, generator=generator) * scale
    return build_model(config.model, state)


def test_their_tensors_come_after_the_public_ones() -> None:
    names = [spec.name for spec in tensor_specs(WITH_PARTS.model)]
    assert names == [*final_state(), "smear_gate", "smear_strength", *GATES]
    assert {m.name for m in matrix_specs(WITH_PARTS.model)} >= set(GATES)


def test_parts_that_do_nothing_change_nothing() -> None:
    tokens, segments = torch.arange(2, 66), Segments.rows(1, 64)
    plain = build_model(TINY.model, final_state())
    neutral = model_with(WITH_PARTS, scale=0.0)
    torch.testing.assert_close(
        neutral.hidden(tokens, segments, loop=True), plain.hidden(tokens, segments, loop=True)
    )
    alive = model_with(WITH_PARTS)
    assert not torch.allclose(
        alive.hidden(tokens, segments, loop=True), plain.hidden(tokens, segments, loop=True)
    )


def test_the_smear_stops_at_bos_and_at_segments() -> None:
    model = model_with(TINY.with_overrides({"model.parts": [SMEAR]}))
    tokens = torch.randint(2, 512, (40,), generator=torch.Generator().manual_seed(2))
    tokens[20] = 1
    with torch.no_grad():
        # Without attention between them, only the smear could carry token 19 into place 20.
        row = Segments.of_lengths([20, 20])
        before = model.hidden(tokens, row, loop=True)
        tokens[19] = 7
        assert torch.equal(model.hidden(tokens, row, loop=True)[20:], before[20:])
        # A dense row crosses the BOS: the embedding part of the smear still stops there.
        run = model._pass(tokens, Segments.rows(1, 40), model_hooks())
        x = torch.randn(40, 64)
        smeared = model.parts[0].embedding(x, run)
        assert torch.equal(smeared[20], x[20]) and torch.equal(smeared[0], x[0])
        assert not torch.equal(smeared[21], x[21])


def model_hooks() -> object:
    from golf_ray.model.hooks import Hooks

    return Hooks()


def test_they_train() -> None:
    config = WITH_PARTS.with_overrides({"train.iterations": 2, "train.batch_tokens": 1024})
    with TrainingRun(config, TRAIN_SHARDS) as run:
        before = {n: t.clone() for n, t in run.model.state_dict().items()}
        result = run.run()
        after = run.model.state_dict()
    assert math.isfinite(result.train_loss_nats)
    for name in ("smear_gate", "smear_strength", *GATES):
        assert not torch.equal(after[name], before[name]), name


def test_they_are_calibrated_quantised_stored_and_scored(tmp_path: Path) -> None:
    model = model_with(WITH_PARTS)
    tokens = load_tokens(TRAIN_SHARDS, 512)
    batches = [np.asarray(tokens[i * 256 : (i + 1) * 256]).reshape(4, 64) for i in range(4)]
    hessians = collect_hessians(model, batches)
    assert set(GATES) <= set(hessians) and hessians[GATES[0]].shape == (64, 64)
    # The gate and the queries see the same input.
    for i, gate in enumerate(GATES):
        torch.testing.assert_close(hessians[gate], hessians[f"blocks.{i}.attn.c_q.weight"])

    state = dict(model.state_dict())
    quantized, _ = quantize_checkpoint(WITH_PARTS, state, batches, device=torch.device("cpu"))
    path = tmp_path / "artifact.int6.ptz"
    write_artifact(path, quantized, config=WITH_PARTS)
    stored, kinds, config = read_artifact(path)
    assert config == WITH_PARTS and kinds[GATES[0]] == "gptq (int6)"
    assert kinds["smear_gate"] == "passthrough (float16)"
    restored = restore_state(stored, kinds, WITH_PARTS.model, str(path))
    assert restored.keys() == state.keys()

    val, tables = load_tokens(VAL_SHARDS, 512), byte_tables(TOKENIZER, 512)
    full = evaluate(model, WITH_PARTS, "packed", tokens=val, tables=tables, weights="full")
    int6 = evaluate(
        build_model(WITH_PARTS.model, restored), WITH_PARTS, "packed",
        tokens=val, tables=tables, weights="int6",
    )  # fmt: skip
    assert int6.score.bpb == pytest.approx(full.score.bpb, rel=0.02)
    assert int6.score.bpb != full.score.bpb


def test_they_are_adapted_to_documents_without_looking_ahead() -> None:
    model = model_with(WITH_PARTS)
    val, tables = np.array(load_tokens(VAL_SHARDS, 512)), byte_tables(TOKENIZER, 512)

    def scores(tokens: np.ndarray, config: Config = WITH_PARTS) -> list[np.ndarray]:
        result = evaluate(
            model, config, "ttt", tokens=tokens, tables=tables, weights="full",
            keep_token_nats=True,
        )  # fmt: skip
        assert result.documents is not None
        return [d.token_nats for d in result.documents if d.token_nats is not None]

    before = scores(val)
    alone = scores(val, WITH_PARTS.with_overrides({"adaptation.group_documents": 1}))
    for a, b in zip(before, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    starts = np.flatnonzero(val == 1)
    document, place = 11, 90
    changed = val.copy()
    changed[starts[document] + place + 1 : starts[document + 1]] = 9
    after = scores(changed)
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        same = place if i == document else len(a)
        assert np.array_equal(a[:same], b[:same]), i
    assert not np.array_equal(before[document][place:], after[document][place:])
