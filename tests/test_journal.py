"""Durable writes: a commit is all or nothing, a journal only grows, and nothing is written through a link."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_caches import tiny_disk

from embedcache import journal
from embedcache.errors import CacheError, CacheLockedError, SweepError
from embedcache.journal import (
    Journal,
    append,
    commit,
    explain,
    make_folder,
    recover,
    refuse_foreign,
    replacing,
    writing,
)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, **instead: Callable[..., Any]) -> Iterator[list[str]]:
    """Note the system calls of a commit in their order; ``instead`` replaces some."""
    calls: list[str] = []
    kinds: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "replace", "unlink")}

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name == "open":
                descriptor = real["open"](*args)
                exclusive = os.O_CREAT | os.O_EXCL
                kinds[descriptor] = "file" if args[1] & exclusive == exclusive else "directory"
                calls.append(f"open {kinds[descriptor]}")
                return descriptor
            what = kinds.get(args[0], "") if isinstance(args[0], int) else ""
            calls.append(f"{name} {what}".strip())
            return instead.get(name, real[name])(*args)

        return call

    with monkeypatch.context() as patched:
        for name in real:
            patched.setattr(os, name, spy(name))
        yield calls


def fails(number: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def test_the_steps_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as calls:
        commit(tmp_path / "f", b"data")
    assert calls == [
        "open file",
        "write file",
        "fsync file",
        "close file",
        "replace",
        "open directory",
        "fsync directory",
        "close directory",
    ]
    assert (tmp_path / "f").read_bytes() == b"data"
    assert os.listdir(tmp_path) == ["f"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with recorded(monkeypatch, write=lambda descriptor, data: write(descriptor, data[:3])) as calls:
        commit(tmp_path / "f", bytes(range(10)))
    assert calls.count("write file") == 4
    assert (tmp_path / "f").read_bytes() == bytes(range(10))


@pytest.mark.parametrize("step", ["write", "fsync", "close", "replace"])
@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "the disk is full: free some space"), (errno.EIO, "error")]
)
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, said: str
) -> None:
    commit(tmp_path / "f", b"old")
    with recorded(monkeypatch, **{step: fails(number)}) as calls, pytest.raises(CacheError, match=said) as caught:
        commit(tmp_path / "f", b"new")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "f") in str(caught.value)
    assert sum(call.startswith(step) for call in calls) == 1, "nothing is tried twice"
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"], "the temporary is removed"


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, room = os.write, [5]

    def until_full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        done = write(descriptor, data[: room[0]])
        room[0] -= done
        return done

    with recorded(monkeypatch, write=until_full), pytest.raises(CacheError, match="the disk is full"):
        commit(tmp_path / "f", b"more than five bytes")
    assert os.listdir(tmp_path) == []


def test_a_directory_whose_fsync_fails_is_an_error_unless_there_is_no_such_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def on_directories(number: int) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        return call

    with (
        recorded(monkeypatch, fsync=on_directories(errno.EIO)) as calls,
        pytest.raises(CacheError, match="disk reports"),
    ):
        commit(tmp_path / "f", b"data")
    assert calls.count("fsync directory") == 1
    with recorded(monkeypatch, fsync=on_directories(errno.EINVAL)):
        commit(tmp_path / "g", b"data")


def test_a_link_in_place_of_the_temporary_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / f".f.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(CacheError, match="File exists"):
        commit(tmp_path / "f", b"data")
    assert (tmp_path / f".f.{'0' * 16}.tmp").is_symlink(), "what is not ours is not removed"
    assert victim.read_bytes() == b"precious"


def test_a_link_in_place_of_the_file_is_replaced(tmp_path: Path) -> None:
    for plant in (Path.symlink_to, Path.hardlink_to):
        victim = tmp_path / "victim"
        victim.write_bytes(b"precious")
        plant(tmp_path / "f", victim)
        commit(tmp_path / "f", b"data")
        assert victim.read_bytes() == b"precious"
        assert (tmp_path / "f").read_bytes() == b"data"
        (tmp_path / "f").unlink()


def test_what_the_block_raises_is_its_own(tmp_path: Path) -> None:
    def half(error: BaseException) -> None:
        with replacing(tmp_path / "f") as file:
            file.write(b"half")
            raise error

    for error in (OSError(errno.ENOSPC, "of another file"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            half(error)
        assert caught.value is error
        assert os.listdir(tmp_path) == []


# Journals.


def test_a_journal_grows_and_half_a_line_is_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "j"
    assert recover(file) == (b"", False)
    append(file, b"1\n")
    append(file, b"2\n3")
    assert recover(file) == (b"1\n2\n", True)
    append(file, b"4\n")
    assert recover(file) == (b"1\n2\n4\n", False)
    assert os.listdir(tmp_path) == ["j"]


def test_the_name_of_a_new_journal_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(journal, "sync_directory", synced.append)
    append(tmp_path / "j", b"1\n")
    append(tmp_path / "j", b"2\n")
    assert synced == [tmp_path]


def test_a_journal_that_is_a_link_is_refused_and_one_with_two_names_copied(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"1\nhalf")
    for name in ("missing", "victim"):
        (tmp_path / "j").symlink_to(tmp_path / name)
        for write in (lambda: append(tmp_path / "j", b"2\n", SweepError), lambda: recover(tmp_path / "j", SweepError)):
            with pytest.raises(SweepError, match=r"j: a link or a special file stands there, .*: remove it"):
                write()
        (tmp_path / "j").unlink()
    os.mkfifo(tmp_path / "j")
    with pytest.raises(CacheError, match="special file"):
        append(tmp_path / "j", b"2\n")
    with pytest.raises(CacheError, match="special file"):
        recover(tmp_path / "j")
    (tmp_path / "j").unlink()
    (tmp_path / "j").hardlink_to(victim)
    with pytest.raises(CacheError, match="a link"):
        append(tmp_path / "j", b"2\n")
    assert recover(tmp_path / "j") == (b"1\n", True)
    append(tmp_path / "j", b"2\n")
    assert victim.read_bytes() == b"1\nhalf"
    assert sorted(os.listdir(tmp_path)) == ["j", "victim"]


def numbers(path: Path) -> Journal[int]:
    return Journal(path, int, str, SweepError, "it is counted again")


@given(kept=st.lists(st.integers(), min_size=1, max_size=7), cut=st.integers(0, 19))
def test_records_survive_a_crash_that_cuts_the_last_line(kept: list[int], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        records = numbers(Path(folder) / "j")
        assert (records.read(), records.recover()) == ([], ([], False))
        records.append(kept)
        last = f"{kept[-1]}\n".encode()
        cut = min(cut, len(last))
        whole = records.path.read_bytes()
        records.path.write_bytes(whole[: len(whole) - cut])
        left = kept[:-1] if cut else kept
        assert records.read() == left
        assert records.recover() == (left, 0 < cut < len(last))
        records.append(kept[len(left) :])
        assert records.read() == kept
        assert records.path.read_bytes() == whole


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    records = numbers(tmp_path / "j")
    records.append([2, 3, 5])
    records.path.write_bytes(b"2\nthree\n5\n")
    for read in (records.read, records.recover):
        with pytest.raises(SweepError, match=r"j, line 2 is damaged \(.*\): delete that line, and it is counted again"):
            read()
    assert records.path.read_bytes() == b"2\nthree\n5\n"


def test_one_writer_makes_a_folder_and_tidies_it_up(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with writing(path, SweepError, parts=["part"], fresh=True):
        assert (path / "part").is_dir()
        (path / "part" / ".left.0123456789abcdef.tmp").touch()
        (path / ".left.0123456789abcdef.tmp").touch()
        with pytest.raises(CacheLockedError), writing(path, SweepError, fresh=False):
            pass
        assert (path / ".left.0123456789abcdef.tmp").exists(), "only the one who has the lock removes anything"
    with writing(path, SweepError, parts=["part"], fresh=False):
        assert sorted(each.name for each in path.rglob("*")) == ["part"]
    with pytest.raises(ZeroDivisionError), writing(path, SweepError, fresh=False):
        raise ZeroDivisionError
    with writing(path, SweepError, fresh=False):  # the lock was given back
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        refuse_foreign(path, "a sweep", "sweep.json", ["parts"], SweepError)

    refuse(tmp_path / "free")
    refuse(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".sweep.json.0123456789abcdef.tmp").touch()
    refuse(tmp_path)  # of a process that was killed at its start
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SweepError, match=r"is not a sweep \(it holds thesis.tex\): choose a new or an empty directory"):
        refuse(tmp_path)
    with pytest.raises(SweepError, match=r"is a file: choose"):
        refuse(tmp_path / "thesis.tex")
    (tmp_path / "sweep.json").touch()
    refuse(tmp_path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"cannot make .*link: a link"):
        make_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="a part of the path is a file"):
        make_folder(tmp_path / "file")
    make_folder(tmp_path / "made")
    make_folder(tmp_path / "made")
    assert (tmp_path / "made").is_dir()


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="a part of the path is a file"):
        commit(tmp_path / "file" / "f", b"data")


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from embedcache.journal import commit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "commit(Path(sys.argv[1]), bytes(4096))\n"
        "try:\n    commit(Path(sys.argv[1]), bytes(4097))\nexcept OSError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], capture_output=True, text=True, check=True)
    assert "larger than this file system or its limit allows" in done.stdout
    assert (tmp_path / "f").read_bytes() == bytes(4096)
    assert os.listdir(tmp_path) == ["f"]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", "256k") as disk:
        commit(disk / "f", bytes(200_000))
        with pytest.raises(CacheError, match="the disk is full"):
            commit(disk / "f", bytes(200_001))
        assert (disk / "f").read_bytes() == bytes(200_000)
        assert os.listdir(disk) == ["f"]


def test_every_error_is_explained_in_one_line() -> None:
    for number in errno.errorcode:
        said = explain(OSError(number, os.strerror(number)))
        assert said
        assert "\n" not in said
