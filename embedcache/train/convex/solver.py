"""One optimum, a path of penalties, and a path for each of several folds.

Products are in float32 first. Where its rounding could be felt at the tolerance (weak penalties, large features,
float64 features) the walk goes on in float64 from there, which takes a step or two: most work is done at the speed of
float32, and the optimum is that of float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError
from embedcache.spec import TaskName
from embedcache.task import REGRESSION, Task, task_named
from embedcache.train.convex.curvature import Curvature
from embedcache.train.convex.descent import Walk, descend
from embedcache.train.convex.design import (
    Design,
    Solution,
    checked_l2,
    checked_l2s,
    checked_masks,
    design,
)
from embedcache.train.convex.objective import Objective
from embedcache.train.convex.squared import squares
from embedcache.train.convex.workers import Workers, workers

if TYPE_CHECKING:
    from typing_extensions import Unpack

_FINEST = 1e-9
"""The tolerance to which float32 is taken: below, its rounding would be walked in until no step is left."""


class _Needed(TypedDict):
    task: Task | TaskName
    outputs: int


class Options(_Needed, total=False):
    """What ``solve``, ``path`` and ``path_folds`` are told of a problem.

    ``task`` and ``outputs`` are needed; see ``solve`` for each.
    """

    sample_weight: npt.ArrayLike | None
    class_weight: npt.ArrayLike | str | None
    standardize: bool
    tolerance: float
    max_iterations: int


def solve(
    x: npt.ArrayLike, y: npt.ArrayLike, *, l2: float, start: Solution | None = None, **options: Unpack[Options]
) -> Solution:
    """Return the linear head at the optimum. The same arguments give the same bits, on any number of threads.

    Args:
        x: features [N, D], float32 or float64.
        y: int64 [N] of classes 0 to ``outputs - 1``, uint8 [N, C] of labels, or float [N, R] of values.
        l2: strength of the penalty on the weights, beside the *sum* of losses; scikit-learn's ``1 / C``.
        start: a solution of a similar problem to start from.
        task: which loss: multinomial logistic, logistic for each label, or half the squared error.
        outputs: C or R. Classes that no training row has get the bias ``NEVER``.
        sample_weight: float [N]; a row of weight 2 counts as two.
        class_weight: float [C], or ``balanced``; for labels, the weight of a row where the label is on.
        standardize: penalise the weights of features scaled to variance 1, as ``StandardScaler`` before the head does.
        tolerance: the estimated gap to the optimal loss, relative to it, at which to stop; 1e-9 unless given.
        max_iterations: steps at most, 1000 unless given; ``converged`` tells.

    Raises ``FeatureError`` for features that are not finite (naming the row) or not [N, D], ``InputError`` for targets
    that do not fit, ``SpecError`` for a setting that cannot be (``l2=0`` of a logistic loss, whose optimum need not be
    finite, among them), ``TrainingError`` for no rows or one class only.
    """
    return _solve(x, y, [checked_l2(l2)], options, starts=None if start is None else [start])[0][0]


def path(x: npt.ArrayLike, y: npt.ArrayLike, l2s: Sequence[float], **options: Unpack[Options]) -> list[Solution]:
    """Return ``solve`` for each penalty, in the order given; each starts at the next stronger one's solution.

    Raises what ``solve`` raises.
    """
    return [solutions[0] for solutions in _solve(x, y, checked_l2s(l2s), options)]


def path_folds(
    x: npt.ArrayLike, y: npt.ArrayLike, l2s: Sequence[float], folds: npt.ArrayLike, **options: Unpack[Options]
) -> list[list[Solution]]:
    """Return for each penalty, in the order given, the solution of each of K folds, trained on the other folds' rows.

    The folds are solved side by side in the same matrix products. Standardisation and balanced class weights are those
    of each fold's own training rows.

    Args:
        folds: int [N], the fold that holds each row out, 0 to K - 1 (-1: none does); or the training rows, bool [K, N].

    Other arguments and what is raised are as for ``solve``. The tolerance is one for choosing a penalty: 1e-7.
    """
    masks = checked_masks(folds, len(np.asarray(x)))
    return _solve(x, y, checked_l2s(l2s), {**options, "tolerance": options.get("tolerance", 1e-7)}, masks=masks)


def _solve(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    l2s: list[float],
    options: Options,
    *,
    starts: list[Solution] | None = None,
    masks: npt.NDArray[np.bool_] | None = None,
) -> list[list[Solution]]:
    """Return solutions by penalty and problem."""
    tolerance, most = options.get("tolerance", 1e-9), options.get("max_iterations", 1000)
    if not tolerance > 0 or most < 1:
        raise SpecError(f"tolerance is {tolerance} and max_iterations {most}: expected positive numbers")
    rows = {name: value for name, value in options.items() if name not in ("tolerance", "max_iterations")}
    with workers() as threads:
        made = design(x, y, masks=masks, **rows)  # type: ignore[arg-type]  # what is left of the options
        if task_named(options["task"]) is REGRESSION:
            problems = squares(made, threads)
            return [[problem.solve(l2) for problem in problems] for l2 in l2s]
        return _descended(made, l2s, starts, tolerance, most, threads)


def _descended(
    made: Design,
    l2s: list[float],
    starts: list[Solution] | None,
    tolerance: float,
    most: int,
    threads: Workers,
) -> list[list[Solution]]:
    if min(l2s) == 0:
        raise SpecError(
            "l2 is 0: a logistic loss then has no finite optimum where classes can be separated; "
            "give it a small positive number"
        )
    curvature, quick = Curvature(made, threads), Objective(made, np.float32, threads)
    exact: Objective | None = None
    points = [
        made.start(problem) if starts is None else made.to_point(starts[problem], problem)
        for problem in range(made.problems)
    ]
    # What rounding leaves of the losses even in float64: a probability of 1 is told from 1 - 1e-16 by nobody.
    floors = [float(np.finfo(np.float64).eps * made.mass(problem).sum()) for problem in range(made.problems)]
    walks = [
        Walk(problem, point, max(l2s), tolerance, floor)
        for problem, (point, floor) in enumerate(zip(points, floors, strict=True))
    ]
    # How far from the optimum rounding alone can keep float32, were all of its error where only the penalty curves.
    noise = np.finfo(np.float32).eps ** 2 * len(made.x) * curvature.spread
    solutions: dict[float, list[Solution]] = {}
    for l2 in sorted(set(l2s), reverse=True):
        for walk in walks:
            walk.again(l2)
            walk.tolerance = max(tolerance, _FINEST)
        descend(quick, curvature, walks, most)
        for walk in walks:
            walk.tolerance = tolerance
        if (
            made.x.dtype == np.float64
            or tolerance < _FINEST
            or noise / l2 > tolerance
            or any(walk.stuck for walk in walks)
        ):
            exact = exact or Objective(made, np.float64, threads)
            descend(exact, curvature, walks, most, renew=False)
        solutions[l2] = [_solution(made, walk) for walk in walks]
    return [solutions[l2] for l2 in l2s]


def _solution(made: Design, walk: Walk) -> Solution:
    weight, bias = made.to_head(walk.point, walk.problem)
    norm = float(np.linalg.norm(walk.gradient))
    return Solution(weight, bias, walk.l2, walk.loss, norm, walk.iterations, walk.converged)
