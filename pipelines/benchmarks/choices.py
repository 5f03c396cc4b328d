"""What folds that are solved only as far as a choice needs change of the choice: nothing that could be told apart.

The sets are those that ``data/prepare.py`` makes, scikit-learn's digits, and 10,000 made-up rows of 150 classes;
``EMBEDCACHE_CHOICES`` names caches to use instead of the first, folders with colons between them.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.convex import data
from benchmarks.table import row

from embedcache.sweep.statistics import resampled_t_interval
from embedcache.task import CLASSIFICATION
from embedcache.train.convex import Solution, path_folds, solve

PENALTIES, FOLDS = np.logspace(2, -1, 16), 5
TOO_LOOSE = 1e-2  # nats a row: the planted fault


def sets() -> dict[str, tuple[Any, Any]]:
    """Features and classes, by name."""
    from sklearn.datasets import load_digits

    from embedcache import FeatureCache

    out = {}
    folders = [Path(path) for path in os.environ.get("EMBEDCACHE_CHOICES", "").split(":") if path]
    for cache in [FeatureCache.open(path) for path in folders] or _prepared():
        out[cache.path.name.removesuffix(".cache")] = (cache.arrays()[0], cache.targets())
    digits = load_digits()
    out["digits"] = (digits.data.astype(np.float32), digits.target)
    out["made up"] = data(10_000, 384, 150, 0.25)
    return {name: _of_enough_rows(np.asarray(x), np.asarray(y)) for name, (x, y) in out.items()}


def _prepared() -> list[Any]:
    from embedcache import extract

    sys.path.insert(0, str(Path(__file__).parents[2] / "data"))
    import prepare

    where = prepare.cache_directory()
    return [
        extract(prepare.prepare(name), output_dir=where / f"{name}.cache", text_column="text", label_column="label")
        for name in ("sms-spam", "movie-reviews", "trec")
    ]


def _of_enough_rows(x: Any, y: Any) -> tuple[Any, Any]:
    _, first = np.unique(x, axis=0, return_index=True)  # repeated lines would be in training and in the fold
    x, y = x[np.sort(first)], y[np.sort(first)]
    kept = np.bincount(y)[y] >= FOLDS
    return x[kept], np.unique(y[kept], return_inverse=True)[1]


def folds_of(y: Any, folds: int = FOLDS) -> Any:
    """The fold of each row, int [N]: each class dealt out at random."""
    generator = np.random.default_rng(0)
    out = np.empty(len(y), np.int64)
    for label in np.unique(y):
        rows = generator.permutation(np.flatnonzero(y == label))
        out[rows] = (np.arange(len(rows)) + label) % folds
    return out


def scores(solved: list[list[Solution]], x: Any, y: Any, folds: Any) -> Any:
    """Accuracy by penalty and fold, [P, K]."""
    out = np.zeros((len(solved), folds.max() + 1))
    for place, by_fold in enumerate(solved):
        for fold, found in enumerate(by_fold):
            held = folds == fold
            said = (x[held] @ found.weight.T.astype(np.float32) + found.bias.astype(np.float32)).argmax(axis=1)
            out[place, fold] = (said == y[held]).mean()
    return out


def reversed_pairs(tight: Any, loose: Any, rows: int) -> int:
    """How many pairs of penalties that the tight scores [P, K] tell apart are in the other order by the loose ones."""
    count = 0
    for one in range(len(tight)):
        for other in range(one):
            apart = tight[one] - tight[other]
            interval = resampled_t_interval(list(apart), rows * (1 - 1 / FOLDS), rows / FOLDS, 0.05)
            told = interval is not None and (interval[0] > 0 or interval[1] < 0)
            count += bool(told and np.sign(apart.mean()) != np.sign((loose[one] - loose[other]).mean()))
    return count


def choices() -> None:
    """The chosen penalty and the order of all, from folds as a sweep solves them and from tight ones."""
    for name, (x, y) in sets().items():
        folds, given = folds_of(y), {"task": CLASSIFICATION, "outputs": int(y.max()) + 1, "standardize": True}
        found: dict[str, Any] = {}
        for how, options in (("tight", {"tolerance": 1e-7}), ("sweep", {}), ("loose", {"gap": TOO_LOOSE})):
            begun = time.perf_counter()
            solved = path_folds(x, y, list(PENALTIES), folds, **given, **options)  # type: ignore[arg-type]
            steps = sum(each.iterations for by_fold in solved for each in by_fold)
            found[how] = (scores(solved, x, y, folds), steps, time.perf_counter() - begun)
        tight, sweep, loose = (found[how][0] for how in ("tight", "sweep", "loose"))
        at, mean = int(sweep.mean(axis=1).argmax()), tight.mean(axis=1)
        row(
            f"folds as a sweep solves them vs tight, {name}: {len(x):,} x {x.shape[1]}, {given['outputs']} classes",
            f"chosen {PENALTIES[at]:.3g}, tight {PENALTIES[int(mean.argmax())]:.3g} "
            f"({(mean.max() - mean[at]) * len(y):.0f} rows of {len(y):,} between them); "
            f"{reversed_pairs(tight, sweep, len(y))} pairs in another order; "
            f"scores differ by {np.abs(sweep - tight).mean(axis=1).max():.4f} at most; "
            f"{found['tight'][1] / found['sweep'][1]:.1f} times fewer steps, "
            f"{found['tight'][2] / found['sweep'][2]:.1f}x; "
            f"a gap of {TOO_LOOSE:g} differs by {np.abs(loose - tight).mean(axis=1).max():.4f}",
            "same choice, 0 pairs",
        )


def many(rows: int, width: int, classes: int, apart: float, strengths: Any, folds: int, tried: slice, bar: str) -> None:
    """Penalties x folds and a last fit against GridSearchCV, of which ``tried`` says the penalties that are timed."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = data(rows, width, classes, apart)
    fold = folds_of(y, folds)
    splits = [(np.flatnonzero(fold != each), np.flatnonzero(fold == each)) for each in range(folds)]
    given: Any = {"task": CLASSIFICATION, "outputs": classes, "standardize": True}
    begun = time.perf_counter()
    solved = path_folds(x, y, list(strengths), fold, **given)
    ours = scores(solved, x, y, fold).mean(axis=1)
    between = time.perf_counter()
    solve(x, y, l2=float(strengths[ours.argmax()]), start=solved[int(ours.argmax())][0], **given)
    last, seconds = time.perf_counter() - between, time.perf_counter() - begun
    os.environ["PYTHONWARNINGS"] = "ignore"
    grid = {"logisticregression__C": 1 / np.asarray(strengths)[tried]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begun = time.perf_counter()
        peer = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)), grid, cv=splits, n_jobs=2
        ).fit(x, y)
        of_peer = (time.perf_counter() - begun - peer.refit_time_) * len(strengths) / len(grid["logisticregression__C"])
    of_peer += peer.refit_time_
    part = "" if tried == slice(None) else f", its seconds from {len(grid['logisticregression__C'])} of them"
    row(
        f"{len(strengths)} penalties x {folds} folds, {rows:,} x {width}, {classes} classes, vs GridSearchCV("
        f"StandardScaler + LogisticRegression(max_iter=300), n_jobs=2){part}",
        f"{of_peer / seconds:.1f}x ({seconds:.1f} s, {last:.1f} s of it the last fit; {of_peer:.0f} s; "
        f"score {ours.max():.4f} and {peer.best_score_:.4f})",
        bar,
    )


def manyclasses() -> None:
    """16 penalties x 5 folds of 77 classes that separate, against GridSearchCV."""
    many(10_003, 384, 77, 0.28, PENALTIES, FOLDS, slice(None, None, 5), "4x, score no worse")


def manyrows() -> None:
    """Three penalties x 3 folds of 50,000 x 768 and 150 classes, against GridSearchCV."""
    many(50_000, 768, 150, 0.16, [1000.0, 100.0, 10.0], 3, slice(None), "3x, score no worse")


def thousand() -> None:
    """Peak memory of 5 folds x 16 penalties x 1,000 classes, 20,000 x 384, penalty by penalty as a sweep walks."""
    import resource

    from embedcache.train.convex import walk_folds

    x, y = data(20_000, 384, 1000, 0.3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    for _ in walk_folds(x, y, list(PENALTIES[:2]), folds_of(y), task=CLASSIFICATION, outputs=1000, standardize=True):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row(
        "peak memory of 5 folds x 1,000 classes, 20,000 x 384, two penalties of a path",
        f"{(after - before) / 2**20:.1f} GiB beside {before / 2**20:.1f}, {time.perf_counter() - begun:.0f} s",
        "a few GB",
    )


SECTIONS = (choices, manyclasses, manyrows, thousand)
