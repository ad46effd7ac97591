"""Kernels through Triton's compiler for a Hopper GPU, which needs none: the interpreter accepts
what the compiler does not, and runs one program at a time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from golf_ray.kernels.triton import grouped

depth, out = int(sys.argv[1]), sys.argv[4]
turned, deep = (argument == "True" for argument in sys.argv[2:4])
cut = grouped.LINEAR_DEEP if deep else grouped.LINEAR[16]
of_w = (cut.depth, cut.columns) if turned else (cut.columns, cut.depth)
types = {
    "x_desc": f"tensordesc<bf16[{cut.rows},{cut.depth}]>",
    "w_desc": f"tensordesc<bf16[{of_w[0]},{of_w[1]}]>",
    "low": "*bf16", "bank": "*bf16",
    "out_desc": f"tensordesc<{out}[{cut.rows},{cut.columns}]>", "out": f"*{out}",
    **dict.fromkeys(("jobs", "documents", "within"), "*i32"),
    **dict.fromkeys(("num_rows", "num_jobs", "bank_stride", "low_stride", "out_stride"), "i32"),
}
constants = {
    "K": 2048 if deep else 512, "DEPTH": depth, "TURNED": turned, "ALIGN": grouped.ALIGNED,
    "FLAT": grouped.FLAT_ROWS, "BLOCK_M": cut.rows, "BLOCK_N": cut.columns, "BLOCK_K": cut.depth,
    "BLOCK_R": grouped.LINEAR_DEPTH, "PRECISION": "tf32",
}
# What launches find: pointers and strides are multiples of 16.
whole = {
    (i,): [["tt.divisibility", 16]]
    for i, (name, kind) in enumerate(types.items())
    if kind[0] == "*" or name.endswith("_stride")
}
source = ASTSource(
    fn=grouped._linear,
    signature={**types, **dict.fromkeys(constants, "constexpr")},
    constexprs=constants,
    attrs=whole,
)
made = triton.compile(
    source, target=GPUTarget("cuda", 90, 32),
    options={"num_warps": cut.warps, "num_stages": cut.stages},
)
print(made.metadata.shared)
print(made.asm["ptx"])
"""
SHARED_BYTES = 227 * 1024
"""Of a program on a Hopper GPU at most."""


@pytest.mark.parametrize(
    ("depth", "turned", "deep", "out"),
    [
        (96, False, False, "bf16"),
        (32, True, False, "bf16"),
        (96, False, False, "fp32"),
        (384, True, True, "bf16"),
    ],
)
def test_the_product_with_adapters(depth: int, turned: bool, deep: bool, out: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", COMPILED, str(depth), str(turned), str(deep), out],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout.split()[0]) <= SHARED_BYTES
    assert "wgmma.mma_async" in run.stdout and "cp.async.bulk.tensor" in run.stdout
