"""The files of a cache: hashed once in a process, checked, and set aside when damaged."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from embedcache.cache import manifest as manifests
from embedcache.cache.gather import Keys, Piece, Rows
from embedcache.cache.manifest import DatasetEntry, Manifest, Shard, ShardFile
from embedcache.cache.remote import problems_at
from embedcache.errors import CacheError, CorruptCacheError
from embedcache.fingerprint import sha256_file
from embedcache.journal import commit, exists, explain, explained, is_locked, lock, make_folder, sync_directory, url_of
from embedcache.shard import Array, Column, FeatureSet, Placed, place, rises
from embedcache.task import task_named
from embedcache.wording import shown

Identity = tuple[int, int, int, int, int]

_KNOWN: dict[tuple[str, Identity], dict[str, Placed]] = {}
"""What has been hashed and parsed in this process. A file that changes in any way gets another key here."""

_VALIDATED: set[tuple[DatasetEntry, int, Identity]] = set()
"""Datasets in which this process found no fault."""

_TICK = 20_000_000
"""Nanoseconds, more than there are between two times that Linux gives to files: 1 to 10 ms."""

_ADVICE = "restore it from a copy, or extract into a new directory"


def dataset_columns(dataset: DatasetEntry) -> dict[str, Column]:
    """Return what an examples file must hold."""
    rows = dataset.rows
    expected = {"row": Column((rows,), np.dtype("<i8")), "split": Column((rows,), np.dtype("u1"))}
    if dataset.task is not None:
        task = task_named(dataset.task)
        expected["target"] = Column(task.target_shape(rows, dataset.targets), task.dtype)
    for name, stored in (("id", dataset.has_ids), ("input", dataset.has_inputs)):
        if stored:
            expected[f"{name}.values"] = Column((None,), np.dtype("u1"))
            expected[f"{name}.offsets"] = Column((rows + 1,), np.dtype("<i8"))
    if dataset.whole_rows is not None:
        expected["number"] = Column((rows,), np.dtype("<i8"))
    return expected


def identity(path: Path | str, file: ShardFile) -> Identity:
    """Return what tells a file of the committed size from other files, and from itself after a change.

    Raises ``CorruptCacheError`` when it is missing, not a plain file, or of another size. A link is refused: the copy
    of a cache must not depend on what was left behind.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCacheError(f"{path} is missing: {_ADVICE}") from None
    except OSError as error:
        raise CacheError(f"cannot read {path}: {explain(error)}") from error
    return _identified(path, file, status)


def _identified(path: Path | str, file: ShardFile, status: os.stat_result) -> Identity:
    if not stat.S_ISREG(status.st_mode):
        raise CorruptCacheError(f"{path} is a link or a special file, not a plain file: {_ADVICE}")
    if status.st_size != file.bytes:
        raise CorruptCacheError(f"{path} has {status.st_size:,} bytes, {file.bytes:,} were committed: {_ADVICE}")
    # The time of the last change of the inode sees a write whose modification time was set back.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check(path: Path, file: ShardFile) -> Identity:
    """Hash a committed file and return its identity.

    Raises ``CorruptCacheError`` when it is missing, of another size, or changed.
    """
    before = identity(path, file)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise CacheError(f"cannot read {path}: {explain(error)}") from error
    if digest != file.sha256:
        raise CorruptCacheError(f"{path} is not what was committed (its sha256 differs): {_ADVICE}")
    return before


