"""The metrics themselves: each turns predictions into a function from the weights of rows to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from embedcache.task import CLASSIFICATION, EPSILON, MULTILABEL, Floats
from embedcache.train.metrics.predictions import Predictions, weighted_mean

Prepared = Callable[[Floats], float]

BINS = 15
"""How many bins of equal width the expected calibration error has, as in Guo et al. 2017."""


def _over_rows(values: Floats) -> Prepared:
    return lambda weights: float(weighted_mean(values, weights))


def mean_defined(values: Sequence[float] | Floats) -> float:
    """Return the mean of what is defined, NaN where nothing is."""
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
        true, predicted = (_masses(each, weights, classes) for each in (predictions.y, predictions.predicted))
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
    there = true > 0
    return float((hits[there] / true[there]).mean())


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
    groups = [np.unique(each, return_inverse=True)[1] for each in (y, outputs)]

    def correlation(weights: Floats) -> float:
        if not weights.any():
            return math.nan
        ranks = []
        for group in groups:
            mass = np.bincount(group, weights)
            ranks.append((np.cumsum(mass) - mass / 2)[group])
        return _correlation(ranks[0], ranks[1], weights)

    return correlation
