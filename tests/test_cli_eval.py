"""`golf-ray eval` and `golf-ray quantize`: stored values, configurations, artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import TINY, UPSTREAM, golf_ray

import golf_ray as package
from golf_ray.config import Config
from golf_ray.model.checkpoint import read_state, save_state
from golf_ray.presets import TINY as TINY_PRESET

FULL, INT6 = TINY / "final_model.pt", TINY / "final_model.int6.ptz"
TTT = ("eval", FULL, *UPSTREAM, "--method", "ttt")
FRACTION = "adaptation.document_fraction=0.5"
CARRIED = TINY_PRESET.with_overrides({"data.dir": str(TINY)})


def stored(file: str, name: str) -> float:
    with np.load(TINY / file) as archive:
        return float(archive[name])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights as a checkpoint of ours, which carries its configuration."""
    path = tmp_path_factory.mktemp("own") / "final_model.pt"
    save_state(path, read_state(FULL)[0], CARRIED)
    return path


@pytest.mark.parametrize("method", ["packed", "sliding"])
def test_full_weights_give_the_stored_values(method: str) -> None:
    data = golf_ray("eval", FULL, *UPSTREAM, "--method", method, "--json").json
    assert data["val_loss_nats"] == pytest.approx(stored("forward.npz", f"{method}_loss"), abs=1e-5)
    assert data["val_bpb"] == pytest.approx(stored("forward.npz", f"{method}_bpb"), abs=1e-5)
    assert data["tokens_scored"] == stored("forward.npz", f"{method}_tokens")
    assert data["bytes_scored"] == stored("forward.npz", "packed_bytes")
    assert data["weights"] == "full" and data["seconds"] > 0 and data["method"] == method
    assert "model_bytes" not in data


def test_the_artifact_gives_the_stored_values() -> None:
    data = golf_ray("eval", INT6, *UPSTREAM, "--json").json
    loss, bpb = (stored("quantized_eval.npz", f"packed_{name}") for name in ("loss", "bpb"))
    assert data["val_loss_nats"] == pytest.approx(loss, abs=1e-5)
    assert data["val_bpb"] == pytest.approx(bpb, abs=1e-5)
    assert data["tokens_scored"] == 832 and data["weights"] == "int6"
    assert data["model_bytes"] == stored("quantized_eval.npz", "artifact_bytes")
    assert data["code_bytes"] == 27_310 and data["limit_bytes"] == 16_000_000
    assert data["total_bytes"] == data["model_bytes"] + data["code_bytes"]
    sliding = golf_ray("eval", INT6, *UPSTREAM, "--method", "sliding", "--json").json
    assert sliding["tokens_scored"] == 832 and sliding["weights"] == "int6"


def test_ttt_with_the_stored_adapters_gives_the_stored_value() -> None:
    argv = ["--method", "ttt", "--adapter-init", TINY / "ttt.npz", "--json"]
    data = golf_ray("eval", FULL, *UPSTREAM, *argv).json
    assert data["val_loss_nats"] == pytest.approx(stored("ttt.npz", "val_loss"), abs=1e-6)
    assert data["val_bpb"] == pytest.approx(stored("ttt.npz", "val_bpb"), abs=1e-6)
    assert data["tokens_scored"] == 882 and data["documents_scored"] == 14


def test_a_ledger_goes_on_and_belongs_to_one_evaluation(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    argv = ["eval", FULL, *UPSTREAM, "--method", "ttt", "--json", "--ledger", ledger]
    first, second = golf_ray(*argv), golf_ray(*argv)
    assert "14 documents are in" in second.err and "documents are in" not in first.err
    assert second.json["val_bpb"] == first.json["val_bpb"]
    assert second.json["seconds"] < first.json["seconds"]
    # A sample of documents is a part of the same evaluation.
    sample = golf_ray(*argv, "--sample", "6")
    assert "14 documents are in" in sample.err and sample.json["documents_scored"] == 6
    header = json.loads((ledger / "header.json").read_text())
    assert header["adaptation"]["chunk_size"] == 16 and header["weights_kind"] == "full"
    other = golf_ray(*argv, "--set", "adaptation.chunk_size=8")
    assert other.status == 2 and other.out == ""
    assert "adaptation.chunk_size is 16 there and 8 here" in other.error
    int6 = golf_ray("eval", INT6, *argv[2:])
    assert int6.status == 2 and "weights_kind is full there and int6 here" in int6.error


def test_ttt_says_the_same_twice_and_by_document(tmp_path: Path) -> None:
    argv = ["eval", FULL, *UPSTREAM, "--method", "ttt", "--json"]
    first = golf_ray(*argv, "--per-document", tmp_path / "documents.jsonl").json
    second = golf_ray(*argv).json
    del first["seconds"], second["seconds"]
    assert first == second
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(14))
    assert sum(row["tokens"] for row in rows) == 882
    assert sum(row["bytes"] for row in rows) == first["bytes_scored"]
    mean = sum(row["nats"] for row in rows) / 882
    assert mean == pytest.approx(first["val_loss_nats"], rel=1e-12)


