"""Writing a cache: one writer, nothing committed is lost, nothing wrong is committed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_caches
from small_caches import SETS, SPEC, arrays, keys, write

from embedcache import journal
from embedcache.cache import CacheWriter, FeatureCache, known_rows, manifest, read_spec, writer
from embedcache.dataset import Dataset
from embedcache.errors import (
    CacheError,
    CacheLockedError,
    CorruptCacheError,
    FeatureError,
    InputError,
    SpecError,
    SpecMismatchError,
)
from embedcache.features import Stored
from embedcache.fingerprint import hash_json
from embedcache.shard import FeatureSet
from embedcache.spec import ExtractionSpec

POOLED = SETS[:1]


def files(path: Path) -> dict[str, bytes]:
    return small_caches.files(path)


# The same files, however they came to be.


def test_two_sittings_give_the_same_bytes(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", 23, 7)
    write(tmp_path / "two", 14, 7)
    write(tmp_path / "two", 23, 7)
    one, two = files(whole), files(tmp_path / "two")
    assert {name: data for name, data in one.items() if name.startswith("features")} == {
        name: data for name, data in two.items() if name.startswith("features")
    }
    assert manifest.read(tmp_path / "two").generation == 2
    assert next(name for name in two if name.startswith("examples")).startswith("examples/000001-")


def test_writing_the_same_dataset_again_changes_no_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 23, 7)
    before = {name: (path / name).stat().st_mtime_ns for name in files(path)}
    write(path, 23, 7)
    assert {name: (path / name).stat().st_mtime_ns for name in files(path)} == before


def test_a_small_dataset_grows_by_far(tmp_path: Path) -> None:
    write(tmp_path / "c", 2, 2, POOLED)
    assert FeatureCache.open(write(tmp_path / "c", 3001, 3001, POOLED)).n_rows == 3001


def test_another_dataset_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3)
    before = files(path)
    write(path, 5, 3, class_names=("x", "y", "z"))
    after = files(path)
    assert FeatureCache.open(path).class_names == ("x", "y", "z")
    assert sum(name.startswith("examples") for name in after) == 1
    assert [name for name in before if name not in after] == [name for name in before if name.startswith("examples")]


@pytest.mark.parametrize("hurt", ["remove", "damage"])
def test_a_dataset_that_was_damaged_is_written_again(tmp_path: Path, hurt: str) -> None:
    path = write(tmp_path / "c", 5, 3)
    (file,) = (path / "examples").iterdir()
    if hurt == "remove":
        file.unlink()
    else:
        file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(CorruptCacheError):
        FeatureCache.open(path)
    write(path, 5, 3)
    assert FeatureCache.open(path).verify() == []


def test_a_damaged_shard_stops_the_writer(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3)
    file = sorted((path / "features").iterdir())[0]
    file.write_bytes(b"?" * file.stat().st_size)
    before = files(path)
    with pytest.raises(CorruptCacheError, match="is not what was committed"):
        write(path, 8, 3)
    assert files(path) == before


# What is refused.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "query: "}, "prompt: cache has None, asked for 'query: '"),
        ({"prompt": ...}, "prompt: cache has None, asked for nothing"),
        ({"revision": None}, "revision: cache has nothing, asked for None"),
        ({"revision": "main"}, "revision: cache has nothing, asked for 'main'"),
        (
            {"backbone": {"weights": {}}},
            "backbone.architecture: cache has 'None', asked for nothing; backbone.weights.mod",
        ),
    ],
)
def test_another_spec_is_refused_field_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    before = files(path)
    other = {name: value for name, value in {**SPEC, **change}.items() if value is not ...}
    for attempt in (
        lambda: write(path, 8, 3, POOLED, spec=other),
        lambda: known_rows(path, other, POOLED, keys(range(3))),
    ):
        with pytest.raises(SpecMismatchError) as caught:
            attempt()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert caught.value.differences[0][0] == said.split(":")[0]
    assert files(path) == before


@pytest.mark.parametrize(
    "sets",
    [
        (FeatureSet("mean", "pooled", 7, 1, "float32"),),
        (FeatureSet("mean", "pooled", 5, 1, "float16"),),
        (FeatureSet("max", "pooled", 5, 1, "float32"),),
        (FeatureSet("mean", "layers", 5, 1, "float32"),),
        SETS[:2],
    ],
)
def test_other_feature_sets_are_refused(tmp_path: Path, sets: tuple[FeatureSet, ...]) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    with pytest.raises(SpecMismatchError, match="feature_sets"):
        write(path, 8, 3, sets)


def test_before_the_first_row_another_spec_may_take_over(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", {"first": True}, SETS[1:2]):
        pass
    write(tmp_path / "c", 3, 3, POOLED)
    assert FeatureCache.open(tmp_path / "c").spec == SPEC


def test_sets_that_collide_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="both be stored as row_key"):
        CacheWriter(tmp_path / "c", SPEC, [FeatureSet("row_key", "pooled", 5, 1, "float32")])
    with pytest.raises(SpecError, match="there is no feature set"):
        CacheWriter(tmp_path / "c", SPEC, [])
    assert not (tmp_path / "c").exists()


def put(array: np.ndarray, where: Any, value: Any) -> np.ndarray:
    """A copy of an array with other values somewhere."""
    array = array.copy()
    array[where] = value
    return array


def other(name: str, **changes: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Stored]], dict[str, Stored]]:
    """A change of the ``values`` or ``offsets`` of one set."""
    return lambda a: (
        a | {name: replace(a[name], **{field: change(getattr(a[name], field)) for field, change in changes.items()})}
    )


WRONG_ARRAYS: dict[str, Callable[[dict[str, Stored]], dict[str, Stored]]] = {
    "a set is missing": lambda a: {name: stored for name, stored in a.items() if name != "cls"},
    "one too many": lambda a: a | dict(more=a["mean"]),
    "of another type": lambda a: a | dict(mean=Stored(replace(a["mean"].feature, dtype="float16"), a["cls"].values)),
    "under another name": lambda a: a | dict(mean=a["cls"], cls=a["mean"]),
    "other type": other("mean", values=lambda v: v.astype(np.float64)),
    "other byte order": other("mean", values=lambda v: v.astype(">f4")),
    "other width": other("mean", values=lambda v: v[:, :-1]),
    "other rows": other("mean", values=lambda v: v[:-1]),
    "other axes": other("mean@1+2", values=lambda v: v.transpose(0, 2, 1)),
    "not a number": other("mean", values=lambda v: put(v, (3, 2), np.nan)),
    "infinite": other("cls", values=lambda v: put(v, (3, 2), np.inf)),
    "infinite bfloat16": other("l2:mean", values=lambda v: put(v, (3, 2), 0x7F80)),
    "negative NaN in bfloat16": other("tokens@-2", values=lambda v: put(v, (3, 2), 0xFFC0)),
    "no offsets": other("tokens", offsets=lambda o: None),
    "empty offsets": other("tokens", offsets=lambda o: o[:0]),
    "offsets of another type": other("tokens", offsets=lambda o: o.astype(np.int32)),
    "offsets that fall": other("tokens", offsets=lambda o: put(o, 2, 99)),
    "offsets that start late": other("tokens", offsets=lambda o: put(o, 0, 1)),
    "offsets that end early": other("tokens", offsets=lambda o: put(o, -1, 0)),
    "offsets that wrap around": other("tokens", offsets=lambda o: put(o, slice(1, 4), [2**63 - 1, -(2**63), -1])),
    "offsets for a pooled set": lambda a: a | dict(mean=replace(a["mean"], offsets=a["tokens"].offsets)),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_arrays_that_do_not_fit_write_nothing(tmp_path: Path, wrong: str) -> None:
    given = arrays(SETS, range(7))
    with CacheWriter(tmp_path / "c", SPEC, SETS) as open_writer:
        before = files(tmp_path / "c")
        with pytest.raises(FeatureError) as caught:
            open_writer.append(keys(range(7)), WRONG_ARRAYS[wrong](given), {})
        assert "\n" not in str(caught.value)
        assert files(tmp_path / "c") == before
        open_writer.append(keys(range(7)), arrays(SETS, range(7)), {})  # and the writer is as good as before


@pytest.mark.parametrize("wrong", [keys(range(7))[:, :15], keys(range(7)).astype(np.int64), keys(range(7)).ravel()])
def test_keys_that_do_not_fit_write_nothing(tmp_path: Path, wrong: np.ndarray) -> None:
    with CacheWriter(tmp_path / "c", SPEC, POOLED) as open_writer, pytest.raises(FeatureError, match="row_key"):
        open_writer.append(wrong, arrays(POOLED, range(len(wrong))), {})


def test_the_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    given = arrays(SETS, range(7))
    given["tokens"].values[given["tokens"].offsets[4]] = np.inf
    with (
        CacheWriter(tmp_path / "c", SPEC, SETS) as open_writer,
        pytest.raises(FeatureError, match="tokens: row 4 holds"),
    ):
        open_writer.append(keys(range(7)), given, {})


def test_provenance_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "c", SPEC, POOLED) as open_writer:
        before = files(tmp_path / "c")
        with pytest.raises((ValueError, TypeError)):
            open_writer.append(keys(range(3)), arrays(POOLED, range(3)), {"speed": float("nan")})
        assert files(tmp_path / "c") == before


TWO = ("x", "y")
WRONG_COLUMNS: list[tuple[dict[str, Any], str]] = [
    ({"split": np.array([0, 1, 2])}, "column split holds 0 to 2, expected at least 0 and below 2"),
    ({"split": np.array([0, 1, 256])}, "column split does not fit into uint8"),
    ({"split": np.array([0, 1, -1])}, "column split does not fit into uint8"),
    ({"split": np.array([0, 1], np.uint8)}, "column split has length 2, expected 3"),
    ({"targets": np.array([0, 1, 3])}, "column target holds 0 to 3"),
    ({"targets": np.array([0, 1, -2])}, "column target holds -2 to 1"),
    ({"targets": np.array([0, 1, 0.5])}, "column target does not fit into int64"),
    ({"targets": np.array([0, 1])}, "column target has length 2"),
    ({"targets": np.zeros((3, 2))}, "targets of shape (3, 2) do not fit the task classification"),
    ({"task": "multilabel", "targets": np.array([0, 1, 1]), "class_names": TWO}, "do not fit the task multilabel"),
    ({"task": "multilabel", "targets": np.zeros((3, 3)), "class_names": TWO}, "there are 3 targets and 2 names"),
    ({"task": "multilabel", "targets": np.full((3, 2), 2), "class_names": TWO}, "other than 0, 1 and 255"),
    ({"task": "regression", "targets": np.full((3, 2), -np.inf), "class_names": TWO}, "holds infinity"),
    ({"class_names": ("a", "a", "b")}, "two classes have the same name: a, a, b"),
    ({"split_names": ("train", "train")}, "two splits have the same name"),
    ({"ids": (np.zeros(3, np.uint8), np.array([0, 1, 3]))}, "column id has length 2, expected 3"),
    ({"ids": (np.zeros(3, np.uint8), np.array([0, 1, 2, 2]))}, "id.offsets do not rise from 0 to 3"),
    ({"inputs": (np.zeros(3, np.uint8), np.array([0, 1, 3]))}, "column input has length 2, expected 3"),
    ({"inputs": (np.zeros(3, np.uint8), np.array([0, 2, 1, 3]))}, "input.offsets do not rise from 0 to 3"),
    ({"numbers": np.array([0, 2, 5]), "whole_rows": 5}, "column number holds 0 to 5, expected at least 0 and below 5"),
    ({"numbers": np.array([0, 2, 2]), "whole_rows": 5}, "column number does not rise"),
]


@pytest.mark.parametrize(("columns", "said"), WRONG_COLUMNS, ids=[said for _, said in WRONG_COLUMNS])
def test_datasets_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "c", 3, 3, POOLED)
    before = files(path)
    with pytest.raises(InputError) as caught:
        write(path, 3, 3, POOLED, **columns)
    assert said in str(caught.value)
    assert files(path) == before


def test_a_dataset_of_rows_that_are_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 4 rows are not in .* \(the first is row 1\): extract them first"):
        write(tmp_path / "c", 3, 3, POOLED, dataset=[0, 7, 2, 5])


def test_an_empty_dataset_and_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 3, 3, POOLED, dataset=[])
    cache = FeatureCache.open(path)
    assert cache.arrays()[0].shape == (0, 5)
    assert cache.ids() == []
    empty = FeatureCache.open(write(tmp_path / "none", 0, 3))
    assert empty.features().shape == (0, 5)
    assert len(empty.ragged()) == 0
    assert empty.n_stored == 0


# Where it is written.


def test_only_an_empty_directory_becomes_a_cache(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", 3, 3, POOLED)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(CacheError, match=r"exists and is not a feature cache \(it holds thesis.tex\): choose a new"):
        write(tmp_path / "full", 3, 3, POOLED)
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="is a file: choose"):
        write(tmp_path / "file", 3, 3, POOLED)
    with pytest.raises(CacheError, match="a part of the path is a file"):
        write(tmp_path / "file" / "c", 3, 3, POOLED)


def test_shards_without_a_manifest_are_not_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    (path / "manifest.json").unlink()
    before = files(path)
    with pytest.raises(CacheError, match=r"holds .* but no manifest\.json: restore that from a copy"):
        write(path, 5, 3, POOLED)
    assert files(path) == before


def test_new_directories_are_made_durable_in_those_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(journal, "sync_directory", synced.append)
    above = {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    write(tmp_path / "a" / "b" / "c", 3, 3, POOLED)
    assert above <= set(synced)
    synced.clear()
    write(tmp_path / "a" / "b" / "c", 5, 3, POOLED)
    assert not above & set(synced)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CacheError, match="permission denied: change its permissions, or choose another place"):
        write(tmp_path / "locked" / "c", 3, 3, POOLED)


@pytest.mark.parametrize(("number", "said"), [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only")])
def test_an_unwritable_place_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(CacheError, match=said):
        write(tmp_path / "c", 3, 3, POOLED)


def test_a_newer_minor_version_is_read_but_not_written(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 3, 3, POOLED)
    body = {**FeatureCache.open(path).manifest, "version": "1.9"}
    body["manifest_hash"] = hash_json({name: value for name, value in body.items() if name != "manifest_hash"})
    (path / manifest.NAME).write_bytes(manifest.encoded(body))
    assert FeatureCache.open(path).n_rows == 3
    with pytest.raises(CacheError, match=r"was written in format 1\.9: upgrade embedcache to write to it"):
        write(path, 5, 3, POOLED)


# What is left over.


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    left = [
        path / "features" / f"000002-{'0' * 16}.h5",
        path / "features" / f".000002-{'0' * 16}.h5.123.tmp",
        path / "examples" / f"000007-{'0' * 16}.h5",
        path / ".manifest.json.123.tmp",
    ]
    kept = [
        path / "features" / f"000007-{'0' * 16}.h5",  # of a better manifest, perhaps
        path / "features" / "notes.txt",
        path / "README",
    ]
    for file in left + kept:
        file.write_text("x")
    assert len(FeatureCache.open(path).verify()) == 7
    with CacheWriter(path, SPEC, POOLED):
        pass
    assert [file.exists() for file in left] == [False] * 4
    assert [file.exists() for file in kept] == [True] * 3
    assert [line.split(" is left over")[0] for line in FeatureCache.open(path).verify()] == sorted(map(str, kept))


# Failing disks.


class Disk:
    """Makes the n-th call of one system function fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, at: int, number: int) -> None:
        self.calls, real = 0, getattr(os, name)

        def call(*args: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise OSError(number, os.strerror(number))
            return real(*args)

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(("name", "number"), [("write", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EIO)])
def test_after_a_failing_disk_the_same_call_goes_on(tmp_path: Path, name: str, number: int) -> None:
    whole = files(write(tmp_path / "whole", 11, 3))
    before = 0
    for at in range(1, 100):
        path = tmp_path / f"{name}{at}"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, name, at, number)
            try:
                write(path, 11, 3)
            except CacheError:
                assert disk.calls == at, "after a failure nothing more is written"
            else:
                assert disk.calls < at
                break
        kept = manifest.read(path).rows if (path / "manifest.json").exists() else 0
        assert kept >= before, "what was committed before is kept"
        before = kept
        write(path, 11, 3)
        assert files(path) == whole
    assert at > 6


