"""One trial on a stored checkpoint, its stages in this process: what it computes and what not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from reference import FOLDER

from golf_ray import fingerprint
from golf_ray.config import Config
from golf_ray.presets import TINY
from golf_ray.sweeps import keys, stages
from golf_ray.sweeps.finalists import candidates, final_of, ranked
from golf_ray.sweeps.rooms import LocalRooms, SweepStopped
from golf_ray.sweeps.store import StageStore
from golf_ray.sweeps.trial import TrialSpec, outcome_of, read_record, run_trial
from trainers.storage import Storage

FULL = FOLDER / "final_model.pt"
BASE = TINY.with_overrides({"data.dir": str(FOLDER), "adaptation.sample_documents": 6})
CHECKPOINT = ((str(FULL), fingerprint.of_file(FULL)),)


class CountingRooms(LocalRooms):
    """Notes which stages were computed."""

    def __init__(self) -> None:
        self.computed: list[str] = []

    def light(self, stage: str, **arguments: Any) -> dict[str, Any]:
        self.computed.append(stage)
        return super().light(stage, **arguments)


def spec(number: int, base: Config = BASE, **knobs: Any) -> TrialSpec:
    return TrialSpec(
        number=number,
        knobs={name.replace("__", "."): value for name, value in knobs.items()},
        base=base,
        data="tiny",
        checkpoints=CHECKPOINT,
    )


def run(one: TrialSpec, root: Path, rooms: CountingRooms | None = None) -> dict[str, Any]:
    store = StageStore(root / "stages", who=f"s/trial {one.number}")
    return run_trial(one, store, Storage(root / "trials"), rooms or CountingRooms())


def test_a_trial_computes_what_its_knobs_change(tmp_path: Path) -> None:
    rooms = CountingRooms()
    first = run(spec(1), tmp_path, rooms)
    assert first["status"] == "done", first["reason"]
    assert rooms.computed == ["calibrate", "quantize", "evaluate"]
    second = run(spec(2, adaptation__chunk_size=32), tmp_path, rooms)
    assert rooms.computed[3:] == ["evaluate"]
    third = run(spec(3, quantization__mlp_clip_sigmas=9.0), tmp_path, rooms)
    assert rooms.computed[4:] == ["quantize", "evaluate"]
    same = run(spec(4), tmp_path, rooms)
    assert len(rooms.computed) == 6, "a trial of knobs that were tried costs nothing"
    assert same["ttt_bpb"] == first["ttt_bpb"] and same["evaluate_s"] == 0.0
    assert first["int6_bpb"] == second["int6_bpb"] != third["int6_bpb"]
    assert len({first["ttt_bpb"], second["ttt_bpb"], third["ttt_bpb"]}) == 3
    assert first["documents_scored"] == 6 and first["ttt_standard_error_bpb"] > 0
    assert outcome_of(first) == {
        "status": "done",
        "reason": None,
        "values": {"ttt_bpb": first["ttt_bpb"]},
        "constraints": {"bytes": first["total_bytes"] / 16_000_000 - 1},
    }


def test_codes_of_a_shared_stage_do_not_depend_on_who_was_first(tmp_path: Path) -> None:
    one = run(spec(1, adaptation__chunk_size=32), tmp_path / "a")
    two = run(spec(1, adaptation__chunk_size=16), tmp_path / "b")
    assert one["codes"] == two["codes"] and one["model_bytes"] == two["model_bytes"]
    [name] = one["codes"]
    files = [tmp_path / place / "stages" / name / stages.CODES_FILE for place in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_search_of_quantisation_alone_adapts_to_nothing(tmp_path: Path) -> None:
    rooms = CountingRooms()
    one = dataclasses.replace(spec(1), objectives=("int6_bpb",))
    record = run(one, tmp_path, rooms)
    assert record["status"] == "done" and rooms.computed == ["calibrate", "quantize"]
    assert record["values"] == {"int6_bpb": record["int6_bpb"]} and "ttt_bpb" not in record


def test_over_the_limit_ends_a_trial_before_it_adapts(tmp_path: Path) -> None:
    rooms = CountingRooms()
    small = BASE.with_overrides({"quantization.limit_bytes": 100_000})
    record = run(spec(1, small), tmp_path, rooms)
    assert record["status"] == "over_limit" and rooms.computed == ["calibrate", "quantize"]
    assert record["constraints"]["bytes"] == record["total_bytes"] / 100_000 - 1 > 0
    excess = record["total_bytes"] - 100_000
    assert record["reason"] == f"{record['total_bytes']:,} bytes, {excess:,} over the limit"
    assert record["values"] == {}


def test_a_training_that_would_be_in_vain_is_not_begun(tmp_path: Path) -> None:
    # A trial on a checkpoint tells how large the model gets.
    known = run(spec(1), tmp_path)
    base = BASE.with_overrides({"quantization.limit_bytes": known["total_bytes"] + 1_000})
    rooms = CountingRooms()
    trained = dataclasses.replace(
        spec(2, base, quantization__mlp_bits=8, quantization__attention_bits=8), checkpoints=()
    )
    record = run(trained, tmp_path, rooms)
    assert record["status"] == "over_limit" and rooms.computed == []
    assert record["trained"] is False and record["constraints"]["bytes"] > 0
    assert record["reason"].startswith("not trained: ")
    assert not list((tmp_path / "stages").glob("train-*"))


def test_a_stage_that_fails_makes_a_record_and_no_error(tmp_path: Path) -> None:
    broken = dataclasses.replace(spec(1), checkpoints=((str(tmp_path / "no.pt"), "none"),))
    record = run(broken, tmp_path)
    assert record["status"] == "failed" and record["stage"] == "calibrate"
    assert "no.pt" in record["reason"] and "\n" not in record["reason"]
    stored = read_record(Storage(tmp_path / "trials"), 1)
    assert stored is not None and stored["status"] == "failed"
    again = run(spec(1), tmp_path)
    assert again["status"] == "done" and again["attempts"] == 2


def test_a_sweep_that_is_stopped_fails_no_trial_and_no_stage(tmp_path: Path) -> None:
    class Stopping(CountingRooms):
        def light(self, stage: str, **arguments: Any) -> dict[str, Any]:
            if stage == "quantize":
                raise SweepStopped
            return super().light(stage, **arguments)

    record = run(spec(1), tmp_path, Stopping())
    assert (record["status"], record["stage"]) == ("interrupted", "quantize")
    assert record["ended_unix_s"] is None and not list(tmp_path.rglob("failed.json"))
    rooms = CountingRooms()
    again = run(spec(1), tmp_path, rooms)
    assert again["status"] == "done" and rooms.computed == ["quantize", "evaluate"]
    assert [span["stage"] for span in again["spans"]].count("calibrate") == 1


def test_several_checkpoints_are_averaged_over(tmp_path: Path) -> None:
    alone = run(spec(1), tmp_path)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(FULL.read_bytes())
    both = dataclasses.replace(spec(2), checkpoints=(*CHECKPOINT, (str(copy), "another")))
    record = run(both, tmp_path)
    assert record["ttt_bpb"] == pytest.approx(alone["ttt_bpb"], abs=1e-12)
    assert len(record["codes"]) == 2


def test_finalists_are_measured_and_not_predicted(tmp_path: Path) -> None:
    from golf_ray.api import open_weights
    from golf_ray.sweeps.plan import SweepPlan
    from golf_ray.sweeps.space import load_space

    record = run(spec(1), tmp_path)
    plan = SweepPlan(
        name="s", storage=str(tmp_path), base=BASE, space=load_space("adaptation", BASE),
        num_trials=1, checkpoints=CHECKPOINT, data="tiny",
    )  # fmt: skip
    whole = BASE.with_overrides({"adaptation.sample_documents": None})
    store = StageStore(tmp_path / "stages", who="s/trial 1")
    # Scored on everything in this process: the pool's total is the same.
    [codes] = record["codes"]
    key = keys.evaluation_key(whole, codes.rpartition("-")[2], keys.documents_of(whole, "tiny"))
    place = str(tmp_path / "stages" / codes / stages.CODES_FILE)
    scored = stages.evaluate_stage(whole, place)
    store.finish("evaluate", key, scored)
    final = final_of(plan, record, store, CountingRooms())
    assert [span["stage"] for span in record["spans"]][-2:] == ["evaluate", "compress"]
    artifact = tmp_path / "stages" / final["artifacts"][0]
    assert final["model_bytes"] == artifact.stat().st_size
    assert final["ttt_bpb"] == scored["val_bpb"] != record["ttt_bpb"]
    carried = open_weights(artifact).config
    assert carried is not None and carried.adaptation.sample_documents is None
    assert json.loads(json.dumps(final)) == final


def test_the_best_is_within_the_limits() -> None:
    def done(number: int, bpb: float, over: float) -> dict[str, Any]:
        return {"trial": number, "status": "done", "values": {"ttt_bpb": bpb},
                "constraints": {"bytes": over}}  # fmt: skip

    records = [done(1, 1.2, -0.1), done(2, 1.1, 0.01), done(3, 1.2, 0.0), done(4, 1.3, -0.2)]
    records.append({**done(5, 1.0, -0.1), "status": "failed"})
    assert [r["trial"] for r in ranked(records, "ttt_bpb")] == [1, 3, 4]
    # Measured it is what it is, whatever was foretold.
    records[0]["final"], records[1]["final"] = {"fits": False}, {"fits": True}
    assert [r["trial"] for r in ranked(records, "ttt_bpb")] == [2, 3, 4]


def test_the_nearest_are_measured_where_too_few_are_within_the_limits() -> None:
    def done(number: int, over: float, **more: Any) -> dict[str, Any]:
        return {"trial": number, "status": "done", "values": {"ttt_bpb": 1.0},
                "constraints": {"bytes": over}, **more}  # fmt: skip

    def order(places: int) -> list[int]:
        return [r["trial"] for r in candidates(records, "ttt_bpb", places)]

    records = [done(1, 0.008), done(2, 0.001), done(3, -0.1), done(4, 0.005)]
    records.append({**done(5, 0.0005), "status": "over_limit"})
    slow = {"bytes": 0.0001, "seconds": 0.2}
    records.append({**done(6, 0.0), "constraints": slow})
    assert order(1) == [3, 2]
    assert order(3) == [3, 2, 4, 1]
    # One that was measured in vain is one try, also after an interruption.
    records[1]["final"] = {"fits": False}
    assert order(1) == [3] and order(2) == [3, 4]
    records[1]["final"] = {"fits": True}
    assert order(1) == [2, 3, 4]
