"""Which metrics there are; one metric, all of them, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from embedcache.errors import SpecError, TrainingError
from embedcache.task import CLASSIFICATION, MULTILABEL, REGRESSION, Array, Flags, Floats, Task
from embedcache.train.metrics import formulas
from embedcache.train.metrics.formulas import (
    BINS,
    Predictions,
    Prepared,
    confidences,
    counts_of,
    mean_defined,
    weighted_mean,
)
from embedcache.wording import did_you_mean

MetricValues = dict[str, Any]
"""Metrics by name as JSON values, and lists of them by class or target; see ``measure``."""

# Which metrics there are.


@dataclass(frozen=True)
class Metric:
    """One number that heads are judged by.

    Attributes:
        name: how it is asked for.
        greater_is_better: its direction.
        of: for each task that has it, a function from ``Predictions`` to a function from weights float64 [N].
    """

    name: str
    greater_is_better: bool
    of: Mapping[Task, Callable[[Predictions], Prepared]]

    def prepare(self, predictions: Predictions) -> Prepared:
        """Return the metric of some predictions as a function of the weights of their rows, float64 [N]."""
        return self.of[predictions.task](predictions)

    def better(self, new: float, old: float) -> bool:
        """Whether ``new`` is strictly better; NaN never is, and anything is better than NaN."""
        if math.isnan(new) or math.isnan(old):
            return math.isnan(old) and not math.isnan(new)
        return new > old if self.greater_is_better else new < old


def _table() -> dict[str, Metric]:
    classes, labels, values = CLASSIFICATION, MULTILABEL, REGRESSION
    rows: list[tuple[str, bool, Mapping[Task, Callable[[Predictions], Prepared]]]] = [
        ("accuracy", True, {classes: formulas.accuracy}),
        ("subset_accuracy", True, {labels: formulas.accuracy}),
        ("hamming_loss", False, {labels: formulas.hamming}),
        ("balanced_accuracy", True, {classes: formulas.of_counts(formulas.balanced_accuracy)}),
        ("f1_micro", True, {labels: formulas.of_counts(formulas.f1_micro)}),
        ("f1_macro", True, dict.fromkeys((classes, labels), formulas.of_counts(formulas.f1_macro))),
        ("f1_weighted", True, {classes: formulas.of_counts(formulas.f1_weighted)}),
        ("mcc", True, {classes: formulas.of_counts(formulas.mcc)}),
        ("roc_auc", True, dict.fromkeys((classes, labels), formulas.of_ranks("roc_auc"))),
        ("average_precision", True, dict.fromkeys((classes, labels), formulas.of_ranks("average_precision"))),
        ("log_loss", False, dict.fromkeys((classes, labels), formulas.log_loss)),
        ("brier", False, dict.fromkeys((classes, labels), formulas.brier)),
        ("ece", False, dict.fromkeys((classes, labels), formulas.ece)),
        ("mae", False, {values: formulas.of_targets(formulas.mae)}),
        ("rmse", False, {values: formulas.of_targets(formulas.rmse)}),
        ("r2", True, {values: formulas.of_targets(formulas.r2)}),
        ("pearson", True, {values: formulas.of_targets(formulas.pearson)}),
        ("spearman", True, {values: formulas.of_targets(formulas.spearman)}),
    ]
    return {name: Metric(name, greater, prepare) for name, greater, prepare in rows}


METRICS: Mapping[str, Metric] = _table()
"""Every metric by name."""


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the names of the metrics that a task has."""
    return tuple(name for name, metric in METRICS.items() if task in metric.of)


def metric_named(name: str, task: Task) -> Metric:
    """Return a metric. Raises ``SpecError`` for a name that the task does not have, with the nearest ones."""
    metric = METRICS.get(name)
    if metric is not None and task in metric.of:
        return metric
    allowed = metrics_of(task)
    # A part of the name counts as near too: accuracy is subset_accuracy where rows have several labels.
    hint = did_you_mean(name, allowed, *(known for known in allowed if name in known))
    what = "there is no metric" if metric is None else f"{task} has no metric"
    raise SpecError(f"{what} {name!r}{hint}: expected one of {', '.join(allowed)}")