def test_a_disk_that_is_really_full_and_then_has_room_again(tmp_path: Path) -> None:
    whole = files(write(tmp_path / "whole", 23, 3))
    with small_caches.tiny_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(CacheError, match="the disk is full: free some space and run the same command again"):
            write(disk / "c", 23, 3)
        kept = manifest.read(disk / "c").rows
        assert 0 < kept < 23
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        write(disk / "c", 23, 3)
        assert files(disk / "c") == whole


def test_after_a_failure_the_writer_is_no_longer_to_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheWriter(tmp_path / "c", SPEC, POOLED) as open_writer:
        with monkeypatch.context() as patch:
            Disk(patch, "fsync", 1, errno.EIO)
            with pytest.raises(CacheError, match="the disk reports an error"):
                open_writer.append(keys(range(3)), arrays(POOLED, range(3)), {})
        with pytest.raises(CacheError, match="failed before: run the same command again; what was committed is kept"):
            open_writer.append(keys(range(3)), arrays(POOLED, range(3)), {})
        with pytest.raises(CacheError, match="failed before"):
            open_writer.commit_dataset(Dataset(keys=keys([]), split=np.zeros(0, np.uint8), split_names=()))


def test_a_writer_is_used_in_a_with_block(tmp_path: Path) -> None:
    closed = CacheWriter(tmp_path / "c", SPEC, POOLED)
    with pytest.raises(CacheError, match="is not open for writing"):
        closed.append(keys(range(3)), arrays(POOLED, range(3)), {})
    with closed:
        pass
    with pytest.raises(CacheError, match="is not open for writing"):
        closed.append(keys(range(3)), arrays(POOLED, range(3)), {})


