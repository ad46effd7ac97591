"""Checkpoints are data: read without running anything, compared with the configuration."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from reference import FOLDER, final_state

from golf_ray.errors import CheckpointError, ConfigError, StorageError
from golf_ray.model.checkpoint import CONFIG_MEMBER, build_model, read_state, save_state
from golf_ray.presets import TINY


class RunsCode:
    """Leaves a mark when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


def test_a_public_checkpoint_is_read() -> None:
    state, config = read_state(FOLDER / "final_model.pt")
    assert config is None
    build_model(TINY.model, state)


def test_a_checkpoint_of_ours_is_a_public_one_that_knows_its_configuration(tmp_path: Path) -> None:
    path = tmp_path / "final_model.pt"
    state = final_state()
    save_state(path, state, TINY)
    found, config = read_state(path)
    assert config == TINY and list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    plain = torch.load(path, weights_only=True)
    assert list(plain) == list(state)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"qo_bank": RunsCode(mark)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        read_state(path)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(RunsCode(mark)))
    with pytest.raises(CheckpointError):
        read_state(path)
    assert not mark.exists()
    # The same file does run code for whoever unpickles it.
    pickle.loads(path.read_bytes())
    assert mark.exists()


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    whole = (FOLDER / "final_model.pt").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"hello\n" * 9)):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=name) as caught:
            read_state(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="is not there"):
        read_state(tmp_path / "absent.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        read_state(tmp_path / "list.pt")


def test_an_unreadable_configuration_inside_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "final_model.pt"
    torch.save(final_state(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"final_model/{CONFIG_MEMBER}", '{"model": {"num_layrs": 3}}')
    with pytest.raises(ConfigError, match=r"did you mean 'model\.num_layers'"):
        read_state(path)


def test_tensors_that_do_not_fit_are_named_with_both_shapes() -> None:
    state = final_state()
    other = TINY.with_overrides({"model.mlp_mult": 4.0}).model
    with pytest.raises(CheckpointError) as caught:
        build_model(other, state)
    line = str(caught.value)
    assert "mlp_up_bank" in line and "[6, 192, 64]" in line and "[6, 256, 64]" in line
    with pytest.raises(CheckpointError, match=r"does not know: 'smear_gate' \[12\]"):
        build_model(TINY.model, {**state, "smear_gate": torch.zeros(12)})
    del state["skip_gates"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'skip_gates' \[5, 64\]"):
        build_model(TINY.model, state)
    whole = final_state()
    whole["skip_gates"] = whole["skip_gates"].to(torch.int64)
    with pytest.raises(CheckpointError, match=r"of type torch\.int64"):
        build_model(TINY.model, whole)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        save_state(blocker / "final_model.pt", final_state(), TINY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