def score(
    name: str,
    task: Task,
    y: Array,
    outputs: Array,
    *,
    thresholds: Sequence[float] | Array | None = None,
) -> float:
    """Return one metric, NaN where it is not defined or an output is not finite.

    ``y`` is int64 [N], uint8 [N, C] or float [N, R]; ``outputs`` are probabilities [N, C] or values [N, R].
    """
    metric, predictions = metric_named(name, task), Predictions(task, y, outputs, thresholds)
    return metric.prepare(predictions)(np.ones(len(predictions.y))) if predictions.finite else math.nan


def scores(name: str, task: Task, y: Array, outputs: Array) -> Floats:
    """Return one metric of K heads, float64 [K]: what ``score`` gives for each, bit by bit, only faster.

    ``outputs`` is [K, N, C]. NaN for a head with an output that is not finite.
    """
    metric = metric_named(name, task)
    y = y[:, None] if task is REGRESSION and y.ndim == 1 else y
    labelled = task.labelled(y)
    if not labelled.all():
        y, outputs = y[labelled], outputs[:, labelled]
    weights = np.ones(outputs.shape[:2])
    finite: Flags = np.asarray(np.isfinite(outputs).all(axis=(1, 2)))
    outputs = outputs if finite.all() else np.where(finite[:, None, None], outputs, 0.0)
    if name in ("accuracy", "subset_accuracy"):
        values = weighted_mean(task.right(y, task.decide(outputs)), weights)
    elif name == "log_loss":
        values = weighted_mean(task.row_loss(y, outputs), weights)
    elif name == "rmse":
        squared = np.square(np.moveaxis(y - outputs.astype(np.float64), 2, 1), order="C")
        values = np.array([mean_defined(by_target) for by_target in np.sqrt(weighted_mean(squared, weights[:, None]))])
    else:
        heads = zip(outputs, weights, strict=True)
        values = np.array([metric.prepare(Predictions(task, y, own))(weight) for own, weight in heads])
    return np.where(finite, values, math.nan)


