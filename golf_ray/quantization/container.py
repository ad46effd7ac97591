"""The public artifact container: quantised weights in one compressed file.

Layout, inside out: `torch.save({"w": tensors, "m": kind by name})`; a byte shuffle (`BSHF`, one
byte stride, then all bytes at offsets 0, stride, ..., then all at 1, 1 + stride, ...); brotli
quality 11 or LZMA preset 6. A matrix `name` of kind `gptq (intB)` is stored as `name.q` (int8 codes
[R, C]) and `name.scale` (float16 [R]); any other tensor under its own name, as
`passthrough (DTYPE)`. Artifacts written here may carry `"c"`, the configuration as JSON text,
which public ones lack.

Not here: which tensors a model has (golf_ray.quantization.artifact).

Invariants: reading never runs code and never takes more memory than its bound; the same state
gives the same bytes.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import brotli
import numpy as np
import torch
from torch import Tensor

from golf_ray.config import Config
from golf_ray.errors import CheckpointError, ConfigError
from golf_ray.model.loading import REMEDY, load_tensors, read_bytes
from golf_ray.quantization.gptq import max_code
from golf_ray.records import atomic_write_bytes

Compressor = Literal["brotli", "lzma"]

MAGIC = b"BSHF"
STRIDE = 2
BROTLI_QUALITY = 11
LZMA_PRESET = 6
MAX_RAW_BYTES = 2**30
"""Largest content that is unpacked; the record's is 38 MB."""
_LZMA_MEMORY_BYTES = 2**28
_CHUNK_BYTES = 2**20
_XZ_MAGIC = b"\xfd7zXZ\x00"
_GPTQ_KIND = re.compile(r"gptq \(int([2-8])\)")
_PASSTHROUGH_KIND = re.compile(r"passthrough(?: \((\w+)\))?")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
        torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedState:
    """The content of an artifact: tensors as stored, and what each named weight is stored as."""

    tensors: Mapping[str, Tensor]
    """`name.q` and `name.scale` of quantised matrices, other tensors under their own names."""
    kinds: Mapping[str, str]
    """`gptq (int6)`, `passthrough (float16)`, ... by unbanked name."""


class Artifact(NamedTuple):
    """What an artifact file holds."""

    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    config: Config | None
    """As the file has it, so no more to be trusted than the file; None in public artifacts."""


def gptq_kind(bits: int) -> str:
    """The kind of a matrix quantised to `bits` bits."""
    return f"gptq (int{bits})"


def passthrough_kind(dtype: torch.dtype) -> str:
    """The kind of a tensor that is stored as it is."""
    return f"passthrough ({str(dtype).removeprefix('torch.')})"


def kind_bits(kind: str) -> int | None:
    """Bits of a quantised kind, None for any other."""
    found = _GPTQ_KIND.fullmatch(kind)
    return int(found[1]) if found else None


def shuffle_bytes(data: bytes, stride: int = STRIDE) -> bytes:
    """Header, then the bytes at offset 0 of each `stride`, then those at offset 1, and so on."""
    source = np.frombuffer(data, dtype=np.uint8)
    lanes = [source[i::stride].tobytes() for i in range(stride)]
    return MAGIC + bytes([stride]) + b"".join(lanes)


def unshuffle_bytes(data: bytes, where: str = "the data") -> bytes:
    """The inverse of `shuffle_bytes`.

    Raises:
        CheckpointError: the header is not that of a byte shuffle.
    """
    if len(data) <= len(MAGIC) or data[: len(MAGIC)] != MAGIC or data[len(MAGIC)] == 0:
        raise CheckpointError(
            f"{where} is no artifact: its content begins with {data[:5]!r}, not with {MAGIC!r} and"
            " a stride",
            "give an artifact (.ptz)",
        )
    stride, begin = data[len(MAGIC)], len(MAGIC) + 1
    source = np.frombuffer(data, dtype=np.uint8, offset=begin)
    result = np.empty_like(source)
    done = 0
    for i in range(stride):
        lane = result[i::stride]
        lane[:] = source[done : done + len(lane)]
        done += len(lane)
    return result.tobytes()


def compress(data: bytes, compressor: Compressor) -> bytes:
    """Compress as the container does."""
    if compressor == "lzma":
        return lzma.compress(data, preset=LZMA_PRESET)
    return bytes(brotli.compress(data, quality=BROTLI_QUALITY))


def decompress(data: bytes, where: str, max_bytes: int = MAX_RAW_BYTES) -> bytes:
    """The inverse of `compress`; tells LZMA (a magic number) from brotli (none) by itself.

    Raises:
        CheckpointError: neither, truncated, or more than `max_bytes` when unpacked.
    """
    if data.startswith(_XZ_MAGIC):
        return _decompress_lzma(data, where, max_bytes)
    return _decompress_brotli(data, where, max_bytes)


