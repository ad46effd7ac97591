"""Sizes: model, code and total apart; the wrapper runs; the prediction against the truth."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import FOLDER

from golf_ray.errors import UsageError
from golf_ray.presets import RECORD
from golf_ray.quantization.container import QuantizedState, encode_artifact, read_artifact
from golf_ray.quantization.gptq import rounded_codes, row_scales
from golf_ray.quantization.sizes import (
    Sizes,
    _squeeze,
    measure_code,
    minify_python,
    predicted_model_bytes,
    sizes_of,
    wrap_code,
)

PROGRAM = textwrap.dedent(
    '''
    #!/usr/bin/env python
    # A comment that must not be counted.
    """The program's docstring."""
    from __future__ import annotations

    import sys  # another


    class Adder:
        """Adds."""

        base: int = 1

        def add(self, *values: int, scale=2) -> int:
            """Sum.

            Over lines.
            """
            total = self . base
            for value in values :
                if value  >  0 and not value == 99:   # why
                    total += - - value
                else : pass
            return total * scale if scale else"never"

        def nothing(self):
            """Only a docstring."""


    def texts(x, width=7):
        kept = """not a docstring
          with   spaces # and no comment
        """
        return f"{x!r:>{width}} {'nested'} {{}}" "joined" 'é' + kept + '"' + "'"

    print(Adder().add(1, 2, 3), Adder().nothing(), repr(texts("a")), 1 .real, 0x1F, 1_000.5e3)
    print(*[lambda *a, **k: (a, k)][0](1, *[2], **{"b": 3}), sys.argv[1:] or -1 ** 2)
    '''
).strip()


def stripped(source: str) -> str:
    """The syntax tree less docstrings, by another way than the code under test."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
        if isinstance(node, kinds):
            node.body = [n for n in node.body if not isinstance(n, ast.Pass)]
    return ast.dump(tree)


def run(source: bytes, path: Path) -> str:
    path.write_bytes(source)
    done = subprocess.run([sys.executable, path], check=True, capture_output=True, text=True)
    return done.stdout


# Sizes ----------------------------------------------------------------------------------------


def test_sizes_keep_model_code_and_total_apart() -> None:
    sizes = Sizes(model_bytes=15_900_000, code_bytes=27_310, limit_bytes=16_000_000)
    assert (sizes.total_bytes, sizes.margin_bytes, sizes.fits) == (15_927_310, 72_690, True)
    assert sizes.to_dict() == {
        "model_bytes": 15_900_000,
        "code_bytes": 27_310,
        "limit_bytes": 16_000_000,
        "total_bytes": 15_927_310,
        "margin_bytes": 72_690,
        "fits": True,
    }
    assert pickle.loads(pickle.dumps(sizes)) == sizes


@given(model=st.integers(0, 10**8), code=st.integers(0, 10**6), limit=st.integers(1, 2 * 10**7))
def test_limit_is_reached_exactly(model: int, code: int, limit: int) -> None:
    sizes = Sizes(model_bytes=model, code_bytes=code, limit_bytes=limit)
    assert sizes.fits == (model + code <= limit)
    assert sizes.margin_bytes == limit - model - code


def test_code_bytes_of_the_configuration_or_measured() -> None:
    assert sizes_of(1000, RECORD) == Sizes(
        model_bytes=1000, code_bytes=27_310, limit_bytes=16_000_000
    )
    assert sizes_of(1000, RECORD.quantization, code_bytes=5).code_bytes == 5


# Code -----------------------------------------------------------------------------------------


def test_minified_program_is_the_same_program(tmp_path: Path) -> None:
    small = minify_python(PROGRAM)
    assert stripped(small) == stripped(PROGRAM)
    assert run(small.encode(), tmp_path / "a.py") == run(PROGRAM.encode(), tmp_path / "b.py")
    assert "comment that must" not in small and "docstring." not in small
    assert "with   spaces # and no comment" in small
    assert "\n\n" not in small and "\n def add(" in small and "\n  total=self.base\n" in small
    assert len(small) < 0.65 * len(PROGRAM)


def test_wrapper_has_two_lines_and_runs(tmp_path: Path) -> None:
    wrapped = wrap_code(PROGRAM)
    assert wrapped.count(b"\n") == 2 and wrapped.isascii()
    assert run(wrapped, tmp_path / "a.py") == run(PROGRAM.encode(), tmp_path / "b.py")


def test_own_sources_minify_and_shrink() -> None:
    folder = Path(__file__).parent.parent / "golf_ray" / "quantization"
    for path in sorted(folder.glob("*.py")):
        source = path.read_text()
        small = minify_python(source)
        assert stripped(small) == stripped(source), path
        assert len(small) < 0.75 * len(source) or not source
    paths = [folder / "gptq.py", folder / "hessian.py"]
    assert measure_code(paths) == measure_code(paths[0]) + measure_code(paths[1])
    assert 1500 < measure_code(paths[0]) < 0.45 * paths[0].stat().st_size


@pytest.mark.parametrize(
    "source",
    [
        "x = 'a' 'b' ''  'c'\n",
        "x = 1 .real + 1. .real\n",
        "'doc'; x = 1\n",
        "def f(): 'doc'\n",
        "class A:\n    'doc'\n\n    'second'\n    x: int\n",
        "async def f():\n\tb'no doc'\n\tawait  g( )\n",
        "x = [\n  1, # one\n\n  2,\n]\nif x :\n   y = 1 ; z = 2\n\n\nelse : y = \\\n  3\n",
        "x = rb'\\n' ; y = f'{x!r}' f\"{x:{1}}\"\n",
        "print(f'''a\n  {1\n  +2}  b\n''')\n",
        "match x :\n  case [ 1 , * _ ] if y : pass\n  case { 'a' : b , ** c } : z\n",
        "é = lambda * , a = - 1 : not a ; x = é if é else not é\n",
        "",
        "'only a docstring'\n",
    ],
)
def test_awkward_sources_keep_their_tree(source: str) -> None:
    assert stripped(minify_python(source)) == stripped(source)


def test_source_that_cannot_be_unparsed_is_squeezed_as_it_stands() -> None:
    for source in ("x = '' 'a'\n", "y = 1 .real\n", "if x :\n    z = f'{x }' 'b' # c\n"):
        assert ast.dump(ast.parse(_squeeze(source))) == ast.dump(ast.parse(source))


def test_comments_and_docstrings_cost_nothing(tmp_path: Path) -> None:
    bare, rich = tmp_path / "bare.py", tmp_path / "rich.py"
    bare.write_text("def f(x):\n    return x + 1\nprint(f(2))\n")
    rich.write_text(
        '"""Module."""\n# why\n\ndef f( x ):\n    """Doc."""\n\n    return x+1  # plus\nprint(f(2))'
    )
    assert measure_code(bare) == measure_code(rich)
    other = tmp_path / "kernel.cu"
    other.write_text("// comment\n")
    assert measure_code([bare, other]) == measure_code(bare) + 11


def test_unusable_code_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    with pytest.raises(UsageError, match=r"a\.py cannot be read \(No such file"):
        measure_code(path)
    path.write_text("def f(:\n")
    with pytest.raises(UsageError, match="no valid Python"):
        measure_code(path)
    path.write_bytes(b"x = '\xff'\n")
    with pytest.raises(UsageError, match="no valid Python"):
        measure_code(path)
    path.write_bytes(b"x = 1\x00\n")
    with pytest.raises(UsageError, match="no valid Python"):
        measure_code(path)
    with pytest.raises(UsageError, match="no code file"):
        measure_code([])


# Prediction -----------------------------------------------------------------------------------


def synthetic(bits: int, clip_sigmas: float) -> QuantizedState:
    w_RC = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    scale_R = row_scales(w_RC, clip_sigmas, bits)
    return QuantizedState(
        tensors={"a.q": rounded_codes(w_RC, scale_R, bits), "a.scale": scale_R},
        kinds={"a": f"gptq (int{bits})"},
    )


def test_prediction_on_the_tiny_artifact_is_within_one_percent() -> None:
    tensors, kinds, _ = read_artifact(FOLDER / "final_model.int6.ptz")
    state = QuantizedState(tensors=tensors, kinds=kinds)
    truth = (FOLDER / "final_model.int6.ptz").stat().st_size
    assert predicted_model_bytes(state) == pytest.approx(truth, rel=0.01)
    assert predicted_model_bytes(state) == pytest.approx(len(encode_artifact(state)), rel=0.01)


@pytest.mark.parametrize(("bits", "clip_sigmas"), [(6, 12.85), (5, 4.0), (8, 20.0)])
def test_prediction_on_normal_weights(bits: int, clip_sigmas: float) -> None:
    state = synthetic(bits, clip_sigmas)
    assert predicted_model_bytes(state) == pytest.approx(len(encode_artifact(state)), rel=0.02)


def test_wider_clips_are_smaller() -> None:
    # One more percent of clip takes log2(1.01) bits off each of 35.9 M codes: 65 KB at the most.
    one, other = (predicted_model_bytes(synthetic(6, s)) for s in (12.85, 12.85 * 1.01))
    saved = (one - other) / (512 * 256) * 35.9e6
    assert 40_000 < saved < 80_000


def test_prediction_of_nothing_and_of_scalars() -> None:
    assert predicted_model_bytes(QuantizedState(tensors={}, kinds={})) < 1000
    state = QuantizedState(
        tensors={"x": torch.tensor(1.0).half(), "n": torch.tensor([3])},
        kinds={"x": "passthrough (float16)", "n": "passthrough"},
    )
    assert predicted_model_bytes(state) < 1000
