"""What a fitted scikit-learn estimator gives for features: probabilities or values, in the columns of the task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from embedcache.errors import BundleError, FeatureError
from embedcache.spec import TaskName
from embedcache.task import CLASSIFICATION, REGRESSION, Array, Floats, Task, task_named

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

_CERTAIN = 1e-15
"""Probabilities are kept this far from 0 and 1, so that their logits are finite."""


def outputs(estimator: BaseEstimator, x: Array, task: Task | TaskName, classes: int) -> Floats:
    """Return what a fitted estimator gives for features ``x`` [N, D]: probabilities [N, C], or values [N, R].

    A class that training did not have gets a column of zeros; a label that was the same in every row of training gets
    that, 0 or 1. Raises ``FeatureError`` for features of another shape, ``BundleError`` for an estimator that does
    not fit the task.
    """
    x, task = np.asarray(x), task_named(task)
    expected = getattr(estimator, "n_features_in_", None)
    if x.ndim != 2 or x.shape[1] != expected:
        raise FeatureError(f"got features of shape {x.shape}, expected [N, {expected}]")
    try:
        if not len(x):
            return np.zeros((0, classes))
        if task is REGRESSION:
            values = np.asarray(estimator.predict(x), np.float64).reshape(len(x), -1)
        elif task is CLASSIFICATION:
            values = _spread(estimator.predict_proba(x), estimator.classes_, classes)
        else:
            values = _label_probabilities(estimator, x, classes)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise BundleError(f"the estimator does not fit {task} with {classes} outputs: {str(error)[:200]}") from error
    if values.shape != (len(x), classes):
        raise BundleError(f"the estimator has {values.shape[1]} outputs, expected {classes}")
    return values


def logits_of(values: Floats, task: Task) -> Floats:
    """Return logits [N, C], whose softmax or sigmoid are the probabilities ``values``; a regression's values stay."""
    if task is REGRESSION:
        return values
    kept = np.clip(values, _CERTAIN, 1.0 - _CERTAIN)
    return np.asarray(np.log(kept) if task is CLASSIFICATION else np.log(kept) - np.log1p(-kept))


def _spread(probabilities: Array, present: Array, classes: int) -> Floats:
    """Put the probabilities of the classes that training had into the columns of all classes."""
    present = np.asarray(present, np.int64)
    if len(np.unique(present)) != probabilities.shape[1] or not ((present >= 0) & (present < classes)).all():
        raise ValueError(f"its classes are {present.tolist()}")
    spread = np.zeros((len(probabilities), classes))
    spread[:, present] = probabilities
    return spread


def _label_probabilities(estimator: BaseEstimator, x: Array, classes: int) -> Floats:
    """Return probabilities [N, C] from what scikit-learn gives: one array, or one [N, 1 or 2] for each label."""
    probabilities = estimator.predict_proba(x)
    present = estimator.classes_
    if not isinstance(probabilities, list):
        if classes > 1:
            return np.asarray(probabilities, np.float64)
        probabilities, present = [probabilities], [present]
    pairs = zip(probabilities, present, strict=True)
    return np.stack([_spread(label, label_classes, 2)[:, 1] for label, label_classes in pairs], axis=1)
