"""Rows, targets and weights as the solver takes them, standardised by arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.errors import FeatureError, InputError, SpecError, TrainingError
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Flags, Floats, Task
from embedcache.threads import blocks
from embedcache.train.data import rounding

NEVER = -1e4
"""The bias of a class that no training row has: its probability is 0. The optimum itself would be minus infinity."""

_OFFSET = 100.0  # means larger than this many deviations lose digits of the gradient in float32


@dataclass(frozen=True, eq=False)
class Solution:
    """A linear head at the optimum, for raw features: logits are ``x @ weight.T + bias``.

    Attributes:
        weight: float64 [C, D]. Of two classes the rows are opposite: ``weight[1] - weight[0]`` is scikit-learn's.
        bias: float64 [C].
        l2: the strength of the penalty.
        loss: the objective there, a sum over rows and not a mean.
        gradient_norm: the Euclidean norm of its gradient.
        iterations: steps that were taken.
        converged: whether the estimated distance to the optimum is within the tolerance.
    """

    weight: Floats
    bias: Floats
    l2: float
    loss: float
    gradient_norm: float
    iterations: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Design:
    """K problems over the same N rows.

    Attributes:
        x: float32 or float64 [N, D].
        mean: float64 [D], subtracted from every row; it conditions the problem and leaves the optimum where it is.
        shift: float64 [D], what of the mean is still in ``x``: all of it, or nothing where ``x`` is a centred copy.
        scale: float64 [K, D], standard deviations of the training rows of each problem; None for raw features.
        y: int64 [N] of classes, or float [N, C] of labels or values.
        weight: float64 [K, N], 0 where a row is held out; None where each row counts once.
        on: float64 [C], the weight of each label where it is on; None for 1.
        softmax: whether columns compete, or each has a sigmoid of its own.
        columns: columns of the parameters: C, and 1 for two classes.
        problems: K.
        absent: bool [K, C], classes that no training row has.
    """

    x: Array
    mean: Floats
    shift: Floats
    scale: Floats | None
    y: Array
    weight: Floats | None
    on: Floats | None
    softmax: bool
    columns: int
    problems: int
    absent: Flags

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of the parameters (a bias after D features) and columns."""
        return self.x.shape[1] + 1, self.columns

    def mass(self, problem: int) -> Floats:
        """Return the weight of each row in one problem, float64 [N]."""
        return np.ones(len(self.x)) if self.weight is None else self.weight[problem]

    def scale_of(self, problem: int) -> Floats:
        """Return the standard deviations that one problem divides by, float64 [D]."""
        return np.ones(self.x.shape[1]) if self.scale is None else self.scale[problem]

    def start(self, problem: int) -> Floats:
        """Return parameters [D + 1, columns] without features: the best that a bias alone can do."""
        point = np.zeros(self.shape)
        mass = self.mass(problem)
        if self.softmax:
            share = np.bincount(self.y, mass, self.columns)
            seen = share > 0
            bias = np.log(np.where(seen, share, 1.0))
            # -80 and not NEVER: far below any other class, and yet a normal number in float32 after exp.
            point[-1] = np.where(seen, bias, bias[seen].max() - 80.0) - bias[seen].max()
            return point
        on, off = self.on_and_off(mass)
        with np.errstate(divide="ignore"):
            point[-1] = np.clip(np.log(on) - np.log(off), -80.0, 80.0)
        return point

    def on_and_off(self, mass: Floats) -> tuple[Floats, Floats]:
        """Return the weight of the rows where each label is on, and where it is off, float64 [columns]."""
        on = mass @ self.y
        off = mass.sum() - on
        return (on if self.on is None else on * self.on), off

    def to_point(self, solution: Solution, problem: int) -> Floats:
        """Return parameters [D + 1, columns] of a head for raw features."""
        weight, bias = solution.weight, solution.bias
        if weight.shape != (max(self.absent.shape[1], self.columns), self.x.shape[1]):
            raise SpecError(
                f"start has a weight {weight.shape}: expected {(self.absent.shape[1], self.x.shape[1])}, "
                "of a solution of the same problem"
            )
        if len(weight) != self.columns:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        point = np.vstack([weight.T * self.scale_of(problem)[:, None], bias + weight @ self.mean])
        if self.softmax:
            seen = ~self.absent[problem]
            top = point[-1, seen].max()
            # A class without rows, or one that float32 would round to 0, starts where ``start`` puts it.
            gone = ~seen | (point[-1] < top - 80.0)
            point[:, gone] = 0.0
            point[-1, gone] = self.start(problem)[-1, gone] + top
        return point

    def to_head(self, point: Floats, problem: int) -> tuple[Floats, Floats]:
        """Return the weight [C, D] and bias [C] for raw features."""
        weight = np.ascontiguousarray((point[:-1] / self.scale_of(problem)[:, None]).T)
        bias = point[-1] - weight @ self.mean
        if self.softmax:
            seen = ~self.absent[problem]
            # Softmax ignores what is added to all classes: rounding alone decides it, and a mean of 0 has least norm.
            weight[seen] -= weight[seen].mean(axis=0)
            bias[seen] -= bias[seen].mean()
            weight[~seen], bias[~seen] = 0.0, NEVER
        elif self.columns != self.absent.shape[1]:
            weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return weight, bias


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring rows with a weight in the same problems: bool [K], and whether each weight there is 1."""

    rows: slice
    inside: Flags
    plain: bool


_WORTH = 0.05  # of the work saved, from which on rows are put in order
_MOST_COPIED = 1 << 28  # numbers: 1 GB


def segments(of: Design) -> tuple[Array, Array, Floats | None, list[Segment]]:
    """Return features, targets and weights with rows in an order in which those that a problem leaves out are together.

    A fold in five is a fifth of all products: nothing is computed of the rows that a problem leaves out.
    """
    n, weight = len(of.x), of.weight
    if weight is None:
        return of.x, of.y, None, [Segment(slice(0, n), np.ones(of.problems, bool), True)]
    weight = np.broadcast_to(weight, (of.problems, n))
    inside = weight > 0
    order, which = by_problems(inside)
    ordered = bool((np.diff(order) == 1).all())
    if 1 - inside.mean() < _WORTH or n < 64 * (which.max() + 1) or (of.x.size > _MOST_COPIED and not ordered):
        return of.x, of.y, weight, [Segment(slice(0, n), np.ones(of.problems, bool), False)]
    ends = np.cumsum(np.bincount(which))
    weight = weight[:, order]
    out = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        own = inside[:, order[start]]
        out.append(Segment(slice(int(start), int(end)), own, bool((weight[own, start:end] == 1).all())))
    return of.x if ordered else of.x[order], of.y[order], weight, out


def by_problems(inside: Flags) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the order that puts rows in the same of K problems together, int64 [N], and the group of each row.

    ``inside`` is bool [K, N]. Features in this order need no copy in it.
    """
    _, which = np.unique(np.packbits(inside, axis=0), axis=1, return_inverse=True)
    which = which.reshape(-1)
    return np.argsort(which, kind="stable"), which


