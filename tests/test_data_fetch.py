"""Fetching, against a local server that speaks the hub's protocol: lists, HEAD, GET, ranges."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from golf_ray.config import DataConfig
from golf_ray.data import fetch
from golf_ray.data.fetch import RepoLayout, fetch_dataset
from golf_ray.data.manifest import read_manifest
from golf_ray.data.shards import find_shards, open_shard, write_shard
from golf_ray.errors import DataError, StorageError, UsageError

pytest.importorskip("huggingface_hub")

MODEL = Path(__file__).parent / "data" / "tiny" / "tokenizers" / "fineweb_512_bpe.model"
REPO = "someone/golf-data"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FOLDER = "datasets/fineweb10B_sp512"
PAGE = 3


class Hub(ThreadingHTTPServer):
    """The repository, what was asked of it, and how it is to misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.authorized: list[str] = []
        self.break_after: dict[str, list[int]] = {}
        """Path -> after how many bytes each of the next transfers breaks."""
        self.bodies: dict[str, bytes] = {}
        """Path -> content that is sent in place of the stated one."""
        self.fail_status: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self) -> list[str]:
        """Files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append((self.command, url.path, self.headers.get("Range")))
        if self.headers.get("Authorization"):
            self.server.authorized.append(url.path)
        prefix = f"/datasets/{REPO}/resolve/{COMMIT}/"
        api = f"/api/datasets/{REPO}"
        if self.server.fail_status is not None:
            self.reply(self.server.fail_status, b"")
        elif url.path == f"{api}/revision/main":
            self.reply_json({"_id": "1", "id": REPO, "sha": COMMIT, "private": False,
                             "tags": [], "downloads": 0, "likes": 0, "siblings": []})  # fmt: skip
        elif url.path.startswith(f"{api}/revision/"):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif url.path == f"{api}/tree/{COMMIT}":
            self.tree(int(parse_qs(url.query).get("cursor", ["0"])[0]))
        elif url.path.startswith(prefix) and url.path[len(prefix) :] in self.server.files:
            self.content(url.path[len(prefix) :])
        elif url.path.startswith(prefix):
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def tree(self, cursor: int) -> None:
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0,
                                          "path": "datasets"}]  # fmt: skip
        for path, content in self.server.files.items():
            entry: dict[str, Any] = {"type": "file", "size": len(content), "path": path}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if path.endswith(".bin"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(),
                                "size": len(content), "pointerSize": 130}  # fmt: skip
            entries.append(entry)
        headers = {}
        if cursor + PAGE < len(entries):
            following = f"{self.server.url}{urlsplit(self.path).path}?recursive=true"
            headers["Link"] = f'<{following}&cursor={cursor + PAGE}>; rel="next"'
        self.reply_json(entries[cursor : cursor + PAGE], headers)

    def content(self, path: str) -> None:
        stated = self.server.files[path]
        body = self.server.bodies.get(path, stated)
        etag = hashlib.sha256(stated).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.reply(200, stated, headers)
            return
        status, start = 200, 0
        if wanted := self.headers.get("Range"):
            status, start = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        breaks = self.server.break_after.get(path)
        self.reply(status, body[start:], headers, stop_after=breaks.pop(0) if breaks else None)

    def reply_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self.reply(200, json.dumps(value).encode(),
                   {"Content-Type": "application/json", **(headers or {})})  # fmt: skip

    def reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        stop_after: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if stop_after is None else body[:stop_after])
        if stop_after is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def shard_bytes(folder: Path, tokens: Any) -> bytes:
    path = folder / "shard.bin"
    write_shard(path, tokens)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rng = np.random.default_rng(0)
    server = Hub()
    for name in ("val_000000", "train_000000", "train_000001", "train_000002"):
        tokens = rng.integers(4, 512, 40_000)
        tokens[::100] = 1
        server.files[f"{FOLDER}/fineweb_{name}.bin"] = shard_bytes(tmp_path, tokens)
    server.files["tokenizers/fineweb_512_bpe.model"] = MODEL.read_bytes()
    server.files["README.md"] = b"# data"
    other = "datasets/fineweb10B_sp5120/fineweb_val_000000.bin"
    server.files[other] = shard_bytes(tmp_path, [1, 2])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(hub: Hub, out: Path, train_shards: int | None = 2, **keywords: Any) -> Any:
    arguments = {"repo": REPO, "out_dir": out, "endpoint": hub.url, **keywords}
    return fetch_dataset("sp512", train_shards, **arguments)


def tree(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def failure(kind: type[Exception] = DataError, *args: Any, **keywords: Any) -> str:
    with pytest.raises(kind) as caught:
        get(*args, **keywords)
    text = str(caught.value)
    assert "\n" not in text and text
    return text


def test_files_take_their_places(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[tuple[str, int, int]] = []
    report = get(hub, out, progress=lambda *values: told.append(values))
    assert tree(out) == [
        f"{FOLDER}/fineweb_train_000000.bin",
        f"{FOLDER}/fineweb_train_000001.bin",
        f"{FOLDER}/fineweb_val_000000.bin",
        f"{FOLDER}/manifest.json",
        "tokenizers/fineweb_512_bpe.model",
    ]
    for name in tree(out):
        if not name.endswith(".json"):
            assert (out / name).read_bytes() == hub.files[name]
    assert (report.fetched_files, report.present_files) == (4, 0)
    assert (report.num_train_shards, report.num_val_shards) == (2, 1)
    assert report.revision == COMMIT
    total = sum(len(hub.files[n]) for n in tree(out) if not n.endswith(".json"))
    assert report.fetched_bytes == total and told[-1] == ("fetch", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    shards = find_shards(DataConfig(dir=str(out)), 512, "train")
    assert all(len(open_shard(path, 512)) == 40_000 for path in shards)
    manifest = read_manifest(report.dataset_dir)
    assert manifest is not None
    assert manifest["fetched"] == {"repo": REPO, "revision": COMMIT}


def test_only_the_given_address_is_asked_and_no_token_is_sent(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts: set[str] = set()
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def watched_resolve(host: Any, *args: Any, **keywords: Any) -> Any:
        hosts.add(str(host))
        return resolve(host, *args, **keywords)

    def watched_connect(self: socket.socket, address: Any) -> Any:
        hosts.add(str(address[0]) if isinstance(address, tuple) else str(address))
        return connect(self, address)

    import huggingface_hub.utils._detect_agent as agents

    monkeypatch.setattr(socket, "getaddrinfo", watched_resolve)
    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(agents, "_registry", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_token")
    before = huggingface_hub_telemetry()
    get(hub, tmp_path / "out")
    assert hosts == {"127.0.0.1"}
    assert hub.authorized == []
    assert not [path for _, path, _ in hub.requests if "agent" in path or "telemetry" in path]
    assert huggingface_hub_telemetry() == before


def huggingface_hub_telemetry() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_DISABLE_TELEMETRY)


def test_a_second_fetch_takes_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    get(hub, out, 1)
    hub.requests.clear()
    report = get(hub, out, 3)
    assert hub.gets() == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert (report.fetched_files, report.present_files) == (2, 3)
    damaged = out / FOLDER / "fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    hub.requests.clear()
    report = get(hub, out, 2)
    assert hub.gets() == ["fineweb_train_000001.bin"]
    assert damaged.read_bytes() == hub.files[f"{FOLDER}/fineweb_train_000001.bin"]
    manifest = read_manifest(out / FOLDER)
    assert manifest is not None and len(manifest["splits"]["train"]["shards"]) == 3
    hub.requests.clear()
    assert get(hub, out, None).fetched_files == 0
    assert hub.gets() == []


def test_a_transfer_that_breaks_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    # The hub client writes blocks of 10 MiB and takes up after the last whole one.
    block = 10 * 2**20
    name = f"{FOLDER}/fineweb_train_000000.bin"
    tokens = np.random.default_rng(1).integers(4, 512, (2 * block + 5000) // 2)
    hub.files[name] = shard_bytes(tmp_path, tokens)
    hub.break_after[name] = [block + 3000, block + 4000]
    told: list[int] = []
    get(hub, tmp_path / "out", 1, progress=lambda stage, done, total: told.append(done))
    assert (tmp_path / "out" / name).read_bytes() == hub.files[name]
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith(name)]
    assert ranges == [None, f"bytes={block}-", f"bytes={2 * block}-"]
    assert told[-1] == max(told)


def test_an_interrupted_fetch_goes_on_and_leaves_no_part(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"

    class Stopped(BaseException):
        pass

    limit = len(MODEL.read_bytes()) + 80_000 + 1024 + 1

    def stop(stage: str, done: int, total: int) -> None:
        if done >= limit:
            raise Stopped

    with pytest.raises(Stopped):
        get(hub, out, 2, progress=stop)
    assert tree(out) == [f"{FOLDER}/fineweb_val_000000.bin", "tokenizers/fineweb_512_bpe.model"]
    hub.requests.clear()
    assert get(hub, out, 2).present_files == 2
    assert hub.gets() == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.parametrize("how", ["header", "short", "id", "tokenizer"])
def test_a_file_that_is_wrong_at_its_source_is_refused(hub: Hub, tmp_path: Path, how: str) -> None:
    name = f"{FOLDER}/fineweb_train_000000.bin"
    content = hub.files[name]
    if how == "header":
        hub.files[name] = b"\0" + content[1:]
    elif how == "short":
        hub.files[name] = content[:-2]
    elif how == "id":
        hub.files[name] = content[:-2] + b"\xff\xff"
    else:
        name = "tokenizers/fineweb_512_bpe.model"
        hub.files[name] = b"no model"
    text = failure(DataError, hub, tmp_path / "out")
    assert f"{REPO} holds a wrong file" in text and name in text
    assert str(tmp_path) not in text
    assert name not in tree(tmp_path / "out")
    assert not [n for n in tree(tmp_path / "out") if "/." in n or n.startswith(".")]


@pytest.mark.parametrize("how", ["shorter", "other"])
def test_content_other_than_stated_is_refused(hub: Hub, tmp_path: Path, how: str) -> None:
    name = f"{FOLDER}/fineweb_train_000000.bin"
    content = hub.files[name]
    hub.bodies[name] = content[:-100] if how == "shorter" else content[:-2] + b"\x05\x00"
    text = failure(DataError, hub, tmp_path / "out", 1)
    assert name in text and "fetch again" in text
    assert name not in tree(tmp_path / "out")
    del hub.bodies[name]
    assert get(hub, tmp_path / "out", 1).present_files == 2


def test_what_the_repository_does_not_have(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no data-set repository some/other" in failure(DataError, hub, out, repo="some/other")
    assert "no repository name" in failure(DataError, hub, out, repo="a/b/c")
    assert "no revision 'v9'" in failure(DataError, hub, out, revision="v9")
    assert "has 3" in failure(DataError, hub, out, 4)
    with pytest.raises(DataError, match="it has: sp512, sp5120") as caught:
        fetch_dataset("sp1024", 1, repo=REPO, out_dir=out, endpoint=hub.url)
    assert "sp1024" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        fetch_dataset("8192", 1, repo=REPO, out_dir=out, endpoint=hub.url)
    del hub.files["tokenizers/fineweb_512_bpe.model"]
    assert "fineweb_512_bpe.model" in failure(DataError, hub, out)
    assert not out.exists()


def test_unreachable_and_foreign_servers(hub: Hub, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    text = failure(DataError, hub, tmp_path / "out", endpoint=closed)
    assert closed in text and "cannot be reached" in text
    hub.fail_status = 503
    assert "answered 503" in failure(DataError, hub, tmp_path / "out")
    hub.fail_status = 200
    assert "does not answer like" in failure(DataError, hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_said_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SPARE_BYTES", shutil.disk_usage(tmp_path).free)
    text = failure(StorageError, hub, tmp_path / "out")
    assert "GB free" in text
    assert hub.gets() == [] and not (tmp_path / "out").exists()


def test_what_is_not_fetched_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / FOLDER).mkdir(parents=True)
    (out / FOLDER / "manifest.json").write_text('{"format": 1, "splits": {}}')
    assert "was built here" in failure(DataError, hub, out)
    (out / FOLDER / "manifest.json").unlink()
    (out / "tokenizers").mkdir()
    (out / "tokenizers" / "fineweb_512_bpe.model").write_bytes(b"mine")
    assert "another tokenizer" in failure(DataError, hub, out)
    assert (out / "tokenizers" / "fineweb_512_bpe.model").read_bytes() == b"mine"
    assert hub.gets() == []
    (tmp_path / "file").write_text("")
    failure(StorageError, hub, tmp_path / "file")


def test_other_layouts(hub: Hub, tmp_path: Path) -> None:
    for name in list(hub.files):
        if "sp512/" in name:
            hub.files["shards/v2/" + name.rpartition("/")[2]] = hub.files.pop(name)
    model = hub.files.pop("tokenizers/fineweb_512_bpe.model")
    hub.files["bpe.model"] = model
    assert "it has: sp5120" in failure(DataError, hub, tmp_path / "out")
    text = failure(DataError, hub, tmp_path / "out", layout=RepoLayout(folder="shards"))
    assert "shards/v2" in text
    layout = RepoLayout(folder="shards/v2/", tokenizer="bpe.model")
    report = get(hub, tmp_path / "out", 1, layout=layout)
    assert report.tokenizer.read_bytes() == model
    assert report.num_train_shards == 1