def encode_artifact(
    state: QuantizedState, *, config: Config | None = None, compressor: Compressor = "brotli"
) -> bytes:
    """The bytes of an artifact; equal for equal states, whatever they were made of.

    Args:
        config: travels inside, where given, and costs about 1,250 bytes.
        compressor: brotli takes about 2 s a megabyte of content; LZMA a tenth, and 6% more bytes.
    """
    check_state(state.tensors, state.kinds, "the quantised state")
    # Pickle writes a repeated object as a reference and an equal copy in full, and a view with all
    # of its storage: one object for each text and tight copies make the bytes follow from values.
    content: dict[str, Any] = {
        "w": {sys.intern(n): _tight(t) for n, t in state.tensors.items()},
        "m": {sys.intern(n): sys.intern(kind) for n, kind in state.kinds.items()},
    }
    if config is not None:
        content["c"] = json.dumps(config.to_dict(), separators=(",", ":"))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return compress(shuffle_bytes(buffer.getvalue()), compressor)


def decode_artifact(
    data: bytes, where: str = "the artifact", *, max_bytes: int = MAX_RAW_BYTES
) -> Artifact:
    """The inverse of `encode_artifact`, for bytes from anywhere.

    Raises:
        CheckpointError: it is no artifact, is damaged, would run code, unpacks to more than
            `max_bytes`, or its tensors do not fit its kinds.
    """
    archive = unshuffle_bytes(decompress(data, where, max_bytes), where)
    _check_zip(archive, where)
    content = load_tensors(archive, where)
    if not isinstance(content, dict) or not {"w", "m"} <= content.keys() <= {"w", "m", "c"}:
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{where} holds {keys} instead of 'w' and 'm'", "give an artifact")
    tensors, kinds = content["w"], content["m"]
    if not isinstance(tensors, dict) or not isinstance(kinds, dict):
        raise CheckpointError(f"{where} holds no tables of tensors and kinds", REMEDY)
    # A few bytes of storage may pose as a tensor of any shape, or as many tensors.
    found = [t for t in tensors.values() if isinstance(t, Tensor)]
    if sum(t.numel() * t.element_size() for t in found) > len(archive):
        raise CheckpointError(f"{where} holds tensors larger than what is stored of them", REMEDY)
    check_state(tensors, kinds, where)
    config = _embedded_config(content["c"], where) if "c" in content else None
    return Artifact({n: t.detach() for n, t in tensors.items()}, dict(kinds), config)


def write_artifact(
    path: Path,
    state: QuantizedState,
    *,
    config: Config | None = None,
    compressor: Compressor | None = None,
) -> int:
    """Write an artifact, whole or not at all, and return its size in bytes.

    Args:
        config: travels inside, where given; a public artifact has none.
        compressor: None for the configuration's, or brotli without one.
    """
    if compressor is None:
        compressor = config.quantization.compressor if config is not None else "brotli"
    data = encode_artifact(state, config=config, compressor=compressor)
    atomic_write_bytes(Path(path), data)
    return len(data)


def read_artifact(path: Path, *, max_bytes: int = MAX_RAW_BYTES) -> Artifact:
    """Read an artifact of ours or a public one.

    Raises:
        CheckpointError: as `decode_artifact`, or the file cannot be read.
    """
    path = Path(path)
    data = read_bytes(path, str(path), max_bytes=max_bytes)
    return decode_artifact(data, str(path), max_bytes=max_bytes)


