"""Checked files: hashed once in a process, then remembered by hash, size and file identity."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from embedcache.cache.index import Keys
from embedcache.cache.manifest import DatasetEntry, Manifest, Shard
from embedcache.errors import CacheError, CorruptCacheError
from embedcache.fingerprint import sha256_file
from embedcache.journal import explain, explained
from embedcache.shard import Column, FeatureSet, Placed, ShardFile, place
from embedcache.task import task_named

Array = npt.NDArray[Any]
Identity = tuple[int, int, int, int, int]

_KNOWN: dict[tuple[str, Identity], dict[str, Placed]] = {}
"""What has been hashed and parsed in this process. A file that changes in any way gets another key here."""

_SENSIBLE: set[tuple[DatasetEntry, int, Identity]] = set()
"""Datasets in which this process found no nonsense."""

_TICK = 20_000_000
"""Nanoseconds; Linux stamps files every 1 to 10 ms."""

_ADVICE = "restore it from a copy, or extract into a new directory"


def shard_columns(feature_sets: Sequence[FeatureSet], rows: int) -> dict[str, Column]:
    """Return what a feature shard must hold."""
    expected = {"row_key": Column((rows, 16), np.dtype("u1"))}
    for each in feature_sets:
        expected |= each.columns(rows)
    return expected


def dataset_columns(dataset: DatasetEntry) -> dict[str, Column]:
    """Return what an examples file must hold."""
    rows = dataset.rows
    expected = {"row": Column((rows,), np.dtype("<i8")), "split": Column((rows,), np.dtype("u1"))}
    if dataset.task is not None:
        task = task_named(dataset.task)
        expected["target"] = Column(task.target_shape(rows, dataset.targets), task.dtype)
    for name, there in (("id", dataset.has_ids), ("input", dataset.has_inputs)):
        if there:
            expected[f"{name}.values"] = Column((None,), np.dtype("u1"))
            expected[f"{name}.offsets"] = Column((rows + 1,), np.dtype("<i8"))
    if dataset.whole_rows is not None:
        expected["number"] = Column((rows,), np.dtype("<i8"))
    return expected


def identity(path: Path, file: ShardFile) -> Identity:
    """Return what tells a file from another and from itself after a change, once it has the committed size.

    Raises ``CorruptCacheError`` when it is missing, no plain file, or of another size. A link is refused: the copy of
    a cache must not depend on what was left behind.
    """
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptCacheError(f"{path} is missing: {_ADVICE}") from None
    except OSError as error:
        raise CacheError(f"cannot read {path}: {explain(error)}") from error
    return _identified(path, file, status)


def _identified(path: Path, file: ShardFile, status: os.stat_result) -> Identity:
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
        known = (dataset.file.sha256, _identified(path, dataset.file, os.fstat(stream.fileno())))
        expected = dataset_columns(dataset)
        if again or known not in _KNOWN:
            _settle(known[1])
            digest = sha256_file(path, stream)
            if digest != dataset.file.sha256:
                raise CorruptCacheError(f"{path} is not what was committed (its sha256 differs): {_ADVICE}")
            placed = place(path, expected, stream)
            status = os.fstat(stream.fileno())
            # To remove its name changes the file's ctime, and nothing in it.
            compared = slice(0, 5 if status.st_nlink else 4)
            if _identified(path, dataset.file, status)[compared] != known[1][compared]:
                raise CorruptCacheError(f"{path} changed while it was being read: {_ADVICE}")
            _KNOWN[known] = placed
        placed = _agreeing(_KNOWN[known], expected) or place(path, expected, stream)
        columns = {name: each.map(path, stream) for name, each in placed.items()}
    if again or (dataset, stored, known[1]) not in _SENSIBLE:
        if reason := nonsense(dataset, columns, stored):
            raise CorruptCacheError(f"{path}: {reason}: embedcache did not write this file; do not use the cache")
        _SENSIBLE.add((dataset, stored, known[1]))
    return columns


def _agreeing(placed: dict[str, Placed], expected: Mapping[str, Column]) -> dict[str, Placed] | None:
    """Return what was found in a file, or None: two manifests may name one file and disagree on what it holds."""
    if placed.keys() != expected.keys() or not all(fits(placed[name], expected[name]) for name in expected):
        return None
    return placed


def checked(path: Path, file: ShardFile, expected: Mapping[str, Column]) -> dict[str, Placed]:
    """Return where a file's arrays lie, after hashing it, unless this very file was hashed before in this process."""
    known = (file.sha256, identity(path, file))
    if known not in _KNOWN:
        _settle(known[1])
        check(path, file)
        placed = place(path, expected)
        if identity(path, file) != known[1]:
            raise CorruptCacheError(f"{path} changed while it was being read: {_ADVICE}")
        _KNOWN[known] = placed
    return _agreeing(_KNOWN[known], expected) or place(path, expected)