def test_a_sample_of_documents_gives_an_estimate(tmp_path: Path) -> None:
    argv = ["eval", FULL, *UPSTREAM, "--method", "ttt", "--sample"]
    whole = golf_ray("eval", FULL, *UPSTREAM, "--method", "ttt", "--json").json
    data = golf_ray(*argv, 8, "--json", "--per-document", tmp_path / "documents.jsonl").json
    found = data["estimate"]
    assert data["val_bpb"] == found["bpb"] != whole["val_bpb"]
    assert found["low_bpb"] < whole["val_bpb"] < found["high_bpb"]
    assert 0 < found["standard_error_bpb"] < 0.2
    assert (found["documents_scored"], found["documents_total"]) == (8, 14)
    assert (found["tokens_total"], found["bytes_total"]) == (882, 1596)
    assert data["documents_scored"] == 8 and data["bytes_scored"] < 1596
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    # Another setting scores the same documents.
    other = [*argv, 8, "--json", "--set", "adaptation.chunk_size=32"]
    changed = golf_ray(*other, "--per-document", tmp_path / "changed.jsonl").json
    assert changed["val_bpb"] != data["val_bpb"]
    again = [json.loads(line) for line in (tmp_path / "changed.jsonl").read_text().splitlines()]
    assert [row["index"] for row in again] == [row["index"] for row in rows]
    # As many as there are, or more, are all: no estimate but the value.
    every = golf_ray(*argv, 100, "--json").json
    assert every["estimate"]["standard_error_bpb"] == 0
    assert every["val_bpb"] == whole["val_bpb"] and every["tokens_scored"] == 882
    text = golf_ray(*argv, 8).out
    error, low, high = (found[name] for name in ("standard_error_bpb", "low_bpb", "high_bpb"))
    assert (
        f"{found['bpb']:.4f} +- {error:.4f} (95% {low:.4f} to {high:.4f}), "
        "estimated from 8 of 14 documents\n"
    ) in text
    assert "nats a token, estimated\n" in text
    assert "estimated" not in golf_ray(*argv, 14).out


def test_a_report_for_people_says_the_same() -> None:
    text = golf_ray("eval", INT6, *UPSTREAM).out
    assert "packed, int6 weights of" in text and f"{stored('quantized_eval.npz', 'packed_bpb'):.6f}"
    assert "model 126,841 + code 27,310 = 154,151 of 16,000,000 bytes" in text


def test_a_checkpoint_carries_its_configuration(own: Path) -> None:
    given = golf_ray("eval", FULL, *UPSTREAM, "--json").json
    carried = golf_ray("eval", own, "--json").json
    assert carried["val_loss_nats"] == given["val_loss_nats"]
    changed = golf_ray("eval", own, "--set", "evaluation.batch_tokens=64", "--json").json
    assert changed["val_loss_nats"] != given["val_loss_nats"]
    # Its folder will do, as that of a run.
    assert golf_ray("eval", own.parent, "--json").json["checkpoint"] == str(own)


def test_another_model_than_the_carried_is_refused_unless_forced(own: Path) -> None:
    done = golf_ray("eval", own, "--set", "model.rope_base=500", "--set", "model.xsa_last_n=2")
    assert done.status == 1
    assert "model.rope_base = 10000.0 there, 500.0 here; model.xsa_last_n differ" in done.error
    forced = golf_ray("eval", own, "--set", "model.rope_base=500", "--force", "--json")
    assert forced.status == 0 and forced.json["tokens_scored"] == 832
    # What only sets initial weights is no other model.
    same = golf_ray("eval", own, "--set", "model.qk_gain_init=1", "--json")
    assert same.status == 0


