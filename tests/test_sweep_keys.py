"""Keys of stages: what changes an output changes its key, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from golf_ray.config import Config
from golf_ray.presets import RECORD, TINY
from golf_ray.sweeps import keys

DATA = "0123456789abcdef"


def keys_of(config: Config) -> dict[str, Any]:
    documents = keys.documents_of(config, DATA)
    return {
        "train": keys.training_key(config, DATA),
        "calibrate": keys.calibration_key(config, "w", DATA),
        "quantize": keys.quantization_key(config, "h", documents),
        "evaluate": keys.evaluation_key(config, "c", documents),
    }


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"name": "other"}, ""),
        ({"data.dir": "/elsewhere"}, ""),
        ({"cluster.num_workers": 4}, ""),
        ({"cluster.eval_actors": 1}, ""),
        ({"train.log_every_steps": 1, "train.val_every_steps": 7}, ""),
        ({"train.min_tokens_per_s": 1e6}, ""),
        ({"adaptation.resident_documents": 3, "adaptation.step_tokens": 99}, ""),
        ({"evaluation.limit_s": 5.0}, ""),
        ({"quantization.limit_bytes": 1, "quantization.code_bytes": 2}, ""),
        ({"train.warmdown_frac": 0.5}, "train"),
        ({"train.seed": 1}, "train"),
        ({"train.max_wallclock_s": 60.0}, "train"),
        ({"model.xsa_last_n": 2}, "train"),
        ({"quantization.calibration_batches": 3}, "calibrate"),
        ({"quantization.mlp_clip_sigmas": 9.0}, "quantize"),
        ({"quantization.embedding_bits": 7}, "quantize"),
        ({"quantization.damping": 0.02}, "quantize"),
        ({"evaluation.batch_tokens": 4096}, "quantize"),
        ({"evaluation.threads": 2}, "quantize evaluate"),
        ({"adaptation.chunk_size": 48}, "evaluate"),
        ({"adaptation.rank": 8}, "evaluate"),
        ({"adaptation.sample_documents": 9}, "quantize evaluate"),
        ({"adaptation.document_fraction": 0.5}, "quantize evaluate"),
        ({"train.precision": "float32"}, "train calibrate evaluate"),
        ({"cluster.gpus_per_worker": 0.0}, "train calibrate evaluate"),
        ({"data.seq_len": 1024}, "train calibrate"),
    ],
)
def test_a_change_reaches_the_stages_that_it_changes(change: dict[str, Any], stages: str) -> None:
    before, after = keys_of(RECORD), keys_of(RECORD.with_overrides(change))
    assert {name for name in before if before[name] != after[name]} == set(stages.split())


def test_workers_count_where_each_clips_its_own_mean() -> None:
    rank = RECORD.with_overrides({"train.clip_scope": "rank"})
    fewer = rank.with_overrides({"cluster.num_workers": 4})
    assert keys.training_key(rank, DATA) != keys.training_key(fewer, DATA)


def test_a_samples_seed_counts_where_there_is_a_sample() -> None:
    def documents(**change: Any) -> str:
        settings = {f"adaptation.{name}": value for name, value in change.items()}
        return keys.documents_of(TINY.with_overrides(settings), DATA)

    assert documents(seed=1) == documents(seed=2)
    assert documents(seed=1, sample_documents=4) != documents(seed=2, sample_documents=4)
    assert documents() != keys.documents_of(TINY, "another text")
    # A's own seed is a setting of test-time training, also where all documents are scored.
    one, two = (TINY.with_overrides({"adaptation.seed": seed}) for seed in (1, 2))
    assert keys.evaluation_key(one, "c", "d") != keys.evaluation_key(two, "c", "d")


def test_inputs_are_part_of_every_key() -> None:
    assert keys.training_key(TINY, "a") != keys.training_key(TINY, "b")
    assert keys.calibration_key(TINY, "a", "d") != keys.calibration_key(TINY, "b", "d")
    assert keys.quantization_key(TINY, "a", "d") != keys.quantization_key(TINY, "b", "d")
    assert keys.evaluation_key(TINY, "a", "d") != keys.evaluation_key(TINY, "b", "d")
    assert keys.artifact_key(TINY, "a") != keys.artifact_key(TINY, "b")
