"""One contract of a folder, kept by a path, a file URI and an S3-compatible server's bucket."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from reference import FOLDER
from s3_server import BUCKET, KEY, SECRET, Server, s3_server

from golf_ray.errors import StorageError, UsageError
from trainers.storage import LineFile, Storage, shown

pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["path", "file", "s3 by environment", "s3 by query", "s3 by query and keys"])
def storage(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> Storage:
    """An empty folder, named in each of the ways that a user may."""
    name = f"{uuid.uuid4().hex}/run"
    kind = request.param
    if kind == "path":
        return Storage(tmp_path / "run")
    if kind == "file":
        return Storage(f"file://{tmp_path}/run")
    for variable, value in server.environment.items():
        if kind == "s3 by environment" or (kind == "s3 by query" and "KEY" in variable):
            monkeypatch.setenv(variable, value)
        else:
            monkeypatch.delenv(variable, raising=False)
    if kind == "s3 by environment":
        return Storage(f"s3://{BUCKET}/{name}/")
    return Storage(server.uri(name, keys=kind.endswith("keys")))


# The contract -----------------------------------------------------------------------------------


def test_a_new_folder_is_empty(storage: Storage) -> None:
    assert storage.name == "run" and storage.names() == []
    assert storage.read_bytes("a") is None and not storage.exists("a")
    storage.remove("never there")


def test_a_file_is_the_last_that_was_written(storage: Storage, tmp_path: Path) -> None:
    for data in (b"one", b"", b"two"):
        storage.write_bytes("a", data)
        assert storage.exists("a") and storage.read_bytes("a") == data
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 40_000)
    storage.write_file("a", source)
    assert storage.read_bytes("a") == source.read_bytes()
    assert storage.names() == ["a"], "no temporary file stays"


def test_names_are_in_order_and_of_one_folder(storage: Storage) -> None:
    for name in ("b", "a", "ab"):
        storage.write_bytes(name, b"x")
    storage.child("inner").write_bytes("deep", b"x")
    assert storage.names() == ["a", "ab", "b", "inner"] and storage.names("a") == ["a", "ab"]
    assert storage.exists("inner") and storage.exists("inner/deep")
    assert not storage.exists("inn") and not storage.exists("inner/dee")


def test_children_are_the_same_by_name_and_by_uri(storage: Storage) -> None:
    inner = storage.child("one").child("two")
    inner.write_bytes("file", b"x")
    assert storage.read_bytes("one/two/file") == b"x"
    for again in (Storage(inner.uri), Storage(storage.uri_of("one/two"))):
        assert again.uri == inner.uri and again.path == inner.path
        assert again.read_bytes("file") == b"x" and again.name == "two"


def test_copies_are_whole_and_replace(storage: Storage) -> None:
    storage.write_bytes("old", b"old")
    storage.child("inner").write_bytes("new", b"new")
    storage.copy("inner/new", "old")
    storage.copy("inner/new", "other")
    storage.child("inner").write_bytes("new", b"newer")
    assert storage.read_bytes("old") == storage.read_bytes("other") == b"new"
    with pytest.raises(StorageError):
        storage.copy("not there", "old")
    assert storage.read_bytes("old") == b"new"


def test_a_folder_goes_with_all_in_it(storage: Storage) -> None:
    storage.write_bytes("kept", b"x")
    storage.child("gone").child("deeper").write_bytes("file", b"x")
    storage.remove("gone")
    storage.child("gone").remove("deeper")
    assert storage.names() == ["kept"] and storage.child("gone").names() == []
    storage.remove("kept")
    assert storage.names() == []


def test_lines_are_read_back(storage: Storage) -> None:
    lines = LineFile(storage, "lines.jsonl")
    for step in (1, 2, 3):
        lines.append({"step": step})
    lines.flush(now=True)
    assert LineFile(storage, "lines.jsonl").values == [{"step": step} for step in (1, 2, 3)]
    lines.replace([{"step": 1}])
    lines.append({"step": 9})
    lines.flush(now=True)
    assert LineFile(storage, "lines.jsonl").values == [{"step": 1}, {"step": 9}]


def test_a_copy_that_breaks_leaves_no_half_file(storage: Storage, tmp_path: Path) -> None:
    for source in (tmp_path / "no source", Path("/proc/self/mem")):
        # The second opens, and cannot be read.
        with pytest.raises(StorageError):
            storage.write_file("half", source)
    assert not storage.exists("half") and storage.names() == []


def test_a_file_system_travels_to_other_processes(storage: Storage) -> None:
    storage.write_bytes("a", b"x")
    again = pickle.loads(pickle.dumps(storage.filesystem))
    with again.open_input_stream(storage.place("a")) as stream:
        assert stream.read() == b"x"


# What is S3's own -------------------------------------------------------------------------------


def test_errors_are_one_line_without_keys(server: Server) -> None:
    uri = server.uri("run").replace(BUCKET, "no-such-bucket")
    with pytest.raises(StorageError) as caught:
        Storage(uri).write_bytes("a", b"x")
    line = str(caught.value)
    assert line.startswith("s3://no-such-bucket/run/a cannot be used") and "\n" not in line
    assert SECRET not in line and KEY not in line
    with pytest.raises(StorageError, match="no storage that can be used") as caught:
        Storage(server.uri("run") + "&endpont=x")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://a:b%2F@bucket/x?region=y", "s3://bucket/x"),
        ("s3://bucket/a@b/x", "s3://bucket/a@b/x"),
        ("/a/what?/b", "/a/what?/b"),
        ("file:///a/b", "file:///a/b"),
    ],
)
def test_people_see_the_place_alone(uri: str, expected: str) -> None:
    assert shown(uri) == expected


def test_a_path_may_hold_a_question_mark(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "what?" / "run")
    storage.child("inner").write_bytes("a?b", b"x")
    assert (tmp_path / "what?" / "run" / "inner" / "a?b").read_bytes() == b"x"


# A training whose run is in a bucket ------------------------------------------------------------


@pytest.mark.ray_cluster
def test_a_training_goes_on_from_a_bucket(cluster: str, server: Server, tmp_path: Path) -> None:
    """A run of this disk, as it was after step 4, is put into a bucket and ended there."""
    from golf_ray import api
    from golf_ray.presets import TINY

    config = TINY.with_overrides(
        {
            "data.dir": str(FOLDER),
            "train.iterations": 6,
            "train.checkpoint_every_steps": 2,
            "train.log_every_steps": 1,
            "cluster.num_workers": 1,
            "cluster.gpus_per_worker": 0.0,
        }
    )
    here = tmp_path / "run"
    api.train(config, run_dir=here, in_process=True)
    run = Storage(server.uri("trained/run"))
    for file in ("config.json", "intervals.jsonl"):
        run.write_file(file, here / file)
    stored = here / "checkpoints" / "step_00000004"
    for path in stored.iterdir():
        run.child("checkpoints").child(stored.name).write_file(path.name, path)
    assert api.read_run_config(run.uri) == config
    with pytest.raises(UsageError, match="there is a run in"):
        api.train(config, run_dir=run.uri, address=cluster)
    done = api.train(config, run_dir=run.uri, resume=True, address=cluster)
    assert done.result.resumed_from_step == 4 and done.result.steps == 6
    assert done.final_model == run.uri_of("final_model.pt")
    assert run.child("checkpoints").names() == ["step_00000004", "step_00000006"]
    steps = [line["step"] for line in LineFile(run, "intervals.jsonl").values]
    assert steps == [1, 2, 3, 4, 5, 6]
    data = run.read_bytes("final_model.pt")
    assert data is not None
    (tmp_path / "fetched.pt").write_bytes(data)
    mine = api.open_weights(tmp_path / "fetched.pt").tensors
    theirs = api.open_weights(here).tensors
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
