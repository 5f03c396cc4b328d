"""Training many heads: K in a stack against one by one and against plain loops, and the default sweep."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import convex
from benchmarks.heads import BATCH, CLASSES, EPOCHS, ROWS, WIDTH, data, plain_loop, stack
from benchmarks.storage import build
from benchmarks.table import interleaved, row, seconds


def stacks() -> None:
    """64 heads in one pass against one by one, with the share of the machine's limits that a step reaches."""
    import torch

    x, y, names = data()
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    start = torch.nn.Linear(WIDTH, CLASSES).state_dict()

    def slices(epoch: int) -> Any:
        return ((features[mine], labels[mine]) for mine in torch.randperm(ROWS).split(BATCH))

    times = interleaved(
        {
            "stack": lambda: stack(64, "linear", {}, x, y, names),
            "one": lambda: stack(1, "linear", {}, x, y, names),
            "plain": lambda: plain_loop(x, y, slices, start),
        },
        rounds=5,
    )
    row("64 linear heads stacked vs one by one with our own loop", f"{64 * times['one'] / times['stack']:.1f}x", "8x")
    row("the same vs 64 plain tensor-slicing loops", f"{64 * times['plain'] / times['stack']:.1f}x", "25x")
    side = 2048
    square = torch.randn(side, side)
    peak = 2 * side**3 / interleaved({"gemm": lambda: square @ square}, rounds=15)["gemm"]
    steps = EPOCHS * -(-ROWS // BATCH)
    work = 2 * 2 * 64 * CLASSES * WIDTH * ROWS * EPOCHS
    moved = steps * 4 * 64 * CLASSES * WIDTH * 14  # what AdamW's passes over weights and moments read and write
    block = torch.randn(64 << 20 >> 2)
    other = torch.empty_like(block)
    bandwidth = 2 * block.numel() * 4 / interleaved({"copy": lambda: other.copy_(block)}, rounds=15)["copy"]
    row(
        "share of the GEMM peak that the stacked step reaches (the two products of a step, over all its time)",
        f"{work / times['stack'] / peak:.0%} of {peak / 1e9:,.0f} GFLOP/s",
    )
    row(
        "share of the memory bandwidth that its optimizer reaches, over all its time",
        f"{moved / times['stack'] / bandwidth:.0%} of {bandwidth / 1e9:.0f} GB/s (its arrays lie in the cache)",
    )
    row("features read from disk in an epoch of 64 heads", f"{read_by(64, x, y, names):.2f} times their bytes", "once")
    wide = {"hidden": [256]}
    part, labelled = x[:5120], y[:5120]
    times = interleaved(
        {
            "stack": lambda: stack(64, "mlp", wide, part, labelled, names),
            "one": lambda: stack(1, "mlp", wide, part, labelled, names),
        },
        rounds=3,
    )
    said = f"{64 * times['one'] / times['stack']:.2f}x; {profile_of(x, y, names)}"
    row("64 MLP heads (hidden 256) stacked vs one by one", said, "1.5x")


def read_by(heads: int, x: Any, y: Any, names: list[str]) -> float:
    """Return how often a pass with so many heads reads the features, in bytes read for each byte there is."""
    from embedcache.features import MappedRows

    read = 0

    class Counted(MappedRows):
        def read(self, rows: Any) -> Any:
            nonlocal read
            found = super().read(rows)
            read += found.nbytes
            return found

    stack(heads, "linear", {}, Counted(x), y, names)
    return read / x.nbytes / EPOCHS


def profile_of(x: Any, y: Any, names: list[str]) -> str:
    """Where the time of a stacked MLP step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        stack(64, "mlp", {"hidden": [256]}, x[:2560], y[:2560], names)
    events = recorded.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:4]
    return ", ".join(f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / whole:.0%}" for event in top)


def sweeping() -> None:
    """The default sweep of 10,000 x 384 by the command line, the whole process, with few classes and with more."""
    rows = 10_000
    split = np.repeat(np.array([0, 1, 2], np.uint8), [8000, 1000, 1000])
    for classes, apart in ((2, 0.05), (6, 0.08), (20, 0.1), (77, 0.28)):
        x, y = convex.data(rows, WIDTH, classes, apart)
        with tempfile.TemporaryDirectory() as folder:
            cache, sweep = Path(folder) / "c", Path(folder) / "sweep"
            build(cache, x, 1, y, split)
            command = [sys.executable, "-m", "embedcache", "sweep", cache, "-o", sweep]
            taken = seconds(lambda: subprocess.run(command, check=True, capture_output=True))  # noqa: B023
            summary = json.loads((sweep / "summary.json").read_text())
            heads, folds = len(summary["leaderboard"]), summary["protocol"]["folds"]
        row(
            f"the default sweep on {rows:,} x {WIDTH}, {classes} classes, whole command",
            f"{taken:.0f} s ({heads} heads x {folds} folds)",
            "60 s; 45 s of 77 classes",
        )


BEYOND = """
import os, sys, threading, time
import embedcache as ec
grid = [
    {"head": "linear", "solver": "convex", "l2": [30.0, 100.0]},
    {"head": "linear", "learning_rate": [0.001, 0.003, 0.01], "epochs": 2, "batch_size": 128},
    {"head": "mlp", "hidden": [128], "dropout": [0.1, 0.5], "epochs": 2, "batch_size": 128},
]
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
most = 0
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.02)
def seconds_a_row(cache):
    begun = time.perf_counter()
    ec.sweep(cache, grid, folds=2, progress=False)
    return (time.perf_counter() - begun) / len(ec.FeatureCache.open(cache))
seconds_a_row(sys.argv[1])
inside = seconds_a_row(sys.argv[1])
os.environ["EMBEDCACHE_MEMORY"] = sys.argv[3]
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
print(inside, seconds_a_row(sys.argv[2]), most - before)
"""


def sweeping_beyond_memory() -> None:
    """Penalties and stacks on folds of features that are kept on disk, page cache warm, and what memory they need."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("small", "large")]
        for path, rows in zip(paths, (15_000, 100_000), strict=True):
            x, y = convex.data(rows, 768, 4, 0.05)
            split = np.random.default_rng(2).choice(3, rows, p=[0.8, 0.1, 0.1])  # rows of a split do not lie together
            build(path, x, 1 + rows // 20_000, y, split)
        command = [sys.executable, "-W", "ignore", "-c", BEYOND, *map(str, paths), str(x.nbytes // 2)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    inside, outside, memory = map(float, said)
    row(
        f"a sweep (2 penalties, 5 stacked heads, 2 folds) over {x.nbytes / 1e6:.0f} MB on disk vs in memory, per row",
        f"{outside / inside:.2f}x ({1e6 * outside:.0f} microseconds a row; its memory grew by {memory / 1e6:.0f} MB)",
        "at most 2x",
    )


SECTIONS = (stacks, sweeping, sweeping_beyond_memory)
