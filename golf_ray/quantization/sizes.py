"""What an artifact weighs against the limit: model bytes and code bytes, always apart.

Code is counted as it is submitted: each Python file minified (comments, docstrings, blank lines and
needless spaces dropped, names kept), LZMA-compressed, base85-coded and put into a wrapper of two
lines that runs it:

    import lzma as L,base64 as B
    exec(L.decompress(B.b85decode("..."),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))

Several files count as the sum of their wrappers; a file that is not Python counts as it is.

Invariant: minified code parses to the same syntax tree as the original less its docstrings.
"""

from __future__ import annotations

import ast
import base64
import io
import lzma
import math
import tokenize
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf_ray.config import Config, QuantizationConfig
from golf_ray.errors import UsageError
from golf_ray.quantization.artifact import matrix_setting, quantized_matrices
from golf_ray.quantization.batching import require_settings_alone
from golf_ray.quantization.container import QuantizedState, kind_bits

BROTLI_OVER_ENTROPY = 1.014
"""Brotli-11 bytes over order-0 entropy of the codes, as seen on the record's artifact."""
BYTES_PER_TENSOR = 44
"""What a tensor's entries in archive and pickle cost after brotli: 24 to 52 were seen, in whole
artifacts of 0.4 and 0.13 MB, so a prediction is within 1% of those and closer for larger ones."""
BYTES_PER_ARTIFACT = 400
"""What archive and pickle cost apart from their tensors."""
_LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
_WRAPPER = (
    b"import lzma as L,base64 as B\n"
    b'exec(L.decompress(B.b85decode("%s"),format=L.FORMAT_RAW,filters=[{"id":L.FILTER_LZMA2}]))\n'
)
_FSTRING_START = {getattr(tokenize, n, -1) for n in ("FSTRING_START", "TSTRING_START")}
_FSTRING_END = {getattr(tokenize, n, -1) for n in ("FSTRING_END", "TSTRING_END")}
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes of a submission. All decimal: 16 MB is 16,000,000."""

    model_bytes: int
    """The artifact file."""
    code_bytes: int
    """The code, as configured or measured."""
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """Model and code together."""
        return self.model_bytes + self.code_bytes

    @property
    def margin_bytes(self) -> int:
        """Bytes left under the limit; negative where it is broken."""
        return self.limit_bytes - self.total_bytes

    @property
    def fits(self) -> bool:
        """Whether the total is within the limit."""
        return self.margin_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        derived = {"total_bytes": self.total_bytes, "margin_bytes": self.margin_bytes}
        return {**asdict(self), **derived, "fits": self.fits}


def sizes_of(
    model_bytes: int, config: Config | QuantizationConfig, *, code_bytes: int | None = None
) -> Sizes:
    """Sizes under a configuration's limit.

    Args:
        code_bytes: as measured; None for the configured number.
    """
    quantization = config.quantization if isinstance(config, Config) else config
    return Sizes(
        model_bytes=model_bytes,
        code_bytes=quantization.code_bytes if code_bytes is None else code_bytes,
        limit_bytes=quantization.limit_bytes,
    )


def measure_code(path: Path | Iterable[Path]) -> int:
    """Bytes of a code file, or of several together, in their wrappers.

    Raises:
        UsageError: a file cannot be read or is no valid Python.
    """
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(p) for p in path]
    if not paths:
        raise UsageError("there is no code file to measure", "give a file")
    return sum(_measure_file(p) for p in paths)


def wrap_code(source: str) -> bytes:
    """A Python program as submitted: two lines that unpack and run its minified text."""
    packed = lzma.compress(
        minify_python(source).encode(), format=lzma.FORMAT_RAW, filters=_LZMA_FILTERS
    )
    return _WRAPPER % base64.b85encode(packed)


def minify_python(source: str) -> str:
    """Python source without comments, docstrings, blank lines and needless spaces.

    Raises:
        SyntaxError: it is no valid Python.
    """
    tree = _without_docstrings(ast.parse(source))
    wanted = ast.dump(tree)
    # What unparse cannot write (rare nested f-strings) keeps its own text, and so its docstrings.
    for unparsed in (True, False):
        try:
            text = _squeeze(ast.unparse(tree) if unparsed else source)
            if ast.dump(_without_docstrings(ast.parse(text))) == wanted:
                return text
        except (ValueError, SyntaxError, tokenize.TokenError):
            continue
    return source


def predicted_model_bytes(state: QuantizedState) -> int:
    """Artifact bytes as brotli would give, without the minute that brotli takes.

    Brotli-11 writes a matrix's codes in 1.014 times their order-0 entropy. Two-byte numbers
    (scales, float16 tensors) are counted by the entropy of their low and of their high bytes, which
    the container's shuffle keeps apart, with a code table for each. Counts are taken where the
    tensors lie; the result is the same on every device.

    An embedding that has hardly been trained has rows that resemble each other, which brotli finds
    and an entropy does not: a small model of 40 steps weighs 4.4% less than this, within 0.5% the
    same for all clip sigmas. So one artifact that was compressed corrects those of one checkpoint.
    """
    code_bits = sum(
        _entropy_bits(state.tensors[f"{name}.q"].flatten().view(torch.uint8))
        for name, kind in state.kinds.items()
        if kind_bits(kind) is not None
    )
    other = [
        t.contiguous().view(torch.uint8).flatten()
        for n, t in state.tensors.items()
        if t.dim() and not (n.endswith(".q") and t.dtype == torch.int8)
    ]
    other_bits = 0.0
    if other:
        flat = torch.cat(other)
        other_bits = _entropy_bits(flat[0::2]) + _entropy_bits(flat[1::2])
    overhead = BYTES_PER_ARTIFACT + BYTES_PER_TENSOR * len(state.tensors)
    return math.ceil(BROTLI_OVER_ENTROPY * (code_bits + other_bits) / 8) + overhead


def predict_change(reference: Config, reference_model_bytes: int, config: Config) -> int:
    """Artifact bytes of a configuration, from those of another that was quantised.

    Needs no weights, so it can be known before a training. By the field's rule: a code's entropy
    moves by the bits added, less log2 of the ratio of the clip sigmas, so that
    bytes = reference + sum over matrices of N / 8 * (delta bits - delta log2 clip_sigmas).
    It counts codes as if none were clipped and steps were fine. On a small trained model that is
    within 0.6% of the artifact for clips from half to twice the reference's and 5 bits or more of
    the matrices, 7 or more of the embedding; 4 bits come out 5% too small and 3 bits 13%.

    Args:
        reference: was quantised.
        reference_model_bytes: of its artifact, measured or predicted.
        config: differs from it, of what matters for codes, in bits and clip sigmas alone.

    Raises:
        UsageError: they differ in another field.
    """
    require_settings_alone(reference, config, "configurations whose sizes are compared")
    added_bits = 0.0
    for spec in quantized_matrices(config):
        bits, clip_sigmas = matrix_setting(spec, config.model, config.quantization)
        before, clip_before = matrix_setting(spec, reference.model, reference.quantization)
        wider = math.log2(clip_sigmas / clip_before)
        added_bits += spec.shape[0] * spec.shape[1] * (bits - before - wider)
    return round(reference_model_bytes + added_bits / 8)


def _measure_file(path: Path) -> int:
    try:
        data = path.read_bytes()
        if path.suffix != ".py":
            return len(data)
        with tokenize.open(path) as file:
            return len(wrap_code(file.read()))
    except OSError as error:
        raise UsageError(
            f"the code file {path} cannot be read ({error.strerror or error})", "check the path"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"the code file {path} is no valid Python ({error})", "mend it") from None


def _entropy_bits(values: Tensor) -> float:
    """Bits of all values, uint8, at their own order-0 entropy."""
    if not len(values):
        return 0.0
    counts = torch.bincount(values, minlength=256).cpu().numpy()
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            rest = node.body[1:]
            node.body = rest if rest or isinstance(node, ast.Module) else [ast.Pass()]
    return tree


def _squeeze(source: str) -> str:
    """Source with one space a level of indentation and spaces only where tokens would run together.

    Raises:
        tokenize.TokenError, SyntaxError: it is no valid Python.
    """
    lines = list(io.StringIO(source))
    out: list[str] = []
    level, at_line_start, depth = 0, True, 0
    begin = (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _FSTRING_START:
            begin = token.start if depth == 0 else begin
            depth += 1
            continue
        text = token.string
        if depth:
            depth -= token.type in _FSTRING_END
            if depth:
                continue
            text = _between(lines, begin, token.end)
        elif token.type == tokenize.INDENT:
            level += 1
            continue
        elif token.type == tokenize.DEDENT:
            level -= 1
            continue
        elif token.type == tokenize.NEWLINE:
            out.append("\n")
            at_line_start = True
            continue
        elif token.type in _LAYOUT:
            continue
        if at_line_start:
            out.append(" " * level)
        elif _runs_together(out[-1], text):
            out.append(" ")
        out.append(text)
        at_line_start = False
    return "".join(out)


def _runs_together(before: str, after: str) -> bool:
    left, right = before[-1], after[0]
    word = left.isalnum() or left == "_" or ord(left) > 127
    if word and (right.isalnum() or right in "_\"'" or ord(right) > 127):
        return True
    if left in "\"'" and right in "\"'":
        return True
    return before[0].isdigit() and right == "."


def _between(lines: list[str], begin: tuple[int, int], end: tuple[int, int]) -> str:
    (first, first_column), (last, last_column) = begin, end
    if first == last:
        return lines[first - 1][first_column:last_column]
    middle = "".join(lines[first : last - 1])
    return lines[first - 1][first_column:] + middle + lines[last - 1][:last_column]
