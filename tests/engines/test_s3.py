"""A cache in S3, against a local server: pushed, opened, damaged there, and both ways killed half-way.

Needs s3fs, and moto with its server: ``make engines``. Not a part of the suite, as it starts a server and processes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_caches
from small_caches import write

from embedcache.cache import FeatureCache, pull, push, verify
from embedcache.cache.manifest import read
from embedcache.cli import run
from embedcache.errors import CacheError, CacheNotFoundError, CorruptCacheError
from embedcache.shard import FeatureSet

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("ignore")  # of botocore's and werkzeug's own

URL = "s3://bucket/team/reviews.cache"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A server on this machine."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def s3(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, found by what s3fs reads from the environment."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)


def remote_file(s3: Any, name: str) -> str:
    s3.invalidate_cache()
    (found,) = [path for path in s3.find("bucket") if f"reviews.cache/{name}" in path]
    return str(found)


def test_there_and_back(s3: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c", 60, 7)
    assert push(path, URL).files == 10
    assert small_caches.files(FeatureCache.open(URL).path) == small_caches.files(path)
    assert verify(URL) == []
    assert push(path, URL).files == 0
    assert run(["train", URL, "-o", str(tmp_path / "run")]) == 0
    assert run(["evaluate", str(tmp_path / "run"), URL]) == 0
    write(path, 73, 7)
    assert push(path, URL).files == 3
    pull(URL, tmp_path / "mine")
    assert small_caches.files(tmp_path / "mine") == small_caches.files(path)


def test_damage_there(s3: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "c", 23, 7)
    push(path, URL)
    shard = remote_file(s3, "features/000001")
    data = bytearray(s3.cat_file(shard))
    data[len(data) // 2] ^= 1
    s3.pipe_file(shard, bytes(data))
    with pytest.raises(CorruptCacheError, match=r"s3://bucket/.*000001.* is not what was committed: run embedcache pu"):
        FeatureCache.open(URL)
    assert len(verify(URL)) == 1
    s3.rm_file(shard)
    with pytest.raises(CorruptCacheError, match=r"000001-.*is missing: run embedcache push again"):
        FeatureCache.open(URL)
    assert push(path, URL).files == 1
    former = (path / "manifest.json").read_bytes()
    push(write(path, 37, 7), URL)
    s3.pipe_file("bucket/team/reviews.cache/manifest.json", former)  # whose files all are there, as they are kept
    assert len(FeatureCache.open(URL)) == 23
    s3.rm_file(remote_file(s3, "examples/000000"))
    assert len(FeatureCache.open(URL)) == 23  # the copy is whole
    with pytest.raises(CorruptCacheError, match=r"examples/000000-.*is missing"):
        pull(URL, tmp_path / "mine")


def test_what_is_not_there_or_not_allowed(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 5, 3)
    with pytest.raises(CacheNotFoundError, match="it has no manifest"):
        FeatureCache.open(URL)
    with pytest.raises(CacheError, match=r"^cannot write s3://no-such-bucket/c/.*: .*bucket"):
        push(path, "s3://no-such-bucket/c")
    assert not s3.exists("no-such-bucket")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CacheError, match=r"^cannot (read|write) s3://bucket/team/reviews.cache.*: .*[Cc]redentials"):
        push(path, URL)


WIDE = (FeatureSet("mean", "pooled", 1 << 18, 1, "float32"),)  # 1 MB a row


@pytest.mark.parametrize("command", ["push", "pull"])
def test_killed_half_way(s3: Any, tmp_path: Path, command: str) -> None:
    """SIGKILL, time and again until a run comes through: what is then there is whole, and nothing was before."""
    path = write(tmp_path / "c", 96, 4, WIDE)
    total = sum(file.bytes for _, file in read(path).files())
    mine = tmp_path / "mine"
    if command == "pull":
        push(path, URL)
    arguments = ["push", str(path), URL] if command == "push" else ["pull", URL, str(mine)]
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-m", "embedcache", *arguments], stdout=subprocess.DEVNULL)

        def moved() -> int:
            if command == "push":
                s3.invalidate_cache()
                return sum(file["size"] for file in s3.find("bucket", detail=True).values())
            return sum(file.stat().st_size for file in mine.rglob("*.[ht]*5") if file.is_file())

        start = moved()
        while process.poll() is None and moved() < start + total / 4:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert not (mine / "manifest.json").exists()
        if command == "push":
            with pytest.raises(CacheNotFoundError):
                FeatureCache.open(URL)
    assert kills >= 2
    assert small_caches.files(FeatureCache.open(URL).path if command == "push" else mine) == small_caches.files(path)