def design(
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    task: Task,
    outputs: int,
    sample_weight: npt.ArrayLike | None = None,
    class_weight: npt.ArrayLike | str | None = None,
    masks: Flags | None = None,
    standardize: bool = False,
) -> Design:
    """Check everything and return the problems; ``masks`` bool [K, N] says which rows each problem trains on.

    Raises ``FeatureError``, ``InputError``, ``SpecError`` and ``TrainingError`` as ``solve`` does.
    """
    rows = _rows(x)
    labels = _targets(y, len(rows), task, outputs)
    weight = _row_weights(sample_weight, len(rows))
    masses, on = _masses(labels, weight, task, outputs, class_weight, masks)
    absent = _absent(labels, masses, task, outputs)
    scale: Floats | None = None
    mean = _mean(rows)
    if standardize:
        # Weights of classes change the loss of a row, and not what its features are standardised by.
        unclassed = weight if masks is None else masks * (1.0 if weight is None else weight)
        mean, scale = _moments(rows, mean, np.ones((1, len(rows))) if unclassed is None else np.atleast_2d(unclassed))
        scale = np.broadcast_to(scale, (len(absent), rows.shape[1]))
    rows, shift = _without_offset(rows, mean)
    # Of two classes one logit is enough, and its weights are what scikit-learn penalises.
    softmax = task is CLASSIFICATION and outputs > 2
    target: Array = labels
    if not softmax:
        target = (
            np.asarray(labels == 1, np.float64)[:, None] if task is CLASSIFICATION else np.asarray(labels, np.float64)
        )
    columns = outputs if softmax else target.shape[1]
    return Design(rows, mean, shift, scale, target, masses, on, softmax, columns, len(absent), absent)


