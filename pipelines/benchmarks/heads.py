"""Training one head: against plain torch loops, on features beyond memory, and as a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.storage import build
from benchmarks.table import interleaved, row, seconds

import embedcache as ec
from embedcache.task import CLASSIFICATION
from embedcache.train import labelled_rows_of, train_stack

EPOCHS, BATCH, WIDTH, CLASSES, ROWS = 5, 256, 384, 6, 20_000


def data(rows: int = ROWS, width: int = WIDTH, classes: int = CLASSES) -> tuple[Any, Any, list[str]]:
    """Features that a linear head separates in part, labels, and class names."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows, width), dtype=np.float32)
    said = x @ generator.standard_normal((width, classes)) + 8 * generator.standard_normal((rows, classes))
    return x, said.argmax(axis=1), [str(name) for name in range(classes)]


def stack(heads: int, kind: str, options: dict[str, Any], x: Any, y: Any, names: list[str]) -> Any:
    """Train ``heads`` heads that differ in learning rate and seed, in one pass."""
    specs = [
        ec.TrainSpec(
            epochs=EPOCHS, batch_size=BATCH, learning_rate=1e-3 * (1 + at / heads), seed=at, shuffle_seed=0,
            schedule="constant", warmup=0.0, clip=0.0, standardize=False,
        )
        for at in range(heads)
    ]  # fmt: skip
    head = ec.HeadSpec(kind, "torch", options)
    rows = labelled_rows_of(x, y, CLASSIFICATION, names)
    return train_stack(rows, None, [head] * heads, specs)


def plain_loop(x: Any, y: Any, batches: Callable[[int], Any], start: Any) -> list[float]:
    """The loop that anyone writes, over ``batches(epoch)``; returns the mean loss of each epoch."""
    import torch
    from torch import nn

    linear = nn.Linear(WIDTH, CLASSES)
    linear.load_state_dict(start)
    optimizer = torch.optim.AdamW(
        [{"params": [linear.weight], "weight_decay": 0.01}, {"params": [linear.bias], "weight_decay": 0.0}], lr=1e-3
    )
    means = []
    for epoch in range(EPOCHS):
        total = 0.0
        for features, labels in batches(epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(linear(features), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        means.append(total / len(x))
    return means


def heads() -> None:
    """One linear head by minibatches against a DataLoader loop and a tensor-slicing loop with the same steps."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from embedcache.features import features_of
    from embedcache.heads import build_head
    from embedcache.train.batches import order

    x, y, names = data()
    features, labels = torch.from_numpy(x), torch.from_numpy(y)
    head = build_head(ec.HeadSpec(), features_of(x).feature, CLASSES, seed=0)
    shares = np.log(np.bincount(y, minlength=CLASSES))  # the biases our heads start with: log shares, their mean 0
    start = {
        "weight": head.state_dict()["output.weight"],
        "bias": torch.from_numpy((shares - shares.mean()).astype(np.float32)),
    }

    def slices(epoch: int) -> Any:
        rows = torch.from_numpy(order(ROWS, 0, epoch))
        return ((features[mine], labels[mine]) for mine in rows.split(BATCH))

    def loader(epoch: int) -> Any:
        return DataLoader(TensorDataset(features, labels), BATCH, sampler=order(ROWS, 0, epoch).tolist())

    times = interleaved(
        {
            "ours": lambda: stack(1, "linear", {}, x, y, names),
            "slicing": lambda: plain_loop(x, y, slices, start),
            "loader": lambda: plain_loop(x, y, loader, start),
        },
        rounds=5,
    )
    ours = stack(1, "linear", {}, x, y, names)[0].history
    apart = max(abs(a["train_loss"] - b) for a, b in zip(ours, plain_loop(x, y, slices, start), strict=True))
    what = f"one linear head, minibatch AdamW, {ROWS:,} x {WIDTH}"
    said = f"{times['loader'] / times['ours']:.1f}x, losses {apart:.0e} apart"
    row(f"{what}, vs nn.Linear + DataLoader", said, "10x, 1e-5")
    row("the same vs a hand-written tensor-slicing loop", f"{times['slicing'] / times['ours']:.2f}x", "1.5x")


BEYOND = """
import resource, sys, time
import numpy as np
import torch
import embedcache as ec
from embedcache.features import MappedRows
path, rows, width, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
x = np.memmap(path, np.float32, "r", shape=(rows, width))
y = np.random.default_rng(0).integers(0, 6, rows)
spec = ec.TrainSpec(epochs=2, batch_size=256, clip=0.0)
named = dict(class_names=[str(each) for each in range(6)], progress=False)
ec.train_head(np.array(x[:2000]), y[:2000], spec=spec, **named)
if limit:
    used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
    found = ec.train_head(MappedRows(x), y, spec=spec, **named)
else:
    few = rows // 8
    found = ec.train_head(np.array(x[:few]), y[:few], spec=spec, **named)
    rows = few
print(found.history[-1]["seconds"] / rows)
"""


def beyond_memory() -> None:
    """An epoch over features four times larger than the memory a process may have, page cache warm."""
    rows = 800_000
    size = rows * WIDTH * 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        generator = np.random.default_rng(0)
        with open(path, "wb") as file:
            for _ in range(100):
                file.write(generator.standard_normal((rows // 100, WIDTH), dtype=np.float32).tobytes())
            file.flush()
            os.fsync(file.fileno())  # writing it back would take the disk and a core from the first epochs

        def epoch(limit: int) -> float:
            arguments = [sys.executable, "-c", BEYOND, str(path), str(rows), str(WIDTH), str(limit)]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True, env=os.environ)
            return float(done.stdout)

        ratios = [epoch(size // 4) / epoch(0) for _ in range(3)]
    row(
        f"an epoch over {size / 1e9:.1f} GB with {size / 4e9:.1f} GB to allocate, vs in memory, per row",
        f"{sorted(ratios)[1]:.2f}x",
        "at most 1.5x",
    )


def whole_process() -> None:
    """Seconds from a cache on disk to a trained, evaluated, saved linear head, the whole process."""
    rows = 10_000
    x, y, _ = data(rows)
    split = np.repeat(np.array([0, 1, 2], np.uint8), [8000, 1000, 1000])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        build(path, x, 1, y, split)
        for engine in ("sklearn", "torch"):
            run = Path(folder) / engine
            command = [sys.executable, "-m", "embedcache"]
            taken = []
            for _ in range(3):
                begun = time.perf_counter()
                arguments = ["train", str(path), "-o", str(run), "--head", "linear", "--engine", engine]
                subprocess.run([*command, *arguments], check=True, capture_output=True)
                taken.append(time.perf_counter() - begun)
            library = "sklearn.linear_model" if engine == "sklearn" else "embedcache.train.convex"  # no torch
            code = f"import embedcache.train.run, {library}"
            imports = seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))  # noqa: B023
            row(
                f"a cache of {rows:,} x {WIDTH} to a trained, measured, saved linear head, "
                f"{'scikit-learn' if engine == 'sklearn' else 'the convex solver'}",
                f"{sorted(taken)[1]:.1f} s, of which imports {imports:.1f} s",
            )


SECTIONS = (heads, beyond_memory, whole_process)
