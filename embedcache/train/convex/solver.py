"""One optimum, a path of penalties, and a path for each of several folds; squared errors in closed form.

One eigendecomposition of the centred moments of each problem serves every penalty (Hastie, Tibshirani and Friedman
2009, equation 3.47). The moments of a fold's training rows are those of all rows less those of the rows it holds out.
Of features more than rows it is the rows' inner products that are decomposed: the same eigenvectors, but for those that
no row has a part in.

Products are in float32 first. Where its rounding could be felt at the tolerance (weak penalties, large features,
float64 features) the walk goes on in float64 from there, which takes a step or two: most work is done at the speed of
float32, and the optimum is that of float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError
from embedcache.spec import HeadSpec, TrainSpec
from embedcache.task import REGRESSION, Flags, Floats, Task
from embedcache.threads import Workers, workers
from embedcache.train.convex.curvature import Curvature
from embedcache.train.convex.descent import Objective, Walk, descend
from embedcache.train.convex.design import (
    Design,
    Solution,
    checked_l2,
    checked_l2s,
    checked_masks,
    design,
    segments,
)
from embedcache.train.data import LabelledRows, class_weights
from embedcache.train.result import Fitted

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Squared errors with a penalty, `sum_i w_i ||y_i - W x_i - b||^2 / 2 + l2 / 2 ||W||^2`, in closed form and float64.


_WIDE = 1024
"""Features from which on the inner products of fewer rows are decomposed: nobody could wait for those of 50,000."""


@dataclass(frozen=True, eq=False)
class Squares:
    """The problem in the eigenvectors of its own moments."""

    design: Design
    problem: int
    mass: float
    centre: Floats  # [D + R], of features and targets, about the design's mean
    values: Floats  # [E], D of them or, of fewer rows, N
    vectors: Floats  # [D, E]
    cross: Floats  # [E, R], moments of eigenvectors and targets
    total: float  # the squared error of the mean

    def solve(self, l2: float) -> Solution:
        """Return the optimum; the solution of least norm where ``l2`` is 0 and there are several."""
        width = len(self.vectors)
        below = self.values + l2
        # Directions that neither rows nor penalty curve stay at 0: that is the solution of least norm.
        small = below <= max(len(self.design.x), width) * np.finfo(np.float64).eps * max(self.values.max(initial=0), l2)
        turned = np.where(small, 0.0, 1 / np.where(small, 1.0, below))[:, None] * self.cross
        gradient = self.values[:, None] * turned - self.cross + l2 * turned
        point = np.empty(self.design.shape)
        point[:-1] = self.vectors @ turned
        scaled = self.centre[:width] / self.design.scale_of(self.problem)
        point[-1] = self.centre[width:] - scaled @ point[:-1]
        weight, bias = self.design.to_head(point, self.problem)
        error = self.total - 2 * np.vdot(turned, self.cross) + np.vdot(turned, self.values[:, None] * turned)
        loss = max(0.0, float(error)) / 2 + l2 / 2 * float(np.vdot(turned, turned))
        return Solution(weight, bias, l2, loss, float(np.linalg.norm(gradient[~small])), 1, True)


def squares(design: Design, workers: Workers) -> list[Squares]:
    """Return each problem, its moments taken in one reading of the rows."""
    masses = np.ones((1, len(design.x))) if design.weight is None else design.weight
    width = design.x.shape[1]
    if width > max(_WIDE, len(design.x)):
        return [_wide(design, problem, mass) for problem, mass in enumerate(masses)]
    rows_of = [np.arange(len(design.x))]
    if len(masses) > 1:
        # Few rows are held out: moments of those, to be subtracted, cost less than moments of those that are not.
        whole = masses.max(axis=0)
        rows_of += [np.flatnonzero(mass != whole) for mass in masses]
        masses = np.vstack([whole[None], [whole - mass for mass in masses]])

    def moments(mass: Floats, rows: npt.NDArray[np.intp]) -> Floats:
        def part(block: slice) -> Floats:
            own = rows[block]
            x = design.x[own].astype(np.float64) - design.shift
            values = np.hstack([x, design.y[own], np.ones((len(own), 1))])
            return np.asarray((values * mass[own, None]).T @ values)

        total = np.zeros((width + design.columns + 1,) * 2)
        for product in workers.each(len(rows), width, part):
            total += product
        return total

    sums = [moments(mass, rows) for mass, rows in zip(masses, rows_of, strict=True)]
    if len(sums) > 1:
        sums = [sums[0] - held_out for held_out in sums[1:]]
    return [_squares(design, problem, moments) for problem, moments in enumerate(sums)]


def _squares(design: Design, problem: int, moments: Floats) -> Squares:
    width, mass = design.x.shape[1], float(moments[-1, -1])
    centre = moments[-1, :-1] / mass
    inner = moments[:-1, :-1] - mass * np.outer(centre, centre)
    scale = design.scale_of(problem)
    values, vectors = np.linalg.eigh(inner[:width, :width] / np.outer(scale, scale))
    cross = vectors.T @ (inner[:width, width:] / scale[:, None])
    total = float(np.trace(inner[width:, width:]))
    return Squares(design, problem, mass, centre, np.maximum(values, 0), vectors, cross, total)


def _wide(design: Design, problem: int, masses: Floats) -> Squares:
    rows = np.flatnonzero(masses)
    own = masses[rows, None]
    mass = float(own.sum())
    x, y = design.x[rows].astype(np.float64) - design.shift, np.asarray(design.y[rows], np.float64)
    centre = np.concatenate([(own * x).sum(axis=0), (own * y).sum(axis=0)]) / mass
    x = (x - centre[: x.shape[1]]) / design.scale_of(problem) * np.sqrt(own)
    y = (y - centre[x.shape[1] :]) * np.sqrt(own)
    values, vectors = np.linalg.eigh(x @ x.T)
    curved = values > len(rows) * np.finfo(np.float64).eps * values.max(initial=0)
    values, vectors = values[curved], vectors[:, curved]
    roots = np.sqrt(values)
    cross = roots[:, None] * (vectors.T @ y)
    return Squares(design, problem, mass, centre, values, x.T @ (vectors / roots), cross, float(np.vdot(y, y)))


_FINEST = 1e-9
"""The tolerance to which float32 is taken: below, its rounding would be walked in until no step is left."""


_CHOOSING, _FEW = 1e-6, 10_000


def choosing(rows: int) -> float:
    """Return the gap for each row, in nats, to which folds are solved; see ``pipelines/benchmark.py choices``.

    A millionth moves a fold's mean loss by a few ten-thousandths. Of fewer than 10,000 rows it is less in proportion:
    they cost little, and the loss out of fold moves by the root of the gap.
    """
    return _CHOOSING * min(1.0, rows / _FEW)


class _Needed(TypedDict):
    task: Task
    outputs: int


class Options(_Needed, total=False):
    """What ``solve``, ``path`` and ``path_folds`` are told of a problem.

    ``task`` and ``outputs`` are needed; see ``solve`` for each.
    """

    sample_weight: npt.ArrayLike | None
    class_weight: npt.ArrayLike | str | None
    standardize: bool
    tolerance: float
    gap: float
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
        gap: an estimated gap for each row, in nats, at which to stop as well; 0 unless given.
        max_iterations: steps at most, 1000 unless given; ``converged`` tells.

    Raises ``FeatureError`` for features that are not finite (naming the row) or not [N, D], ``InputError`` for targets
    that do not fit, ``SpecError`` for a setting that cannot be (``l2=0`` of a logistic loss, whose optimum need not be
    finite, among them), ``TrainingError`` for no rows or one class only.
    """
    return _all(x, y, [checked_l2(l2)], options, starts=None if start is None else [start])[0][0]


