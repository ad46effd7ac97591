"""The laptop preset on real text: each of the four knobs alone changes what it should change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from golf_ray import api
from golf_ray.config import Config
from golf_ray.data.build import build_dataset
from golf_ray.data.library_text import python_library_text
from golf_ray.model.checkpoint import read_state
from golf_ray.presets import LAPTOP

# As many steps as the momentum's warm-up needs to tell two ends apart.
SHORT = {"train.iterations": 6, "train.batch_tokens": 1024, "train.val_every_steps": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The preset over a little of Python's own library."""
    folder = tmp_path_factory.mktemp("laptop")
    build_dataset(python_library_text(600_000), folder, vocab_size=1024, val_documents=3)
    return LAPTOP.with_overrides({**SHORT, "data.dir": str(folder)})


@pytest.fixture(scope="module")
def trained(base: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short training of the base configuration."""
    yield train(base, tmp_path_factory.mktemp("run") / "base")


def train(config: Config, folder: Path) -> Path:
    api.train(config, run_dir=folder, in_process=True)
    return folder / "final_model.pt"


@pytest.fixture(scope="module")
def packed(base: Config, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Its artifact, which comes out the same a second time."""
    folder = tmp_path_factory.mktemp("artifacts")
    first, second = (quantize(trained, base, folder / f"{name}.ptz") for name in "ab")
    assert first == second
    return first


def quantize(trained: Path, config: Config, out: Path) -> bytes:
    return api.quantize(trained, config, out=out, plain=True).artifact.read_bytes()


def test_the_same_training_gives_the_same_weights(
    base: Config, trained: Path, tmp_path: Path
) -> None:
    before, _ = read_state(trained)
    same, _ = read_state(train(base, tmp_path / "again"))
    assert all(torch.equal(before[name], same[name]) for name in before)


@pytest.mark.parametrize(
    "change", [{"train.warmdown_frac": 0.4}, {"train.muon_momentum": 0.90}], ids=str
)
def test_training_knobs_give_other_weights(
    base: Config, trained: Path, tmp_path: Path, change: dict[str, float]
) -> None:
    before, _ = read_state(trained)
    after, _ = read_state(train(base.with_overrides(change), tmp_path / "run"))
    assert not torch.equal(before["qo_bank"], after["qo_bank"])


@pytest.mark.parametrize("group", ["mlp", "attention", "embedding"])
def test_clip_sigmas_give_another_artifact(
    base: Config, trained: Path, packed: bytes, tmp_path: Path, group: str
) -> None:
    changed = base.with_overrides({f"quantization.{group}_clip_sigmas": 9.0})
    assert quantize(trained, changed, tmp_path / "c.ptz") != packed


def test_the_chunk_size_gives_another_score(base: Config, trained: Path) -> None:
    scores = [
        api.evaluate(
            trained, base.with_overrides({"adaptation.chunk_size": size}), method="ttt"
        ).result.score
        for size in (32, 32, 48)
    ]
    assert scores[0] == scores[1]
    assert scores[0].nats != scores[2].nats
    assert scores[0].tokens == scores[2].tokens and scores[0].num_bytes == scores[2].num_bytes
