"""`golf-ray doctor`: what it finds, what it asks for, and that it never breaks."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_runner import TINY, golf_ray

from golf_ray import doctor
from golf_ray.doctor import Finding, works_on_cpu


def findings(*argv: object) -> dict[str, dict[str, str]]:
    data = golf_ray("doctor", *argv, "--json").json
    return {finding["name"]: finding for finding in data["findings"]}


def test_here_all_is_well() -> None:
    done = golf_ray("doctor", "--data-dir", TINY, "--json")
    assert done.status == 0 and done.json["works"]
    found = {finding["name"]: finding for finding in done.json["findings"]}
    names = "Python golf_ray machine torch GPU flash_attn_interface xformers triton Ray optuna"
    assert set(names.split()) <= set(found) and {"sentencepiece", "brotli", "disk"} <= set(found)
    assert "2 train shards (69,119 tokens), 1 val shard (883 tokens)" in found["data"]["detail"]
    assert found["torch"]["status"] == found["Ray"]["status"] == "ok"


def test_the_table_is_one_line_a_finding_in_a_pipe() -> None:
    done = golf_ray("doctor", "--data-dir", TINY)
    assert done.status == 0 and not done.err
    lines = done.out.splitlines()
    assert lines[-1] == "All that is needed is there." and lines[-2] == ""
    assert all(line.split()[0] in ("ok", "-", "MISSING") for line in lines[:-2])


def test_no_data_where_some_was_named_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = golf_ray("doctor", "--data-dir", tmp_path)
    assert done.status == 1 and "Missing: data." in done.out
    assert f"golf-ray data build TEXT --data-dir {tmp_path}" in done.out
    # Where none was named, having none yet is fine.
    monkeypatch.chdir(tmp_path)
    assert golf_ray("doctor").status == 0
    assert findings()["data"]["status"] == "absent"


def test_damaged_data_is_a_finding(tmp_path: Path) -> None:
    shutil.copytree(TINY / "datasets", tmp_path / "datasets")
    assert "no tokenizer" in findings("--data-dir", tmp_path)["data"]["detail"]
    shutil.copytree(TINY / "tokenizers", tmp_path / "tokenizers")
    assert findings("--data-dir", tmp_path)["data"]["status"] == "ok"
    val = tmp_path / "datasets" / "fineweb10B_sp512" / "fineweb_val_000000.bin"
    val.write_bytes(val.read_bytes()[:-2])
    found = findings("--data-dir", tmp_path)["data"]
    assert found["status"] == "missing" and "883 tokens need" in found["detail"]
    val.unlink()
    assert "no val shard" in findings("--data-dir", tmp_path)["data"]["detail"]


def test_what_is_missing_comes_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    done = golf_ray("doctor", "--json")
    assert done.status == 1 and not done.json["works"]
    found = {finding["name"]: finding for finding in done.json["findings"]}
    assert found["Ray"]["remedy"] == "pip install 'ray[default,train,tune]>=2.60,<2.61'"
    assert found["brotli"]["remedy"] == "pip install brotli"
    text = golf_ray("doctor").out
    assert "MISSING" in text and "-> pip install brotli" in text and "Missing: Ray," in text


@pytest.mark.parametrize(
    "error", [ImportError("no CUDA\nmore"), OSError("bad library"), ValueError()]
)
def test_a_torch_that_does_not_load_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = importlib.import_module

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise error
        return real(name, *rest)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = list(doctor.examine(TINY))
    torch = next(f for f in found if f.name == "torch")
    assert torch.status == "missing" and torch.remedy == "pip install 'torch>=2.9,<2.14'"
    assert "\n" not in torch.detail and torch.detail
    assert not works_on_cpu(found)


def test_versions_outside_of_what_was_tried() -> None:
    assert doctor._within("2.13.0+cpu", doctor.TORCHES) and doctor._within("2.9", doctor.TORCHES)
    assert not doctor._within("2.14.0", doctor.TORCHES)
    assert not doctor._within("2.8.1", doctor.TORCHES)
    assert doctor._range(doctor.RAYS) == ">=2.60,<2.61"


def test_absent_is_not_missing() -> None:
    absent = Finding(name="xformers", status="absent", detail="")
    assert works_on_cpu([absent])
    assert not works_on_cpu([absent, Finding(name="Ray", status="missing", detail="")])


def test_a_cluster_that_is_not_there_is_a_finding() -> None:
    done = golf_ray("doctor", "--address", "127.0.0.1:9", "--json")
    found = {finding["name"]: finding for finding in done.json["findings"]}
    assert done.status == 1 and found["cluster"]["status"] == "missing"
    assert "127.0.0.1:9" in found["cluster"]["detail"]
