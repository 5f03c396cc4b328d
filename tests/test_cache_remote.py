"""Caches behind URLs: a copy is what was pushed to the byte, and whatever happens to one is told in one line."""

from __future__ import annotations

import errno
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import small_caches
from small_caches import SETS, keys, values, write

import embedcache as ec
from embedcache.cache import CacheWriter, FeatureCache, local_folder, merge, pull, push, verify
from embedcache.cache import fetch as fetching
from embedcache.cache import manifest as manifests
from embedcache.cache.remote import Remote
from embedcache.cli import run
from embedcache.errors import (
    CacheError,
    CacheNotFoundError,
    CorruptCacheError,
    IncompleteCacheError,
    InputError,
    MissingExtraError,
)
from embedcache.journal import lock, url_of
from embedcache.sweep import sweep
from embedcache.train import evaluate_on_cache, train_on_cache

URL = "memory://bucket/reviews.cache"
SYSTEM = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty memory, and a folder for copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    SYSTEM.store.clear()
    yield
    SYSTEM.store.clear()


def behind(name: str) -> str:
    """The path of the one file in the remote cache whose name begins so."""
    (found,) = [path for path in SYSTEM.store if path.startswith(f"/bucket/reviews.cache/{name}")]
    return found


def flip(path: str) -> None:
    """Change one byte of a remote file."""
    data = bytearray(SYSTEM.cat_file(path))
    data[len(data) // 2] ^= 1
    SYSTEM.pipe_file(path, bytes(data))


def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are sent from now on."""
    names: list[str] = []
    put = Remote.put

    def counting(self: Remote, folder: str, file: small_caches.Any, local: Path) -> None:
        names.append(file.name)
        put(self, folder, file, local)

    monkeypatch.setattr(Remote, "put", counting)
    return names


# What is a URL.


def test_urls_and_local_paths() -> None:
    for url in ("s3://b/c", "hf://datasets/u/n@main", "simplecache::gs://b", "file:///tmp/c"):
        assert url_of(url) == url_of(Path(url)) == url
    for path in ("c", "./s3:/b", "/a/s3://b", r"c:\x", "c:/x", "reviews.cache"):
        assert url_of(path) is None


# A cache there and back.


def test_a_pushed_cache_is_opened_by_its_url(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 23, 7)
    moves = push(path, URL)
    assert (moves.files, moves.total) == (5, 5)
    assert list(SYSTEM.store)[-1].endswith("manifest.json")  # the last that was written
    cache = FeatureCache.open(URL)
    assert np.array_equal(cache.features(), np.stack([values(SETS[0], row) for row in range(23)]))
    assert small_caches.files(cache.path) == small_caches.files(path)
    assert cache.path.is_relative_to(tmp_path / "home" / "embedcache" / "remote")
    assert FeatureCache.open(Path(URL)).path == cache.path
    assert verify(URL) == verify(cache.path) == []


def test_a_second_opening_fetches_the_manifest_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(write(tmp_path / "c", 11, 3), URL)
    copy = local_folder(URL)
    monkeypatch.setattr(Remote, "pieces", lambda *_: pytest.fail("a file was fetched again"))
    assert local_folder(URL) == copy
    next((copy / "features").iterdir()).unlink()  # somebody made room
    with pytest.raises(pytest.fail.Exception, match="fetched again"):
        local_folder(URL)


def test_local_files_have_a_protocol_too(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3)
    url = f"file://{tmp_path}/there/c"
    push(path, url)
    assert small_caches.files(tmp_path / "there" / "c") == small_caches.files(path)
    assert small_caches.files(FeatureCache.open(url).path) == small_caches.files(path)


def test_an_extended_cache_sends_and_fetches_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 7, 7)
    push(path, URL)
    first = local_folder(URL)
    pull(URL, tmp_path / "mine")
    write(path, 13, 7)
    names = sent(monkeypatch)
    assert push(path, URL).files == 2  # one shard, one dataset
    assert sorted(name[:6] for name in names) == ["000001", "000001"]
    second = local_folder(URL)
    shard = next((first / "features").iterdir()).name
    assert (second / "features" / shard).samefile(first / "features" / shard)
    assert pull(URL, tmp_path / "mine").files == 2
    assert small_caches.files(tmp_path / "mine") == small_caches.files(path)
    assert (push(path, URL).files, pull(URL, tmp_path / "mine").files) == (0, 0)
    dataset = FeatureCache.open(path).dataset
    with CacheWriter(path, small_caches.SPEC, SETS) as writer:
        writer.commit_dataset(dataset, None, ["0" * 32])  # what a shard that is there tells is no other shard
    assert (push(path, URL).files, pull(URL, tmp_path / "mine").files) == (0, 0)
    assert small_caches.files(tmp_path / "mine") == small_caches.files(path)


def test_a_pulled_cache_can_be_extended(tmp_path: Path) -> None:
    push(write(tmp_path / "c", 7, 7), URL)
    pull(URL, tmp_path / "mine")
    write(tmp_path / "mine", 13, 7)
    assert small_caches.files(tmp_path / "mine") == small_caches.files(write(write(tmp_path / "c", 7, 7), 13, 7))


def test_what_reads_a_cache_takes_a_url(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 60, 31)
    push(path, URL)
    here, there = (train_on_cache(where, "linear") for where in (path, URL))
    assert here.metrics == there.metrics
    assert evaluate_on_cache(there.head, URL, "test") == evaluate_on_cache(here.head, path, "test")
    assert sweep(URL, ["linear"], output_dir=tmp_path / "s", folds=2).summary["chosen"]
    ec.export_features(URL, tmp_path / "out", to="npy", features=["mean"])
    assert merge([URL], tmp_path / "m").n_rows == 60


# The command line.


def test_commands_take_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "c", 60, 31)
    assert run(["push", str(path), URL]) == 0
    assert capsys.readouterr().out.startswith(f"3 of 3 files sent to {URL}, 0.")
    for command in (["info", URL], ["info", URL, "--untrusted"], ["verify", URL], ["verify", URL, "--untrusted"],
                    ["train", URL, "-o", str(tmp_path / "run"), "--head", "linear"],
                    ["evaluate", str(tmp_path / "run"), URL],
                    ["pull", URL, str(tmp_path / "mine")]):  # fmt: skip
        assert run(command) == 0, command
    assert f"0 of 3 files sent to {URL}, 0.0 MB; the others were there" in (
        run(["push", str(path), URL]), capsys.readouterr().out)[1]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["extract", "rows.csv", "-o", URL], ["relabel", URL, "rows.csv"], ["merge", "c", "-o", URL],
        ["import", "x.npy", "-o", URL], ["verify", URL, "--repair"], ["train", "c", "-o", URL],
        ["sweep", "c", "-o", URL, "--head", "linear", "--folds", "2"],
    ],
)  # fmt: skip
def test_commands_that_write_refuse_a_url(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("text,label\nrow 0,a\nrow 1,b\n")
    np.save("x.npy", np.ones((2, 3), np.float32))
    write(tmp_path / "c", 20, 10)
    before = sorted(Path().iterdir())
    assert run(command) == 1
    assert capsys.readouterr().err.startswith(f"error: {URL} is not a local folder")
    assert sorted(Path().iterdir()) == before
    assert not SYSTEM.store


def test_what_is_not_a_url_or_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 5, 3)
    for work in (lambda: push(path, "d"), lambda: pull("d", path)):
        with pytest.raises(InputError, match="d is not a URL: expected one such as s3://"):
            work()
    with pytest.raises(CacheError, match=r"xyz://a cannot be opened .*: use a protocol that fsspec knows"):
        local_folder("xyz://a")
    for name in ("s3fs", "gcsfs", "paramiko"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"package s3fs, .* run pip install 'embedcache\[remote\]'$"):
        local_folder("s3://bucket/c")
    with pytest.raises(MissingExtraError, match=r"package gcsfs, .* run pip install gcsfs$"):
        local_folder("gs://bucket/c")
    with pytest.raises(MissingExtraError, match=r"package paramiko, .* run pip install paramiko$"):
        local_folder("sftp://host/c")


# What goes wrong there.


@pytest.mark.parametrize("file", ["features/000001", "examples/", "manifest.json"])
def test_a_flipped_byte_behind_the_url(tmp_path: Path, file: str) -> None:
    path = write(tmp_path / "c", 11, 3)
    push(path, URL)
    flip(behind(file))
    (problem,) = verify(URL)
    assert URL in problem
    with pytest.raises(CorruptCacheError, match=f"{behind(file)[1:]}.* (not what was committed|damaged|changed after)"):
        FeatureCache.open(URL)
    assert not list((tmp_path / "home").rglob("manifest.json"))
    if file != "manifest.json":  # which may be another's
        assert push(path, URL).files == 1
        assert len(FeatureCache.open(URL)) == 11


def test_a_flipped_byte_in_the_copy(tmp_path: Path) -> None:
    push(write(tmp_path / "c", 11, 3), URL)
    shard = next((local_folder(URL) / "features").iterdir())
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(CorruptCacheError, match=f"sha256 differs.* it is a copy of {URL}: remove it"):
        FeatureCache.open(URL)
    shard.unlink()
    assert len(FeatureCache.open(URL)) == 11


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda path: SYSTEM.rm_file(path), r"000001-.*\.h5 is missing: run embedcache push again"),
        (lambda path: SYSTEM.pipe_file(path, b"half"), r"000001-.*\.h5 has 4 bytes, [\d,]+ were committed: run embed"),
    ],
)
def test_a_shard_that_is_missing_or_half_there(tmp_path: Path, fault: small_caches.Any, told: str) -> None:
    path = write(tmp_path / "c", 11, 3)
    push(path, URL)
    fault(behind("features/000001"))
    with pytest.raises(CorruptCacheError, match=told):
        FeatureCache.open(URL)
    assert not list((tmp_path / "home").rglob("*.h5"))  # told by the listing, before anything is fetched
    assert len(verify(URL)) == 1
    assert push(path, URL).files == 1
    assert len(FeatureCache.open(URL)) == 11


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), FileNotFoundError("404"), NotImplementedError()])
def test_what_may_be_read_need_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    path = write(tmp_path / "c", 11, 3)
    push(path, URL)
    monkeypatch.setattr(type(SYSTEM), "ls", refused)
    assert (len(FeatureCache.open(URL)), verify(URL)) == (11, [])
    push(path, "memory://bucket/other")
    assert len(FeatureCache.open("memory://bucket/other")) == 11
    SYSTEM.rm_file(behind("features/000001"))
    with pytest.raises(CorruptCacheError, match=r"000001-.*\.h5 is missing: run embedcache push again"):
        pull(URL, tmp_path / "mine")


def test_a_server_without_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 11, 3)
    push(path, URL)
    (folder, file), *_ = manifests.read(path).files()

    def refused(stream: io.BytesIO, start: int, whence: int = 0) -> int:
        if start:
            raise ValueError("Cannot seek streaming HTTP file")
        return io.BytesIO.seek(stream, start, whence)

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.seek", refused)
    data = (path / folder / file.name).read_bytes()
    assert b"".join(Remote.at(URL).pieces(folder, file, 1000)) == data[1000:]


def test_no_cache_and_a_manifest_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=f"{URL} is not a feature cache"):
        FeatureCache.open(URL)
    SYSTEM.pipe_file("/bucket/reviews.cache/manifest.json", b'{"name": "a web page"}')
    with pytest.raises(CorruptCacheError, match="not an embedcache manifest"):
        push(write(tmp_path / "c", 5, 3), URL)
    assert SYSTEM.cat_file("/bucket/reviews.cache/manifest.json") == b'{"name": "a web page"}'


def test_a_manifest_of_another_generation(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 7, 7)
    push(path, URL)
    write(path, 13, 7)
    SYSTEM.put_file(str(path / "manifest.json"), "/bucket/reviews.cache/manifest.json")
    with pytest.raises(CorruptCacheError, match=r"000001-.* is missing: run embedcache push again"):
        FeatureCache.open(URL)


def test_a_cache_that_changes_while_it_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 7, 7)
    push(path, URL)
    pieces = Remote.pieces

    def changing(self: Remote, *file: small_caches.Any) -> Iterator[bytes]:
        monkeypatch.setattr(Remote, "pieces", pieces)
        old = behind("examples/")
        push(write(path, 13, 7), URL)
        SYSTEM.rm_file(old)
        return self.pieces(*file)

    monkeypatch.setattr(Remote, "pieces", changing)
    monkeypatch.setattr("embedcache.cache.remote._AT_ONCE", 1)
    with pytest.raises(CacheError, match=f"{URL} was changed while it was being downloaded: run the same command ag"):
        FeatureCache.open(URL)
    assert len(FeatureCache.open(URL)) == 13


@pytest.mark.parametrize("changed", [False, True])
def test_a_download_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    path = write(tmp_path / "c", 23, 7)
    push(path, URL)
    total, pieces, fetched = sum(file.stat().st_size for file in path.rglob("*.h5")), Remote.pieces, [0]

    def slow(self: Remote, *where: small_caches.Any) -> Iterator[bytes]:
        for piece in pieces(self, *where):
            for start in range(0, len(piece), 1000):
                if fetched[0] > total / 2 and dying:
                    raise KeyboardInterrupt
                fetched[0] += len(piece[start : start + 1000])
                yield piece[start : start + 1000]

    monkeypatch.setattr(Remote, "pieces", slow)
    monkeypatch.setattr("embedcache.cache.remote._AT_ONCE", 1)
    dying = True
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.open(URL)
    half = max((tmp_path / "home").rglob("*.tmp"), key=lambda file: file.stat().st_size)
    assert 0 < half.stat().st_size < total / 2
    if changed:  # what a power cut left of it
        half.write_bytes(bytes(half.stat().st_size))
    dying = False
    cache = FeatureCache.open(URL)
    assert small_caches.files(cache.path) == small_caches.files(path)
    assert (fetched[0] == total) is not changed


@pytest.mark.parametrize("sent_before", [0, 2, 4])
def test_an_upload_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent_before: int) -> None:
    path = write(tmp_path / "c", 23, 7)
    monkeypatch.setattr("embedcache.cache.remote._AT_ONCE", 1)
    put, count = Remote.put, [0]

    def dying(self: Remote, folder: str, file: small_caches.Any, local: Path) -> None:
        if count[0] == sent_before:
            SYSTEM.pipe_file(f"/bucket/reviews.cache/{folder}/{file.name}", local.read_bytes()[:100])
            raise KeyboardInterrupt
        count[0] += 1
        put(self, folder, file, local)

    monkeypatch.setattr(Remote, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        push(path, URL)
    with pytest.raises(CacheNotFoundError, match="or run embedcache push again if that was interrupted"):
        FeatureCache.open(URL)
    monkeypatch.setattr(Remote, "put", put)
    assert push(path, URL).files == 5 - sent_before
    assert len(FeatureCache.open(URL)) == 23


def test_a_disk_that_is_full_at_the_end_leaves_the_cache_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    url = f"file://{tmp_path / 'there'}"
    push(write(tmp_path / "c", 7, 7), url)
    before = FeatureCache.open(url).keys()
    longer = write(tmp_path / "c", 13, 7)

    def half(self: Any, path: str, data: bytes, **_: Any) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(LocalFileSystem, "pipe_file", half)
        with pytest.raises(CacheError, match="No space left"):
            push(longer, url)
    assert np.array_equal(FeatureCache.open(url).keys(), before)
    push(longer, url)
    assert len(FeatureCache.open(url).keys()) == 13


def test_a_manifest_that_is_half_there_is_written_again(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3)
    push(path, URL)
    whole = SYSTEM.cat_file(behind("manifest"))
    SYSTEM.pipe_file(behind("manifest"), whole[:300])
    with pytest.raises(CorruptCacheError, match=r"manifest\.json"):
        FeatureCache.open(URL)
    assert push(path, URL).files == 0
    assert SYSTEM.cat_file(behind("manifest")) == whole


# What is pushed, and what is never overwritten.


def test_another_cache_is_kept(tmp_path: Path) -> None:
    push(write(tmp_path / "c", 13, 7), URL)
    before = {name: SYSTEM.cat_file(name) for name in SYSTEM.store}
    older = write(tmp_path / "older", 7, 7)
    for other in (older, write(tmp_path / "d", 13, 5), write(tmp_path / "e", 13, 7, dataset=range(9))):
        with pytest.raises(CacheError, match=f"{URL} holds a cache that is not an earlier state of {other}, and it is"):
            push(other, URL)
    assert {name: SYSTEM.cat_file(name) for name in SYSTEM.store} == before
    with pytest.raises(CacheError, match="holds a cache that is not an earlier state of memory"):
        pull(URL, tmp_path / "d")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    with pytest.raises(CacheError, match=r"is not a feature cache .it holds todo.txt"):
        pull(URL, tmp_path / "notes")
    with pytest.raises(CacheError, match=r"notes is not a feature cache: it holds todo.txt; choose another place"):
        push(older, f"file://{tmp_path / 'notes'}")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["todo.txt"]


def test_damage_is_not_pushed(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 11, 3)
    shard = sorted((path / "features").iterdir())[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptCacheError, match="sha256 differs"):
        push(path, URL)
    assert not [name for name in SYSTEM.store if "manifest" in name]


def test_what_arrives_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "c", 11, 3)
    put = Remote.put

    def flipping(self: Remote, folder: str, file: small_caches.Any, local: Path) -> None:
        put(self, folder, file, local)
        flip(f"/bucket/reviews.cache/{folder}/{file.name}")

    monkeypatch.setattr(Remote, "put", flipping)
    with pytest.raises(CacheError, match="is not what was sent: push again"):
        push(path, URL)
    assert not [name for name in SYSTEM.store if "manifest" in name]
    push(path, URL, read_back=False)  # sizes agree
    assert len(verify(URL)) == 5


def test_an_unfinished_cache_is_not_pushed(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", small_caches.SPEC, SETS) as writer:
        writer.append(keys(range(3)), small_caches.arrays(SETS, range(3)), {})
    with pytest.raises(IncompleteCacheError, match="is not finished: run the same extract command again, then push"):
        push(tmp_path / "c", URL)
    assert not SYSTEM.store


def test_two_openings_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(write(tmp_path / "c", 11, 3), URL)
    waiting, opened = threading.Event(), []
    monkeypatch.setattr(fetching, "warn", lambda notes: waiting.set())
    copy = local_folder(URL)
    data = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").unlink()
    with lock(copy):
        thread = threading.Thread(target=lambda: opened.append(FeatureCache.open(URL)))
        thread.start()
        assert waiting.wait(10)
        monkeypatch.setattr(Remote, "pieces", lambda *_: pytest.fail("a file was fetched again"))
        (copy / "manifest.json").write_bytes(data)
    thread.join(10)
    assert len(opened[0]) == 11


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(write(tmp_path / "c", 11, 3), URL)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small_caches.Any and type("", (), {"free": 1000})())
    with pytest.raises(CacheError, match=r"has 0\.0 GB left, and memory:.* needs 0\.0 GB more"):
        FeatureCache.open(URL)


def test_errors_of_a_file_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClientError(Exception):
        """As botocore's, which is no ``OSError``."""

    def failing(*_: object, **__: object) -> None:
        raise ClientError("the request is signed with another key\nsecond line")

    monkeypatch.setattr(type(SYSTEM), "_open", failing)
    with pytest.raises(CacheError, match=f"^cannot read {URL}: the request is signed with another key$"):
        FeatureCache.open(URL)
    monkeypatch.undo()
    monkeypatch.setattr(type(SYSTEM), "put_file", failing)
    with pytest.raises(CacheError, match=rf"^cannot write {URL}/\w+/.*: the request is signed with another key$"):
        push(write(tmp_path / "c", 5, 3), URL)
