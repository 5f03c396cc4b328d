"""Checked files: hashed once in a process, then remembered by hash, size and file identity."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.cache.manifest import Dataset, Manifest, Shard
from embedcache.shard import FeatureSet, Placed, ShardFile, check, check_size, place

_KNOWN: dict[tuple[str, int, int, int, int], dict[str, Placed]] = {}
"""What has been hashed and parsed in this process. A file that changes in any way gets another key here."""

Expected = Mapping[str, tuple[tuple[int | None, ...], np.dtype[Any]]]


def shard_arrays(feature_sets: Sequence[FeatureSet], rows: int) -> dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]:
    """Return what a feature shard must hold."""
    expected: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]] = {"row_key": ((rows, 16), np.dtype("u1"))}
    for each in feature_sets:
        expected |= each.datasets(rows)
    return expected


def dataset_arrays(dataset: Dataset) -> dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]]:
    """Return what a dataset file must hold."""
    rows = dataset.rows
    expected: dict[str, tuple[tuple[int | None, ...], np.dtype[Any]]] = {
        "row": ((rows,), np.dtype("<i8")),
        "split": ((rows,), np.dtype("u1")),
    }
    if dataset.task is not None:
        shape = (rows,) if dataset.task == "classification" else (rows, dataset.targets)
        dtype = {"classification": "<i8", "multilabel": "u1", "regression": "<f8"}[dataset.task]
        expected["target"] = (shape, np.dtype(dtype))
    for name, there in (("id", dataset.has_ids), ("input", dataset.has_inputs)):
        if there:
            expected |= {f"{name}.values": ((None,), np.dtype("u1")), f"{name}.offsets": ((rows + 1,), np.dtype("<i8"))}
    if dataset.part:
        expected["number"] = ((rows,), np.dtype("<i8"))
    return expected


def checked(path: Path, file: ShardFile, expected: Expected) -> dict[str, Placed]:
    """Return where a file's arrays lie, after hashing it, unless this very file was hashed before in this process."""
    check_size(path, file)
    status = os.stat(path)
    known = (file.sha256, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if known not in _KNOWN:
        check(path, file)
        _KNOWN[known] = place(path, expected)
    return _KNOWN[known]


def check_all(directory: Path, manifest: Manifest) -> None:
    """Check every shard, several at a time. Raises ``CorruptCacheError`` for the first that is wrong."""

    def one(shard: Shard) -> None:
        checked(directory / "features" / shard.file.name, shard.file, shard_arrays(manifest.feature_sets, shard.rows))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, manifest.shards):
            pass
