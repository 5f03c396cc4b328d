"""One metric, all of them, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.errors import SpecError, TrainingError
from embedcache.spec import TaskName
from embedcache.train.metrics.formulas import BINS, confidences, counts_of, mean_defined
from embedcache.train.metrics.judged import (
    Array,
    Floats,
    Judged,
    decided,
    labelled_rows,
    right,
    row_log_loss,
    weighted_mean,
)
from embedcache.train.metrics.table import METRICS, metric_named, metrics_of

LOOKED_AT: Mapping[TaskName, tuple[str, ...]] = {
    "classification": ("accuracy", "f1_macro"),
    "multilabel": ("subset_accuracy", "f1_macro"),
    "regression": ("rmse", "r2"),
}
"""The metrics that ``measure`` gives intervals of."""


def score(
    name: str,
    task: TaskName,
    y: Array,
    outputs: Array,
    *,
    thresholds: Sequence[float] | Array | None = None,
) -> float:
    """Return one metric, NaN where it is not defined or an output is not finite.

    ``y`` is int64 [N], uint8 [N, C] or float [N, R]; ``outputs`` are probabilities [N, C] or values [N, R].
    """
    prepare = metric_named(name, task).prepare[task]
    judged = Judged(task, y, outputs, thresholds)
    return prepare(judged)(np.ones(len(judged.y))) if judged.finite else math.nan


def scores(
    name: str, task: TaskName, y: Array, outputs: Array, *, masks: npt.NDArray[np.bool_] | None = None
) -> Floats:
    """Return one metric of K heads, float64 [K]: what ``score`` gives for each, bit by bit, only faster.

    ``outputs`` is [K, N, C]; ``masks`` bool [K, N] says which rows are each head's own.
    """
    prepare = metric_named(name, task).prepare[task]
    y = y[:, None] if task == "regression" and y.ndim == 1 else y
    labelled = labelled_rows(task, y)
    if not labelled.all():
        y, outputs = y[labelled], outputs[:, labelled]
        masks = None if masks is None else masks[:, labelled]
    weights = np.ones(outputs.shape[:2]) if masks is None else masks.astype(np.float64)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(outputs).all(axis=2))
    if not finite.all():  # rows that are not a head's own must not spoil it
        outputs = np.where(finite[:, :, None], outputs, 0.0)
    if name in ("accuracy", "subset_accuracy"):
        values = weighted_mean(right(task, y, decided(task, outputs)), weights)
    elif name == "log_loss":
        values = weighted_mean(row_log_loss(task, y, outputs), weights)
    elif name == "rmse":
        squared = np.square(np.moveaxis(y - outputs.astype(np.float64), 2, 1), order="C")
        values = np.array([mean_defined(each) for each in np.sqrt(weighted_mean(squared, weights[:, None]))])
    else:
        values = np.array([prepare(Judged(task, y, outputs[k]))(weights[k]) for k in range(len(outputs))])
    return np.where((~finite & (weights > 0)).any(axis=1), math.nan, values)


def measure(
    task: TaskName,
    y: Array,
    outputs: Array,
    class_names: Sequence[str],
    *,
    thresholds: Sequence[float] | Array | None = None,
    intervals: bool = False,
) -> dict[str, Any]:
    """Return everything there is to say about predictions, ready for JSON: numbers, None where one is not defined.

    ``intervals`` adds 95 % bootstrap intervals over rows of the metrics that are looked at most, by name; Wilson's of
    the accuracy alone where all or no rows are right.

    Classification: ``outputs`` are probabilities [N, C]. ``brier`` is the sum over classes of squared errors, halved
    for two classes as scikit-learn does; ``ece`` has 15 bins of equal width; ``average_precision`` is of the second
    class where there are two and the mean over one-vs-rest where there are more, as is ``roc_auc``.
    Multi-label: ``log_loss`` and ``brier`` are means over rows and labels. Regression: means over targets, each target
    in ``per_target``. Raises ``TrainingError`` for outputs that are not finite, or are no probabilities.
    """
    judged = Judged(task, y, outputs, thresholds)
    _refuse_bad_outputs(judged)
    ones = np.ones(len(judged.y))
    measured: dict[str, Any] = {"rows": len(ones)}
    for name in metrics_of(task):
        measured[name] = _json_number(METRICS[name].prepare[task](judged)(ones)) if len(ones) else None
    if intervals:
        # Of many rows the interval is narrow, and fewer draws find it well enough.
        draws = min(1000, max(200, 10_000_000 // max(1, judged.outputs.size)))
        bounds = {
            name: interval(task, y, outputs, name, draws=draws, thresholds=thresholds) for name in LOOKED_AT[task]
        }
        if measured.get(LOOKED_AT[task][0]) in (0.0, 1.0) and task != "regression":  # no draw can differ
            bounds = {LOOKED_AT[task][0]: wilson(measured[LOOKED_AT[task][0]] * len(ones), len(ones))}
        measured["intervals"] = {
            name: [float(low), float(high)] for name, (low, high) in bounds.items() if math.isfinite(high - low)
        }
    if task == "regression":
        measured["per_target"] = [
            {"target": name, "rows": len(ones)}
            | {key: _json_number(score(key, task, judged.y[:, at], judged.outputs[:, at])) for key in metrics_of(task)}
            for at, name in enumerate(class_names)
        ]
        return measured
    true, predicted, hits = counts_of(judged)(ones)
    if task == "classification":
        cells = judged.y * len(true) + judged.predicted
        measured["confusion_matrix"] = np.bincount(cells, minlength=len(true) ** 2).reshape(len(true), -1).tolist()
    measured["per_class"] = [
        {
            "class": name,
            "rows": int(true[at]),
            "precision": float(hits[at] / predicted[at]) if predicted[at] else None,
            "recall": float(hits[at] / true[at]) if true[at] else None,
            "f1": float(2 * hits[at] / (true[at] + predicted[at])) if true[at] else None,
        }
        for at, name in enumerate(class_names)
    ]
    measured["missing_classes"] = [name for at, name in enumerate(class_names) if not true[at]]
    return measured


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _refuse_bad_outputs(judged: Judged) -> None:
    outputs = judged.outputs
    if not judged.finite or not np.isfinite(judged.y).all():
        values, whose = (judged.y, "the targets") if judged.finite else (outputs, "the head's outputs")
        bad: npt.NDArray[np.bool_] = np.asarray(~np.isfinite(values).all(axis=1))
        raise TrainingError(
            f"{whose} are not finite in {int(bad.sum())} of {len(bad)} rows, first in labelled row "
            f"{int(bad.argmax())}: train with a lower learning rate, and look at the features"
        )
    if judged.task == "regression" or not len(outputs):
        return
    low, high = float(outputs.min()), float(outputs.max())
    sums = outputs.sum(axis=1, dtype=np.float64) if judged.task == "classification" else np.ones(1)
    if low < 0 or high > 1 + 1e-6 or float(np.abs(sums - 1).max()) > 1e-3:
        raise TrainingError(
            f"outputs are no probabilities (they go from {low:.4g} to {high:.4g}): "
            "expected those of a softmax or a sigmoid"
        )


def reliability(task: TaskName, y: Array, outputs: Array) -> dict[str, Any]:
    """Return the calibration curve: ``ece`` and ``bins``, each {low, high, confidence, accuracy, rows}.

    Classification looks at the probability of the predicted class and how often it is the right one, multi-label at
    that of every label and how often it holds; both are None in an empty bin. Raises ``SpecError`` for a regression.
    """
    prepare = metric_named("ece", task).prepare[task]
    judged = Judged(task, y, outputs)
    confidence, came_true, at = confidences(judged)
    rows, sums, hits = (np.bincount(at, weights, BINS) for weights in (None, confidence, came_true))
    bins = [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "confidence": float(sums[number] / rows[number]) if rows[number] else None,
            "accuracy": float(hits[number] / rows[number]) if rows[number] else None,
            "rows": int(rows[number]),
        }
        for number in range(BINS)
    ]
    return {"ece": _json_number(prepare(judged)(np.ones(len(judged.y)))), "bins": bins}


def resampled_scores(
    task: TaskName,
    y: Array,
    outputs: Array,
    metric: str,
    *,
    draws: int = 1000,
    seed: int = 0,
    thresholds: Sequence[float] | Array | None = None,
) -> Floats:
    """Return the metric on ``draws`` bootstrap samples of the rows, float64 [draws].

    The samples depend on ``seed`` and N only: two heads measured on the same rows are resampled in step, so that the
    difference of their scores is a paired bootstrap.
    """
    prepare = metric_named(metric, task).prepare[task]
    judged = Judged(task, y, outputs, thresholds)
    rows = len(judged.y)
    if not rows or not judged.finite:
        return np.full(draws, math.nan)
    value, generator = prepare(judged), np.random.default_rng(seed)
    drawn = (np.bincount(generator.integers(0, rows, rows), minlength=rows) for _ in range(draws))
    return np.array([value(weights.astype(np.float64)) for weights in drawn])


def wilson(right: float, rows: float, alpha: float = 0.05) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a proportion: not of zero width where all or none were right."""
    z = NormalDist().inv_cdf(1 - alpha / 2)
    share = right / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def interval(
    task: TaskName,
    y: Array,
    outputs: Array,
    metric: str,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    *,
    thresholds: Sequence[float] | Array | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a metric over rows (Efron 1979), NaN where no draw defines it."""
    if not 0 < level < 1:
        raise SpecError(f"level is {level!r}: expected a share between 0 and 1, such as 0.95")
    values = resampled_scores(task, y, outputs, metric, draws=draws, seed=seed, thresholds=thresholds)
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