# One writer at a time.


def test_a_second_writer_is_refused_at_once_while_readers_go_on(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 5, 3, POOLED)
    code = (
        "import sys; from embedcache.cache import CacheWriter, FeatureCache; from small_caches import *\n"
        "print(len(FeatureCache.open(sys.argv[1]).features()))\n"
        "try:\n    CacheWriter(sys.argv[1], SPEC, SETS[:1]).__enter__()\n"
        "except BlockingIOError as error:\n    print(error)\n"
    )

    def other() -> list[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,  # who waits for the lock waits for ever: it is held until this process has ended
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONPATH": str(Path(writer.__file__).parents[2])},
        ).stdout.splitlines()

    with CacheWriter(path, SPEC, POOLED) as first:
        assert other() == ["5", f"another process is writing to {path}: wait for it, or stop it"]
        with pytest.raises(CacheLockedError, match="another process is writing"):
            CacheWriter(path, SPEC, POOLED).__enter__()
        first.append(keys(range(5, 8)), arrays(POOLED, range(5, 8)), {})
    write(path, 8, 3, POOLED)
    assert other() == ["8"], "and afterwards the lock is free"
    assert sorted(os.listdir(path)) == ["examples", "features", "manifest.json"]


def test_where_directories_cannot_be_locked_a_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = journal.fcntl.flock

    def only_files(descriptor: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "not open for writing")
        real(descriptor, how)

    monkeypatch.setattr(journal.fcntl, "flock", only_files)
    with CacheWriter(tmp_path / "c", SPEC, POOLED):
        assert (tmp_path / "c" / ".lock").exists()
        with pytest.raises(CacheLockedError):
            CacheWriter(tmp_path / "c", SPEC, POOLED).__enter__()
    assert not (tmp_path / "c" / ".lock").exists()
    write(tmp_path / "c", 3, 3, POOLED)


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal.fcntl, "flock", never)
    with pytest.raises(CacheError, match=r"cannot lock .*: No locks available"):
        CacheWriter(tmp_path / "c", SPEC, POOLED).__enter__()
    monkeypatch.setattr(journal, "fcntl", None)
    with pytest.raises(CacheError, match="needs a POSIX system"):
        CacheWriter(tmp_path / "c", SPEC, POOLED).__enter__()


# Looking without writing.


def test_known_rows_and_the_spec_are_read_without_a_lock(tmp_path: Path) -> None:
    assert known_rows(None, SPEC, POOLED, keys(range(3))).tolist() == [-1, -1, -1]
    assert known_rows(tmp_path / "none", SPEC, POOLED, keys(range(3))).tolist() == [-1, -1, -1]
    assert read_spec(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    path = write(tmp_path / "c", 5, 3, POOLED)
    before = files(path)
    with CacheWriter(path, SPEC, POOLED):
        assert known_rows(path, SPEC, POOLED, keys([4, 9, 0])).tolist() == [4, -1, 0]
        assert read_spec(path) == (ExtractionSpec(SPEC), {"device": "none", "shard": 3})
    assert files(path) == before
