"""The importer of the public program's configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from reference import FOLDER

from golf_ray.errors import ConfigError
from golf_ray.presets import TINY
from golf_ray.upstream import config_from_upstream, read_upstream


def test_the_tiny_configuration_is_the_preset() -> None:
    config = read_upstream(FOLDER / "config.json", base=TINY)
    train = dataclasses.replace(config.train, val_every_steps=None)
    assert dataclasses.replace(config, train=train, name="tiny") == TINY


def test_a_log_says_the_same_as_json(tmp_path: Path) -> None:
    flat = json.loads((FOLDER / "config.json").read_text())
    log = tmp_path / "train.log"
    lines = [f"  {key}: {value}" for key, value in flat.items()]
    log.write_text(
        "logs/run.txt\nHyperparameters:\n" + "\n".join(lines) + "\n  data_dir: ./data/\n"
        "  run_id: 3f2a\n==========\nRunning Python 3.12\nstep:1 train_loss: 9.0\n"
    )
    assert read_upstream(log) == read_upstream(FOLDER / "config.json")


def test_absent_keys_are_the_records() -> None:
    config = config_from_upstream({"warmdown_frac": 0.8, "matrix_clip_sigmas": 12.0})
    assert config.train.warmdown_frac == 0.8
    assert config.quantization.mlp_clip_sigmas == config.quantization.attention_clip_sigmas == 12.0
    assert config.model.num_layers == 11 and config.train.clip_scope == "rank"
    assert config.quantization.calibration_batch_tokens == 98_304


def test_switches_and_special_values() -> None:
    config = config_from_upstream(
        {
            "ttt_k_lora": False,
            "ttt_mlp_lora": False,
            "max_wallclock_seconds": 0.0,
            "parallel_final_lane": "mlp",
            "val_batch_tokens": 524_288,
        }
    )
    assert config.adaptation.sites == ("q", "v", "o", "head")
    assert config.train.max_wallclock_s is None
    assert config.model.parallel_final_lane == "mlp"
    assert config.evaluation.batch_tokens == 65_536


@pytest.mark.parametrize(
    ("flat", "line"),
    [
        ({"warmdown_fraction": 0.7}, "did you mean 'warmdown_frac'?"),
        ({"smear_gate_enabled": True}, "unknown key 'smear_gate_enabled'"),
        ({"rope_yarn": True}, "rope_yarn = true is not supported"),
        ({"parallel_final_lane": "left"}, "parallel_final_lane = 'left' is unknown"),
        ({"num_layers": "eleven"}, "model.num_layers = 'eleven' is not of type int"),
    ],
)
def test_what_is_not_understood_is_never_dropped(flat: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_upstream(flat)
    assert line in str(caught.value)


def test_files_that_are_neither_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("nothing here\n")
    with pytest.raises(ConfigError, match="holds no `Hyperparameters:` block"):
        read_upstream(path)
    path.write_text('{"seed": ')
    with pytest.raises(ConfigError, match="is not JSON"):
        read_upstream(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_upstream(tmp_path / "absent.json")
