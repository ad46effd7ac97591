"""Checkpoint to artifact and back: the stored artifact, bits and clips per group, errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import FOLDER, arrays, final_state, tiny_model
from torch import Tensor

from golf_ray.config import Config
from golf_ray.errors import CheckpointError
from golf_ray.model.checkpoint import build_model
from golf_ray.model.parameters import initial_state, matrix_specs, tensor_specs
from golf_ray.model.segments import Segments
from golf_ray.presets import RECORD, TINY
from golf_ray.quantization.artifact import (
    count_saturated,
    load_artifact,
    matrix_setting,
    prepare_factors,
    quantize_checkpoint,
    quantize_state,
    quantized_matrices,
)
from golf_ray.quantization.container import (
    QuantizedState,
    dequantize,
    encode_artifact,
    kind_bits,
    read_artifact,
    write_artifact,
)
from golf_ray.quantization.hessian import collect_hessians

PUBLIC = FOLDER / "final_model.int6.ptz"
CALIBRATION = arrays("gptq")["calibration_tokens"].astype(np.int64)


@pytest.fixture(scope="module")
def hessians() -> dict[str, Tensor]:
    return collect_hessians(tiny_model(), CALIBRATION)


def codes(state: QuantizedState) -> dict[str, Tensor]:
    """Codes by matrix name."""
    return {n: state.tensors[f"{n}.q"] for n, k in state.kinds.items() if kind_bits(k) is not None}


def changed(a: QuantizedState, b: QuantizedState) -> set[str]:
    """Matrices whose codes, scales or kind differ."""
    return {
        name
        for name in codes(a)
        if a.kinds[name] != b.kinds[name]
        or any(
            not torch.equal(a.tensors[name + end], b.tensors[name + end])
            for end in (".q", ".scale")
        )
    }


def dense_logits(state: dict[str, Tensor]) -> Tensor:
    """Logits of the stored 64 dense tokens, looping on."""
    model = build_model(TINY.model, state)
    tokens = torch.from_numpy(arrays("forward")["tokens"][:64])
    segments = Segments.rows(1, 64, "cpu")
    with torch.no_grad():
        return model.logits(model.hidden(tokens, segments, loop=True))


def test_public_artifact_gives_the_stored_logits() -> None:
    state = load_artifact(PUBLIC, TINY)
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        s.name: s.shape for s in tensor_specs(TINY.model)
    }
    stored = torch.from_numpy(arrays("quantized_eval")["logits_dense"])
    torch.testing.assert_close(dense_logits(state), stored, rtol=0, atol=1e-4)


def test_quantised_tiny_checkpoint_is_the_public_artifact() -> None:
    quantized, report = quantize_checkpoint(TINY, final_state(), CALIBRATION)
    tensors, kinds, _ = read_artifact(PUBLIC)
    assert quantized.kinds == kinds and list(quantized.kinds) == list(kinds)
    assert list(quantized.tensors) == list(tensors)
    same = total = 0
    for name, tensor in tensors.items():
        found = quantized.tensors[name]
        if name.endswith(".q"):
            same += int((found == tensor).sum())
            total += tensor.numel()
        else:
            assert torch.equal(found, tensor), name
    assert total == 253_952 and same / total >= 0.999
    assert report.num_codes == total and report.raised_damping == {}
    size = len(encode_artifact(quantized))
    assert size <= int(arrays("quantized_eval")["artifact_bytes"])


def test_same_inputs_same_bytes(hessians: dict[str, Tensor]) -> None:
    first = quantize_state(final_state(), hessians, TINY)
    second = quantize_state(final_state(), hessians, TINY)
    assert encode_artifact(first, compressor="lzma") == encode_artifact(second, compressor="lzma")


def test_round_trip_through_the_file(tmp_path: Path, hessians: dict[str, Tensor]) -> None:
    config = dataclasses.replace(TINY, name="mine")
    quantized = quantize_state(final_state(), hessians, config)
    path = tmp_path / "model.ptz"
    write_artifact(path, quantized, config=config, compressor="lzma")
    state, same = load_artifact(path), load_artifact(path, TINY)
    assert list(state) == [s.name for s in tensor_specs(TINY.model)]
    assert all(torch.equal(state[name], same[name]) for name in state)
    weights = dequantize(quantized.tensors, quantized.kinds)
    assert torch.equal(state["kv_bank"][6 + 2], weights["blocks.2.attn.c_v.weight"])
    full = final_state()
    for name, tensor in state.items():
        assert float((tensor - full[name]).norm() / full[name].norm()) < 0.2, name


# Bits and clips -------------------------------------------------------------------------------


def test_settings_of_groups_and_looped_layers() -> None:
    config = TINY.with_overrides(
        {
            "quantization.mlp_bits": 5,
            "quantization.mlp_clip_sigmas": 12.0,
            "quantization.attention_clip_sigmas": 13.0,
            "quantization.embedding_bits": 7,
            "quantization.embedding_clip_sigmas": 15.0,
        }
    )
    specs = {s.name: s for s in matrix_specs(config.model)}

    def setting(name: str, config: Config) -> tuple[int, float]:
        return matrix_setting(specs[name], config.model, config.quantization)

    assert setting("blocks.0.mlp.fc.weight", config) == (5, 12.0)
    assert setting("blocks.2.mlp.proj.weight", config) == (5, 12.0)
    assert setting("blocks.5.attn.c_k.weight", config) == (6, 13.0)
    assert setting("tok_emb.weight", config) == (7, 15.0)
    looped = config.with_overrides({"quantization.looped_bits": 8})
    assert setting("blocks.2.mlp.proj.weight", looped) == (8, 12.0)
    assert setting("blocks.3.attn.c_q.weight", looped) == (8, 13.0)
    assert setting("blocks.4.attn.c_q.weight", looped) == (6, 13.0)
    assert setting("tok_emb.weight", looped) == (7, 15.0)
    looped = config.with_overrides({"quantization.looped_clip_sigmas": 9.0})
    assert setting("blocks.3.attn.c_q.weight", looped) == (6, 9.0)
    unlooped = looped.with_overrides({"model.num_loops": 0, "quantization.looped_bits": 8})
    assert setting("blocks.3.attn.c_q.weight", unlooped) == (6, 13.0)


GROUPS = {
    "mlp": lambda name: ".mlp." in name,
    "attention": lambda name: ".attn." in name,
    "embedding": lambda name: name == "tok_emb.weight",
    "looped": lambda name: name.startswith(("blocks.2.", "blocks.3.")),
}


@pytest.mark.parametrize("group", list(GROUPS))
def test_each_knob_changes_its_group_alone(group: str, hessians: dict[str, Tensor]) -> None:
    state = final_state()
    factors = prepare_factors(TINY, hessians)
    base = quantize_state(state, hessians, TINY, factors=factors)
    members = {name for name in codes(base) if GROUPS[group](name)}
    for knob, value in (("bits", 5), ("clip_sigmas", 9.0)):
        config = TINY.with_overrides({f"quantization.{group}_{knob}": value})
        assert changed(base, quantize_state(state, hessians, config, factors=factors)) == members


def test_bits_bound_the_codes_and_saturation_is_counted(hessians: dict[str, Tensor]) -> None:
    config = TINY.with_overrides({"quantization.mlp_bits": 3, "quantization.mlp_clip_sigmas": 1.0})
    quantized = quantize_state(final_state(), hessians, config)
    name = "blocks.1.mlp.fc.weight"
    assert quantized.kinds[name] == "gptq (int3)"
    assert int(codes(quantized)[name].abs().max()) == 3
    saturated, total = count_saturated(quantized)
    mlp = {n: q for n, q in codes(quantized).items() if ".mlp." in n}
    assert saturated == sum(int((q.abs() == 3).sum()) for q in mlp.values()) > 0.2 * 6 * 24_576
    assert total == 253_952


@pytest.mark.parametrize(("limit", "expected"), [(0, 37), (2048, 25), (4096, 13), (32768, 0)])
def test_threshold(limit: int, expected: int, hessians: dict[str, Tensor]) -> None:
    config = TINY.with_overrides({"quantization.float16_max_numel": limit})
    quantized = quantize_state(final_state(), hessians, config)
    assert len(codes(quantized)) == len(quantized_matrices(config)) == expected
    for name, kind in quantized.kinds.items():
        if kind_bits(kind) is None:
            assert kind == "passthrough (float16)"
            assert quantized.tensors[name].dtype == torch.float16


def test_record_quantises_every_matrix_and_nothing_else() -> None:
    matrices = quantized_matrices(RECORD)
    assert len(matrices) == 67 and len(matrices) == len(matrix_specs(RECORD.model))
    small = [s for s in tensor_specs(RECORD.model) if s.optimizer == "small"]
    assert all(np.prod(s.shape) <= RECORD.quantization.float16_max_numel for s in small)


# Factors and Hessians -------------------------------------------------------------------------


def test_query_key_value_share_a_factor(hessians: dict[str, Tensor]) -> None:
    factors = prepare_factors(TINY, hessians)
    assert factors.keys() == hessians.keys()
    q, k, v = (factors[f"blocks.1.attn.c_{x}.weight"] for x in "qkv")
    assert q is k and k is v
    # The same where every Hessian is a copy of its own.
    copies = prepare_factors(TINY, {name: h.clone() for name, h in hessians.items()})
    assert all(torch.equal(copies[n].upper_CC, factors[n].upper_CC) for n in factors)


def test_batches_of_factorisations_change_nothing(
    hessians: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize_state(final_state(), hessians, TINY)
    monkeypatch.setattr("golf_ray.quantization.artifact.MAX_BATCH_ELEMENTS", 2 * 64 * 64)
    pieces = quantize_state(final_state(), hessians, TINY)
    same = [codes(whole)[n] == codes(pieces)[n] for n in codes(whole)]
    assert torch.cat([s.flatten() for s in same]).float().mean() >= 0.999


def test_calibration_runs_in_the_arithmetic_of_the_training() -> None:
    def artifact(precision: str, dtype: torch.dtype | None = None) -> QuantizedState:
        config = TINY.with_overrides({"train.precision": precision})
        return quantize_checkpoint(config, final_state(), CALIBRATION, compute_dtype=dtype)[0]

    single, half = artifact("float32"), artifact("bfloat16")
    assert changed(single, half)
    assert not changed(half, artifact("float32", torch.bfloat16))
    assert not changed(single, artifact("auto"))


def test_given_hessians_skip_calibration(hessians: dict[str, Tensor]) -> None:
    def never() -> Any:
        raise AssertionError("calibration batches were read")
        yield

    quantized, report = quantize_checkpoint(TINY, final_state(), never(), hessians=hessians)
    assert not changed(quantized, quantize_state(final_state(), hessians, TINY))
    assert report.codes_s > 0


def test_raised_damping_is_reported(hessians: dict[str, Tensor]) -> None:
    broken = dict(hessians)
    name = "blocks.4.mlp.fc.weight"
    broken[name] = torch.eye(64)
    broken[name][0, 1] = broken[name][1, 0] = 1.5
    _, report = quantize_checkpoint(TINY, final_state(), hessians=broken)
    assert report.raised_damping == pytest.approx({name: 1.0})


def test_unusable_hessians_are_named(hessians: dict[str, Tensor]) -> None:
    state = final_state()
    name = "blocks.3.attn.proj.weight"
    without = {n: h for n, h in hessians.items() if n != name}
    with pytest.raises(CheckpointError, match=f"no Hessian for '{name}'"):
        quantize_state(state, without, TINY)
    with pytest.raises(CheckpointError, match=r"no Hessian for 'blocks.*' and 36 more"):
        quantize_state(state, {}, TINY)
    with pytest.raises(CheckpointError, match=r"shape \[8, 8\], expected \[64, 64\]"):
        quantize_state(state, {**hessians, name: torch.eye(8)}, TINY)
    with pytest.raises(CheckpointError, match=f"Hessian of {name} is not finite"):
        quantize_state(state, {**hessians, name: torch.full((64, 64), torch.nan)}, TINY)
    with pytest.raises(CheckpointError, match="no calibration batch"):
        quantize_checkpoint(TINY, state)


# Other models ---------------------------------------------------------------------------------


def test_fresh_weights_with_zero_matrices_are_quantised(tmp_path: Path) -> None:
    state = initial_state(TINY.model, 1)
    quantized, _ = quantize_checkpoint(TINY, state, CALIBRATION[:1])
    zero = quantized.tensors["blocks.0.attn.proj.weight.q"]
    assert not bool(zero.any())
    write_artifact(tmp_path / "a.ptz", quantized, compressor="lzma")
    restored = load_artifact(tmp_path / "a.ptz", TINY)
    assert not bool(restored["mlp_down_bank"].any())
    assert bool(restored["mlp_up_bank"].any())


def test_untied_head_and_looked_up_table() -> None:
    model = dataclasses.replace(TINY.model, tie_embeddings=False, embedding_dim=32)
    config = dataclasses.replace(TINY, model=model)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in initial_state(model, 1).items()
    }
    quantized, _ = quantize_checkpoint(config, state, CALIBRATION[:1])
    for name in ("tok_emb.weight", "lm_head.weight"):
        assert quantized.kinds[name] == "gptq (int8)"
    assert quantized.kinds["head_proj.weight"] == "gptq (int6)"
    # A table has no input rows: its codes are the nearest ones.
    scale_R = quantized.tensors["tok_emb.weight.scale"].float()
    nearest = (state["tok_emb.weight"] / scale_R[:, None]).round().clamp(-127, 127).char()
    assert torch.equal(quantized.tensors["tok_emb.weight.q"], nearest)


# Bad input ------------------------------------------------------------------------------------


def test_bad_states_are_named(hessians: dict[str, Tensor]) -> None:
    state = final_state()
    with pytest.raises(CheckpointError, match="not know: 'odd'"):
        quantize_state({**state, "odd": torch.zeros(1)}, hessians, TINY)
    with pytest.raises(CheckpointError, match=r"mine: 'qo_bank' has shape \[1\]"):
        quantize_state({**state, "qo_bank": torch.zeros(1)}, hessians, TINY, what="mine")
    bad = {name: tensor.clone() for name, tensor in state.items()}
    bad["mlp_up_bank"][3, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"blocks\.3\.mlp\.fc\.weight is not finite"):
        quantize_state(bad, hessians, TINY)
    bad = {**state, "blocks.1.attn_scale": torch.full((64,), 1e6)}
    with pytest.raises(CheckpointError, match=r"'blocks\.1\.attn_scale' is not finite, or too"):
        quantize_state(bad, hessians, TINY)


def test_artifacts_that_do_not_fit_the_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no configuration"):
        load_artifact(PUBLIC)
    wider = TINY.with_overrides({"model.mlp_mult": 4.0})
    with pytest.raises(CheckpointError, match=r"has shape \[192, 64\], .* \[256, 64\]"):
        load_artifact(PUBLIC, wider)
    deeper = TINY.with_overrides({"model.num_layers": 7})
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'blocks\.6"):
        load_artifact(PUBLIC, deeper)
    shallower = TINY.with_overrides({"model.num_layers": 5, "model.xsa_last_n": 5})
    with pytest.raises(CheckpointError, match=r"not know: 'blocks\.5"):
        load_artifact(PUBLIC, shallower)


def test_configuration_of_a_foreign_artifact_runs_no_code(tmp_path: Path) -> None:
    part = tmp_path / "part.py"
    part.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nPART = None\n")
    config = TINY.with_overrides({"model.parts": [f"{part}:PART"]})
    tensors, kinds, _ = read_artifact(PUBLIC)
    path = tmp_path / "a.ptz"
    state = QuantizedState(tensors=tensors, kinds=kinds)
    write_artifact(path, state, config=config, compressor="lzma")
    with pytest.raises(CheckpointError, match=r"asks to run code from '.*part\.py:PART'"):
        load_artifact(path)
    assert not (tmp_path / "ran").exists()
    load_artifact(path, TINY)
