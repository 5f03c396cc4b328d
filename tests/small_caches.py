"""Small caches with every kind of feature set, written without a backbone; what they hold can be worked out by hand.

Component j of row i is ``((31 i + 17 j) % 251 - 125) / 8``: seven bits, which float32, float16 and bfloat16 all hold
exactly, so one formula says what any of them gives back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.cache import CacheWriter
from embedcache.dataset import Dataset, IdColumn, Packed, Whole
from embedcache.features import Stored
from embedcache.fingerprint import row_key
from embedcache.shard import FeatureSet

SETS = (
    FeatureSet("mean", "pooled", 5, 1, "float32"),
    FeatureSet("cls", "pooled", 3, 1, "float16"),
    FeatureSet("l2:mean", "pooled", 7, 1, "bfloat16"),
    FeatureSet("mean@1+2", "layers", 5, 2, "float32"),
    FeatureSet("cls@all", "layers", 2, 3, "bfloat16"),
    FeatureSet("tokens", "tokens", 3, 1, "float32"),
    FeatureSet("tokens@-2", "tokens", 5, 1, "bfloat16"),
)
SPEC = {"backbone": {"architecture": "None", "weights": {"model.safetensors": "0" * 64}}, "prompt": None}


def keys(rows: Sequence[int]) -> np.ndarray:
    """The keys of rows, u1 [n, 16]."""
    return np.frombuffer(b"".join(row_key(b"row %d" % row) for row in rows), np.uint8).reshape(-1, 16)


def tokens(row: int) -> int:
    """How many vectors a row of a token-level set has: 0 to 4."""
    return 7 * row % 5


def values(each: FeatureSet, row: int) -> np.ndarray:
    """What a set gives back for a row: float32 [D], [L, D] or [T, D]."""
    shape = (tokens(row), each.dim) if each.kind == "tokens" else each.row_shape
    j = np.arange(int(np.prod(shape))).reshape(shape)
    return ((31 * row + 17 * j) % 251 - 125).astype(np.float32) / 8


def store(each: FeatureSet, decoded: np.ndarray) -> np.ndarray:
    """Float32 that the set's type holds exactly, as that type."""
    if each.dtype == "bfloat16":
        return (np.ascontiguousarray(decoded, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return decoded.astype(each.dtype)


def arrays(sets: Sequence[FeatureSet], rows: Sequence[int]) -> dict[str, Stored]:
    """What ``CacheWriter.append`` takes for some rows."""
    out: dict[str, Stored] = {}
    for each in sets:
        decoded = [values(each, row) for row in rows]
        if each.kind == "tokens":
            offsets = np.concatenate([[0], np.cumsum([len(row) for row in decoded], dtype=np.int64)])
            vectors = np.concatenate([np.zeros((0, each.dim), np.float32), *decoded])
            out[each.name] = Stored(each, store(each, vectors), offsets)
        else:
            out[each.name] = Stored(each, store(each, np.stack(decoded)))
    return out


def committed(
    row_keys: np.ndarray,
    *,
    ids: tuple[np.ndarray, np.ndarray] | None = None,
    numbers: np.ndarray | None = None,
    whole_rows: int = 0,
    whole_hash: str | None = None,
    **columns: Any,
) -> Dataset:
    """A dataset of rows with these keys; ``ids`` are a buffer and the offsets into it."""
    return Dataset(
        keys=row_keys,
        ids=None if ids is None else IdColumn(len(row_keys), Packed(*ids)),
        whole=None if numbers is None else Whole(numbers, whole_rows, whole_hash),
        **columns,
    )


def write(
    path: Path,
    rows: int = 23,
    per_shard: int = 7,
    sets: Sequence[FeatureSet] = SETS,
    *,
    spec: dict[str, Any] = SPEC,
    dataset: Sequence[int] | None = None,
    inputs: tuple[np.ndarray, np.ndarray] | None = None,
    **columns: Any,
) -> Path:
    """Write a cache of ``rows`` stored rows whose dataset has the stored rows ``dataset``, by default all in order.

    The target of row i is i % 3, its split train for the first two thirds and test for the rest.
    """
    dataset = range(rows) if dataset is None else dataset
    with CacheWriter(path, spec, sets) as writer:
        have = writer._manifest.rows
        for start in range(have, rows, per_shard):
            mine = range(start, min(start + per_shard, rows))
            writer.append(keys(mine), arrays(sets, mine), {"device": "none", "shard": start})
        facts: dict[str, Any] = {
            "targets": np.array(dataset, np.int64) % 3,
            "task": "classification",
            "class_names": ("a", "b", "c"),
            "split": (np.arange(len(dataset)) * 3 >= len(dataset) * 2).astype(np.uint8),
            "split_names": ("train", "test"),
        }
        writer.commit_dataset(
            committed(keys(dataset), **(facts | columns)), None if inputs is None else Packed(*inputs)
        )
    return path


@contextmanager
def tiny_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes at ``path``; the test is skipped where none may be mounted."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def files(path: Path) -> dict[str, bytes]:
    """Every file in a directory, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
