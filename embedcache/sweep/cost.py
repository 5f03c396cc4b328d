"""What a grid costs, roughly: so that nobody starts days of training by accident."""

from __future__ import annotations

import time

import numpy as np

from embedcache.errors import SweepError
from embedcache.heads import build_head
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.grid import Grid
from embedcache.sweep.problem import Problem
from embedcache.wording import counted, duration

ASK_ABOVE = 10_000
"""More configurations than this are not run without a yes."""
_FLOPS = 1e11
"""What two modest cores do in a second, in products of the size that heads need."""
_STEPS = 8
"""What the convex solver takes for a penalty and a fold: 3 for a strong one, 30 for a weak one that separates much."""
_MINIBATCH = 0.75
"""The share of that speed that is left in training by minibatches."""
_SEARCHED = 0.35
"""The share that is left in a search for neighbours."""
_STEP = 1e-4
"""Seconds of a step of a head in a small stack beside its products."""


def refuse_too_many(problem: Problem, grid: Grid, random: int | None, yes: bool) -> None:
    """Raise ``SweepError`` with count and estimate for a grid that nobody means to run by accident."""
    count = len(grid) if random is None else min(len(grid), random)
    if count <= ASK_ABOVE or yes:
        return
    fits = count * len(problem.folds)
    seconds = fits * float(np.mean([seconds_of(problem, drawn) for drawn in grid.sample()]))
    raise SweepError(
        f"{counted(count, 'configuration')} on {counted(len(problem.folds), 'fold')} are "
        f"{counted(fits, 'head')}, about {duration(seconds)}: "
        "draw some with --random 50, name fewer values, or pass --yes to train them all"
    )


def seconds_of(problem: Problem, configuration: Configuration) -> float:
    """Return roughly how many seconds one fold of a configuration takes on two cores."""
    feature = problem.cache.feature(configuration.feature)
    rows, outputs = len(problem), len(problem.class_names)
    if configuration.head.engine == "sklearn" and configuration.head.kind == "knn":
        return 2 * problem.mean_train_rows * problem.mean_score_rows * feature.dim / (_SEARCHED * _FLOPS)
    if configuration.head.engine == "sklearn":
        return 0.0 if configuration.head.kind == "majority" else 1.0
    if configuration.train.solver == "convex":
        return 0.002 + 4 * _STEPS * rows * feature.dim * outputs / _FLOPS
    size = sum(parameter.numel() for parameter in build_head(configuration.head, feature, outputs).parameters())
    beside = configuration.head.kind == "layer-concat"  # all layers in one product
    vectors = 1 if beside else {"pooled": 1, "layers": feature.layers, "tokens": 32}[feature.kind]
    rows = int(problem.mean_train_rows)
    steps = -(-rows // configuration.train.batch_size)
    epochs = configuration.train.epochs_of(steps)
    return epochs * (6 * rows * size * vectors / (_MINIBATCH * _FLOPS) + steps * _STEP)


def speed() -> float:
    """Return how much faster this machine is than the one that the estimates are of, measured by a few products."""
    a, b = np.ones((1024, 384), np.float32), np.ones((384, 256), np.float32)
    a @ b
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(3):
            a @ b
        best = min(best, time.perf_counter() - begun)
    return 3 * 2 * a.size * b.shape[1] / best / _FLOPS