def dequantize(tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights by unbanked name: code * scale in float32; other floats as float32, the rest as is.

    Raises:
        CheckpointError: tensors and kinds do not fit each other.
    """
    check_state(tensors, kinds, "the quantised state")
    weights = {}
    for name, kind in kinds.items():
        if kind_bits(kind) is not None:
            weights[name] = tensors[f"{name}.q"].float() * tensors[f"{name}.scale"].float()[:, None]
        else:
            tensor = tensors[name]
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor.clone()
    return weights


def check_state(tensors: Mapping[Any, Any], kinds: Mapping[Any, Any], where: str) -> None:
    """Check that every kind is known and has its tensors, and every tensor its kind.

    Raises:
        CheckpointError: not so; the tensor, what it is and what it should be are named.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{where}: {name!r} is no named tensor", REMEDY)
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.is_meta:
            raise CheckpointError(f"{where}: '{name}' is no plain dense tensor", REMEDY)
    claimed: set[str] = set()
    for name, kind in kinds.items():
        if not isinstance(name, str) or not isinstance(kind, str):
            raise CheckpointError(f"{where}: {name!r} has kind {kind!r}, no text", REMEDY)
        parts = _check_matrix if kind_bits(kind) is not None else _check_passthrough
        claimed.update(parts(tensors, name, kind, where))
    unclaimed = [name for name in tensors if name not in claimed]
    if unclaimed:
        raise CheckpointError(f"{where}: '{unclaimed[0]}' belongs to no named weight", REMEDY)


def _check_matrix(tensors: Mapping[str, Any], name: str, kind: str, where: str) -> list[str]:
    parts = [f"{name}.q", f"{name}.scale"]
    for part in parts:
        if part not in tensors:
            raise CheckpointError(f"{where}: '{name}' is {kind} but '{part}' is missing", REMEDY)
    q_RC, scale_R = (tensors[part] for part in parts)
    _require(q_RC, parts[0], torch.int8, 2, where)
    _require(scale_R, parts[1], torch.float16, 1, where)
    if len(q_RC) != len(scale_R):
        raise CheckpointError(
            f"{where}: '{parts[0]}' has shape {list(q_RC.shape)}, '{parts[1]}' has"
            f" {list(scale_R.shape)}",
            REMEDY,
        )
    if not bool((scale_R.isfinite() & (scale_R >= 0)).all()):
        raise CheckpointError(f"{where}: '{parts[1]}' holds a negative or no number", REMEDY)
    bits = kind_bits(kind)
    assert bits is not None
    if q_RC.numel():
        low, high = (int(x) for x in q_RC.aminmax())
        if low < -max_code(bits) or high > max_code(bits):
            found = low if low < -max_code(bits) else high
            raise CheckpointError(
                f"{where}: '{parts[0]}' holds the code {found}, {kind} allows"
                f" {-max_code(bits)} to {max_code(bits)}",
                REMEDY,
            )
    return parts


def _check_passthrough(tensors: Mapping[str, Any], name: str, kind: str, where: str) -> list[str]:
    found = _PASSTHROUGH_KIND.fullmatch(kind)
    if found is None or (found[1] is not None and found[1] not in _DTYPES):
        raise CheckpointError(
            f"{where}: '{name}' is of the unknown kind '{kind}'",
            "known: gptq (int2) to gptq (int8), passthrough (float16) and other types",
        )
    if name not in tensors:
        raise CheckpointError(f"{where}: '{name}' is {kind} but is missing", REMEDY)
    tensor = tensors[name]
    if found[1] is not None:
        _require(tensor, name, _DTYPES[found[1]], None, where)
    elif tensor.dtype not in _DTYPES.values():
        raise CheckpointError(f"{where}: '{name}' is of the unknown type {tensor.dtype}", REMEDY)
    return [name]


def _require(tensor: Tensor, name: str, dtype: torch.dtype, dims: int | None, where: str) -> None:
    if tensor.dtype != dtype or (dims is not None and tensor.dim() != dims):
        wanted = f"{dtype}" + (f" with {dims} dimensions" if dims is not None else "")
        raise CheckpointError(
            f"{where}: '{name}' is {tensor.dtype} {list(tensor.shape)}, expected {wanted}", REMEDY
        )


def _tight(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _embedded_config(text: Any, where: str) -> Config:
    if not isinstance(text, str):
        raise CheckpointError(f"{where}: its configuration is no text", REMEDY)
    try:
        return Config.from_json(text)
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{where}: its configuration cannot be used: {error}") from None


def _check_zip(archive: bytes, where: str) -> None:
    """Refuse anything but a plain stored zip: an entry packed again may unpack to any size."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
            entries = zipped.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"{where} holds no torch archive ({error})", REMEDY) from None
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > len(archive):
        raise CheckpointError(f"{where} holds a packed or overlapping archive", REMEDY)


def _too_large(where: str, max_bytes: int) -> CheckpointError:
    return CheckpointError(f"{where} unpacks to more than {max_bytes} bytes", "give an artifact")


def _decompress_brotli(data: bytes, where: str, max_bytes: int) -> bytes:
    decompressor = brotli.Decompressor()
    pieces, total, feed = [], 0, data
    try:
        while not decompressor.is_finished():
            piece = decompressor.process(feed, output_buffer_limit=_CHUNK_BYTES)
            if not piece and not decompressor.is_finished() and decompressor.can_accept_more_data():
                raise CheckpointError(f"{where} is truncated", REMEDY)
            pieces.append(piece)
            total += len(piece)
            feed = b""
            if total > max_bytes:
                raise _too_large(where, max_bytes)
    except brotli.error:
        raise CheckpointError(
            f"{where} is damaged, or no artifact: neither brotli nor LZMA can unpack it",
            "give an artifact (.ptz)",
        ) from None
    return b"".join(pieces)


def _decompress_lzma(data: bytes, where: str, max_bytes: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_BYTES)
    try:
        result = decompressor.decompress(data, max_length=max_bytes + 1)
    except lzma.LZMAError as error:
        raise CheckpointError(f"{where} is damaged ({error})", REMEDY) from None
    if len(result) > max_bytes:
        raise _too_large(where, max_bytes)
    if not decompressor.eof:
        raise CheckpointError(f"{where} is truncated", REMEDY)
    return result
