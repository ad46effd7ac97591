"""Search spaces: those that are shipped, conditions, stored ones, and every way to be wrong."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution as Choice
from optuna.distributions import FloatDistribution as Float
from optuna.distributions import IntDistribution as Int

import search_spaces
from golf_ray.config import Config
from golf_ray.errors import ConfigError
from golf_ray.presets import LAPTOP, RECORD, TINY
from golf_ray.sweeps.space import Space, check_space, load_space, stage_of
from golf_ray.sweeps.study import suggest_knob

SHIPPED = [m.name for m in pkgutil.iter_modules(search_spaces.__path__)]
ALL = {"train", "quantize", "evaluate"}
STAGES = {"record": ALL, "laptop": ALL, "training": {"train"}, "schedule": {"train"},
          "quantization": {"quantize"}, "adaptation": {"evaluate"}}  # fmt: skip


def base_of(name: str) -> Config:
    return LAPTOP if name == "laptop" else RECORD


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_begin_at_their_preset(name: str) -> None:
    base = base_of(name)
    space = load_space(name, base)
    assert {stage_of(knob) for knob in space.knobs()} == STAGES[name]
    [first] = space.first
    assert tuple(first) == space.active(first), "whole, and in the order of sampling"
    assert base.with_overrides(first) == base
    assert Space.from_dict(json.loads(json.dumps(space.to_dict()))) == space


@pytest.mark.parametrize("name", SHIPPED)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6))
def test_every_point_of_a_shipped_space_is_a_configuration(name: str, seed: int) -> None:
    base = base_of(name)
    space = load_space(name, base)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    point: dict[str, Any] = {}
    for knob, distribution in space.distributions.items():
        if space.is_active(knob, point):
            point[knob] = suggest_knob(trial, knob, distribution)
    assert tuple(point) == space.active(point)
    config = base.with_overrides(point)
    assert base.with_overrides({k: str(v) for k, v in point.items()}) == config


CHAIN = Space(
    name="chain",
    distributions={
        "adaptation.optimizer": Choice(["adam", "sgd"]),
        "adaptation.grad_steps": Int(1, 3),
        "adaptation.beta1": Float(0.0, 0.9),
    },
    conditions={
        "adaptation.grad_steps": ("adaptation.optimizer", ("sgd",)),
        "adaptation.beta1": ("adaptation.grad_steps", (2, 3)),
    },
)


def test_a_knob_is_there_with_its_parents() -> None:
    check_space(CHAIN, RECORD)
    optimizer, steps, beta = CHAIN.knobs()
    assert CHAIN.active({}) == (optimizer,)
    assert CHAIN.active({optimizer: "sgd"}) == (optimizer, steps)
    assert CHAIN.active({optimizer: "sgd", steps: 1}) == (optimizer, steps)
    assert CHAIN.active({optimizer: "sgd", steps: 2}) == (optimizer, steps, beta)
    assert CHAIN.active({optimizer: "adam", steps: 2}) == (optimizer,)


def test_a_users_space_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from optuna.distributions import CategoricalDistribution, FloatDistribution\n"
        "KNOBS = {'adaptation.optimizer': CategoricalDistribution(['adam', 'sgd']),\n"
        "         'adaptation.beta1': FloatDistribution(0, 0.9)}\n"
        "CONDITIONS = {'adaptation.beta1': ('adaptation.optimizer', ['sgd'])}\n"
    )
    space = load_space(f"{path}:KNOBS", TINY)
    assert space.knobs("evaluate") == ("adaptation.optimizer", "adaptation.beta1")
    assert space.first == ()
    assert space.conditions == {"adaptation.beta1": ("adaptation.optimizer", ("sgd",))}


CHUNK, WINDOW, RANK = "adaptation.chunk_size", "adaptation.window", "adaptation.rank"
OPTIMIZER, BETA = "adaptation.optimizer", "adaptation.beta1"
SGD = {OPTIMIZER: Choice(["adam", "sgd"]), BETA: Float(0, 0.9)}


def lines_of(space: Space, base: Config = RECORD) -> str:
    with pytest.raises(ConfigError) as caught:
        check_space(space, base)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("distributions", "line"),
    [
        ({"train.warmdwn": Float(0, 1)}, "did you mean 'train.warmdown_frac'"),
        ({"train.warmdown_frac": Float(0.5, 1.5)}, "space 'mine': train.warmdown_frac = 1.5"),
        ({"cluster.num_workers": Int(1, 2)}, "is no knob to search"),
        ({1: Int(1, 2)}, "1 is no configuration field"),
        ({"train.clip_scope": Choice(["rank", "all"])}, "'all' is not one"),
        ({RANK: Float(48, 128)}, "use IntDistribution"),
        ({OPTIMIZER: Float(0, 1)}, "use CategoricalDistribution"),
        ({OPTIMIZER: Int(0, 1)}, "use CategoricalDistribution"),
        ({"train.muon_row_normalize": Int(0, 1)}, "use CategoricalDistribution"),
        ({RANK: Choice(["48", "64"])}, "'48' is a text; give a value of type int"),
        ({RANK: Choice([48, 64.5])}, "64.5 is not of type int"),
        ({RANK: Choice([48, None])}, "None is not of type int"),
        ({RANK: Choice([True])}, "True is not of type int"),
        ({"train.min_lr": Choice([0.0, float("inf")])}, "is not finite"),
        ({"adaptation.sites": Choice(["q,k", "q,x"])}, "'x' is not one of its choices"),
        # A value between the ends.
        ({"train.micro_batches": Int(2, 8, step=2)}, "train.micro_batches = 2"),
        ({"model.num_kv_heads": Int(1, 4)}, "model.num_kv_heads = 3 is not allowed"),
    ],
)
def test_knobs_that_cannot_be_are_one_line(distributions: dict[str, Any], line: str) -> None:
    assert line in lines_of(Space(name="mine", distributions=distributions))


@pytest.mark.parametrize(
    ("distributions", "line"),
    [
        (
            {CHUNK: Int(32, 128, step=32), WINDOW: Int(64, 2048, step=64)},
            f"space 'mine' with {CHUNK} = 128, {WINDOW} = 64: {CHUNK} = 128 is not allowed; "
            f"it must be at most {WINDOW} = 64",
        ),
        (
            {"evaluation.stride": Int(64, 512, step=64), "evaluation.seq_len": Choice([256, 2048])},
            "with evaluation.stride = 512, evaluation.seq_len = 256: evaluation.stride = 512",
        ),
        # Of two sections.
        (
            {"data.seq_len": Choice([2048, 4096]), "quantization.calibration_batch_tokens":
             Choice([98_304, 2048])},
            "quantization.calibration_batch_tokens = 2048 is not allowed; it must be a multiple",
        ),
    ],
)  # fmt: skip
def test_knobs_that_cannot_be_together_are_one_line(
    distributions: dict[str, Any], line: str
) -> None:
    assert line in lines_of(Space(name="mine", distributions=distributions))


def test_three_knobs_of_a_section_that_cannot_be_together_are_one_line() -> None:
    base = RECORD.with_overrides({"model.num_loops": 0, "model.loop_end": 8})
    distributions: dict[str, Any] = {
        "model.num_loops": Choice([0, 2]),
        "model.loop_start": Int(3, 6),
        "model.loop_end": Int(5, 8),
    }
    line = lines_of(Space(name="mine", distributions=distributions), base)
    assert "with model.num_loops = 2, model.loop_start = 6, model.loop_end = 5: " in line


def test_what_a_space_never_gives_is_no_fault() -> None:
    # The base's window would be too small for the chunk; the space moves both.
    base = RECORD.with_overrides({WINDOW: 32})
    distributions: dict[str, Any] = {CHUNK: Int(64, 128, step=64), WINDOW: Int(128, 256, step=128)}
    check_space(Space(name="mine", distributions=distributions), base)
    # Loops end before they begin only where there are none.
    distributions = {"model.num_loops": Choice([0, 2]), "model.loop_start": Int(5, 6)}
    check_space(
        Space(
            name="mine",
            distributions=distributions,
            conditions={"model.loop_start": ("model.num_loops", (0,))},
        ),
        RECORD,
    )


def test_a_large_section_is_checked_in_bounded_time() -> None:
    names = [
        "warmdown_frac", "min_lr", "enable_looping_at", "ema_decay", "clip_norm", "muon_lr",
        "muon_wd", "muon_momentum", "adam_beta1", "adam_beta2", "embed_lr", "embed_wd", "small_lr",
        "small_wd", "head_lr", "muon_momentum_warmup_start", "untied_embed_lr", "adam_eps",
    ]  # fmt: skip
    distributions: dict[str, Any] = {f"train.{name}": Float(0.0, 0.5) for name in names}
    check_space(Space(name="mine", distributions=distributions), RECORD)
    distributions["train.reserve_s"] = Float(0.0, 700.0)
    assert "train.reserve_s = 700.0" in lines_of(Space(name="mine", distributions=distributions))


@pytest.mark.parametrize(
    ("conditions", "line"),
    [
        ({BETA: ("adaptation.optimiser", ("sgd",))}, "did you mean 'adaptation.optimizer'"),
        ({"adaptation.beta2": (OPTIMIZER, ("sgd",))}, "'adaptation.beta2', which is not in"),
        ({OPTIMIZER: (BETA, (0.5,))}, f"put {BETA} before {OPTIMIZER}"),
        ({BETA: (BETA, (0.5,))}, "which does not come before it"),
        ({BETA: (OPTIMIZER, ("adamw",))}, f"{OPTIMIZER} = 'adamw', which it cannot have"),
        ({BETA: (OPTIMIZER, ())}, "no value at all"),
        ({RANK: (BETA, (0.5,))}, "whose values are not countable"),
        ({"train.min_lr": (OPTIMIZER, ("sgd",))}, "a knob of a later stage"),
    ],
)
def test_conditions_that_cannot_be_are_one_line(conditions: dict[str, Any], line: str) -> None:
    distributions = {**SGD, RANK: Int(48, 64), "train.min_lr": Float(0, 0.1)}
    assert line in lines_of(Space(name="mine", distributions=distributions, conditions=conditions))


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ({"train.min_lr": 0.2}, "train.min_lr = 0.2, outside of FloatDistribution"),
        ({"train.mn_lr": 0}, "did you mean 'train.min_lr'"),
        ({"train.min_lr": "0.05"}, "is a text"),
        ({RANK: 50}, "outside of IntDistribution"),
        ({RANK: True}, "True is not of type int"),
        ({OPTIMIZER: "adamw"}, "'adamw' is not one of its choices"),
        ({BETA: 0.5}, f"there only with {OPTIMIZER} one of ['sgd']"),
        ({OPTIMIZER: "adam", BETA: 0.5}, f"there only with {OPTIMIZER} one of ['sgd']"),
    ],
)
def test_first_points_outside_are_one_line(first: dict[str, Any], line: str) -> None:
    space = Space(
        name="mine",
        distributions={**SGD, RANK: Int(48, 64, step=16), "train.min_lr": Float(0, 0.1)},
        conditions={BETA: (OPTIMIZER, ("sgd",))},
        first=(first,),
    )
    assert line in lines_of(space)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("recrod", "did you mean 'record'"),
        ("/no/file.py:SPACE", "there is no space file"),
        ("no_such_module:SPACE", "is not found"),
        ("json:dumps", "is no space"),
    ],
)
def test_an_absent_space_is_one_line(name: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(name, RECORD)
    assert line in str(caught.value)


GOOD = "from optuna.distributions import FloatDistribution as F\nSPACE={'train.min_lr': F(0,.1)}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SPACE = {\n", "SyntaxError"),
        ("import no_such_package\n", "no_such_package"),
        ("SPACE = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("raise SystemExit('two\\nlines')\n", "SystemExit: two"),
        ("from optuna.distributions import FloatDistribution as F\nSPACE={'a': F(1, 0)}\n", "low"),
        ("SPACE = {}\n", "is no space"),
        ("SPACE = {'train.min_lr': (0, 0.1)}\n", "is no space"),
        (GOOD + "FIRST = {'train.min_lr': 0.1}\n", "is no list of points"),
        (GOOD + "CONDITIONS = {'train.min_lr': 'train.seed'}\n", "cannot be read"),
        (GOOD + "CONDITIONS = {'train.min_lr': ('train.seed', 3)}\n", "cannot be read"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "my_space.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_space(f"{path}:SPACE", RECORD)
    message = str(caught.value)
    assert line in message and "my_space.py" in message and "\n" not in message


@pytest.mark.parametrize("damage", [{"first": None}, {"distributions": {"a": {"name": "?"}}}])
def test_stored_spaces_that_are_damaged_are_one_line(damage: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Space.from_dict({**CHAIN.to_dict(), **damage})
    with pytest.raises(ConfigError, match="cannot be read"):
        Space.from_dict({})
