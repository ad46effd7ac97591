"""Several settings in one pass, stored Hessians, a quantiser that is kept, sizes foretold."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FOLDER, arrays, final_state, tiny_model
from torch import Tensor

from golf_ray import api
from golf_ray.config import Config
from golf_ray.errors import CheckpointError, DataError, UsageError
from golf_ray.model.checkpoint import save_state
from golf_ray.presets import RECORD, TINY
from golf_ray.quantization.artifact import (
    load_artifact,
    prepare_factors,
    quantize_many,
    quantize_state,
)
from golf_ray.quantization.container import QuantizedState, encode_artifact, read_artifact
from golf_ray.quantization.gptq import (
    Factor,
    gptq_codes,
    gptq_codes_many,
    prepare_factor,
    row_scales,
)
from golf_ray.quantization.hessian import collect_hessians, read_hessians, write_hessians
from golf_ray.quantization.sizes import predict_change, predicted_model_bytes

BASE = TINY.with_overrides({"data.dir": str(FOLDER), "quantization.compressor": "lzma"})
CHECKPOINT = FOLDER / "final_model.pt"
CALIBRATION = arrays("gptq")["calibration_tokens"].astype(np.int64)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"mlp_clip_sigmas": 9.0},
    {"attention_bits": 5, "embedding_clip_sigmas": 14.0},
    {"looped_bits": 4, "looped_clip_sigmas": 11.0},
    {"mlp_clip_sigmas": 1.0, "mlp_bits": 3, "code_bytes": 5, "limit_bytes": 7},
    {},
)


def changed(changes: Mapping[str, Any], base: Config = BASE) -> Config:
    return base.with_overrides({f"quantization.{name}": v for name, v in changes.items()})


def equal(a: QuantizedState, b: QuantizedState) -> bool:
    return (
        list(a.kinds.items()) == list(b.kinds.items())
        and list(a.tensors) == list(b.tensors)
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


@pytest.fixture(scope="module")
def hessians() -> dict[str, Tensor]:
    return collect_hessians(tiny_model(), CALIBRATION)


@pytest.fixture(scope="module")
def factors(hessians: dict[str, Tensor]) -> dict[str, Factor]:
    return prepare_factors(BASE, hessians)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hessians") / "hessians.pt"
    api.calibrate(CHECKPOINT, BASE, out=path)
    return path


# Many settings in one pass --------------------------------------------------------------------


@settings(max_examples=40)
@given(data=st.data())
def test_a_setting_beside_others_is_the_setting_alone(data: st.DataObject) -> None:
    draw = data.draw
    matrices, rows = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    columns, block = draw(st.integers(2, 70)), draw(st.sampled_from([1, 5, 16, 128]))
    setting = st.tuples(st.integers(2, 8), st.floats(0.5, 30.0))
    several = draw(st.lists(setting, min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    w_NRC = torch.randn(matrices, rows, columns, generator=generator)
    x_NTC = torch.randn(matrices, 2 * columns, columns, generator=generator)
    x_NTC[:, :, :: draw(st.integers(2, 9))] *= draw(st.sampled_from([0.0, 1.0]))
    factor = prepare_factor(x_NTC.transpose(1, 2) @ x_NTC, 0.01)
    scales = [row_scales(w_NRC, clip, bits) for bits, clip in several]
    bits_S11 = torch.tensor([bits for bits, _ in several])[:, None, None]
    together = gptq_codes_many(w_NRC, torch.stack(scales), bits_S11, factor, block)
    assert together.shape == (len(several), *w_NRC.shape) and together.dtype == torch.int8
    for codes_NRC, scale_NR, (bits, _) in zip(together, scales, several, strict=True):
        assert torch.equal(codes_NRC, gptq_codes(w_NRC, scale_NR, bits, factor, block))


@pytest.mark.parametrize("max_elements", [1, 100_000, 2**27])
def test_many_settings_are_each_alone(
    max_elements: int, factors: dict[str, Factor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("golf_ray.quantization.batching.MAX_PASS_ELEMENTS", max_elements)
    configs = [changed(change) for change in CHANGES]
    together = quantize_many(final_state(), factors, configs)
    alone = [quantize_state(final_state(), {}, c, factors=factors) for c in configs]
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True))
    assert not any(equal(together[0], other) for other in together[1:-1])
    assert equal(together[0], together[-1])
    # Also as a file, though the two share tensors.
    packed = [encode_artifact(s[-1], compressor="lzma") for s in (together, alone)]
    assert packed[0] == packed[1]


def test_what_a_setting_does_not_change_is_computed_once(factors: dict[str, Factor]) -> None:
    configs = [changed({}), changed({"embedding_clip_sigmas": 14.0})]
    one, other = quantize_many(final_state(), factors, configs)
    same = {name for name in one.tensors if one.tensors[name] is other.tensors[name]}
    assert one.tensors.keys() - same == {"tok_emb.weight.q", "tok_emb.weight.scale"}


def test_no_settings_and_the_codes_bits(factors: dict[str, Factor]) -> None:
    assert quantize_many(final_state(), factors, []) == []
    config = changed({"looped_bits": 4, "looped_clip_sigmas": 3.0})
    (state,) = quantize_many(final_state(), factors, [config])
    assert state.kinds["blocks.2.mlp.fc.weight"] == "gptq (int4)"
    assert int(state.tensors["blocks.2.mlp.fc.weight.q"].abs().max()) == 7


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quantization.damping", 0.02),
        ("quantization.block_columns", 64),
        ("quantization.float16_max_numel", 1024),
        ("quantization.calibration_seed", 8),
        ("quantization.calibration_batches", 2),
        ("model.num_loops", 1),
    ],
)
def test_other_differences_are_refused_by_name(
    path: str, value: float, factors: dict[str, Factor]
) -> None:
    other = BASE.with_overrides({path: value})
    with pytest.raises(UsageError, match=rf"{path} is .* and {value} in another") as refused:
        quantize_many(final_state(), factors, [BASE, other])
    assert refused.value.exit_status == 2
    with pytest.raises(UsageError, match=path):
        predict_change(BASE, 100_000, other)


# Stored Hessians ------------------------------------------------------------------------------


def test_stored_hessians_make_the_same_artifact(stored: Path, tmp_path: Path) -> None:
    fresh = api.quantize(CHECKPOINT, BASE, out=tmp_path / "fresh.ptz")
    # Calibration is not run: it would not find its shards.
    nowhere = BASE.with_overrides({"data.dir": str(tmp_path / "nowhere")})
    phases: list[str] = []
    made = api.quantize(
        CHECKPOINT,
        nowhere,
        out=tmp_path / "stored.ptz",
        hessians=stored,
        carry=BASE,
        progress=lambda phase, done, total: phases.append(phase),
    )
    assert (tmp_path / "fresh.ptz").read_bytes() == (tmp_path / "stored.ptz").read_bytes()
    assert phases == ["GPTQ", "compress"] and made.report.num_codes == fresh.report.num_codes
    assert read_artifact(tmp_path / "stored.ptz").config == BASE


def test_a_calibration_says_what_it_was(tmp_path: Path) -> None:
    phases: list[tuple[str, int, int]] = []
    done = api.calibrate(
        CHECKPOINT, BASE, out=tmp_path / "h.pt", progress=lambda *phase: phases.append(phase)
    )
    assert done.num_bytes == (tmp_path / "h.pt").stat().st_size > 100_000
    assert (done.num_batches, done.num_tokens) == (4, 1024) and done.wall_s > 0
    assert done.to_dict()["hessians"] == str(tmp_path / "h.pt")
    assert phases == [*(("Hessians", i, 4) for i in range(4)), ("store", 0, 0)]
    found = read_hessians(tmp_path / "h.pt")
    assert (
        found["blocks.0.attn.c_q.weight"].data_ptr() == found["blocks.0.attn.c_v.weight"].data_ptr()
    )


def test_a_failed_calibration_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "h.pt"
    path.write_text("before")
    for bad in ({"data.dir": str(tmp_path / "none")}, {"model.num_layers": 7}):
        with pytest.raises((DataError, CheckpointError)):
            api.calibrate(CHECKPOINT, BASE.with_overrides(bad), out=path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="would replace its checkpoint"):
        api.calibrate(CHECKPOINT, BASE, out=CHECKPOINT)
    with pytest.raises(UsageError, match="quantised already"):
        api.calibrate(FOLDER / "final_model.int6.ptz", BASE, out=path)


def test_hessians_of_other_weights_or_another_calibration_are_refused(
    stored: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.ptz"
    other = changed({"calibration_batches": 3})
    with pytest.raises(CheckpointError, match=r"calibration_batches = 4, not 3"):
        api.quantize(CHECKPOINT, other, out=out, hessians=stored)
    weights = final_state()
    weights["qo_bank"] = weights["qo_bank"] * 1.5
    save_state(tmp_path / "other.pt", weights, BASE)
    with pytest.raises(CheckpointError, match="collected under another checkpoint"):
        api.quantize(tmp_path / "other.pt", BASE, out=out, hessians=stored)
    with pytest.raises(CheckpointError, match="collected under another checkpoint"):
        api.Quantizer(tmp_path / "other.pt", BASE, hessians=stored)
    assert not out.exists()
    api.quantize(tmp_path / "other.pt", BASE, out=out, hessians=stored, force=True)
    assert out.exists()


def test_hessians_that_do_not_say_are_taken(
    stored: Path, hessians: dict[str, Tensor], tmp_path: Path
) -> None:
    write_hessians(tmp_path / "plain.pt", hessians)
    found = api.stored_hessians(tmp_path / "plain.pt", final_state(), BASE)
    assert all(torch.equal(found[name], hessians[name]) for name in hessians)
    with pytest.raises(CheckpointError, match="cannot be read"):
        api.stored_hessians(tmp_path / "none.pt", final_state(), BASE)
    with zipfile.ZipFile(tmp_path / "plain.pt", "a") as archive:
        archive.writestr("plain/golf_ray_hessians.json", "[")
    with pytest.raises(CheckpointError, match="is damaged"):
        api.stored_hessians(tmp_path / "plain.pt", final_state(), BASE)


# A quantiser that is kept ---------------------------------------------------------------------


def test_a_kept_quantiser_gives_what_one_call_gives(stored: Path, tmp_path: Path) -> None:
    quantizer = api.Quantizer(CHECKPOINT, BASE, hessians=stored)
    configs = [
        changed({}),
        changed({"damping": 0.1, "mlp_bits": 5}),
        changed({"mlp_clip_sigmas": 10.0}),
        changed({"float16_max_numel": 4096, "damping": 0.1}),
    ]
    states = quantizer.codes(configs)
    for i, (config, state) in enumerate(zip(configs, states, strict=True)):
        made = api.quantize(CHECKPOINT, config, out=tmp_path / "one.ptz", hessians=stored)
        sizes = quantizer.write(state, tmp_path / f"{i}.ptz", config)
        assert (tmp_path / "one.ptz").read_bytes() == (tmp_path / f"{i}.ptz").read_bytes()
        assert sizes == made.sizes
        restored, loaded = quantizer.restored(state), load_artifact(tmp_path / f"{i}.ptz")
        assert list(restored) == list(loaded)
        assert all(torch.equal(restored[name], loaded[name]) for name in loaded)
    # Whatever was asked for before.
    (again,) = quantizer.codes([configs[2]])
    assert equal(again, states[2])


def test_factors_are_computed_once_a_damping(stored: Path) -> None:
    quantizer = api.Quantizer(CHECKPOINT, BASE, hessians=stored)
    first = quantizer.factors()
    assert quantizer.factors(changed({"mlp_bits": 5})) is first
    other = quantizer.factors(changed({"damping": 0.1}))
    assert other is not first and quantizer.factors() is first
    # Only so many are kept: those that were asked for last.
    for damping in (0.2, 0.3, 0.4):
        quantizer.factors()
        quantizer.factors(changed({"damping": damping}))
    assert quantizer.factors() is first
    assert quantizer.factors(changed({"damping": 0.1})) is not other


def test_an_artifact_says_what_it_is_told_to_carry(stored: Path, tmp_path: Path) -> None:
    quantizer = api.Quantizer(CHECKPOINT, BASE, hessians=stored)
    trials = [BASE.with_overrides({"adaptation.chunk_size": size}) for size in (8, 16)]
    (state,) = quantizer.codes(trials[:1])

    def written(config: Config, **options: Any) -> bytes:
        quantizer.write(state, tmp_path / "a.ptz", config, **options)
        return (tmp_path / "a.ptz").read_bytes()

    assert written(trials[0]) != written(trials[1])
    assert written(trials[0], carry=BASE) == written(trials[1], carry=BASE)
    assert read_artifact(tmp_path / "a.ptz").config == BASE
    assert written(trials[0], plain=True) == encode_artifact(state, compressor="lzma")


def test_a_quantiser_refuses_what_is_not_of_its_checkpoint(stored: Path) -> None:
    quantizer = api.Quantizer(CHECKPOINT, BASE, hessians=stored)
    for path, value in (
        ("quantization.calibration_seed", 9),
        ("model.num_loops", 1),
        ("quantization.calibration_batch_tokens", 128),
    ):
        with pytest.raises(UsageError, match=path):
            quantizer.codes([BASE, BASE.with_overrides({path: value})])
    with pytest.raises(UsageError, match="quantised already"):
        api.Quantizer(FOLDER / "final_model.int6.ptz", BASE, hessians=stored)


# Sizes ----------------------------------------------------------------------------------------


def test_prediction_counts_as_numpy_does(factors: dict[str, Factor]) -> None:
    def bits(values: np.ndarray[Any, Any]) -> float:
        _, counts = np.unique(values, return_counts=True)
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    (state,) = quantize_many(final_state(), factors, [BASE])
    tensors = {name: t.numpy() for name, t in state.tensors.items()}
    codes = sum(bits(a) for name, a in tensors.items() if name.endswith(".q"))
    other = np.concatenate(
        [a.ravel().view(np.uint8) for name, a in tensors.items() if not name.endswith(".q")]
    )
    entropy = codes + bits(other[0::2]) + bits(other[1::2])
    expected = 1.014 * entropy / 8 + 400 + 44 * len(tensors)
    assert predicted_model_bytes(state) == pytest.approx(expected, abs=2)


def test_a_change_is_the_field_s_rule() -> None:
    def moved(**changes: Any) -> int:
        return predict_change(RECORD, 15_900_000, changed(changes, RECORD)) - 15_900_000

    assert moved() == 0 and moved(limit_bytes=1, code_bytes=1, compressor="lzma") == 0
    mlp, attention, embedding = 23_068_672, 8_650_752, 4_194_304
    assert moved(mlp_bits=7) == mlp // 8
    assert moved(attention_bits=5) == -attention // 8
    assert moved(embedding_bits=7) == -embedding // 8
    assert moved(embedding_clip_sigmas=40.0) == -embedding // 8
    # Twice as wide and a bit more is the same size.
    assert moved(mlp_bits=7, mlp_clip_sigmas=25.7) == 0
    # 1% on all of the layers' matrices: 57 KB.
    wider = moved(mlp_clip_sigmas=12.85 * 1.01, attention_clip_sigmas=12.85 * 1.01)
    assert wider == pytest.approx(-57_000, rel=0.01)
    # Three of eleven layers are looped.
    assert moved(looped_bits=7) == (mlp + attention) * 3 // 11 // 8
    assert moved(looped_clip_sigmas=6.425) == (mlp + attention) * 3 // 11 // 8
    # A looped layer's own setting stands where its group's changes.
    looped = changed({"looped_bits": 6}, RECORD)
    assert (
        predict_change(looped, 0, changed({"mlp_bits": 7, "looped_bits": 6}, RECORD))
        == mlp * 8 // 11 // 8
    )


@settings(max_examples=20)
@given(
    clips=st.tuples(*[st.floats(1.0, 40.0)] * 3),
    bits=st.tuples(*[st.integers(2, 8)] * 3),
)
def test_changes_add_up(clips: tuple[float, ...], bits: tuple[int, ...]) -> None:
    groups = ("mlp", "attention", "embedding")
    between = changed({f"{g}_clip_sigmas": c for g, c in zip(groups, clips, strict=True)}, RECORD)
    end = changed({f"{g}_bits": b for g, b in zip(groups, bits, strict=True)}, between)
    there = predict_change(between, predict_change(RECORD, 10**7, between), end)
    assert abs(there - predict_change(RECORD, 10**7, end)) <= 1
    assert predict_change(end, there, RECORD) == pytest.approx(10**7, abs=2)


@pytest.mark.parametrize(
    "change",
    [{"mlp_clip_sigmas": 10.0}, {"attention_bits": 7}, {"looped_clip_sigmas": 16.0}],
    ids=str,
)
def test_a_change_is_near_what_codes_say(
    change: dict[str, float], factors: dict[str, Factor]
) -> None:
    configs = [BASE, changed(change)]
    before, after = (
        predicted_model_bytes(s) for s in quantize_many(final_state(), factors, configs)
    )
    rule = predict_change(BASE, before, configs[1])
    assert abs(after - before) > 0.005 * before
    assert math.isclose(rule, after, rel_tol=0.01)


def test_results_are_frozen() -> None:
    done = api.Calibration(
        checkpoint=Path("a"), hessians=Path("b"), num_bytes=1, num_batches=1, num_tokens=1, wall_s=1
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.num_bytes = 2  # type: ignore[misc]
