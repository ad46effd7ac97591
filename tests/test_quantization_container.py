"""The container: round trips, the public file, equal bytes for equal states, hostile input."""

from __future__ import annotations

import io
import json
import lzma
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import FOLDER, arrays
from torch import Tensor

from golf_ray.errors import CheckpointError
from golf_ray.presets import TINY
from golf_ray.quantization import container
from golf_ray.quantization.container import (
    MAGIC,
    QuantizedState,
    check_state,
    compress,
    decode_artifact,
    decompress,
    dequantize,
    encode_artifact,
    gptq_kind,
    kind_bits,
    passthrough_kind,
    read_artifact,
    shuffle_bytes,
    unshuffle_bytes,
    write_artifact,
)

PUBLIC = FOLDER / "final_model.int6.ptz"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def small_state() -> QuantizedState:
    generator = torch.Generator().manual_seed(0)
    return QuantizedState(
        tensors={
            "a.weight.q": torch.randint(-31, 32, (6, 8), generator=generator).to(torch.int8),
            "a.weight.scale": torch.rand(6, generator=generator).half(),
            "gain": torch.randn(4, generator=generator).half(),
        },
        kinds={"a.weight": "gptq (int6)", "gain": "passthrough (float16)"},
    )


def sealed(content: Any) -> bytes:
    """The container around anything that torch.save takes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return brotli.compress(shuffle_bytes(buffer.getvalue()), quality=1)


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        decode_artifact(data, "x.ptz", **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("x.ptz") and len(message) < 400
    return message


# Bytes ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300), stride=st.integers(1, 255))
def test_shuffle_round_trip(data: bytes, stride: int) -> None:
    shuffled = shuffle_bytes(data, stride)
    assert len(shuffled) == len(data) + 5
    assert unshuffle_bytes(shuffled) == data


def test_shuffle_layout() -> None:
    assert shuffle_bytes(b"abcde") == b"BSHF\x02acebd"


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=2000), compressor=st.sampled_from(["brotli", "lzma"]))
def test_compressors_are_told_apart(data: bytes, compressor: Any) -> None:
    packed = compress(data, compressor)
    assert decompress(packed, "x", max_bytes=len(data)) == data
    if data:
        with pytest.raises(CheckpointError, match="unpacks to more than"):
            decompress(packed, "x", max_bytes=len(data) - 1)


# The public file ------------------------------------------------------------------------------


def test_public_artifact_is_read() -> None:
    tensors, kinds, config = read_artifact(PUBLIC)
    assert config is None
    assert len(kinds) == 65 and kinds["tok_emb.weight"] == "gptq (int8)"
    stored = arrays("gptq")
    for name in [k.removesuffix(".q") for k in stored if k.endswith(".q")]:
        np.testing.assert_array_equal(tensors[f"{name}.q"].numpy(), stored[f"{name}.q"])
        np.testing.assert_array_equal(tensors[f"{name}.scale"].numpy(), stored[f"{name}.scale"])
    weights = dequantize(tensors, kinds)
    name = "blocks.4.mlp.fc.weight"
    expected = (
        stored[f"{name}.q"].astype(np.float32) * stored[f"{name}.scale"].astype(np.float32)[:, None]
    )
    np.testing.assert_array_equal(weights[name].numpy(), expected)
    assert all(w.dtype == torch.float32 for w in weights.values())


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_public_artifact_written_again_is_read_by_the_public_steps(compressor: Any) -> None:
    tensors, kinds, _ = read_artifact(PUBLIC)
    data = encode_artifact(QuantizedState(tensors=tensors, kinds=kinds), compressor=compressor)
    raw = lzma.decompress(data) if compressor == "lzma" else brotli.decompress(data)
    assert raw[:5] == b"BSHF\x02"
    half = (len(raw) - 5 + 1) // 2
    plain = bytearray(len(raw) - 5)
    plain[0::2], plain[1::2] = raw[5 : 5 + half], raw[5 + half :]
    content = torch.load(io.BytesIO(plain), weights_only=True)
    assert list(content) == ["w", "m"] and content["m"] == kinds
    assert list(content["w"]) == list(tensors)
    assert all(torch.equal(content["w"][name], tensors[name]) for name in tensors)
    if compressor == "brotli":
        assert len(data) <= PUBLIC.stat().st_size


# Round trips ----------------------------------------------------------------------------------


@st.composite
def states(draw: Any) -> QuantizedState:
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    for i, name in enumerate(draw(st.lists(names, unique=True, max_size=6))):
        name = f"{name}{i}"
        if draw(st.booleans()):
            bits = draw(st.integers(2, 8))
            rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 5))
            limit = 2 ** (bits - 1) - 1
            codes = torch.randint(-limit, limit + 1, (rows, columns), generator=generator)
            tensors[f"{name}.q"] = codes.to(torch.int8)
            tensors[f"{name}.scale"] = torch.rand(rows, generator=generator).half()
            kinds[name] = gptq_kind(bits)
        else:
            shape = draw(st.lists(st.integers(0, 4), max_size=3))
            dtype = draw(st.sampled_from(FLOATS + OTHERS))
            tensors[name] = (10 * torch.randn(shape, generator=generator)).to(dtype)
            kinds[name] = draw(st.sampled_from([passthrough_kind(dtype), "passthrough"]))
    return QuantizedState(tensors=tensors, kinds=kinds)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(state=states(), compressor=st.sampled_from(["brotli", "lzma"]))
def test_any_state_round_trips(state: QuantizedState, compressor: Any) -> None:
    data = encode_artifact(state, compressor=compressor)
    tensors, kinds, config = decode_artifact(data)
    assert config is None and kinds == state.kinds and list(tensors) == list(state.tensors)
    for name, tensor in state.tensors.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)
    weights = dequantize(tensors, kinds)
    assert weights.keys() == kinds.keys()


def test_configuration_travels_inside(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.ptz"
    config = TINY.with_overrides({"quantization.compressor": "lzma", "train.seed": 99})
    size = write_artifact(path, small_state(), config=config)
    assert path.stat().st_size == size and path.read_bytes()[:4] == b"\xfd7zX"
    assert read_artifact(path).config == config
    assert [p.name for p in path.parent.iterdir()] == ["a.ptz"]
    write_artifact(path, small_state(), config=config, compressor="brotli")
    assert read_artifact(path).config == config


def test_dequantised_values() -> None:
    state = QuantizedState(
        tensors={
            "m.q": torch.tensor([[-3, 0, 2], [127, -127, 1]], dtype=torch.int8),
            "m.scale": torch.tensor([0.5, 2.0]).half(),
            "b": torch.tensor([1.5]).bfloat16(),
            "n": torch.tensor([7]),
        },
        kinds={"m": "gptq (int8)", "b": "passthrough (bfloat16)", "n": "passthrough (int64)"},
    )
    weights = dequantize(state.tensors, state.kinds)
    assert weights["m"].tolist() == [[-1.5, 0.0, 1.0], [254.0, -254.0, 2.0]]
    assert weights["b"].dtype == torch.float32 and weights["b"].tolist() == [1.5]
    assert weights["n"].dtype == torch.int64


# Equal bytes ----------------------------------------------------------------------------------


def test_equal_states_give_equal_bytes_however_they_were_made() -> None:
    state = small_state()
    expected = encode_artifact(state)
    views = {n: torch.stack([t, t])[1] for n, t in state.tensors.items()}
    strided = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in views.items()}
    # Other text objects, and one that is shared where the first state had two.
    texts = {"".join(list(n)): "".join(list(k)) for n, k in state.kinds.items()}
    parameters = {
        n: torch.nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in strided.items()
    }  # fmt: skip
    for tensors in (views, strided, parameters):
        assert encode_artifact(QuantizedState(tensors=tensors, kinds=texts)) == expected
    again = decode_artifact(expected)
    assert encode_artifact(QuantizedState(tensors=again.tensors, kinds=again.kinds)) == expected
    assert encode_artifact(state, config=TINY) == encode_artifact(state, config=TINY)


def test_equal_bytes_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "other.ptz"
    program = (
        "import sys, torch, pathlib\n"
        "from golf_ray.presets import TINY\n"
        "from golf_ray.quantization.container import *\n"
        "a = read_artifact(pathlib.Path(sys.argv[1]))\n"
        "s = QuantizedState(tensors=a.tensors, kinds=a.kinds)\n"
        "write_artifact(pathlib.Path(sys.argv[2]), s, config=TINY, compressor='lzma')\n"
    )
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-c", program, str(PUBLIC), str(path)],
        check=True, cwd=root, env={**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    tensors, kinds, _ = read_artifact(PUBLIC)
    state = QuantizedState(tensors=tensors, kinds=kinds)
    assert path.read_bytes() == encode_artifact(state, config=TINY, compressor="lzma")


# Hostile input --------------------------------------------------------------------------------


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch '{self.flag}'",)


def hostile_files(flag: Path) -> dict[str, bytes]:
    def saved(**options: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save({"w": {"a": Bomb(flag)}, "m": {"a": "passthrough"}}, buffer, **options)
        return buffer.getvalue()

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({"w": Bomb(flag), "m": {}}, protocol=4))
        zipped.writestr("archive/version", "3")
    return {
        "zip": saved(),
        "legacy": saved(_use_new_zipfile_serialization=False),
        "pickle": pickle.dumps(Bomb(flag)),
        "handmade": archive.getvalue(),
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "handmade"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, form: str) -> None:
    flag = tmp_path / "ran"
    inner = hostile_files(flag)[form]
    # The file would do harm where it is unpickled.
    unsafe = tmp_path / "unsafe"
    unsafe.write_bytes(inner)
    if form == "pickle":
        pickle.loads(inner)
    else:
        torch.load(unsafe, weights_only=False)
    assert flag.exists()
    flag.unlink()
    for data in (
        brotli.compress(shuffle_bytes(inner)),
        lzma.compress(shuffle_bytes(inner)),
        brotli.compress(inner),
        shuffle_bytes(inner),
        inner,
    ):
        refusal(data)
        assert not flag.exists()
    message = refusal(brotli.compress(shuffle_bytes(inner)))
    if form == "zip":
        assert "nothing of it was run" in message and "system" in message


def test_truncated_at_any_place() -> None:
    for compressor in ("brotli", "lzma"):
        data = encode_artifact(small_state(), compressor=compressor)
        for end in range(0, len(data), 7):
            refusal(data[:end])
    raw = unshuffle_bytes(brotli.decompress(encode_artifact(small_state())))
    for end in range(0, len(raw), 101):
        refusal(brotli.compress(shuffle_bytes(raw[:end]), quality=1))


@settings(deadline=None, max_examples=150)
@given(where=st.integers(0, 10**6), value=st.integers(0, 255), pickled=st.booleans())
def test_a_changed_byte_is_read_or_refused_in_one_line(
    where: int, value: int, pickled: bool
) -> None:
    archive = bytearray(unshuffle_bytes(brotli.decompress(encode_artifact(small_state()))))
    begin = archive.index(b"\x80\x02}") if pickled else 0
    end = archive.index(b".PK", begin) + 1 if pickled else len(archive)
    archive[begin + where % (end - begin)] = value
    data = brotli.compress(shuffle_bytes(bytes(archive)), quality=1)
    try:
        decode_artifact(data, "x.ptz")
    except CheckpointError as error:
        assert "\n" not in str(error)


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(data: bytes) -> None:
    refusal(data)
    refusal(lzma.compress(data, preset=0))
    refusal(brotli.compress(MAGIC + b"\x02" + data, quality=1))


def test_wrong_magic_and_strange_files_say_what_they_are(tmp_path: Path) -> None:
    assert "no artifact" in refusal(brotli.compress(b"PK\x03\x04" + bytes(100)))
    assert "no artifact" in refusal(brotli.compress(b"BSHF\x00" + bytes(100)))
    assert "neither brotli nor LZMA" in refusal((FOLDER / "final_model.pt").read_bytes())
    assert "holds list instead" in refusal(sealed([1, 2]))
    assert "instead of 'w' and 'm'" in refusal(sealed({"w": {}}))
    assert "'extra'" in refusal(sealed({"w": {}, "m": {}, "extra": 1}))
    assert "no tables" in refusal(sealed({"w": [], "m": {}}))
    with pytest.raises(CheckpointError, match=r"none\.ptz cannot be read \(No such file"):
        read_artifact(tmp_path / "none.ptz")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_artifact(tmp_path)
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        read_artifact(PUBLIC, max_bytes=100)


def test_decompression_bombs_are_bounded() -> None:
    huge = MAGIC + b"\x02" + bytes(50_000_000)
    for data in (brotli.compress(huge, quality=5), lzma.compress(huge, preset=1)):
        assert len(data) < 10_000
        assert "unpacks to more than 1000000 bytes" in refusal(data, max_bytes=1_000_000)
    assert container.MAX_RAW_BYTES <= 2**30


def test_packed_archive_inside_is_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", bytes(10_000_000))
    assert "packed" in refusal(brotli.compress(shuffle_bytes(buffer.getvalue()), quality=1))


def test_tensors_that_pose_as_large_are_refused() -> None:
    wide = torch.zeros(1, dtype=torch.int8).expand(10**6, 10**6)
    state = {"w.q": wide, "w.scale": torch.ones(1).half().expand(10**6)}
    message = refusal(sealed({"w": state, "m": {"w": "gptq (int6)"}}))
    assert "larger than what is stored" in message
    many = torch.zeros(2000)
    shared = {f"t{i}": many for i in range(500)}
    kinds = dict.fromkeys(shared, "passthrough (float32)")
    assert "larger than what is stored" in refusal(sealed({"w": shared, "m": kinds}))


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        [1, 2],
        "text",
    ],
    ids=["meta", "sparse", "list", "text"],
)
@pytest.mark.filterwarnings("ignore")
def test_anything_but_plain_tensors_is_refused(odd: Any) -> None:
    assert "'a'" in refusal(sealed({"w": {"a": odd}, "m": {"a": "passthrough"}}))


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "missing scale": (lambda w, m: w.pop("a.weight.scale"), "'a.weight.scale' is missing"),
    "missing codes": (lambda w, m: w.pop("a.weight.q"), "'a.weight.q' is missing"),
    "missing tensor": (lambda w, m: w.pop("gain"), "'gain' is passthrough (float16) but is"),
    "no kind": (lambda w, m: m.pop("gain"), "'gain' belongs to no named weight"),
    "extra tensor": (lambda w, m: w.update(odd=torch.zeros(1)), "'odd' belongs to no named"),
    "unknown kind": (lambda w, m: m.update(gain="ternary"), "unknown kind 'ternary'"),
    "unknown bits": (lambda w, m: m.update({"a.weight": "gptq (int9)"}), "kind 'gptq (int9)'"),
    "unknown type": (lambda w, m: m.update(gain="passthrough (float8)"), "(float8)'"),
    "kind no text": (lambda w, m: m.update(gain=3), "has kind 3"),
    "wrong type": (lambda w, m: m.update(gain="passthrough (float32)"), "expected torch.float32"),
    "codes float": (
        lambda w, m: w.update({"a.weight.q": torch.zeros(6, 8)}),
        "'a.weight.q' is torch.float32 [6, 8], expected torch.int8 with 2",
    ),
    "codes flat": (
        lambda w, m: w.update({"a.weight.q": torch.zeros(6, dtype=torch.int8)}),
        "'a.weight.q' is torch.int8 [6], expected torch.int8 with 2 dimensions",
    ),
    "scale float32": (
        lambda w, m: w.update({"a.weight.scale": torch.ones(6)}),
        "'a.weight.scale' is torch.float32 [6], expected torch.float16",
    ),
    "rows differ": (
        lambda w, m: w.update({"a.weight.scale": torch.ones(5).half()}),
        "'a.weight.q' has shape [6, 8], 'a.weight.scale' has [5]",
    ),
    "scale not finite": (
        lambda w, m: w.update({"a.weight.scale": torch.full((6,), torch.nan).half()}),
        "'a.weight.scale' holds a negative or no number",
    ),
    "code out of range": (
        lambda w, m: w["a.weight.q"].__setitem__((2, 3), -32),
        "'a.weight.q' holds the code -32, gptq (int6) allows -31 to 31",
    ),
    "name no text": (lambda w, m: w.update({7: torch.zeros(1)}), "7 is no named tensor"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_content_that_does_not_fit_is_named(case: str) -> None:
    state = small_state()
    tensors, kinds = dict(state.tensors), dict(state.kinds)
    change, expected = BROKEN[case]
    check_state(tensors, kinds, "x")
    change(tensors, kinds)
    assert expected in refusal(sealed({"w": tensors, "m": kinds}))
    with pytest.raises(CheckpointError):
        encode_artifact(QuantizedState(tensors=tensors, kinds=kinds))


@pytest.mark.parametrize(
    "text",
    [5, "no json", "[]", '{"unknown": 1}', '{"model": {"num_layers": "x"}}', "[" * 100_000],
    ids=["number", "no json", "list", "unknown", "ill-typed", "deep"],
)
def test_bad_configuration_inside_is_one_line(text: Any) -> None:
    state = small_state()
    content = {"w": dict(state.tensors), "m": dict(state.kinds)}
    assert decode_artifact(sealed({**content, "c": json.dumps(TINY.to_dict())})).config == TINY
    assert "configuration" in refusal(sealed({**content, "c": text}))


def test_kinds() -> None:
    assert kind_bits(gptq_kind(6)) == 6
    assert kind_bits("passthrough (float16)") is None
    assert kind_bits("gptq (int6) ") is None
    assert passthrough_kind(torch.bfloat16) == "passthrough (bfloat16)"


def test_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        write_artifact(tmp_path / "file" / "a.ptz", small_state())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
