"""From options to a configuration: precedence, names, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import TINY, golf_ray

from golf_ray.cli.options import ConfigOptions, resolve_config
from golf_ray.config import Config
from golf_ray.errors import ConfigError
from golf_ray.presets import LAPTOP, PRESETS
from golf_ray.presets import TINY as TINY_PRESET


def test_show_prints_what_config_takes_back(tmp_path: Path) -> None:
    done = golf_ray("config", "show", "--preset", "laptop", "--set", "train.warmdown_frac=0.8")
    assert done.status == 0
    config = Config.from_dict(done.json)
    assert config == LAPTOP.with_overrides(["train.warmdown_frac=0.8"])
    (tmp_path / "mine.json").write_text(done.out)
    assert golf_ray("config", "show", "--config", tmp_path / "mine.json").json == done.json


def test_later_wins(tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    file.write_text(json.dumps({"train": {"seed": 5, "iterations": 33}, "data": {"dir": "there"}}))
    public = tmp_path / "public.json"
    public.write_text(json.dumps({"iterations": 44, "warmdown_frac": 0.5}))

    def resolved(**given: object) -> Config:
        return resolve_config(ConfigOptions(**given), carried=TINY_PRESET)  # type: ignore[arg-type]

    assert resolved() == TINY_PRESET
    assert resolved(preset="laptop") == LAPTOP
    over = resolved(preset="laptop", config=file)
    assert (over.train.seed, over.train.iterations, over.data.dir) == (5, 33, "there")
    assert over.model == LAPTOP.model
    over = resolved(preset="laptop", config=file, upstream_config=public)
    assert (over.train.seed, over.train.iterations, over.train.warmdown_frac) == (5, 44, 0.5)
    over = resolved(config=file, assignments=("train.iterations=55", "data.dir=here"))
    assert (over.train.iterations, over.data.dir) == (55, "here")
    over = resolved(assignments=("data.dir=here",), data_dir=Path("elsewhere"))
    assert over.data.dir == "elsewhere" and over.model == TINY_PRESET.model


def test_changes_that_need_each_other_come_together() -> None:
    options = ConfigOptions(preset="laptop", assignments=("train.micro_batches=4",))
    config = resolve_config(options, changes={"cluster.num_workers": 4})
    assert (config.train.micro_batches, config.cluster.num_workers) == (4, 4)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--preset", "laptp"], "unknown preset 'laptp'; did you mean 'laptop'?"),
        (
            ["--preset", "tiny", "--set", "train.warmdown=0.5"],
            "unknown configuration field 'train.warmdown'; did you mean 'train.warmdown_frac'?",
        ),
        (["--preset", "tiny", "--set", "train.seed"], "is no assignment"),
        (["--preset", "tiny", "--set", "train.seed=x"], "train.seed = 'x' is not of type int"),
        (["--preset", "tiny", "--set", "train.min_lr=2"], "train.min_lr = 2.0 is not allowed"),
        (["--config", "none.json"], "none.json cannot be read"),
        (["--upstream-config", "none.json"], "none.json cannot be read"),
        ([], "no configuration was given; add --preset"),
        (["--config", str(TINY / "config.json")], "give it with --upstream-config"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_2(argv: list[str], expected: str) -> None:
    done = golf_ray("config", "show", *argv)
    assert done.status == 2 and not done.out and expected in done.error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no JSON object"),
        ('{"train": {"iteration": 3}}', "did you mean 'train.iterations'?"),
        ('{"train": 3}', "train = 3 is not an object"),
        ('{"model": {"num_layers": 2.5}}', "model.num_layers = 2.5 is not of type int"),
        ('{"train": {}, "trian": {}}', "unknown configuration field 'trian'"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    done = golf_ray("config", "show", "--config", file)
    assert done.status == 2 and expected in done.error


def test_names_are_checked_before_anything_is_loaded() -> None:
    done = golf_ray("eval", "there-is-no-such-file.pt", "--set", "adaptation.chunk=3")
    assert done.status == 2 and "did you mean 'adaptation.chunk_size'?" in done.error


def test_options_that_name_parts() -> None:
    assert not ConfigOptions(assignments=("train.seed=1",)).names_parts
    assert ConfigOptions(assignments=("model.parts = a.py:B",)).names_parts
    assert ConfigOptions(preset="tiny").names_parts
    with pytest.raises(ConfigError):
        ConfigOptions(assignments=("model.part=x",))


def test_presets_lists_all() -> None:
    assert [row["name"] for row in golf_ray("config", "presets", "--json").json] == list(PRESETS)
    text = golf_ray("config", "presets").out
    assert all(name in text for name in PRESETS)
    assert max(map(len, text.splitlines())) <= 80