def _settle(known: Identity) -> None:
    """Wait until a change from now on would show in the time of the last change, which advances in ticks."""
    age = time.time_ns() - known[-1]
    if 0 <= age < _TICK:
        time.sleep((_TICK - age) / 1e9)


def fits(placed: Placed, column: Column) -> bool:
    """Whether an array that was found is what a manifest expects."""
    return (
        placed.dtype == column.dtype.str
        and len(placed.shape) == len(column.shape)
        and all(want in (None, have) for want, have in zip(column.shape, placed.shape, strict=True))
    )


def damage_of(path: Path, shard: Shard, feature_sets: Sequence[FeatureSet]) -> str | None:
    """Hash a feature shard again and look into it; return what is wrong, None for nothing."""
    try:
        check(path, shard.file)
        placed = place(path, shard_columns(feature_sets, shard.rows))
        for each in feature_sets:
            if each.kind == "tokens":
                values, offsets = (placed[f"{each.name}.{part}"] for part in ("values", "offsets"))
                refuse_offsets(path, each.name, offsets.map(path), values.shape[0])
    except CacheError as error:
        return str(error)
    return None


def check_all(directory: Path, manifest: Manifest) -> None:
    """Check every shard, several at a time. Raises ``CorruptCacheError`` for the first that is wrong."""

    def one(index: int) -> None:
        shard = manifest.shards[index]
        path = directory / "features" / shard.file.name
        checked(path, shard.file, shard_columns(manifest.feature_sets, shard.rows))

    new = [at for at, shard in enumerate(manifest.shards) if not is_known(directory / "features", shard.file)]
    if len(new) > 1:  # starting threads costs more than looking up
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(one, new))
    for index in range(len(manifest.shards)):
        one(index)


def is_known(folder: Path, file: ShardFile) -> bool:
    """Whether this very file was hashed before in this process."""
    return (file.sha256, identity(folder / file.name, file)) in _KNOWN


def stored_keys(path: Path, manifest: Manifest) -> Keys:
    """Return the keys of every row in every shard, u1 [N, 16], in order."""
    check_all(path, manifest)
    keys = np.empty((manifest.rows, 16), np.uint8)
    at = 0
    for shard in manifest.shards:
        file = path / "features" / shard.file.name
        placed = checked(file, shard.file, shard_columns(manifest.feature_sets, shard.rows))
        keys[at : at + shard.rows] = placed["row_key"].map(file)
        at += shard.rows
    return keys


def nonsense(dataset: DatasetEntry, columns: Mapping[str, Array], stored: int) -> str | None:
    """Return what in a dataset's columns means nothing where ``stored`` rows are in the shards, or None."""
    limits = {"row": (0, stored), "split": (0, len(dataset.split_names))}
    if dataset.task == "classification":
        limits["target"] = (-1, len(dataset.class_names))
    if dataset.whole_rows is not None:
        limits["number"] = (0, dataset.whole_rows)
    for name, (low, high) in limits.items():
        column = columns[name]
        if len(column) and not (low <= int(column.min()) and int(column.max()) < high):
            return f"the column {name} holds {column.min()} to {column.max()}, expected at least {low} and below {high}"
    if dataset.task == "multilabel" and not np.isin(columns["target"], (0, 1, 255)).all():
        return "the column target holds something other than 0, 1 and 255"
    if dataset.task == "regression" and np.isinf(columns["target"]).any():
        return "the column target holds infinity"
    if "number" in columns and (columns["number"][1:] <= columns["number"][:-1]).any():
        return "the column number does not rise"
    for name in ("id", "input"):
        offsets = columns.get(f"{name}.offsets")
        if offsets is not None and not rises(offsets, len(columns[f"{name}.values"])):
            return f"{name}.offsets do not rise from 0 to {len(columns[f'{name}.values']):,}"
    return None


def rises(offsets: Array, length: int) -> bool:
    """Whether offsets rise from 0 to ``length``."""
    # Compared, not subtracted: a difference of hostile numbers wraps around.
    return int(offsets[0]) == 0 and int(offsets[-1]) == length and not bool((offsets[1:] < offsets[:-1]).any())


def refuse_offsets(path: Path, name: str, offsets: Array, length: int) -> None:
    """Raise ``CorruptCacheError`` unless offsets rise from 0 to ``length``."""
    if not rises(offsets, length):
        raise CorruptCacheError(f"{path}: {name}.offsets do not rise from 0 to {length:,}; do not use the cache")