def test_a_public_checkpoint_needs_a_configuration() -> None:
    done = golf_ray("eval", FULL, "--set", "evaluation.stride=8")
    assert done.status == 2 and "carries no configuration; add --upstream-config" in done.error


PART = """
from pathlib import Path
from golf_ray.model.parts import Part
Path({marker!r}).touch()
class Harmless(Part):
    pass
"""


@pytest.mark.parametrize("suffix", [".pt", ".int6.ptz"])
def test_code_that_a_file_asks_for_runs_only_on_the_users_word(
    tmp_path: Path, own: Path, suffix: str
) -> None:
    marker, part = tmp_path / "ran", tmp_path / "part.py"
    part.write_text(PART.format(marker=str(marker)))
    asked = f"{part}:Harmless"
    config = CARRIED.with_overrides({"model.parts": [asked]})
    foreign = tmp_path / f"foreign{suffix}"
    if suffix == ".pt":
        save_state(foreign, read_state(own)[0], config)
    else:
        from golf_ray.quantization.container import QuantizedState, read_artifact, write_artifact

        tensors, kinds, _ = read_artifact(INT6)
        write_artifact(foreign, QuantizedState(tensors=tensors, kinds=kinds), config=config)
    for argv in ([], ["--set", "evaluation.stride=8"], ["--force"]):
        done = golf_ray("eval", foreign, *argv)
        assert done.status == 1 and f"asks to run code from '{asked}'" in done.error
        assert not marker.exists()
    # Parts of the user's own, but not those of the file.
    done = golf_ray("eval", foreign, "--set", "model.parts=")
    assert done.status == 1 and "model.parts" in done.error and not marker.exists()
    done = golf_ray("eval", foreign, "--set", f"model.parts={asked}", "--json")
    assert done.status == 0 and marker.exists()


def test_quantize_then_eval_is_eval_with_quantize(own: Path, tmp_path: Path) -> None:
    source = tmp_path / "mine.pt"
    shutil.copyfile(own, source)
    report = golf_ray("quantize", source, "--json").json
    artifact = tmp_path / "mine.int6.ptz"
    assert report["artifact"] == str(artifact)
    assert report["model_bytes"] == artifact.stat().st_size
    assert set(report["seconds"]) == {"hessians", "gptq", "compress"}
    assert report["fits"] and report["num_codes"] > 200_000
    assert report["margin_bytes"] == 16_000_000 - report["total_bytes"]

    scored = golf_ray("eval", artifact, "--json").json
    kept = tmp_path / "kept.ptz"
    at_once = golf_ray("eval", own, "--quantize", "--artifact", kept, "--json").json
    assert kept.read_bytes() == artifact.read_bytes()
    assert at_once["val_loss_nats"] == scored["val_loss_nats"]
    assert at_once["weights"] == scored["weights"] == "int6"
    assert at_once["quantization"]["artifact"] == str(kept)
    full = golf_ray("eval", own, "--json").json
    assert 0 < abs(scored["val_loss_nats"] - full["val_loss_nats"]) < 0.05
    # Made only to be scored: it leaves no file, and says so.
    gone = golf_ray("eval", own, "--quantize", "--json").json
    assert gone["quantization"]["artifact"] is None
    assert gone["val_loss_nats"] == scored["val_loss_nats"]


def test_an_artifact_is_known_by_its_content_too(own: Path, tmp_path: Path) -> None:
    for name, compressor in (("a.bin", "brotli"), ("b", "lzma")):
        out = tmp_path / name
        argv = ["--out", out, "--set", f"quantization.compressor={compressor}"]
        assert golf_ray("quantize", own, *argv).status == 0
        assert golf_ray("eval", out, "--json").json["weights"] == "int6"
    renamed = tmp_path / "weights"
    shutil.copyfile(own, renamed)
    assert golf_ray("eval", renamed, "--json").json["weights"] == "full"


def test_what_cannot_be_scored_is_found_out_before_quantising(own: Path, tmp_path: Path) -> None:
    kept = tmp_path / "a.ptz"
    argv = ["--quantize", "--artifact", kept, "--method", "ttt", "--adapter-init", "no.npz"]
    done = golf_ray("eval", own, *argv)
    assert done.status == 1 and "no.npz" in done.error and not kept.exists()


