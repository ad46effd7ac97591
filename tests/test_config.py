"""Configurations: values that survive JSON, change by name, and refuse nonsense in one line."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_ray.config import Config, ModelConfig, TrainConfig, field_paths, get_field
from golf_ray.errors import ConfigError, GolfRayError, nearest
from golf_ray.presets import LAPTOP, PRESETS, RECORD, TINY, preset


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_json_gives_the_same_configuration(config: Config) -> None:
    assert Config.from_json(config.to_json()) == config
    assert preset(config.name) is config


@given(
    st.floats(0, 1),
    st.integers(1, 10**9),
    st.sampled_from([None, 12.5, 600.0]),
    st.lists(st.sampled_from(["q", "k", "v", "o", "mlp", "head"]), unique=True),
)
def test_changed_fields_survive_json(
    frac: float, steps: int, wall_s: float | None, sites: list[str]
) -> None:
    changes = {
        "train.warmdown_frac": frac,
        "train.iterations": steps,
        "train.max_wallclock_s": wall_s,
        "train.reserve_s": 1.0,
        "adaptation.sites": sites,
    }
    config = RECORD.with_overrides(changes)
    assert Config.from_json(config.to_json()) == config
    assert get_field(config, "adaptation.sites") == tuple(sites)
    assert config.train.iterations == steps and config.model == RECORD.model


@given(st.sampled_from(sorted(field_paths())))
def test_every_field_can_be_set_to_its_own_value_as_text(path: str) -> None:
    value = get_field(TINY, path)
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    assert TINY.with_overrides([f"{path}={text}"]) == TINY


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        ("train.warmdwn_frac=0.8", "did you mean 'train.warmdown_frac'?"),
        ("warmdown_frac=0.8", "did you mean 'train.warmdown_frac'?"),
        ("trian.seed=1", "did you mean 'train.seed'?"),
        ("train.iterations=many", "train.iterations = 'many' is not of type int"),
        ("train.iterations=0", "train.iterations = 0 is not allowed; it must be greater than 0"),
        ("train.warmdown_frac=1.5", "train.warmdown_frac = 1.5 is not allowed; it must be from"),
        ("train.warmdown_frac=nan", "train.warmdown_frac = nan is not finite"),
        ("model.tie_embeddings=maybe", "model.tie_embeddings = 'maybe' is not of type bool"),
        ("train.clip_scope=none", "choose from micro_batch, rank, global"),
        ("adaptation.sites=q,w", "adaptation.sites = 'w' is not one of its choices"),
        ("model.num_kv_heads=3", "a divisor of model.num_heads = 8"),
        ("model.loop_end=11", "from model.loop_start = 3 to 10"),
        ("train.micro_batches=7", "a divisor of train.batch_tokens = 786432"),
        ("cluster.num_workers=3", "a divisor of train.micro_batches = 8"),
        ("train.max_wallclock_s=5", "less than train.max_wallclock_s = 5.0"),
        ("evaluation.stride=4096", "from 1 to 2048"),
        ("quantization.mlp_bits=9", "from 2 to 8"),
        ("seed", "--set 'seed' is no assignment"),
    ],
)
def test_nonsense_is_one_line_that_helps(assignment: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RECORD.with_overrides([assignment])
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an object"),
        ('{"train": 3}', "train = 3 is not an object"),
        ('{"trian": {}}', "did you mean 'train'?"),
        ('{"train": {"seed": 1.5}}', "train.seed = 1.5 is not of type int"),
        ('{"train": {"seed": true}}', "train.seed = True is not of type int"),
        ('{"adaptation": {"sites": "q"}}', "is not a list"),
    ],
)
def test_a_bad_file_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_json(text)
    assert line in str(caught.value)


def test_whole_numbers_are_fine_where_a_float_is_asked_for() -> None:
    config = Config.from_dict({"train": {"min_lr": 0, "warmdown_frac": 1}})
    assert isinstance(config.train.min_lr, float) and config.train.warmdown_frac == 1.0


def test_the_record_is_the_record() -> None:
    assert RECORD.train.warmdown_frac == 0.72 and RECORD.train.muon_momentum == 0.97
    assert RECORD.quantization.mlp_clip_sigmas == 12.85 and RECORD.adaptation.chunk_size == 32
    assert RECORD.cluster.num_workers == 8 and RECORD.cluster.gpus_per_worker == 1.0
    assert RECORD.cluster.placement == "STRICT_PACK" and RECORD.train.clip_scope == "micro_batch"
    assert RECORD.quantization.code_bytes == 27_310
    assert RECORD.quantization.limit_bytes == 16_000_000
    assert LAPTOP.cluster.gpus_per_worker == 0.0
    with pytest.raises(ConfigError, match="did you mean 'laptop'"):
        preset("labtop")


def test_every_field_is_documented() -> None:
    import ast
    import inspect

    import golf_ray.sections as module

    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            assert documented, f"{node.name}.{ast.unparse(field.target)} has no docstring"


def test_sections_are_frozen_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.train.seed = 3  # type: ignore[misc]
    assert hash(ModelConfig()) == hash(ModelConfig())
    assert typing.get_type_hints(TrainConfig)["max_wallclock_s"] == float | None


def test_errors_survive_pickling_and_stay_one_line() -> None:
    import pickle

    error = ConfigError("a\nb = 3", "do c")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a b = 3; do c"
    assert isinstance(again, GolfRayError) and again.exit_status == 2
    assert nearest("xyzzy", ["a", "b"]) == "known: a, b"
