"""Predictions of both sides, and what rounding features to the storage type costs them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Array, Rows, difference
from embedcache.equivalence.features import Recomputed
from embedcache.equivalence.result import Comparison, Outcome, cost, judged
from embedcache.equivalence.rows import Subject
from embedcache.equivalence.tolerance import labels_may_differ
from embedcache.equivalence.training import Record, train
from embedcache.task import CLASSIFICATION, REGRESSION, Task
from embedcache.train.metrics import score


def compare_predictions(
    cache: FeatureCache, rows: Rows, task: Task, reference: str, cached: Array, live: Array, tolerance: float | None
) -> list[Comparison]:
    """Compare logits [N, C] of some rows of a cache, int64 [N], and the labels that follow from them.

    Labels may differ where rounding within the ``tolerance`` of logits decides; None for bit for bit.
    """
    gap = difference(cached, live)
    comparisons = [judged(reference, "logits", gap, _row(cache, rows, gap.where), tolerance)]
    if task is REGRESSION:
        return comparisons
    cached_labels, live_labels = (_labels(logits, task) for logits in (cached, live))
    gap = difference(cached_labels, live_labels)
    place = _row(cache, rows, gap.where)
    if tolerance is None:
        return [*comparisons, judged(reference, "labels", gap, place)]
    clear = ~labels_may_differ(cached, tolerance, task)
    allowed = None if ((cached_labels != live_labels) & clear).any() else math.inf
    labels = judged(reference, "labels", gap, place, allowed)
    return [*comparisons, replace(labels, tolerance=None, rule="but for close calls")]


def _row(cache: FeatureCache, rows: Rows, where: tuple[int, ...] | None) -> str:
    return "" if where is None else f"row {cache.ids()[int(rows[where[0]])]}"


def _labels(logits: Array, task: Task) -> Array:
    return np.asarray(logits.argmax(axis=1) if task is CLASSIFICATION else logits >= 0)


def storage_costs(subject: Subject, recomputed: Recomputed, cached: Record) -> Outcome:
    """Say what rounding to a smaller type costs: in features, in logits, in labels and in the metric."""
    plan, rows, ids = subject.plan, subject.rows, subject.cache.ids()
    computed = {feature.name: feature.dtype for feature in subject.backbone.feature_sets}
    if plan.feature.dtype == "float32" or computed[plan.feature.name] != "float32":
        return Outcome()
    comparisons = [
        cost(f"features {name} ({report.feature.dtype})", report.rounding, report.place_of(report.rounding, ids))
        for name, report in recomputed.reports.items()
    ]
    exact = replace(plan.feature, dtype="float32")
    x, evaluation = (recomputed.features(part, exact) for part in (rows.train, rows.evaluate))
    unrounded = train(plan, x, subject.cached_targets, evaluation, title="unrounded")
    gap = difference(cached.logits, unrounded.logits)
    comparisons.append(cost("logits", gap, _row(subject.cache, rows.evaluate, gap.where)))
    costs = {}
    if plan.task is not REGRESSION:
        same = (_labels(cached.logits, plan.task) == _labels(unrounded.logits, plan.task)).mean()
        costs["label agreement"] = f"{same:.2%}"
    costs["largest difference of a logit"] = f"{gap.largest:.2e}"
    y = subject.cache.targets()[rows.evaluate]
    for metric in dict.fromkeys((plan.task.default_metric, *(["accuracy"] if plan.task is CLASSIFICATION else []))):
        stored_score, exact_score = (
            score(metric, plan.task, y, _probabilities(record)) for record in (cached, unrounded)
        )
        costs[metric] = (
            f"{stored_score:.4f} stored as {plan.feature.dtype}, {exact_score:.4f} as float32 "
            f"({stored_score - exact_score:+.4f})"
        )
    return Outcome(tuple(comparisons), costs=costs)


def _probabilities(record: Record) -> Array:
    assert record.head is not None
    return record.head.calibrated(record.logits)
