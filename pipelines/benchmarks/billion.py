"""What a billion rows of 768 would need, tried where the cost is: 100,000 shards, ten million rows, 1,000 parts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from benchmarks.table import row, seconds

from embedcache.cache import CacheWriter, merge
from embedcache.cache.manifest import DatasetEntry, Manifest, Shard, file_of
from embedcache.dataset import Dataset, Whole
from embedcache.features import Stored
from embedcache.shard import FeatureSet, build
from embedcache.spec import ExtractionSpec

SHARDS, ROWS, PER_SHARD, WIDTH = 100_000, 10_000_000, 7, 5
FEATURE = FeatureSet("mean", "pooled", WIDTH, 1, "float32")
RAN = {
    "model": "sentence-transformers/all-mpnet-base-v2", "revision": "e8c3b32edf5434bc2275fc9bab85f82640a19130",
    "device": "NVIDIA H100 80GB HBM3", "cpu_capability": "AVX512", "torch": "2.13.0", "transformers": "5.23.0",
    "probe": "ab" * 32,
}  # fmt: skip
OPEN = """
import re, sys, time
import numpy, h5py
from embedcache.cache import FeatureCache
start, cpu = time.perf_counter(), time.process_time()
cache = FeatureCache.open(sys.argv[1], verify=False)
taken, cpu = time.perf_counter() - start, time.process_time() - cpu
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])  # getrusage counts the parent's
print(taken, cpu, peak / 1024, len(cache))
"""


def billion() -> None:
    """A cache of 100,000 shards: its manifest, opening it, one shard more; and 1,000 parts merged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.cache"
        manifest = many_shards(path, 700)
        manifest.write(path)
        taken, cpu, peak = opened(path)
        size = (path / "manifest.json").stat().st_size / 1e6
        measured = f"{taken:.2f} s, {cpu:.2f} s of CPU time; peak memory {peak:.0f} MiB; {size:.0f} MB"
        row(f"opening a cache of {SHARDS:,} shards; its manifest", measured, "2 s; 512 MB")
        rows, cpu_rows, _ = opened(with_dataset(path, manifest, ROWS))
        added = f"{rows - taken:.2f} s, {cpu_rows - cpu:.2f} s of CPU time"
        row(f"what a dataset of {ROWS / 1e6:.0f} million rows, hashed and checked, adds to that", added)
        longer = manifest.with_shard(Shard(file_of(SHARDS, b"x" * 500), PER_SHARD, RAN))
        longer.data()
        row("writing that manifest again with one shard more", f"{seconds(lambda: longer.write(path)):.2f} s")
    times = {parts: merging(parts) for parts in (250, 1000)}
    ratio = times[1000] / times[250]
    row(
        "merging 250 / 1,000 parts of a shard each, CPU time",
        f"{times[250]:.1f} / {times[1000]:.1f} s: {ratio:.1f}x",
        "4x",
    )


def many_shards(path: Path, rows: int) -> Manifest:
    """Make a cache of 100,000 shards, all with the bytes of one, and a dataset of a few rows."""
    values = np.zeros((PER_SHARD, WIDTH), np.float32)
    data = build({"row_key": np.zeros((PER_SHARD, 16), np.uint8), "mean": values})
    for inside in ("features", "examples"):
        (path / inside).mkdir(parents=True)
    shards = []
    for number in range(SHARDS):
        file = file_of(number, data)
        if number % 10_000 == 0:  # a file may have so many names
            first = path / "features" / file.name
            first.write_bytes(data)
        else:
            os.link(first, path / "features" / file.name)
        shards.append(Shard(file, PER_SHARD, RAN))
    return Manifest(ExtractionSpec({"made": "up"}), (FEATURE,), tuple(shards), *dataset(path, rows))


def dataset(path: Path, rows: int) -> tuple[DatasetEntry, bool, int]:
    """Write a dataset of so many rows; return its entry, that it is complete, and the next generation."""
    columns = {
        "row": np.arange(rows) % (SHARDS * PER_SHARD), "split": np.zeros(rows, np.uint8),
        "target": np.zeros(rows, np.int64),
    }  # fmt: skip
    data = build(columns)
    file = file_of(0, data)
    (path / "examples" / file.name).write_bytes(data)
    entry = DatasetEntry(file, rows, "classification", ("a",), ("train",), 0, False, False, None, None)
    return entry, True, 1


def with_dataset(path: Path, manifest: Manifest, rows: int) -> Path:
    """Give a cache a dataset of so many rows."""
    entry, complete, generation = dataset(path, rows)
    Manifest(manifest.spec, manifest.feature_sets, manifest.shards, entry, complete, generation).write(path)
    return path


def opened(path: Path) -> tuple[float, float, float]:
    """Open a cache in a process of its own; return seconds, those of CPU time, and the peak of memory in MiB."""
    done = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True, check=True)
    taken, cpu, peak, _ = map(float, done.stdout.split())
    return taken, cpu, peak


def merging(parts: int) -> float:
    """Return the CPU seconds of merging so many parts of a few rows each, as ``extract --part`` cuts them."""
    total = parts * PER_SHARD
    keys = np.random.default_rng(0).integers(0, 256, (total, 16), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for part in range(parts):
            numbers = np.arange(part, total, parts)
            with CacheWriter(Path(folder) / str(part), {"made": "up"}, [FEATURE]) as writer:
                writer.append(keys[numbers], {"mean": Stored(FEATURE, np.zeros((PER_SHARD, WIDTH), np.float32))}, RAN)
                writer.commit_dataset(
                    Dataset(
                        keys=keys[numbers], split=np.zeros(PER_SHARD, np.uint8), split_names=("train",),
                        whole=Whole(numbers, total, "0" * 64),
                    )
                )  # fmt: skip
        every = [Path(folder) / str(part) for part in range(parts)]
        return seconds(lambda: merge(every, Path(folder) / "all"), time.process_time)


SECTIONS = (billion,)