def path(x: npt.ArrayLike, y: npt.ArrayLike, l2s: Sequence[float], **options: Unpack[Options]) -> list[Solution]:
    """Return ``solve`` for each penalty, in the order given; each starts at the next stronger one's solution.

    Raises what ``solve`` raises.
    """
    return [solutions[0] for solutions in _all(x, y, checked_l2s(l2s), options)]


def path_folds(
    x: npt.ArrayLike, y: npt.ArrayLike, l2s: Sequence[float], folds: npt.ArrayLike, **options: Unpack[Options]
) -> list[list[Solution]]:
    """Return for each penalty, in the order given, the solution of each of K folds, trained on the other folds' rows.

    The folds are solved side by side in the same matrix products. Standardisation and balanced class weights are those
    of each fold's own training rows.

    Args:
        folds: int [N], the fold that holds each row out, 0 to K - 1 (-1: none does); or the training rows, bool [K, N].

    Other arguments and what is raised are as for ``solve``. Where neither tolerance nor gap is given, the gap is one
    for choosing a penalty, a millionth of a nat (see ``choosing``). Relative to the loss it would be ever finer where
    the loss goes to zero, as where a weak penalty separates the classes; what a fold's score can tell does not become
    finer with it.
    """
    solved = dict(walk_folds(x, y, l2s, folds, **options))
    return [solved[l2] for l2 in checked_l2s(l2s)]


def walk_folds(
    x: npt.ArrayLike, y: npt.ArrayLike, l2s: Sequence[float], folds: npt.ArrayLike, **options: Unpack[Options]
) -> Iterator[tuple[float, list[Solution]]]:
    """Yield what ``path_folds`` returns as it is solved: each penalty, strongest first, and the solutions of K folds.

    Who keeps none of them needs memory for one penalty only. While it waits to go on, BLAS has one thread.
    """
    masks = checked_masks(folds, len(np.asarray(x)))
    if "tolerance" not in options and "gap" not in options:
        options = {**options, "gap": choosing(masks.shape[1])}
    return _solved(x, y, checked_l2s(l2s), options, masks=masks)


def _all(
    x: npt.ArrayLike, y: npt.ArrayLike, l2s: list[float], options: Options, starts: list[Solution] | None = None
) -> list[list[Solution]]:
    solved = dict(_solved(x, y, l2s, options, starts=starts))
    return [solved[l2] for l2 in l2s]