def measure(
    task: Task,
    y: Array,
    outputs: Array,
    class_names: Sequence[str],
    *,
    thresholds: Sequence[float] | Array | None = None,
    intervals: bool = False,
) -> MetricValues:
    """Return all metrics of predictions as JSON values, None where a metric is not defined.

    ``intervals`` adds 95 % bootstrap intervals over rows for the most important metrics, by name. Where all or no rows
    are right there is only Wilson's interval of the accuracy.

    Classification: ``outputs`` are probabilities [N, C]. ``brier`` is the sum over classes of squared errors, halved
    for two classes as scikit-learn does; ``ece`` has 15 bins of equal width; ``average_precision`` is of the second
    class where there are two and the mean over one-vs-rest where there are more, as is ``roc_auc``.
    Multi-label: ``log_loss`` and ``brier`` are means over rows and labels. Regression: means over targets, each target
    in ``per_target``. Raises ``TrainingError`` for outputs that are not finite, or are not probabilities.
    """
    predictions = Predictions(task, y, outputs, thresholds)
    _refuse_bad_outputs(predictions)
    ones = np.ones(len(predictions.y))
    measured: MetricValues = {"rows": len(ones)}
    for name in metrics_of(task):
        measured[name] = _json_number(METRICS[name].prepare(predictions)(ones)) if len(ones) else None
    if intervals:
        # Of many rows the interval is narrow, and fewer draws find it well enough.
        draws = min(1000, max(200, 10_000_000 // max(1, predictions.outputs.size)))
        bounds = {
            name: interval(task, y, outputs, name, draws=draws, thresholds=thresholds) for name in task.interval_metrics
        }
        first = task.interval_metrics[0]
        if measured.get(first) in (0.0, 1.0) and task is not REGRESSION:  # no draw can differ
            bounds = {first: wilson(measured[first] * len(ones), len(ones))}
        measured["intervals"] = {
            name: [float(low), float(high)] for name, (low, high) in bounds.items() if math.isfinite(high - low)
        }
    if task is REGRESSION:
        targets = zip(class_names, predictions.y.T, predictions.outputs.T, strict=True)
        measured["per_target"] = [
            {"target": name, "rows": len(ones)}
            | {key: _json_number(score(key, task, truth, output)) for key in metrics_of(task)}
            for name, truth, output in targets
        ]
        return measured
    true, predicted, hits = counts_of(predictions)(ones)
    if task is CLASSIFICATION:
        cells = predictions.y * len(true) + predictions.predicted
        measured["confusion_matrix"] = np.bincount(cells, minlength=len(true) ** 2).reshape(len(true), -1).tolist()
    measured["per_class"] = [
        {
            "class": name,
            "rows": int(true[label]),
            "precision": float(hits[label] / predicted[label]) if predicted[label] else None,
            "recall": float(hits[label] / true[label]) if true[label] else None,
            "f1": float(2 * hits[label] / (true[label] + predicted[label])) if true[label] else None,
        }
        for label, name in enumerate(class_names)
    ]
    measured["missing_classes"] = [name for label, name in enumerate(class_names) if not true[label]]
    return measured


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _refuse_bad_outputs(predictions: Predictions) -> None:
    outputs = predictions.outputs
    if not predictions.finite or not np.isfinite(predictions.y).all():
        values, whose = (predictions.y, "the targets") if predictions.finite else (outputs, "the head's outputs")
        bad: Flags = np.asarray(~np.isfinite(values).all(axis=1))
        raise TrainingError(
            f"{whose} are not finite in {int(bad.sum())} of {len(bad)} rows, first in labelled row "
            f"{int(bad.argmax())}: train with a lower learning rate, and look at the features"
        )
    if predictions.task is REGRESSION or not len(outputs):
        return
    low, high = float(outputs.min()), float(outputs.max())
    sums = outputs.sum(axis=1, dtype=np.float64) if predictions.task is CLASSIFICATION else np.ones(1)
    if low < 0 or high > 1 + 1e-6 or float(np.abs(sums - 1).max()) > 1e-3:
        raise TrainingError(
            f"outputs are not probabilities (they go from {low:.4g} to {high:.4g}): "
            "expected those of a softmax or a sigmoid"
        )


def reliability(task: Task, y: Array, outputs: Array) -> MetricValues:
    """Return the calibration curve: ``ece`` and ``bins``, each {low, high, confidence, accuracy, rows}.

    For a classification confidence is the probability of the predicted class, and accuracy how often that class is
    right; for multi-label it is the probability of every label, and how often the label is on. Both are None in an
    empty bin. Raises ``SpecError`` for a regression.
    """
    metric, predictions = metric_named("ece", task), Predictions(task, y, outputs)
    confidence, came_true, bin_of = confidences(predictions)
    rows, sums, hits = (np.bincount(bin_of, weights, BINS) for weights in (None, confidence, came_true))
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
    return {"ece": _json_number(metric.prepare(predictions)(np.ones(len(predictions.y)))), "bins": bins}


def resampled_scores(
    task: Task,
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
    prepare, predictions = metric_named(metric, task).prepare, Predictions(task, y, outputs, thresholds)
    rows = len(predictions.y)
    if not rows or not predictions.finite:
        return np.full(draws, math.nan)
    value, generator = prepare(predictions), np.random.default_rng(seed)
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
    task: Task,
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
    return percentile_interval(values, 1 - level) or (math.nan, math.nan)


def percentile_interval(values: Floats, alpha: float = 0.05) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval at 1 - alpha of resampled scores [B], NaN left out; None if all are."""
    there = values[np.isfinite(values)]
    if not len(there):
        return None
    low, high = np.quantile(there, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)
