"""Storage: reading features back, opening a cache, memory while extracting, and how fast the command line starts."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from benchmarks.table import interleaved, row

import embedcache as ec
from embedcache.cache import CacheWriter
from embedcache.dataset import Dataset
from embedcache.features import Stored
from embedcache.shard import FeatureSet

REPO = Path(__file__).resolve().parents[2]
WIDTH = 384


def build(
    path: Path, x: np.ndarray, shards: int, y: np.ndarray | None = None, split: np.ndarray | None = None
) -> ec.FeatureCache:
    """Make a cache of the rows of ``x`` [N, D], of classes ``y`` and with 0, 1, 2 for train, validation, test."""
    keys = np.random.default_rng(1).integers(0, 256, (len(x), 16), dtype=np.uint8)
    targets = np.zeros(len(x), np.int64) if y is None else y
    feature = FeatureSet("mean", "pooled", x.shape[1], 1, "float32")
    with CacheWriter(path, {"made": "up"}, [feature]) as writer:
        for part in np.array_split(np.arange(len(x)), shards):
            writer.append(keys[part], {"mean": Stored(feature, x[part])}, {})
        names = tuple(str(each) for each in range(int(targets.max()) + 1))
        of_rows = np.zeros(len(x), np.uint8) if split is None else split.astype(np.uint8)
        splits = {"split": of_rows, "split_names": ("train",) if split is None else ("train", "validation", "test")}
        labels = {"task": "classification", "targets": targets, "class_names": names}
        writer.commit_dataset(Dataset(keys=keys, **splits, **labels))
    return ec.FeatureCache.open(path)


def reading() -> None:
    """``arrays()`` and a full pass against a memory-mapped .npy of the same array, page cache warm.

    Shards hold a multiple of 1,024 rows, as ``extract`` makes them.
    """
    x = np.random.default_rng(0).standard_normal((60 * 3072, WIDTH), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x)
        for shards, bar in ((1, "0.95x"), (60, "0.6x")):
            cache = build(Path(folder) / f"{shards}.cache", x, shards)
            times = interleaved(
                {
                    "npy": lambda: np.load(f"{folder}/x.npy", mmap_mode="r").sum(),
                    "ours": lambda cache=cache: cache.arrays("train")[0].sum(),
                },
                rounds=9,
            )
            where = f"{shards} shard{'s' * (shards > 1)}"
            row(
                f"`arrays()` and a pass vs a memory-mapped .npy, rows in {where}",
                f"{times['npy'] / times['ours']:.2f}x",
                bar,
            )


def opening() -> None:
    """Opening a million rows a second time in a process."""
    x = np.zeros((1_000_000, WIDTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        build(path, x, 61)
        taken = interleaved({"open": lambda: ec.FeatureCache.open(path)}, rounds=5)["open"]
    row(f"opening a 1M x {WIDTH} cache of 61 shards a second time in a process", f"{taken * 1000:.0f} ms", "50 ms")


def memory() -> None:
    """Resident memory of an extraction by a fake backbone, each size in a process of its own."""
    script = (
        "import sys, resource; sys.path[:0] = [sys.argv[1] + '/tests']\n"
        "from fakes import CountingBackbone\n"
        "from embedcache.examples import load_examples\n"
        "from embedcache.extract import run\n"
        "class Forgotten(list): __iadd__ = lambda self, rows: self  # the fake would hold every row that it has seen\n"
        "backbone = CountingBackbone(384, positions=4096)\n"
        "backbone.rows_seen = Forgotten()\n"
        "run(load_examples(sys.argv[2]), backbone, sys.argv[3])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    said = []
    for count in (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.csv"
            lines = (f"row number {at} of the file,{at % 3}\n" for at in range(count))
            source.write_text("text,label\n" + "".join(lines))
            command = [sys.executable, "-c", script, REPO, source, f"{folder}/c"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            said.append(f"{count:,}: {int(done.stdout) / 1024:,.0f} MiB")
    row(f"peak resident memory of an extraction x {WIDTH}, by rows", ", ".join(said), "flat")


def startup() -> None:
    """CPU time of ``embedcache --help``."""
    taken = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "embedcache", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    row("`embedcache --help`, CPU time", f"{statistics.median(taken):.2f} s", "0.15 s")


SECTIONS = (reading, opening, memory, startup)