@contextmanager
def opened(path: Path, file: ShardFile) -> Iterator[IO[bytes]]:
    """Open a committed file, which stays readable when a writer replaces and removes it. Raises as ``identity``."""
    identity(path, file)  # a pipe is not to be opened
    with explained(f"cannot read {path}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise CorruptCacheError(f"{path} is missing: {_ADVICE}") from None
    with open(descriptor, "rb", buffering=0) as stream:
        yield stream


def dataset_arrays(path: Path, dataset: DatasetEntry, stored: int, *, again: bool = False) -> dict[str, Array]:
    """Return the columns of an examples file, mapped, after hashing it and looking into it.

    ``again`` hashes it even if this very file was hashed before in this process. From the moment the file is open,
    nothing depends on its name: a writer that replaces the dataset meanwhile does no harm.

    Raises ``CorruptCacheError`` for anything that is not what was committed, or points outside of the ``stored`` rows.
    """
    with explained(f"cannot read {path}"), opened(path, dataset.file) as stream:
        file_identity = _identified(path, dataset.file, os.fstat(stream.fileno()))
        known = (dataset.file.sha256, file_identity)
        expected = dataset_columns(dataset)
        if again or known not in _KNOWN:
            _settle(file_identity)
            if sha256_file(path, stream) != dataset.file.sha256:
                raise CorruptCacheError(f"{path} is not what was committed (its sha256 differs): {_ADVICE}")
            placed = place(path, expected, stream)
            status = os.fstat(stream.fileno())
            # To remove its name changes the file's ctime, and nothing in it.
            compared = slice(0, 5 if status.st_nlink else 4)
            if _identified(path, dataset.file, status)[compared] != file_identity[compared]:
                raise CorruptCacheError(f"{path} changed while it was being read: {_ADVICE}")
            _KNOWN[known] = placed
        placed = _agreeing(_KNOWN[known], expected) or place(path, expected, stream)
        columns = {name: array.map(path, stream) for name, array in placed.items()}
    validated = (dataset, stored, file_identity)
    if again or validated not in _VALIDATED:
        if fault := find_fault(dataset, columns, stored):
            raise CorruptCacheError(f"{path}: {fault}: embedcache did not write this file; do not use the cache")
        _VALIDATED.add(validated)
    return columns


def _agreeing(placed: dict[str, Placed], expected: Mapping[str, Column]) -> dict[str, Placed] | None:
    """Return the arrays of a file if they are what is expected: two manifests may name one file and disagree."""
    agree = placed.keys() == expected.keys() and all(expected[name].fits(array) for name, array in placed.items())
    return placed if agree else None


@dataclass(frozen=True)
class StoredShard:
    """A shard that a manifest names, as it lies on disk: hashed once in a process, when it is first looked into.

    Whatever reads it raises ``CorruptCacheError`` for a file that is not what was committed.
    """

    folder: Path
    entry: Shard
    feature_sets: tuple[FeatureSet, ...]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.folder / self.entry.file.name

    @classmethod
    def all_of(cls, directory: Path, manifest: Manifest) -> list[StoredShard]:
        """Return the shards of a cache, in order."""
        folder = directory / "features"
        return [cls(folder, entry, manifest.feature_sets) for entry in manifest.shards]

    def _columns(self) -> dict[str, Column]:
        expected = {"row_key": Column((self.entry.rows, 16), np.dtype("u1"))}
        for feature in self.feature_sets:
            expected |= feature.columns(self.entry.rows)
        return expected

    def is_known(self) -> bool:
        """Whether this very file was hashed before in this process."""
        return (self.entry.file.sha256, identity(self.path, self.entry.file)) in _KNOWN

    def checked(self) -> dict[str, Placed]:
        """Return where the arrays lie, after hashing the file unless it is known."""
        file = self.entry.file
        known = (file.sha256, identity(self.path, file))
        if known not in _KNOWN:
            _settle(known[1])
            check(self.path, file)
            placed = place(self.path, self._columns())
            if identity(self.path, file) != known[1]:
                raise CorruptCacheError(f"{self.path} changed while it was being read: {_ADVICE}")
            _KNOWN[known] = placed
        return _agreeing(_KNOWN[known], self._columns()) or place(self.path, self._columns())

    def piece(self, name: str) -> Piece:
        """Return where an array lies."""
        placed = self.checked()[name]
        return Piece(self.path, placed.offset, placed.shape, placed.dtype)

    def tokens(self, feature: FeatureSet) -> tuple[Array, Rows]:
        """Return the vectors of a token-level set as stored, and where each row's begin, int64 [rows + 1]; mapped."""
        return self._rising(feature, self.checked())

    def _rising(self, feature: FeatureSet, placed: Mapping[str, Placed]) -> tuple[Array, Rows]:
        values, offsets = (placed[f"{feature.name}.{part}"].map(self.path) for part in ("values", "offsets"))
        if not rises(offsets, len(values)):
            raise CorruptCacheError(
                f"{self.path}: {feature.name}.offsets do not rise from 0 to {len(values):,}; do not use the cache"
            )
        return values, np.asarray(offsets)

    def damage(self) -> str | None:
        """Hash the file again and look into it; return what is wrong, None for nothing."""
        try:
            check(self.path, self.entry.file)
            placed = place(self.path, self._columns())
            for feature in self.feature_sets:
                if feature.kind == "tokens":
                    self._rising(feature, placed)
        except CacheError as error:
            return str(error)
        return None


def _settle(known: Identity) -> None:
    """Wait until a change from now on would show in the time of the last change, which advances in ticks."""
    age = time.time_ns() - known[-1]
    if 0 <= age < _TICK:
        time.sleep((_TICK - age) / 1e9)


def check_all(shards: Sequence[StoredShard]) -> None:
    """Check every shard, several at a time. Raises ``CorruptCacheError`` for the first that is wrong."""
    new = [shard for shard in shards if not shard.is_known()]
    if len(new) > 1:  # starting threads costs more than looking up
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(StoredShard.checked, new))
    for shard in shards:
        shard.checked()