def _solved(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    l2s: list[float],
    options: Options,
    *,
    starts: list[Solution] | None = None,
    masks: Flags | None = None,
) -> Iterator[tuple[float, list[Solution]]]:
    """Yield each penalty and the solutions by problem."""
    tolerance, most = options.get("tolerance", 1e-9), options.get("max_iterations", 1000)
    if not tolerance > 0 or most < 1:
        raise SpecError(f"tolerance is {tolerance} and max_iterations {most}: expected positive numbers")
    gap = options.get("gap", 0.0)
    if not gap >= 0:
        raise SpecError(f"gap is {gap}: expected a number of nats, 0 or more")
    rows = {name: value for name, value in options.items() if name not in ("tolerance", "gap", "max_iterations")}
    with workers() as threads:
        checked = design(x, y, masks=masks, **rows)  # type: ignore[arg-type]  # what is left of the options
        if options["task"] is REGRESSION:
            problems = squares(checked, threads)
            yield from ((l2, [problem.solve(l2) for problem in problems]) for l2 in sorted(set(l2s), reverse=True))
            return
        yield from _descended(checked, l2s, starts, tolerance, gap, most, threads)


def _descended(
    checked: Design,
    l2s: list[float],
    starts: list[Solution] | None,
    tolerance: float,
    gap: float,
    most: int,
    threads: Workers,
) -> Iterator[tuple[float, list[Solution]]]:
    if min(l2s) == 0:
        raise SpecError(
            "l2 is 0: a logistic loss then has no finite optimum where classes can be separated; "
            "give it a small positive number"
        )
    ordered = segments(checked)
    curvature, quick = Curvature(checked, threads), Objective(checked, np.float32, threads, ordered)
    exact: Objective | None = None
    points = [
        checked.start(problem) if starts is None else checked.to_point(starts[problem], problem)
        for problem in range(checked.problems)
    ]
    # What rounding leaves of the losses even in float64: a probability of 1 is told from 1 - 1e-16 by nobody.
    masses = [float(checked.mass(problem).sum()) for problem in range(checked.problems)]
    eps = float(np.finfo(np.float64).eps)
    walks = [
        Walk(problem, point, max(l2s), tolerance, gap * mass, eps * mass)
        for problem, (point, mass) in enumerate(zip(points, masses, strict=True))
    ]
    # How far from the optimum rounding alone can keep float32, were all of its error where only the penalty curves.
    noise = np.finfo(np.float32).eps ** 2 * len(checked.x) * curvature.spread
    for l2 in sorted(set(l2s), reverse=True):
        for walk in walks:
            walk.again(l2)
            walk.tolerance = max(tolerance, _FINEST)
        descend(quick, curvature, walks, most, threads)
        for walk in walks:
            walk.tolerance = tolerance
        felt = checked.x.dtype == np.float64 or tolerance < _FINEST or noise / l2 > tolerance
        if gap:
            felt = noise / l2 > gap * min(masses)
        if felt or any(walk.stuck for walk in walks):
            exact = exact or Objective(checked, np.float64, threads, ordered)
            descend(exact, curvature, walks, most, threads, renew=False)
        yield l2, [_solution(checked, walk) for walk in walks]


def _solution(checked: Design, walk: Walk) -> Solution:
    weight, bias = checked.to_head(walk.point, walk.problem)
    norm = float(np.linalg.norm(walk.gradient))
    return Solution(weight, bias, walk.l2, walk.loss, norm, walk.iterations, walk.converged)


# The convex solver as an engine of training: checked rows in, a fitted head out.


def fit_convex(rows: LabelledRows, head: HeadSpec, spec: TrainSpec) -> Fitted:
    """Return a linear head at the optimum; of ``spec`` it reads ``l2``, ``class_weight`` and ``standardize``.

    Raises ``SpecError`` for another head, ``FeatureError`` for features with several vectors a row, and what ``solve``
    raises.
    """
    if head.kind != "linear":
        raise SpecError(f"the convex solver is for linear heads, not {head.kind}: use the solver minibatch")
    x = rows.matrix("the convex solver")
    weights = class_weights([spec], rows.y, rows.task, rows.class_names)
    solution = solve(
        x, rows.y, task=rows.task, outputs=rows.outputs, l2=spec.l2, sample_weight=rows.weight,
        class_weight=None if weights is None else weights[0], standardize=spec.standardize,
        # Who gives float64 gets its digits: a head is as far from the optimum as the root of the gap, here 1e-10.
        tolerance=1e-20 if x.dtype == np.float64 else 1e-9,
    )  # fmt: skip
    notes: tuple[str, ...] = ()
    if not solution.converged:
        notes = (f"the solver stopped after {solution.iterations} iterations, short of the optimum",)
    entry = {
        "epoch": solution.iterations,
        "train_loss": solution.loss * rows.repeats / len(rows),
        "gradient_norm": solution.gradient_norm,
    }
    return Fitted({"output.weight": solution.weight, "output.bias": solution.bias}, history=[entry], notes=notes)