def _rows(given: npt.ArrayLike) -> Array:
    x = np.asarray(given)
    if x.ndim != 2 or not x.shape[1]:
        raise FeatureError(f"features are {list(x.shape)}: the convex solver needs one vector a row, [N, D]")
    if not len(x):
        raise TrainingError("there is no training row")
    if x.dtype.kind not in "fiu":
        raise FeatureError(f"features are {x.dtype}: expected numbers")
    return np.ascontiguousarray(x, x.dtype if x.dtype in (np.float32, np.float64) else np.float32)


def _targets(given: npt.ArrayLike, n: int, task: Task, outputs: int) -> Array:
    y = np.asarray(given)
    shape = task.target_shape(n, outputs)
    if task is REGRESSION and y.ndim == 1 and outputs == 1:
        y = y[:, None]
    if y.shape != shape:
        raise InputError(f"targets of {task} are {list(shape)} for {n} rows and {outputs} outputs, got {list(y.shape)}")
    if task is REGRESSION:
        values: Array = y.astype(np.float64)
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise InputError(f"row {bad} has a target that is not finite: give it a number, or leave the row out")
        return values
    if task is CLASSIFICATION and outputs < 2:
        raise SpecError(f"a classification has two classes or more, and outputs is {outputs}")
    most = outputs - 1 if task is CLASSIFICATION else 1
    if y.dtype.kind not in "iub" or (y.size and (y.min() < 0 or y.max() > most)):
        raise InputError(f"targets of {task} are whole numbers from 0 to {most}, got {y.dtype} {y.min()} to {y.max()}")
    return np.asarray(y, np.int64 if task is CLASSIFICATION else np.uint8)


def _row_weights(sample_weight: npt.ArrayLike | None, n: int) -> Floats | None:
    if sample_weight is None:
        return None
    weight = np.asarray(sample_weight, np.float64)
    if weight.shape != (n,) or not np.isfinite(weight).all() or weight.min() < 0 or not weight.any():
        raise SpecError(f"sample_weight: expected {n} numbers of 0 or more, and one above 0")
    return weight


def _masses(
    y: Array,
    rows: Floats | None,
    task: Task,
    outputs: int,
    given: npt.ArrayLike | str | None,
    masks: Flags | None,
) -> tuple[Floats | None, Floats | None]:
    """Return the weights of rows [K, N] in each problem, classes considered, and those of labels that are on [C]."""
    mass = None if rows is None else rows[None]
    if masks is not None:
        mass = masks.astype(np.float64) if mass is None else masks * mass
    if given is None:
        return mass, None
    if task is REGRESSION:
        raise SpecError("class_weight is for classes, and this is a regression: drop it")
    if isinstance(given, str):
        if given != "balanced" or task is not CLASSIFICATION:
            raise SpecError(f"class_weight is {given!r}: expected a weight for each class (or, of one label, balanced)")
        mass = np.ones((1, len(y))) if mass is None else mass
        counts = np.stack([np.bincount(y, of_problem, outputs) for of_problem in mass])
        seen = (counts > 0).sum(axis=1, keepdims=True)
        balanced = counts.sum(axis=1, keepdims=True) / (seen * np.where(counts > 0, counts, 1.0))
        return mass * balanced[:, y], None
    weights = np.asarray(given, np.float64)
    if weights.shape != (outputs,) or not np.isfinite(weights).all() or weights.min() < 0:
        raise SpecError(f"class_weight: expected {outputs} numbers of 0 or more")
    if task is MULTILABEL:
        return mass, weights
    return (weights[y][None] if mass is None else mass * weights[y]), None


def _absent(y: Array, masses: Floats | None, task: Task, outputs: int) -> Flags:
    masses = np.ones((1, len(y))) if masses is None else masses
    absent = np.zeros((len(masses), outputs), bool)
    for problem, mass in enumerate(masses):
        where = f"fold {problem}: " if len(masses) > 1 else ""
        if not mass.any():
            raise TrainingError(f"{where}there is no training row with a weight above 0")
        if task is CLASSIFICATION:
            absent[problem] = np.bincount(y, mass, outputs) == 0
            if outputs - absent[problem].sum() < 2:
                only = int(np.flatnonzero(~absent[problem])[0])
                raise TrainingError(f"{where}every training row is of class {only}: a head needs two classes or more")
    return absent