def stored_keys(shards: Sequence[StoredShard]) -> Keys:
    """Return the keys of every row in every shard, u1 [N, 16], in order."""
    check_all(shards)
    keys = np.empty((sum(shard.entry.rows for shard in shards), 16), np.uint8)
    start = 0
    for shard in shards:
        keys[start : start + shard.entry.rows] = shard.piece("row_key").map()
        start += shard.entry.rows
    return keys


def find_fault(dataset: DatasetEntry, columns: Mapping[str, Array], stored: int) -> str | None:
    """Return which values of a dataset's columns are impossible where ``stored`` rows are in the shards, or None."""
    limits = {"row": (0, stored), "split": (0, len(dataset.split_names))}
    if dataset.whole_rows is not None:
        limits["number"] = (0, dataset.whole_rows)
    for name, (low, high) in limits.items():
        column = columns[name]
        if len(column) and not (low <= int(column.min()) and int(column.max()) < high):
            return f"the column {name} holds {column.min()} to {column.max()}, expected at least {low} and below {high}"
    if dataset.task is not None:
        fault = task_named(dataset.task).stored_fault(columns["target"], len(dataset.class_names))
        if fault is not None:
            return f"the column target holds {fault}"
    if "number" in columns and (columns["number"][1:] <= columns["number"][:-1]).any():
        return "the column number does not rise"
    for name in ("id", "input"):
        offsets = columns.get(f"{name}.offsets")
        if offsets is not None and not rises(offsets, len(columns[f"{name}.values"])):
            return f"{name}.offsets do not rise from 0 to {len(columns[f'{name}.values']):,}"
    return None


# What is wrong with the files of a cache.


PATIENCE = 100
"""How often a writer may replace the dataset just after its name was read."""


def verify(path: Path | str) -> list[str]:
    """Hash every file of a cache again and return what is wrong, one line each, left-over files included.

    Of a cache behind a URL every byte is read where it is, and what is left over there is not looked for.

    While another process writes to the cache, its temporary files are not left-overs, and a dataset that it replaced
    meanwhile is looked at in its new form.

    Raises ``CacheNotFoundError`` when there is no cache.
    """
    if (url := url_of(path)) is not None:
        return problems_at(url)
    directory = Path(path)
    known: dict[str, str | None] = {}  # shards never change, and are looked at once
    for _ in range(PATIENCE):
        try:
            manifest = manifests.read(directory)
        except CorruptCacheError as error:
            return [str(error)]
        damaged_dataset = dataset_damage(directory, manifest)  # first, as a writer may remove it
        for shard in StoredShard.all_of(directory, manifest):
            if shard.path.name not in known:
                known[shard.path.name] = shard.damage()
        every = [*(known[shard.file.name] for shard in manifest.shards), damaged_dataset]
        problems = [problem for problem in every if problem is not None]
        if not problems or manifests.read(directory).examples == manifest.examples:
            break
    with explained(f"cannot read {directory}"):
        return problems + [
            shown(f"{file} is left over: the manifest does not name it, so it is never read")
            for file in _left_over(directory)
        ]


