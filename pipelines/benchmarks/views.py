"""Augmented views of pictures: what training on them, and averaging over them, is worth on CIFAR-10."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from benchmarks.table import row

from embedcache import extract, train_head
from embedcache.cache import FeatureCache
from embedcache.train.metrics import wilson

REPO = Path(__file__).resolve().parents[2]
VIEWS = 4
SIZES = ((300, 600), (2000, 1000))
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
Correct = npt.NDArray[np.bool_]


def made_by(program: str, *arguments: str) -> Path:
    """Run a program of this repository that makes a folder, and return the folder."""
    command = [sys.executable, REPO / "data" / program, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip().splitlines()[-1])


def views() -> None:
    """CIFAR-10 through EfficientNet-Lite0: a linear head on plain pictures, with 1 and with 4 views of each."""
    pictures = made_by("prepare_pictures.py", "cifar10")
    path = pictures.parent / "cifar10-views.cache"
    cache = extract(str(pictures), output_dir=path, model=made_by("efficientnet_lite.py"), views=VIEWS, device="cpu")
    for train, test in SIZES:
        plain = correct(cache, train, test, 0)
        tell(f"CIFAR-10, {train:,} rows to train, {test:,} to test: accuracy without views", plain, None)
        for number in (1, VIEWS):
            tell(f"the same with crop+flip views: {number}", correct(cache, train, test, number), plain)
        averaged = correct(cache, train, test, VIEWS, average=True)
        tell(f"the same with {VIEWS} views, averaged over them in the test too", averaged, plain)


def tell(what: str, right: Correct, plain: Correct | None) -> None:
    """Add a row: the accuracy with Wilson's interval, and the difference to plain pictures on the same test rows."""
    low, high = wilson(float(right.sum()), len(right))
    told = f"{right.mean():.3f} [{low:.3f}, {high:.3f}]"
    if plain is not None:
        apart = right.astype(float) - plain
        half = 1.96 * float(apart.std()) / np.sqrt(len(apart))
        told += f", {apart.mean():+.3f} [{apart.mean() - half:+.3f}, {apart.mean() + half:+.3f}]"
    row(what, told, "report")


def correct(cache: FeatureCache, train: int, test: int, number: int, *, average: bool = False) -> Correct:
    """Return which test rows a head gets right whose penalty was chosen on a fifth of its training rows."""
    # In the order of their keys, rows are in no order of classes.
    of_split = {name: np.argsort(cache.keys(name)[:, :8].copy().view(">u8").ravel()) for name in ("train", "test")}
    learn, judge = of_split["train"][:train], of_split["test"][:test]
    names = [cache.feature().name, *(view.name for view in cache.views(cache.feature()))]
    x, y = {name: cache.features("train", name)[learn] for name in names}, cache.targets("train")[learn]
    fit, choose = np.arange(train // 5, train), np.arange(train // 5)

    def head(rows: npt.NDArray[np.int64], l2: float):  # type: ignore[no-untyped-def]  # a TrainedHead
        sets = [x[name][rows] for name in names[: number + 1]]
        trained = train_head(
            sets[0], y[rows], head="linear", spec={"l2": l2}, class_names=cache.class_names, views=sets[1:],
            progress=False, intervals=False,
        )  # fmt: skip
        return trained.head

    def right(l2: float) -> float:
        return float((head(fit, l2).probabilities(x[names[0]][choose]).argmax(axis=1) == y[choose]).mean())

    whole = head(np.arange(train), max(PENALTIES, key=right))
    shown = names if average else names[:1]
    given = np.mean([whole.probabilities(cache.features("test", name)[judge]) for name in shown], axis=0)
    answers: Correct = given.argmax(axis=1) == cache.targets("test")[judge]
    return answers


SECTIONS = (views,)
