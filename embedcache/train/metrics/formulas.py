"""Predictions with their targets, and the metrics: each is a function from weights of rows to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError
from embedcache.task import CLASSIFICATION, EPSILON, MULTILABEL, REGRESSION, Array, Flags, Floats, Task
from embedcache.wording import counted

# Predictions beside the truth, and what is computed row by row.


KEEP = 1 << 23
"""Up to how many outputs the order of the rows is remembered, class by class."""


class Predictions:
    """The outputs of a head beside the targets, unlabelled rows left out.

    Attributes:
        task: what the targets mean.
        y: int64 [N], uint8 [N, C] or float64 [N, R].
        outputs: probabilities [N, C], or values [N, R].
        thresholds: [C], the probability at which a label of a multi-label row counts as on.
    """

    def __init__(
        self,
        task: Task,
        y: npt.ArrayLike,
        outputs: npt.ArrayLike,
        thresholds: Sequence[float] | Array | None = None,
    ) -> None:
        y, outputs = np.asarray(y), np.asarray(outputs)
        if task is REGRESSION:
            outputs = outputs[:, None] if outputs.ndim == 1 else outputs
            y = y[:, None] if y.ndim == 1 else y
        if outputs.ndim != 2 or y.shape != task.target_shape(*outputs.shape):
            raise SpecError(f"{task}: y {y.shape} does not fit outputs {outputs.shape}: expected one row for each")
        labelled = task.labelled(y)
        if not labelled.all():
            y, outputs = y[labelled], outputs[labelled]
        if task is CLASSIFICATION:
            y = y.astype(np.int64, copy=False)
            if len(y) and (int(y.min()) < 0 or int(y.max()) >= outputs.shape[1]):
                raise SpecError(f"a class is {int(y.max())} or {int(y.min())}, outputs have {outputs.shape[1]} columns")
        self.task = task
        self.y = y
        self.outputs = outputs
        self.thresholds = np.full(outputs.shape[1], 0.5) if thresholds is None else np.asarray(thresholds, np.float64)
        if self.thresholds.shape != outputs.shape[1:]:
            raise SpecError(f"{len(self.thresholds)} thresholds for {counted(outputs.shape[1], 'class')}")
        self._ranked: dict[int, Ranked] = {}
        self._areas: dict[int, tuple[float, float]] = {}

    @cached_property
    def finite(self) -> bool:
        """Whether every output is a number."""
        return bool(np.isfinite(self.outputs).all())

    @cached_property
    def predicted(self) -> Array:
        """The class of each row int64 [N], the labels bool [N, C], or the values."""
        return self.task.decide(self.outputs, self.thresholds)

    @cached_property
    def right(self) -> Array:
        """Which rows are classified rightly, float64 [N]."""
        return self.task.right(self.y, self.predicted)

    def areas(self, column: int) -> tuple[float, float]:
        """Return ROC-AUC and average precision of one class, each row counting once."""
        if column not in self._areas:
            self._areas[column] = areas(self.task.positive(self.y, column), self.outputs[:, column])
        return self._areas[column]

    def ranked(self, column: int) -> Ranked:
        """Return the rows in the order of their output for one class."""
        if column not in self._ranked:
            ranked = Ranked(self.task.positive(self.y, column), self.outputs[:, column])
            if self.outputs.size > KEEP:
                return ranked
            self._ranked[column] = ranked
        return self._ranked[column]


def weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Return the mean over rows of values [..., N] under weights [..., N]; NaN where no row has any."""
    total = weights.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((values * weights).sum(axis=-1) / total)


def areas(positive: Flags, score: Array) -> tuple[float, float]:
    """Return ROC-AUC and average precision where all rows weigh the same, NaN as in ``Ranked``.

    Only the two sides are sorted, and only the positives looked up: ten times as fast as ranking every row.
    """
    on, off = np.sort(score[positive]), np.sort(score[~positive])
    if not len(on):
        return float("nan"), float("nan")
    below, upto = np.searchsorted(off, on, "left"), np.searchsorted(off, on, "right")
    auc = float(below.sum() + upto.sum()) / (2 * len(on) * len(off)) if len(off) else float("nan")
    hits, falls = len(on) - np.searchsorted(on, on, "left"), len(off) - below
    return auc, float((hits / (hits + falls)).mean())


