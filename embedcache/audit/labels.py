"""Labels that are probably wrong, by confident learning (Northcutt, Jiang and Chuang 2021).

A row speaks for a class when its out-of-fold probability of it is at least the mean probability that rows with that
label have of it: the class's own threshold, so that neither rare classes nor an over-confident head need a correction.
Rows that speak for another class than their label's are counted, given label by class; scaled to the number of rows of
each label, these counts estimate how many labels of one class belong to another. So many rows are named, those first
whose margin between the two classes is largest (the paper's "prune by noise rate").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embedcache.features import Rows
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Flags, Floats, Task

_FAR = 5.0
"""Robust deviations from which on a value of a regression is named: one in two million of normal errors."""


@dataclass(frozen=True, eq=False)
class Doubts:
    """How far the label of each of n rows is to be doubted.

    Attributes:
        score: float64 [n], larger is worse: 1 less the probability of the label; of a multi-label row, of its most
            doubtful label; of a regression the error in robust standard deviations.
        flagged: bool [n], which rows are named.
        suggested: what the label should be, in the form of the targets [n, ...].
        joint: int64 [C, C], how many rows with the label of the line speak for the class of the column; None where
            there are no classes.
        estimate: float64 [C, C], the same scaled to the number of rows with each label; None as ``joint``.
    """

    score: Floats
    flagged: Flags
    suggested: Array
    joint: Rows | None = None
    estimate: Floats | None = None


def doubts(task: Task, y: Array, outputs: Array) -> Doubts:
    """Return the doubts about labels ``y`` of n rows, given out-of-fold outputs [n, C] of a head."""
    if task is CLASSIFICATION:
        return _of_classes(y, outputs)
    return _of_labels(y, outputs) if task is MULTILABEL else _of_values(y, outputs)


def _of_classes(y: Array, p: Array) -> Doubts:
    rows, classes = np.arange(len(y)), p.shape[1]
    own = p[rows, y].astype(np.float64)
    joint = confident_joint(y, p)
    counts = np.bincount(y, minlength=classes)
    estimate = joint * (counts / np.maximum(joint.sum(axis=1), 1))[:, None]
    flagged = np.zeros(len(y), bool)
    for label in np.flatnonzero(counts):
        members = np.flatnonzero(y == label)
        for other in np.flatnonzero(joint[label]):
            if other != label:
                margin = p[members, other].astype(np.float64) - own[members]
                most = members[np.argsort(-margin, kind="stable")[: round(float(estimate[label, other]))]]
                flagged[most] = True
    # A label that the head itself holds likeliest is not named, however the counts come out.
    likeliest = p.argmax(axis=1)
    flagged[likeliest == y] = False
    return Doubts(1 - own, flagged, likeliest.astype(np.int64), joint, estimate)


def confident_joint(y: Array, p: Array) -> Rows:
    """Return how many rows with each label speak for each class, int64 [C, C]: the paper's equations 1 and 2.

    ``y`` is int64 [n], ``p`` float [n, C].
    """
    classes = p.shape[1]
    counts = np.bincount(y, minlength=classes)
    own = np.bincount(y, p[np.arange(len(y)), y].astype(np.float64), classes)
    thresholds = np.where(counts > 0, own / np.maximum(counts, 1), np.inf)  # no label, no confidence
    confident = p >= thresholds
    speaks = np.where(confident, p, -1.0).argmax(axis=1)
    sure = confident.any(axis=1)
    return np.bincount(y[sure] * classes + speaks[sure], minlength=classes**2).reshape(classes, classes)


def _of_labels(y: Array, p: Array) -> Doubts:
    """Each label is a problem of two classes of its own: off and on."""
    flips = np.zeros(y.shape, bool)
    wrong = np.where(y == 1, 1 - p, p).astype(np.float64)
    for column in range(y.shape[1]):
        of_label = _of_classes((y[:, column] == 1).astype(np.int64), np.column_stack([1 - p[:, column], p[:, column]]))
        flips[:, column] = of_label.flagged
    doubted = np.asarray(flips.any(axis=1))
    return Doubts(wrong.max(axis=1, initial=0.0), doubted, np.where(flips, 1 - y, y).astype(np.uint8))


def _of_values(y: Array, outputs: Array) -> Doubts:
    """Errors in units of their own spread, by target; the median absolute deviation ignores the worst."""
    error = outputs.astype(np.float64) - y
    error -= np.median(error, axis=0)
    spread = 1.4826 * np.median(np.abs(error), axis=0)
    far = (np.abs(error) / np.where(spread > 0, spread, np.inf)).max(axis=1, initial=0.0)
    return Doubts(far, far > _FAR, outputs.astype(np.float64))
