"""`golf-ray audit`: a ledger of the tiny reference data, as it is and tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import TINY, UPSTREAM, golf_ray

import golf_ray as package
from golf_ray.data.shards import load_tokens, write_shard

FULL, INT6 = TINY / "final_model.pt", TINY / "final_model.int6.ptz"
VAL = "datasets/fineweb10B_sp512/fineweb_val_000000.bin"


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A ledger of all 14 documents, and what the evaluation printed."""
    ledger = tmp_path_factory.mktemp("audit") / "ledger"
    done = golf_ray("eval", FULL, *UPSTREAM, "--method", "ttt", "--ledger", ledger, "--json")
    return ledger, done.json


@pytest.fixture
def ledger(scored: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy that may be tampered with."""
    return Path(shutil.copytree(scored[0], tmp_path / "ledger"))


def tamper(ledger: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change the lines of all segments, and give the file the name of its content."""
    lines = []
    for path in sorted((ledger / "segments").iterdir()):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
    content = "".join(json.dumps(line) + "\n" for line in change(lines)).encode()
    name = hashlib.sha256(content).hexdigest() + ".jsonl"
    (ledger / "segments" / name).write_bytes(content)


def test_an_honest_ledger_passes(scored: tuple[Path, Any]) -> None:
    ledger, printed = scored
    text = golf_ray("audit", ledger, *UPSTREAM)
    assert text.status == 0 and not text.err
    assert text.out.startswith(f"{ledger}: passed\n")
    for words in ("14 of 14, 64 chunks", "882 of 882", "1,596 of 1,596", "9 of 9 passed"):
        assert words in text.out
    assert f"{printed['val_bpb']:.6f}" in text.out and "FINDING" not in text.out
    data = golf_ray("audit", ledger, *UPSTREAM, "--json").json
    for name in ("val_bpb", "val_loss_nats", "tokens_scored", "bytes_scored"):
        assert data[name] == printed[name], "to the last bit"
    assert data["passed"] and data["perturbation"] is None and data["findings"] == []
    assert data["adaptation"]["chunk_size"] == 16 and data["weights_kind"] == "full"
    # The settings are the ledger's, whatever the configuration says.
    other = golf_ray("audit", ledger, *UPSTREAM, "--set", "adaptation.chunk_size=8")
    assert other.status == 0


def test_a_perturbation_of_the_weights_it_is_of(scored: tuple[Path, Any]) -> None:
    argv = ["audit", scored[0], *UPSTREAM, "--checkpoint", FULL, "--perturb", "2"]
    done = golf_ray(*argv)
    assert done.status == 0
    words = "2 documents, 4 changes, 1 pair in a step together: nothing leaked, to the bit"
    assert f"perturbed   {words}\n" in done.out
    config = package.preset("tiny").with_overrides({"data.dir": str(TINY)})
    assert package.audit(scored[0], config).passed


def first(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    """Change the longest document."""

    def change(lines: list[Any]) -> list[Any]:
        longest = max(lines, key=lambda line: line["tokens"])
        for name, how in changes.items():
            longest[name] = how(longest[name])
        return lines

    return change


def swapped(trace: list[Any]) -> list[Any]:
    chunk, scored_at, updated_at = trace[1]
    return [trace[0], [chunk, updated_at, scored_at], *trace[2:]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lines: lines[2:], "documents: 2 documents ("),
        (lambda lines: [*lines, {**lines[0], "nats": "0x1p+3"}], "scored twice, with different"),
        (first(trace=lambda t: [t[0], *t]), "scores chunk 0 twice"),
        (first(trace=swapped), "learns from chunk 1 at"),
        (first(trace=lambda t: [*t[:-1], [*t[-1][:2], 999]]), "learns from its last chunk"),
        (first(bytes=lambda n: n + 1), "bytes: document "),
        (first(tokens=str), "holds what is no score"),
    ],
)  # fmt: skip
def test_a_forged_ledger_is_found_out(
    ledger: Path, change: Callable[[list[Any]], list[Any]], expected: str
) -> None:
    tamper(ledger, change)
    done = golf_ray("audit", ledger, *UPSTREAM)
    assert done.status == 1 and done.out.startswith(f"{ledger}: FAILED\n")
    assert any(expected in line for line in done.out.splitlines() if "FINDING" in line)
    assert done.error


def test_a_flipped_byte_is_named_and_mended_by_scoring_again(ledger: Path) -> None:
    path = min((ledger / "segments").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    done = golf_ray("audit", ledger, *UPSTREAM, "--json")
    assert done.status == 1 and f"{path} is damaged" in done.json["findings"][0]
    assert not done.json["passed"] and done.json["checks"][0]["num_failed"] == 1
    assert "the same 'golf-ray eval --ledger' scores what is missing" in done.error
    path.unlink()
    golf_ray("eval", FULL, *UPSTREAM, "--method", "ttt", "--ledger", ledger)
    assert golf_ray("audit", ledger, *UPSTREAM).status == 0


def test_another_text_or_other_weights_are_refused(
    scored: tuple[Path, Any], tmp_path: Path
) -> None:
    ledger = scored[0]
    data = Path(shutil.copytree(TINY, tmp_path / "data"))
    ids = load_tokens([data / VAL], 512)
    write_shard(data / VAL, ids[:-1])
    done = golf_ray("audit", ledger, *UPSTREAM, "--data-dir", data)
    assert done.status == 2 and not done.out
    assert "is the ledger of other text: tokens is" in done.error
    assert "tokenizer is" not in done.error
    done = golf_ray("audit", ledger, *UPSTREAM, "--checkpoint", INT6)
    assert done.status == 2 and "of other weights: weights is" in done.error
    assert "weights_kind is full there and int6 here" in done.error


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        ([], 2, "add --checkpoint FILE, --config FILE or --upstream-config FILE"),
        (["--perturb", "4", *UPSTREAM], 2, "add --checkpoint FILE"),
        (["--perturb", "1", "--checkpoint", FULL, *UPSTREAM], 2, "--perturb"),
        (["--checkpoint", FULL], 2, "carries no configuration"),
    ],
)
def test_what_does_not_go_together(
    scored: tuple[Path, Any], argv: list[object], status: int, expected: str
) -> None:
    done = golf_ray("audit", scored[0], *argv)
    assert done.status == status and expected in done.error and not done.out


def test_what_is_no_ledger_is_one_line(ledger: Path, tmp_path: Path) -> None:
    done = golf_ray("audit", tmp_path / "none", *UPSTREAM)
    assert done.status == 1 and "holds no header.json, so it is no ledger" in done.error
    header = json.loads((ledger / "header.json").read_text())
    for settings, expected in [
        (None, "says nothing of the chunks"),
        ({**header["adaptation"], "chunk_size": 0}, "has settings that cannot be"),
    ]:
        (ledger / "header.json").write_text(json.dumps({**header, "adaptation": settings}))
        done = golf_ray("audit", ledger, *UPSTREAM)
        assert done.status == 1 and expected in done.error
