"""Records of older versions: each step as a pure function, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from golf_ray import fingerprint
from golf_ray.errors import StorageError
from golf_ray.presets import TINY
from golf_ray.results.migration import from_1, from_2, migrate
from golf_ray.results.schema import SCHEMA

CONFIG = TINY.to_dict()
LIMIT = CONFIG["quantization"]["limit_bytes"]
OLDEST: dict[str, Any] = {
    "schema": 1, "trial": 0, "status": "done", "stage": None, "reason": None,
    "began_unix_s": 1.0, "ended_unix_s": 9.0, "knobs": {"train.warmdown_frac": 0.7}, "seed": 1337,
    "code_version": "0123abcd", "config": CONFIG, "training": "train-1", "trained": True,
    "train_s": 4.0, "steps": 10, "train_loss_nats": 5.5, "val_bpb": 2.6, "restarts": 0,
    "quantize_s": 1.0, "int6_bpb": 2.7, "model_bytes": 90_000, "code_bytes": 20_000,
    "total_bytes": 110_000, "fits": True, "evaluate_s": 2.0, "ttt_bpb": 2.5, "ttt_loss_nats": 4.9,
    "tokens_scored": 882, "bytes_scored": 2_500, "weights": "int6",
}  # fmt: skip
"""As the first version wrote it, which counted trials from 0."""


def test_the_first_version_gets_what_the_second_said() -> None:
    before = copy.deepcopy(OLDEST)
    found = from_1(OLDEST)
    assert before == OLDEST, "the record given is changed"
    assert found["trial"] == 1 and found["golf_ray_version"] == "0123abcd"
    assert "code_version" not in found and found["bytes_exact"] is True
    assert found["values"] == {"ttt_bpb": 2.5}
    assert found["constraints"] == {"bytes": 110_000 / LIMIT - 1}


def test_a_trial_of_the_first_version_without_scores_says_none() -> None:
    failed = {k: v for k, v in OLDEST.items() if not k.endswith(("bpb", "bytes", "nats", "scored"))}
    found = migrate({**failed, "status": "failed", "reason": "no"}, "x.json")
    assert found["values"] == {} and found["constraints"] == {} and "bytes_exact" not in found


def test_the_second_version_gets_limits_times_and_a_fingerprint() -> None:
    second = {**from_1(OLDEST), "schema": 2, "group": 0,
              "phases_s": {"start": 1.5, "compile": 0.5, "elapsed": 3.0, "ttt": 2.0}}  # fmt: skip
    found = from_2(second)
    assert found["limit_bytes"] == LIMIT
    assert (found["start_s"], found["compile_s"], found["elapsed_s"]) == (1.5, 0.5, 3.0)
    assert found["config_fingerprint"] == fingerprint.of_value(CONFIG)
    assert found["tokens"] == 10 * CONFIG["train"]["batch_tokens"]
    assert found["num_workers"] == CONFIG["cluster"]["num_workers"]
    assert found.get("commit") is None and found.get("val_tokens_scored") is None


@pytest.mark.parametrize("version", range(1, SCHEMA + 1))
def test_migrating_again_changes_nothing(version: int) -> None:
    once = migrate({**OLDEST, "schema": version}, "x.json")
    assert migrate(once, "x.json") == once
    assert once["schema"] == SCHEMA
    assert once.get("schema_written", SCHEMA) == version


def test_a_record_that_its_driver_closed_says_little_and_is_one() -> None:
    found = migrate({"trial": 3, "knobs": {}, "status": "failed", "reason": "lost"}, "x.json")
    assert found["config"] == {} and found["constraints"] == {} and found["trial"] == 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"schema": SCHEMA + 1}, "was written by a newer golf_ray"),
        ({"schema": "3"}, "is no record: its schema is '3'"),
        ({"schema": True}, "is no record: its schema is True"),
        ({"schema": 0}, "is no record: its schema is 0"),
        ({"schema": 1, "trial": "first"}, "is damaged"),
        ({"schema": 1, "config": []}, "is damaged"),
        ({"schema": 2, "phases_s": 3}, "is damaged"),
    ],
)
def test_what_is_no_record_is_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(StorageError) as caught:
        migrate({**OLDEST, **change}, "sweeps/a/trials/00001.json")
    assert line in str(caught.value) and "00001.json" in str(caught.value)
