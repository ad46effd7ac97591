"""Benchmarks: documents as the field's, categories, the documents that come out."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import golf_ray
from kernel_cases import interpreter_problem

from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.plan import window_tokens, windows
from golf_ray.bench import report
from golf_ray.bench.adaptation import TttBench, whole_set_ms
from golf_ray.bench.corpus import document_lengths, random_tokens, write_random_shards
from golf_ray.bench.host import field_segments
from golf_ray.bench.kernels import cases, difference_of
from golf_ray.bench.profile import OTHER, category_of
from golf_ray.bench.timing import median_ms
from golf_ray.config import AdaptationConfig
from golf_ray.data.shards import BOS_ID, open_shard
from golf_ray.model.compute import Compute
from golf_ray.presets import TINY


def test_random_documents_are_as_long_as_the_field_s() -> None:
    lengths = document_lengths(200_000, seed=1)
    published = {0.10: 149, 0.50: 476, 0.90: 1596, 0.99: 5681}
    for quantile, expected in published.items():
        # Two standard errors of a quantile of 200,000 are under 2%.
        assert np.quantile(lengths, quantile) == pytest.approx(expected, rel=0.04)
    # 811 tokens on average; over 4,096 tokens 2% of the documents.
    assert lengths.mean() == pytest.approx(811, rel=0.03)
    assert (lengths > 4096).mean() == pytest.approx(0.02, abs=0.003)
    assert lengths.min() >= 2 and np.array_equal(lengths, document_lengths(200_000, seed=1))


def test_random_shards_are_shards(tmp_path: Path) -> None:
    (path,) = write_random_shards(tmp_path, 1, 50_000, 512)
    tokens = open_shard(path, 512)
    assert len(tokens) == 50_000 and tokens[0] == BOS_ID
    assert np.array_equal(tokens, random_tokens(50_000, 512))
    assert 30 < int((np.asarray(tokens) == BOS_ID).sum()) < 120


def test_segments_fill_a_buffer() -> None:
    lengths = field_segments(98_304)
    assert sum(lengths) == 98_304 and max(lengths) <= 2048 and 100 < len(lengths) < 200


@pytest.mark.parametrize(
    ("kernel", "category"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<...", "backward"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...", "forward"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_splitK_NTN", "matrix products"),
        ("_up", "MLP kernels"),
        ("_down_backward", "MLP kernels"),
        ("_mix_backward", "mixes"),
        ("_prepare", "heads"),
        ("_cross_entropy", "cross entropy"),
        ("triton_poi_fused_add_0", "compiled"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("something new", OTHER),
    ],
)
def test_kernels_fall_into_categories(kernel: str, category: str) -> None:
    assert category in category_of(kernel)


def test_a_median_is_of_the_runs_that_count() -> None:
    runs = []
    ms = median_ms(lambda: runs.append(1), torch.device("cpu"), runs=5, warm_up=2)
    assert len(runs) == 7 and 0 <= ms < 10


def test_bench_train_measures_compares_and_writes(tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    options = ("--preset", "tiny", "--steps", "2", "--no-baseline", "--no-start-up")
    done = golf_ray("bench", "train", *options, "--out", str(first), "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads(first.read_text())
    assert document["kind"] == "bench train" and document["host"]["torch"] == torch.__version__
    training = document["training"]
    assert training["tokens_per_s"] > 0 and training["tokens_per_s_looping"] > 0
    assert training["steps"] == 8 and training["compute"]["attention"] == "sdpa"

    again = golf_ray("bench", "train", *options, "--compare", str(first))
    assert again.status == 0, again.err
    assert "loop off" in again.out and "against the earlier run" in again.out


def test_bench_train_starts_in_a_process_of_its_own() -> None:
    done = golf_ray("bench", "train", "--preset", "tiny", "--steps", "2", "--no-baseline", "--json")
    found = json.loads(done.out)["start_up"]
    assert found.keys() == {"cold_s", "warm_s"} and all(0 < s < 60 for s in found.values())


def test_bench_kernels_without_a_gpu_times_torch() -> None:
    done = golf_ray("bench", "kernels", "--preset", "tiny", "--no-compiled", "--json")
    assert done.status == 0, done.err
    rows = json.loads(done.out)["kernels"]
    assert {row["operation"] for row in rows} == {
        "mix, 3 tensors", "mix, 2 tensors", "mlp", "head and loss", "embedding", "attention",
        "adapters, rows", "adapters, in a product", "adapters, in a gradient",
        "adapters, in a deep product", "adapters, sums",
    }  # fmt: skip
    for row in rows:
        assert row["twin_forward_ms"] > 0 and row["fused_forward_ms"] is None
        assert (row["twin_both_ms"] is None) == row["operation"].startswith("adapters")
        assert row["against_twin"] is None and row["difference"] is None and row["right"] is None


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_operations_compute_what_torch_s_do(dtype: torch.dtype) -> None:
    config = TINY.with_overrides({"train.batch_tokens": 128, "train.micro_batches": 1})
    compute = Compute(dtype=dtype, kernels="triton")
    off = {
        case.operation: difference_of(case)
        for case in cases(config, torch.device("cpu"), compute)
        if case.operation != "attention"
    }
    # A result's rounding and some steps before it.
    assert len(off) == 10 and max(off.values()) <= 4 * torch.finfo(dtype).eps, off


@pytest.mark.parametrize(("factor", "expected"), [(1.1, 0.1), (float("nan"), 1.0), (-3.0, 1.0)])
def test_an_operation_that_computes_something_else_is_a_fault(
    factor: float, expected: float
) -> None:
    config = TINY.with_overrides({"train.batch_tokens": 128, "train.micro_batches": 1})
    device, compute = torch.device("cpu"), Compute()
    found: dict[str, Any] = {"kernels": []}
    assert report.kernel_fault(found) is None
    for case in cases(config, device, compute):
        right = difference_of(dataclasses.replace(case, fused=case.twin))
        assert right == 0
        wrong = difference_of(
            dataclasses.replace(case, fused=lambda *t, run=case.twin: [factor * y for y in run(*t)])
        )
        assert wrong == pytest.approx(expected, rel=1e-3), case.operation
        row = {"operation": case.operation, "difference": wrong, "right": wrong <= 0.05}
        found["kernels"].append(row)
    fault = report.kernel_fault(found)
    assert fault is not None and fault.exit_status == 1
    assert f"mlp by {expected:.2g}" in fault.problem and "kernels.backend=torch" in fault.remedy


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be compared with"), ("{", "cannot be compared"), ('{"kind": "x"}', "no docum")],
)
def test_a_document_that_is_none_is_one_line(
    content: str | None, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "earlier.json"
    if content is not None:
        path.write_text(content)
    done = golf_ray("bench", "train", "--preset", "tiny", "--compare", str(path))
    assert done.status == 2 and expected in done.error and not done.out


def test_ratios_say_what_is_faster() -> None:
    def document(speed: float, product: float, forward_ms: float) -> dict[str, object]:
        return {
            "training": {"tokens_per_s": speed, "tokens_per_s_looping": None},
            "yardsticks": {"product_tflops": product, "fa3_forward_ms": forward_ms},
        }

    found = report.against(document(1.2e6, 700.0, 0.5), document(1.0e6, 350.0, 1.0))
    assert found == pytest.approx(
        {
            "tokens_per_s": 1.2,
            "yardstick product_tflops": 2.0,
            "yardstick fa3_forward_ms": 2.0,
        }
    )


def test_the_whole_set_costs_what_its_chunks_cost() -> None:
    adaptation = AdaptationConfig(chunk_size=8, window=32)
    prices = {8: 1.0, 16: 2.0, 24: 3.0, 32: 4.0}
    endings = [(16, 0.5), (32, 1.5)]
    lengths = [0, 5, 8, 9, 31, 32, 33, 100]
    expected = 0.0
    for n in lengths:
        chunks = windows(n, adaptation.chunk_size, adaptation.window)
        expected += sum(prices[c.window_tokens] for c in chunks[:-1])
        if chunks:
            # Straight between the two, and flat outside.
            last = min(32, max(16, chunks[-1].window_tokens))
            expected += 0.5 + (last - 16) / 16 + 0.25
    found = whole_set_ms(lengths, adaptation, prices, endings, start_ms=0.25)
    assert found == pytest.approx(expected)


def test_classes_are_timed_by_the_engine_itself() -> None:
    config = TINY.with_overrides({"adaptation.resident_documents": 3, "adaptation.step_tokens": 96})
    bench = TttBench(config, torch.device("cpu"))
    assert bench.classes() == [64]
    steps, times = bench.run([40, 33])
    assert len(steps) == len(times) and all(ms > 0 for ms in times)
    assert sum(step.window_tokens for step in steps) == window_tokens(40, 16, 64) + window_tokens(
        33, 16, 64
    )
    timing, prices = bench.time_class(64)
    assert timing.documents == 1 and sorted(prices) == [16, 32, 48, 64]
    assert timing.window_tokens_per_s == pytest.approx(64 / timing.chunk_ms * 1e3)
    assert bench.start_ms() > 0


def test_a_fresh_engine_finds_the_memory_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = TttBench(TINY, torch.device("cpu"))
    before, new = weakref.ref(bench.engine), bench._new_engine
    # As a GPU's graphs do, it holds a method that holds it.
    bench.engine._graphs = bench.engine.losses  # type: ignore[assignment]

    def made(*, thrifty: bool) -> Engine:
        assert thrifty and before() is None
        return new(thrifty=thrifty)

    monkeypatch.setattr(bench, "_new_engine", made)
    assert bench.run_afresh([40, 33]) > 0


def test_ttt_document_as_tables() -> None:
    found = {
        "host": {"device": "a GPU", "torch": "2.11"},
        "compute": {"dtype": "bfloat16", "attention": "fa3"},
        "budget": {"step_tokens": 65_536, "residents": 200},
        "classes": [
            {
                "window": 2048, "documents": 32, "chunk_ms": 2.2, "ending_ms": 0.9,
                "window_tokens_per_s": 930_909.1,
            }
        ],
        "whole_set": {
            "documents": 50_000, "tokens": 41_125_204, "gpu_s": 1246.1, "priced_gpu_s": 1228.1,
            "method": "sum",
        },
        "mixed": {"documents": 64, "measured_s": 5.1, "priced_s": 5.0, "fresh_s": 7.3},
        "peak_memory_bytes": 80_000_000_000,
        "first_result": {"cold_s": 40.0, "warm_s": 9.5},
        "yardsticks": {"copy": 4.2},
    }  # fmt: skip
    tables = list(report.ttt_rows(found))
    text = "\n".join(title + "\n" + str(rows) for title, rows in tables)
    for words in (
        "2,048",
        "930,909",
        "1,246 s",
        "80.0 GB",
        "9.5 s",
        "7.3 s",
        "200 documents at a time",
    ):
        assert words in text, words


def test_bench_quantize_measures_compares_and_writes(tmp_path: Path) -> None:
    first = tmp_path / "first.json"
    options = ("bench", "quantize", "--preset", "tiny", "--settings", "3")
    done = golf_ray(*options, "--out", first, "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document == json.loads(first.read_text()) and document["kind"] == "bench quantize"
    assert all(s > 0 for s in document["seconds"].values())
    assert document["shape"]["weights"].startswith("random")
    sizes = document["bytes"]
    assert sizes["predicted"] / sizes["true"] == sizes["predicted_over_true"]
    assert sizes["predicted"] == pytest.approx(sizes["true"], rel=0.02)
    assert abs(sizes["rule_off"]) < 0.005 * sizes["predicted"]

    again = golf_ray(*options, "--no-compress", "--compare", first)
    assert again.status == 0, again.err
    for words in ("codes of 3 together", "predicted by entropy", "against the earlier run"):
        assert words in again.out
    other = golf_ray("bench", "quantize", "--preset", "laptop", "--compare", first, "--no-compress")
    assert other.status == 2 and "preset is 'tiny'" in other.error
    kind = golf_ray("bench", "train", "--preset", "tiny", "--compare", first)
    assert kind.status == 2 and "no document of 'golf-ray bench train'" in kind.error
