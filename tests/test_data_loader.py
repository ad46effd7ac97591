"""The loader: stored batches, any number of ranks, shard changes, exact states, no thread left."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.config import DataConfig
from golf_ray.data.loader import PackedLoader
from golf_ray.data.shards import find_shards, write_shard
from golf_ray.errors import DataError

TINY = Path(__file__).parent / "data" / "tiny"


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("golf-ray-loader")]


def make_shards(folder: Path, sizes: list[int], first_bos: int = 0) -> list[Path]:
    """Shards of running numbers, so that an id tells where it was; BOS every 37 tokens."""
    paths, first = [], 2
    for index, size in enumerate(sizes):
        tokens = np.arange(first, first + size)
        tokens[first_bos::37] = 1
        first += size
        paths.append(folder / f"fineweb_train_{index:06d}.bin")
        write_shard(paths[-1], tokens)
    return paths


def take(loader: PackedLoader, num: int) -> list[list[int]]:
    return [loader.next_batch().x.tolist() for _ in range(num)]


def reference_stream(
    paths: list[Path], n: int, group: int, num_groups: int
) -> list[list[list[int]]]:
    """Groups of inputs, read plainly from the files."""
    shards = [np.fromfile(p, "<u2", offset=1024).astype(int).tolist() for p in paths]
    groups: list[list[list[int]]] = []
    index, cursor = 0, shards[0].index(1)
    while len(groups) < num_groups:
        if len(shards[index]) - cursor < group * (n + 1):
            index = (index + 1) % len(shards)
            cursor = shards[index].index(1)
        starts = [cursor + j * (n + 1) for j in range(group)]
        groups.append([shards[index][s : s + n] for s in starts])
        cursor += group * (n + 1)
    return groups


@pytest.mark.parametrize("group", [1, 8])
def test_stored_batches(group: int) -> None:
    stored = np.load(TINY / "training.npz")
    paths = find_shards(DataConfig(dir=str(TINY)), 512, "train")
    with PackedLoader(
        paths, vocab_size=512, micro_batch_tokens=256, seq_len=64, group=group
    ) as loader:
        for number in range(10):
            batch = loader.next_batch()
            np.testing.assert_array_equal(batch.x, stored[f"batch{number}_x"])
            np.testing.assert_array_equal(batch.y, stored[f"batch{number}_y"])
            np.testing.assert_array_equal(batch.cu_seqlens, stored[f"batch{number}_cu"])
            assert batch.max_seqlen == int(stored[f"batch{number}_max_seqlen"])
    assert loader_threads() == []


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_groups_do_not_depend_on_the_number_of_ranks(tmp_path: Path, world: int) -> None:
    # The shards hold 3, 1 and 5 groups after their first BOS, so 25 groups wrap round twice.
    paths = make_shards(tmp_path, [3 * 88 + 5 + 60, 88 + 5, 5 * 88 + 87 + 5], first_bos=5)
    groups = reference_stream(paths, 10, 8, 25)
    assert groups[0] == groups[9] == groups[18]
    for rank in range(world):
        with PackedLoader(
            paths, vocab_size=4096, micro_batch_tokens=10, seq_len=8, rank=rank, world=world,
            group=8,
        ) as loader:  # fmt: skip
            mine = take(loader, 25 * 8 // world)
        assert mine == [group[j] for group in groups for j in range(rank, 8, world)]


def test_public_form_interleaves_the_ranks(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [400, 300])
    groups = reference_stream(paths, 16, 3, 12)
    for rank in range(3):
        with PackedLoader(
            paths, vocab_size=4096, micro_batch_tokens=16, seq_len=8, rank=rank, world=3, group=3
        ) as loader:
            assert take(loader, 12) == [group[rank] for group in groups]


def test_targets_are_the_inputs_one_later(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [500])
    with PackedLoader(paths, vocab_size=4096, micro_batch_tokens=20, seq_len=8) as loader:
        first, second = loader.next_batch(), loader.next_batch()
    assert first.y[:-1].tolist() == first.x[1:].tolist()
    assert second.x[0] == first.y[-1] + 1


@settings(deadline=None, max_examples=25)
@given(before=st.integers(0, 40), world=st.sampled_from([1, 2, 4]), via_json=st.booleans())
def test_states_continue_exactly(
    tmp_path_factory: pytest.TempPathFactory, before: int, world: int, via_json: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    paths = make_shards(folder, [200, 130], first_bos=3)
    keywords = {"vocab_size": 4096, "micro_batch_tokens": 10, "seq_len": 8, "group": 4}
    with (
        PackedLoader(paths, rank=world - 1, world=world, **keywords) as loader,
        PackedLoader(paths, rank=world - 1, world=world, **keywords) as resumed,
    ):
        take(loader, before)
        state = loader.state_dict()
        state = json.loads(json.dumps(state)) if via_json else state
        expected = take(loader, 15)
        take(resumed, before // 3)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert take(resumed, 15) == expected


def test_a_state_at_the_end_of_a_step_fits_any_number_of_ranks(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [400, 300])
    groups = reference_stream(paths, 10, 8, 9)
    keywords = {"vocab_size": 4096, "micro_batch_tokens": 10, "seq_len": 8, "group": 8}
    with PackedLoader(paths, rank=1, world=2, **keywords) as loader:
        take(loader, 4 * 5)
        state = loader.state_dict()
    assert state["taken"] == 0
    for rank in range(8):
        with PackedLoader(paths, rank=rank, world=8, **keywords) as loader:
            loader.load_state_dict(state)
            assert take(loader, 4) == [group[rank] for group in groups[5:]]


def test_a_state_amid_a_step_is_refused_where_ranks_do_not_divide_it(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [400])
    keywords = {"vocab_size": 4096, "micro_batch_tokens": 10, "seq_len": 8, "group": 4}
    with PackedLoader(paths, **keywords) as loader:
        take(loader, 1)
        state = loader.state_dict()
    with PackedLoader(paths, world=2, **keywords) as loader:
        with pytest.raises(DataError, match="2 workers"):
            loader.load_state_dict(state)
        assert len(take(loader, 2)) == 2


def test_a_state_of_other_shards_is_refused(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [400, 300])
    keywords = {"vocab_size": 4096, "micro_batch_tokens": 10, "seq_len": 8}
    with PackedLoader(paths, **keywords) as loader:
        state = loader.state_dict()
        for wrong in ({"shard": 2}, {"shard_name": "other.bin"}, {"cursor": 401}):
            with pytest.raises(DataError, match="that the run began with"):
                loader.load_state_dict({**state, **wrong})


def test_a_shard_without_room_for_a_group_is_named_at_once(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [400, 20, 400])
    with pytest.raises(DataError, match="reads 44") as caught:
        PackedLoader(paths, vocab_size=4096, micro_batch_tokens=10, seq_len=8, group=4)
    assert str(paths[1]) in str(caught.value) and "\n" not in str(caught.value)
    paths = make_shards(tmp_path, [45], first_bos=2)
    with pytest.raises(DataError, match="43 tokens from its first document"):
        PackedLoader(paths, vocab_size=4096, micro_batch_tokens=10, seq_len=8, group=4)
    assert loader_threads() == []


def test_no_bos_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.bin", np.full(100, 7))
    with pytest.raises(DataError, match=r"s\.bin holds no document"):
        PackedLoader([tmp_path / "s.bin"], vocab_size=512, micro_batch_tokens=10, seq_len=8)
    assert loader_threads() == []


def test_errors_of_the_background_come_out_of_next_batch(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [100, 100])
    tokens = np.arange(100)
    tokens[50] = 5000
    write_shard(paths[1], tokens)
    with PackedLoader(paths, vocab_size=4096, micro_batch_tokens=40, seq_len=8) as loader:
        take(loader, 2)
        for _ in range(2):
            with pytest.raises(DataError, match="token id 5000"):
                loader.next_batch()
        # The state is still that of the last good batch.
        assert loader.state_dict()["cursor"] == 82
    assert loader_threads() == []


def test_close_ends_the_threads_and_may_be_repeated(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [100, 100])
    loader = PackedLoader(paths, vocab_size=4096, micro_batch_tokens=40, seq_len=8)
    loader.next_batch()
    assert loader_threads()
    loader.close()
    loader.close()
    assert loader_threads() == []


def test_one_shard_wraps_to_itself(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, [100], first_bos=7)
    with PackedLoader(paths, vocab_size=4096, micro_batch_tokens=40, seq_len=8) as loader:
        batches = take(loader, 5)
    assert batches[0] == batches[2] == batches[4] and batches[1] == batches[3]
