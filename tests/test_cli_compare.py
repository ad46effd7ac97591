"""`golf-ray compare`: the record's figures, sides by name, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import golf_ray
from results_made import Made, make_ledger, make_sweep

BPB = "1.07258208,1.07324696,1.07426259"
NATS = "2.77059090,2.77230836,2.77493185"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_sweep(tmp_path_factory.mktemp("made") / "store", "nightly", all_done=True)


def test_the_records_figures() -> None:
    text = golf_ray("compare", "--values", BPB, "--against", "1.0810").out
    assert "n 3, mean 1.07336388, sample standard deviation 0.00084633" in text
    assert "t 15.63, p 0.0020 one-sided" in text
    argv = ("--values", NATS, "--nats", "--against", "2.7923")
    assert "t 11.64, p 0.0037 one-sided" in golf_ray("compare", *argv).out
    assert "2.7923 - 0 nats: t 15.60" in golf_ray("compare", *argv, "--margin", "0").out
    data = golf_ray("compare", *argv, "--json").json
    assert data["unit"] == "nats"
    assert data["published"]["margin_test"]["p_one_sided"] == pytest.approx(0.0037, abs=5e-5)


def test_one_seed_says_so() -> None:
    text = golf_ray("compare", "--values", "1.07", "--against", "1.0810").out
    assert "one seed gives no p-value" in text and "t " not in text.split("against")[1]


def test_trials_and_ledgers_are_sides(made: Made, tmp_path: Path) -> None:
    text = golf_ray("compare", "nightly:1", "nightly:9", "--storage", made.storage).out
    assert "nightly:9 against nightly:1" in text and "by document" in text
    for name, bpb in (("a", 1.07), ("b", 1.08)):
        make_ledger(tmp_path / name, 30, bpb=bpb, seed=3)
    data = golf_ray("compare", tmp_path / "a", tmp_path / "b", "--json").json
    assert data["sides"] == [] and data["documents"][0]["num_documents"] == 30
    assert data["documents"][0]["difference_bpb"] > 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nightly"], "24 trials of different knobs"),
        (["nigthly:1", "nightly:2"], "did you mean 'nightly'"),
        (["nightly:1", "nightly:2", "--score", "tt_bpb"], "did you mean 'ttt_bpb'"),
        (["--values", "1,x", "--against", "1"], "'x', which is no number"),
        (["--values", "1,2"], "give --against"),
        ([], "name two sides, or give --values"),
        (["nightly:1", "nightly:2", "--against", "1"], "leave one of them out"),
    ],
)
def test_bad_input_is_one_line(made: Made, argv: list[str], expected: str) -> None:
    outcome = golf_ray("compare", *argv, "--storage", made.storage)
    assert outcome.status == 2 and expected in outcome.error