def test_a_plain_artifact_is_a_public_one(own: Path, tmp_path: Path) -> None:
    carrying, plain = tmp_path / "a.ptz", tmp_path / "b.ptz"
    assert golf_ray("quantize", own, "--out", carrying).status == 0
    assert golf_ray("quantize", own, "--out", plain, "--plain").status == 0
    assert plain.stat().st_size < carrying.stat().st_size
    done = golf_ray("eval", plain)
    assert done.status == 2 and "carries no configuration" in done.error
    a = golf_ray("eval", carrying, "--json").json
    b = golf_ray("eval", plain, *UPSTREAM, "--json").json
    assert a["val_loss_nats"] == b["val_loss_nats"]


def test_over_the_limit_is_status_1_and_the_artifact_stays(own: Path, tmp_path: Path) -> None:
    out, code = tmp_path / "a.ptz", tmp_path / "code.py"
    code.write_text("print('a program')  # and a remark\n")
    argv = ["quantize", own, "--out", out, "--code", code, "--set", "quantization.limit_bytes=9999"]
    done = golf_ray(*argv, "--json")
    assert done.status == 1
    report = done.json
    assert not report["fits"] and report["margin_bytes"] < 0 and 100 < report["code_bytes"] < 1000
    assert out.stat().st_size == report["model_bytes"]
    over = f"{-report['margin_bytes']:,} bytes over the limit of 9,999"
    assert over in done.error
    assert "OVER THE LIMIT" in golf_ray(*argv).out


def test_nothing_quantised_is_said(tmp_path: Path, own: Path) -> None:
    argv = ["--set", "quantization.float16_max_numel=1000000", "--out", tmp_path / "a.ptz"]
    assert "none: no matrix has more elements than" in golf_ray("quantize", own, *argv).out


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (["eval", FULL, *UPSTREAM, "--artifact", "a.ptz"], 2, "add --quantize"),
        (["eval", FULL, *UPSTREAM, "--per-document", "a"], 2, "add --method ttt"),
        (["eval", FULL, *UPSTREAM, "--sample", "5"], 2, "add --method ttt"),
        (["eval", FULL, *UPSTREAM, "--ledger", "l"], 2, "add --method ttt"),
        ([*TTT, "--sample", "1"], 2, "sample_documents = 1 is not allowed; it must be at least 2"),
        ([*TTT, "--sample", "5", "--set", FRACTION], 2, "document_fraction 1 in place of 0.5"),
        (["eval", FULL, *UPSTREAM, "--address", "auto"], 2, "add --workers N"),
        (["eval", FULL, *UPSTREAM, "--adapter-init", TINY / "ttt.npz"], 2, "use --method ttt"),
        (["eval", INT6, *UPSTREAM, "--quantize"], 2, "is quantised already"),
        (["quantize", INT6, *UPSTREAM], 2, "is quantised already"),
        (["quantize", FULL, *UPSTREAM, "--out", FULL], 2, "would replace its checkpoint"),
        (["quantize", FULL, *UPSTREAM, "--code", "no.py"], 2, "no.py cannot be read"),
        (["eval", FULL, *UPSTREAM, "--set", "cluster.device=cuda"], 1, "torch finds none here"),
        (["eval", TINY / "datasets", *UPSTREAM], 1, "holds no final_model.pt"),
    ],
)
def test_what_does_not_go_together(argv: list[object], status: int, expected: str) -> None:
    if "cluster.device=cuda" in argv and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = golf_ray(*argv)
    assert done.status == status and expected in done.error


def test_the_python_interface_has_the_same_shape(own: Path) -> None:
    config = package.preset("tiny").with_overrides({"data.dir": str(TINY)})
    assert isinstance(config, package.Config) and package.Config is Config
    done = package.evaluate(FULL, config)
    assert done.result.score.loss_nats == pytest.approx(stored("forward.npz", "packed_loss"))
    assert package.evaluate(own).result.score == done.result.score
    with pytest.raises(package.GolfRayError, match="carries no configuration"):
        package.evaluate(FULL)
    with pytest.raises(AttributeError):
        _ = package.no_such_name
    assert {"Config", "evaluate", "preset", "quantize", "train"} <= set(dir(package))


def test_threads_are_put_back(own: Path) -> None:
    before = torch.get_num_threads()
    golf_ray("eval", own, "--set", "evaluation.threads=2")
    assert torch.get_num_threads() == before
