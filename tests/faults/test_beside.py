"""Readers beside a writer see whole generations; caches of many shards and parts need few files open at a time."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import beside
import forge
import hdf5
import numpy as np
import pytest
import small_caches
from small_caches import SETS, values, write

from embedcache.cache import CacheWriter, FeatureCache, merge, verify


@pytest.mark.parametrize("seed", [1, 2])
def test_readers_beside_a_writer(seed: int) -> None:
    assert beside.run(12, seed) == (12, [])


def test_what_a_writer_has_not_named_yet_is_no_left_over(tmp_path: Path) -> None:
    path = write(tmp_path / "c", 11)
    (path / "features" / ".000009-0123456789abcdef.h5.00ff.tmp").touch()
    with CacheWriter(path, small_caches.SPEC, SETS):
        (path / "features" / ".000009-0123456789abcdef.h5.00ff.tmp").touch()
        assert verify(path) == []
    (said,) = verify(path)
    assert "left over" in said


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_many_shards_and_many_parts_need_few_descriptors(
    tmp_path: Path, few_descriptors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.cache.files._TICK", 0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    cache = FeatureCache.open(write(tmp_path / "c", 150, 1, SETS[5:6]))
    ragged = cache.ragged()
    assert all(np.array_equal(ragged[row], values(SETS[5], row)) for row in range(150))
    assert verify(tmp_path / "c") == []
    parts = []
    for part in range(60):
        parts.append(tmp_path / f"p{part}")
        ids = (np.frombuffer(b"ab", np.uint8), np.array([0, 1, 2]))
        with CacheWriter(parts[-1], small_caches.SPEC, SETS[:1]) as writer:
            rows = range(2 * part, 2 * part + 2)
            writer.append(small_caches.keys(rows), small_caches.arrays(SETS[:1], rows), {})
            writer.commit_dataset(
                small_caches.committed(
                    small_caches.keys(rows),
                    task="classification",
                    targets=np.zeros(2, int),
                    class_names=("a",),
                    split=np.zeros(2, np.uint8),
                    split_names=("train",),
                    ids=ids,
                )
            )
    assert merge(parts, tmp_path / "merged").n_rows == 120


@pytest.mark.parametrize("attack", hdf5.OFFSETS)
def test_verify_looks_into_the_offsets_of_tokens(tmp_path: Path, attack: str) -> None:
    path = write(tmp_path / "c")
    hdf5.OFFSETS[attack](path)
    (said,) = verify(path)
    assert "offsets do not rise" in said
    assert str(forge.first_shard(path)) in said