def dataset_damage(directory: Path, manifest: Manifest) -> str | None:
    """Hash the current dataset again and look into it; return what is wrong, None for nothing."""
    dataset = manifest.examples
    if dataset is not None:
        try:
            dataset_arrays(directory / "examples" / dataset.file.name, dataset, manifest.rows, again=True)
        except CacheError as error:
            return str(error)
    return None


def _left_over(directory: Path) -> list[Path]:
    """Return what no manifest names, unless a writer is at work, which may have made it."""
    if is_locked(directory):
        return []
    named = {Path(folder, file.name) for folder, file in manifests.read(directory).files()} | {Path(manifests.NAME)}
    left = []
    for file in sorted(directory.rglob("*")):
        inside = file.relative_to(directory)
        is_folder = str(inside) in manifests.FOLDERS and file.is_dir()
        if not is_folder and inside not in named:
            left.append(file)
    # What a writer made since, or has removed again, is not left over.
    return [] if is_locked(directory) else [file for file in left if exists(file)]


# Damaged files set aside, so that the next extraction computes what they held and nothing else.


@dataclass(frozen=True)
class Repair:
    """What was done: ``problems`` one line each, ``aside`` where the files are now, and how many rows are left.

    ``aside`` is None where nothing was damaged, and nothing has changed.
    """

    problems: tuple[str, ...]
    aside: Path | None
    rows: int
    lost: int


def repair(path: Path | str) -> Repair:
    """Take every damaged shard out of a cache, and the dataset, which points into all of them.

    The files, and the manifest that named them, are moved into a folder beside the cache. The same ``extract`` command
    then computes the rows that are missing, and only those, and makes the dataset again; so does ``relabel``, where no
    shard was damaged.

    Raises:
        CacheNotFoundError: there is no cache.
        CorruptCacheError: the manifest is damaged, which nothing can replace.
        CacheError: another process is writing to it, or it cannot be written.
    """
    directory = Path(path)
    manifests.read(directory)
    with lock(directory):
        manifest = manifests.read(directory)
        if manifest.newer is not None:
            raise CacheError(f"{path} was written in format {manifest.newer}: upgrade embedcache to repair it")
        damage = [(shard.entry, shard.damage()) for shard in StoredShard.all_of(directory, manifest)]
        damaged = [shard for shard, problem in damage if problem is not None]
        every = [*(problem for _, problem in damage), dataset_damage(directory, manifest)]
        problems = tuple(problem for problem in every if problem is not None)
        if not problems:
            return Repair((), None, manifest.rows, 0)
        aside = _new_folder(directory)
        with explained(f"cannot write {aside}"):
            commit(aside / manifests.NAME, (directory / manifests.NAME).read_bytes())
        kept = tuple(shard for shard in manifest.shards if shard not in damaged)
        # First the manifest that no longer names them: from then on they are left-over files, and nothing reads them.
        changed = replace(manifest, shards=kept, examples=None, complete=False)
        changed.write(directory)
        moved = [("features", shard.file.name) for shard in damaged]
        moved += [] if manifest.examples is None else [("examples", manifest.examples.file.name)]
        for folder, name in moved:
            if exists(directory / folder / name):
                make_folder(aside / folder)
                with explained(f"cannot move {directory / folder / name}"):
                    os.replace(directory / folder / name, aside / folder / name)
                    sync_directory(aside / folder)
        return Repair(problems, aside, changed.rows, manifest.rows - changed.rows)


def _new_folder(directory: Path) -> Path:
    """Make a folder beside a cache."""
    for number in range(1, 10_000):
        aside = directory.resolve().with_name(f"{directory.resolve().name}.damaged{'' if number == 1 else number}")
        if not exists(aside):
            make_folder(aside)
            return aside
    raise CacheError(f"cannot make a folder beside {directory}: too many are there")
