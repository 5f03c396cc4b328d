"""Readers beside a writer that replaces the dataset again and again: a reader sees one whole generation, always."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import small_caches

from embedcache.cache import CacheWriter, FeatureCache, verify
from embedcache.errors import CacheError

ROWS = 23


def replace_for_ever(path: Path, pause: float = 0.0) -> None:
    """Commit datasets of which each tells its number in its targets and its names, until killed."""
    os.fsync = lambda descriptor: None  # nobody cuts the power, and a slow disk would make it easy for the readers
    number = 0
    while True:
        with CacheWriter(path, small_caches.SPEC, small_caches.SETS) as writer:
            for _ in range(20):
                number += 1
                writer.commit_dataset(
                    small_caches.committed(
                        small_caches.keys(range(ROWS)),
                        task="classification",
                        targets=np.full(ROWS, number % 3),
                        class_names=tuple(f"{number}-{each}" for each in range(3)),
                        split=np.zeros(ROWS, np.uint8),
                        split_names=("train",),
                    )
                )
                time.sleep(pause)


def torn(path: Path) -> list[str]:
    """What one reader sees that is not one whole generation."""
    problems = []
    try:
        cache = FeatureCache.open(path)
        (target,) = set(cache.targets().tolist())
        numbers = {int(name.split("-")[0]) for name in cache.class_names}
        if len(numbers) != 1 or target != numbers.pop() % 3:
            problems.append(f"targets {target} of {cache.class_names}")
        if not np.array_equal(cache.features(None, "mean")[7], small_caches.values(small_caches.SETS[0], 7)):
            problems.append("other features")
    except CacheError as error:
        problems.append(f"open: {error}")
    return problems + [f"verify: {each}" for each in verify(path)]


def run(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Read ``count`` times beside a writer; return how often that was, and what went wrong."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = small_caches.write(
            Path(folder) / "c", ROWS, class_names=("0-0", "0-1", "0-2"), targets=np.zeros(ROWS, int)
        )
        child = os.fork()
        if not child:
            try:
                replace_for_ever(path, [0.0, 0.001, 0.02][seed % 3])
            finally:
                os._exit(1)
        problems = []
        try:
            for _ in range(count):
                problems += torn(path)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
        return count, problems + [each for each in torn(path) if "left over" not in each]
