"""What a grid costs, roughly: so that nobody starts days of training by accident."""

from __future__ import annotations

import numpy as np

from embedcache.errors import SweepError
from embedcache.heads import build_head
from embedcache.sweep.configuration import Configuration
from embedcache.sweep.grid import Grid
from embedcache.sweep.problem import Problem
from embedcache.wording import counted, duration

ASK_ABOVE = 10_000
"""More configurations than this are not run without a yes."""
_FLOPS = 3e10
"""What a modest core does in a second, for an estimate of days, not of seconds."""


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
    if configuration.head.engine == "sklearn":
        return 1.0
    if configuration.train.solver == "convex":
        return 4 * 60 * rows * feature.dim * outputs / _FLOPS
    size = sum(parameter.numel() for parameter in build_head(configuration.head, feature, outputs).parameters())
    vectors = {"pooled": 1, "layers": feature.layers, "tokens": 32}[feature.kind]
    epochs = configuration.train.epochs_of(-(-rows // configuration.train.batch_size))
    return 6 * rows * size * vectors * epochs / _FLOPS