def _mean(x: Array) -> Floats:
    """Return the mean of each feature. Its digits do not matter to the optimum: it is only subtracted and added."""
    with np.errstate(all="ignore"):
        mean = np.asarray((np.full(len(x), 1 / len(x), x.dtype) @ x), np.float64)
    if not np.isfinite(mean).all():  # a sum of finite numbers may overflow, so look at the rows before blaming them
        for part in blocks(len(x), x.shape[1]):
            bad = ~np.isfinite(x[part]).all(axis=1)
            if bad.any():
                row = part.start + int(np.flatnonzero(bad)[0])
                column = int(np.flatnonzero(~np.isfinite(x[row]))[0])
                raise FeatureError(
                    f"row {row} has the value {x[row, column]} in feature {column}: expected finite numbers; "
                    "leave the row out or extract it again"
                )
        raise FeatureError("features are so large that their mean overflows: scale them down")
    return mean


def _moments(x: Array, near: Floats, mass: Floats) -> tuple[Floats, Floats]:
    """Return the mean over all rows [D] and the deviations of each problem [K, D]; 1 for a constant feature."""
    total = mass.sum(axis=1, keepdims=True)
    first, second = np.zeros((len(mass), x.shape[1])), np.zeros((len(mass), x.shape[1]))
    for part in blocks(len(x), x.shape[1]):
        gap = x[part].astype(np.float64) - near
        first += mass[:, part] @ gap
        second += mass[:, part] @ np.square(gap, out=gap)
    first /= total
    variance = second / total - first**2
    eps = np.finfo(np.float64).eps
    # As in scikit-learn's StandardScaler: what rounding leaves is not variance. `near` comes from float32 sums.
    noise = total * eps * (second / total) + (total * eps * (near + first)) ** 2
    variance[variance <= noise] = 0.0
    deviation, mean = np.sqrt(variance), near + first.mean(axis=0)
    for of_problem in deviation:
        of_problem[of_problem <= rounding(mean, of_problem, x.dtype)] = 1.0
    return mean, deviation


def _without_offset(x: Array, mean: Floats) -> tuple[Array, Floats]:
    """Return rows and what of the mean is in them: a centred copy where float32 would lose the features' digits."""
    sample = x[:: max(1, len(x) // 512)]
    spread = np.asarray(sample, np.float64).std(axis=0)
    if (np.abs(mean) <= _OFFSET * spread).all():
        return x, mean
    centred = np.empty_like(x)
    for part in blocks(len(x), x.shape[1]):
        centred[part] = x[part] - mean
    return centred, np.zeros_like(mean)


def checked_l2(l2: float) -> float:
    """Return the strength of the penalty. Raises ``SpecError`` where it is negative or no number."""
    value = float(l2)
    if not np.isfinite(value) or value < 0:
        raise SpecError(f"l2 is {l2}: expected a positive number")
    return value


def checked_masks(given: npt.ArrayLike, n: int) -> Flags:
    """Return the training rows of each fold, bool [K, N], from numbers of folds [N] or from such masks."""
    folds = np.asarray(given)
    if folds.dtype == bool and folds.ndim == 2 and folds.shape[1] == n and len(folds):
        return np.asarray(folds)
    if folds.shape != (n,) or folds.dtype.kind not in "iu":
        raise SpecError(f"folds: expected {n} whole numbers, or the training rows of each fold as bool [K, {n}]")
    count = int(folds.max()) + 1  # -1 counts for none
    if count < 1 or len(np.unique(folds[folds >= 0])) != count:
        raise SpecError("folds: expected the numbers 0 to K - 1, each at least once (-1: rows that all folds train on)")
    return np.asarray(folds[None] != np.arange(count)[:, None])


def checked_l2s(values: Sequence[float]) -> list[float]:
    """Return the strengths of a path, checked. Raises ``SpecError`` for none."""
    strengths = [checked_l2(value) for value in values]
    if not strengths:
        raise SpecError("a path needs at least one l2")
    return strengths