class Ranked:
    """Rows by falling score, so that the curves of any weights need no further sorting."""

    def __init__(self, positive: Flags, score: Array) -> None:
        self._order = np.argsort(-score)
        score = score[self._order]
        self._positive = positive[self._order]
        self._ends = np.flatnonzero(np.append(score[1:] != score[:-1], True))

    def _curve(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return the true and the false positives at every distinct score, from the highest down."""
        falling = weights[self._order]
        hits = np.cumsum(falling * self._positive)
        return hits[self._ends], (np.cumsum(falling) - hits)[self._ends]

    def roc_auc(self, weights: Floats) -> float:
        """Return the area under the ROC curve, NaN where one side has no weight."""
        hits, falls = self._curve(weights)
        if hits[-1] <= 0 or falls[-1] <= 0:
            return float("nan")
        before = np.concatenate([[0.0], hits[:-1]])
        return float(np.diff(falls, prepend=0.0) @ (hits + before) / (2 * hits[-1] * falls[-1]))

    def average_precision(self, weights: Floats) -> float:
        """Return the mean precision over the steps of recall, NaN without positives."""
        hits, falls = self._curve(weights)
        if hits[-1] <= 0:
            return float("nan")
        precision = hits / np.maximum(hits + falls, 1e-300)
        return float(np.diff(hits, prepend=0.0) @ precision / hits[-1])


Prepared = Callable[[Floats], float]

BINS = 15
"""How many bins of equal width the expected calibration error has, as in Guo et al. 2017."""


def _over_rows(values: Floats) -> Prepared:
    return lambda weights: float(weighted_mean(values, weights))


def mean_defined(values: Sequence[float] | Floats) -> float:
    """Return the mean of the values that are not NaN, NaN where all are."""
    kept = [float(value) for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def accuracy(predictions: Predictions) -> Prepared:
    """The share of rows that are wholly right."""
    return _over_rows(predictions.right)


def log_loss(predictions: Predictions) -> Prepared:
    """The mean of -log p of what is true, in nats."""
    return _over_rows(predictions.task.row_loss(predictions.y, predictions.outputs))


def brier(predictions: Predictions) -> Prepared:
    """The squared error of the probabilities (Brier 1950).

    Over classes summed, over labels averaged; halved for two classes.
    """
    p = predictions.outputs.astype(np.float64)
    if predictions.task is MULTILABEL:
        return _over_rows(np.square(p - predictions.y).mean(axis=1))
    p[np.arange(len(p)), predictions.y] -= 1
    return _over_rows(np.square(p).sum(axis=1) / (2 if p.shape[1] == 2 else 1))


def hamming(predictions: Predictions) -> Prepared:
    """The share of labels that are wrong."""
    return _over_rows((predictions.predicted != predictions.y).mean(axis=1))


def confidences(predictions: Predictions) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Return confidences, what came true, and bins, each flat: of the predicted class, or of every label."""
    if predictions.task is CLASSIFICATION:
        confidence, came_true = predictions.outputs.max(axis=1, initial=0.0).astype(np.float64), predictions.right
    else:
        confidence, came_true = predictions.outputs.astype(np.float64).ravel(), predictions.y.astype(np.float64).ravel()
    # Bins are (low, high], so that 1 belongs to the last; 0 goes to the first.
    return confidence, came_true, np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def ece(predictions: Predictions) -> Prepared:
    """The expected calibration error (Guo et al. 2017) over ``BINS`` bins of equal width."""
    confidence, came_true, bins = confidences(predictions)
    gap, repeats = came_true - confidence, len(confidence) // max(1, len(predictions.y))

    def error(weights: Floats) -> float:
        repeated = np.repeat(weights, repeats) if repeats > 1 else weights
        total = float(repeated.sum())
        return float(np.abs(np.bincount(bins, repeated * gap, BINS)).sum()) / total if total else math.nan

    return error


Counts = tuple[Floats, Floats, Floats]


def counts_of(predictions: Predictions) -> Callable[[Floats], Counts]:
    """Return a function from weights to (rows of each class, predicted rows, rightly predicted rows), each [C]."""
    classes = predictions.outputs.shape[1]
    if predictions.task is MULTILABEL:
        true, predicted = predictions.y.astype(np.float64), predictions.predicted.astype(np.float64)
        hits = true * predicted
        return lambda weights: (weights @ true, weights @ predicted, weights @ hits)

    def counts(weights: Floats) -> Counts:
        true, predicted = (_masses(labels, weights, classes) for labels in (predictions.y, predictions.predicted))
        return true, predicted, _masses(predictions.y, weights * predictions.right, classes)

    return counts


def _masses(which: npt.NDArray[np.int64], weights: Floats, length: int) -> Floats:
    return np.asarray(np.bincount(which, weights, length), np.float64)


def of_counts(function: Callable[[Floats, Floats, Floats], float]) -> Callable[[Predictions], Prepared]:
    """Make a metric of a function of the counts of each class; NaN where no class has a row."""

    def prepare(predictions: Predictions) -> Prepared:
        counts = counts_of(predictions)

        def value(weights: Floats) -> float:
            true, predicted, hits = counts(weights)
            return function(true, predicted, hits) if true.any() else math.nan

        return value

    return prepare


def _f1(true: Floats, predicted: Floats, hits: Floats) -> Floats:
    return np.asarray(2 * hits / np.maximum(true + predicted, 1e-300))


def f1_macro(true: Floats, predicted: Floats, hits: Floats) -> float:
    """The mean F1 of the classes that are there."""
    return float(_f1(true, predicted, hits)[true > 0].mean())


def f1_weighted(true: Floats, predicted: Floats, hits: Floats) -> float:
    """The mean F1 of the classes, weighted by their rows."""
    return float((_f1(true, predicted, hits) * true).sum() / true.sum())


def f1_micro(true: Floats, predicted: Floats, hits: Floats) -> float:
    """F1 of all labels taken as one."""
    return float(2 * hits.sum() / (true.sum() + predicted.sum()))


def balanced_accuracy(true: Floats, predicted: Floats, hits: Floats) -> float:
    """The mean recall of the classes that are there."""
    occurs = true > 0
    return float((hits[occurs] / true[occurs]).mean())


def mcc(true: Floats, predicted: Floats, hits: Floats) -> float:
    """Return Gorodkin's R_K (2004), which is Matthews' coefficient for two classes."""
    if (true > 0).sum() < 2:
        return math.nan
    if (predicted > 0).sum() < 2:
        return 0.0  # by convention: a constant says nothing
    rows = true.sum()
    spread = (rows**2 - true @ true) * (rows**2 - predicted @ predicted)
    return float((hits.sum() * rows - true @ predicted) / math.sqrt(spread))


def of_ranks(name: Literal["roc_auc", "average_precision"]) -> Callable[[Predictions], Prepared]:
    """Make a metric of a method of ``Ranked``: the mean, one class against the rest, where it is defined."""

    def prepare(predictions: Predictions) -> Prepared:
        classes = predictions.outputs.shape[1]
        # As in scikit-learn, of two classes the second is the one looked for.
        columns = [1] if predictions.task is CLASSIFICATION and classes == 2 else range(classes)

        def value(weights: Floats) -> float:
            if not weights.any():
                return math.nan
            if (weights == 1).all():
                return mean_defined([predictions.areas(column)[name != "roc_auc"] for column in columns])
            return mean_defined([getattr(predictions.ranked(column), name)(weights) for column in columns])

        return value

    return prepare


def of_targets(make: Callable[[Floats, Floats], Prepared]) -> Callable[[Predictions], Prepared]:
    """Average over targets, as scikit-learn's ``uniform_average``, those left out where it is not defined."""

    def prepare(predictions: Predictions) -> Prepared:
        y, outputs = predictions.y.astype(np.float64), predictions.outputs.astype(np.float64)
        targets = [make(y[:, target], outputs[:, target]) for target in range(y.shape[1])]
        return lambda weights: mean_defined([target(weights) for target in targets])

    return prepare


def mae(y: Floats, outputs: Floats) -> Prepared:
    """The mean absolute error."""
    return _over_rows(np.abs(y - outputs))


def rmse(y: Floats, outputs: Floats) -> Prepared:
    """The root of the mean squared error."""
    squared = np.square(y - outputs)
    return lambda weights: math.sqrt(weighted_mean(squared, weights))


def _spread(values: Floats, weights: Floats) -> tuple[Floats, float]:
    """Return values less their mean, and the sum of their squares, 0 where they are all the same."""
    centred = values - weighted_mean(values, weights)
    squares = float((weights * centred * centred).sum())
    noise = 8 * EPSILON * float(np.abs(values).max(initial=0.0))
    return centred, 0.0 if squares <= weights.sum() * noise**2 else squares


def r2(y: Floats, outputs: Floats) -> Prepared:
    """The share of the variance that is explained; NaN where the targets are all the same."""
    squared = np.square(y - outputs)

    def explained(weights: Floats) -> float:
        spread = _spread(y, weights)[1] if weights.any() else 0.0
        return 1 - float((squared * weights).sum()) / spread if spread else math.nan

    return explained


def _correlation(y: Floats, outputs: Floats, weights: Floats) -> float:
    if not weights.any():
        return math.nan
    (y, of_y), (outputs, of_outputs) = _spread(y, weights), _spread(outputs, weights)
    if not of_y or not of_outputs:
        return math.nan
    return max(-1.0, min(1.0, float((weights * y * outputs).sum()) / math.sqrt(of_y) / math.sqrt(of_outputs)))


def pearson(y: Floats, outputs: Floats) -> Prepared:
    """The correlation; NaN where either side is all the same."""
    return lambda weights: _correlation(y, outputs, weights)


def spearman(y: Floats, outputs: Floats) -> Prepared:
    """The correlation of ranks, ties sharing their mean rank."""
    groups = [np.unique(values, return_inverse=True)[1] for values in (y, outputs)]

    def correlation(weights: Floats) -> float:
        if not weights.any():
            return math.nan
        ranks = []
        for group in groups:
            mass = np.bincount(group, weights)
            ranks.append((np.cumsum(mass) - mass / 2)[group])
        return _correlation(ranks[0], ranks[1], weights)

    return correlation
