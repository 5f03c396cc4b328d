"""Nothing committed is lost when a writer is killed or the power cut at any step, and the next run finishes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import killing
import pytest
import small_caches
from power import Disk, Node, policies

from embedcache import journal
from embedcache.cache import CacheWriter, files, manifest
from embedcache.errors import CacheNotFoundError


def test_killed_at_every_system_call() -> None:
    script = Path(killing.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["first"]["points"] > 60
    assert report["extended"]["points"] > 40
    assert [each["problems"] for each in report.values()] == [[], []]


class PowerCuts:
    """Cuts the power everywhere during some work, and collects what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.problems, self.states = folder, list[str](), 0
        self.acknowledged = 0
        self.policies = policies(2)
        self.seen: set[tuple[int, str]] = set()
        self.left: list[tuple[int, Path, str]] = []

    def cut(self, top: Node) -> None:
        for name, survives in self.policies.items():
            path = self.folder / f"left{self.states}"
            top.write_to(path, survives)
            state = (self.acknowledged, repr(small_caches.files(path)) + repr(sorted(os.listdir(path))))
            if state in self.seen:
                shutil.rmtree(path)
                continue
            self.seen.add(state)
            self.left.append((self.acknowledged, path / "c", f"{name} after {len(self.seen)}"))
            self.states += 1


def power_cuts(folder: Path, monkeypatch: pytest.MonkeyPatch, most: int = 100) -> tuple[int, list[str]]:
    """How many different states power cuts leave while a cache is written and extended, and what is wrong with them."""
    cuts = PowerCuts(folder)
    append, dataset = CacheWriter.append, CacheWriter.commit_dataset

    def acknowledge(real: Callable[..., None]) -> Callable[..., None]:
        def call(self: CacheWriter, *args: object, **options: object) -> None:
            real(self, *args, **options)
            cuts.acknowledged = self._manifest.rows

        return call

    root = folder / "root"
    root.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "append", acknowledge(append))
        patch.setattr(CacheWriter, "commit_dataset", acknowledge(dataset))
        with Disk(root, cuts.cut).followed():
            killing.first(root / "c")
            killing.extended(root / "c")
    wanted = small_caches.files(root / "c")
    problems = []
    monkeypatch.setattr(files, "_TICK", 0)  # nothing changes here behind anybody's back
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for rows, path, when in cuts.left:
        if len(problems) >= most:
            break
        try:
            kept = manifest.read(path).rows
        except CacheNotFoundError:
            kept = 0
        except Exception as error:
            problems.append(f"{when}: {error}")
            continue
        if kept < rows:
            problems.append(f"{when}: {kept} rows are left of {rows}")
        try:
            if killing.whole(path) not in (None, 17, 26):
                problems.append(f"{when}: half a dataset")
            if rows < 17 or not (path / "manifest.json").exists():
                killing.first(path)
            killing.extended(path)
            if {name: data for name, data in small_caches.files(path).items() if "features" in name} != {
                name: data for name, data in wanted.items() if "features" in name
            }:
                problems.append(f"{when}: other shards than without a power cut")
            assert killing.whole(path) == 26
        except Exception as error:
            problems.append(f"{when}: {error}")
    return len(cuts.left), problems


def test_power_cut_at_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, problems = power_cuts(tmp_path, monkeypatch)
    assert states > 60
    assert problems == []


def no_sync_of_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "sync_directory", lambda directory: None)


def no_sync_of_new_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "make_output", lambda path, kind, fresh: path.mkdir(parents=True, exist_ok=True))


def no_sync_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    class Quiet:
        """The module os, but for files that are written."""

        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                os.fsync(descriptor)

    assert sync is not None
    monkeypatch.setattr(journal, "os", Quiet())


def written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_place(path: Path, data: bytes, kind: object = None) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        journal.sync_directory(path.parent)

    monkeypatch.setattr("embedcache.cache.writer.commit", in_place)
    monkeypatch.setattr(manifest, "commit", in_place)


@pytest.mark.parametrize(
    "fault", [no_sync_of_directories, no_sync_of_new_directories, no_sync_of_files, written_in_place]
)
def test_power_cuts_find_a_protocol_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        _, problems = power_cuts(tmp_path, patch, most=1)
    assert problems
