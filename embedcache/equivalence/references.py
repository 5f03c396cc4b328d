"""The references a cache is held against: features, training and predictions of each, compared with the cache's own.

``canonical`` runs the backbone at the cache's own shapes, ``standard`` is plain transformers and torch, ``unrounded``
is what the cache would hold if it stored float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from embedcache.equivalence import causes
from embedcache.equivalence.bits import Array, Rows, difference
from embedcache.equivalence.features import InMemory, Recomputed, stored
from embedcache.equivalence.live import LiveBatches
from embedcache.equivalence.result import Comparison, Outcome, cost, judged, judged_by_component
from embedcache.equivalence.standard_heads import STANDARD_HEADS
from embedcache.equivalence.standard_model import StandardModel
from embedcache.equivalence.standard_training import train_standard
from embedcache.equivalence.subject import Subject
from embedcache.equivalence.tolerance import labels_may_differ
from embedcache.equivalence.training import Record, compare_records, differences_of, train
from embedcache.errors import FeatureError, TrainingError, quiet
from embedcache.features import Ragged
from embedcache.shard import FeatureSet
from embedcache.task import CLASSIFICATION, REGRESSION, Task
from embedcache.train import train_head
from embedcache.train.metrics import score
from embedcache.wording import counted


def compare_features(
    subject: Subject, recomputed: Recomputed, tolerances: Mapping[str, Array] | None, other_poolings: causes.Recompute
) -> Outcome:
    """Compare what was recomputed at canonical shapes with the cache; without tolerances, bit for bit."""
    ids, comparisons = subject.cache.ids(), []
    for name, report in recomputed.reports.items():
        what, place = f"features {name}", report.place_of(report.total, ids)
        if tolerances is None:
            row = judged("canonical", what, report.total, place)
        else:
            tolerance = tolerances[name]
            row = judged_by_component("canonical", what, report.total, place, tolerance, report.within(tolerance))
        comparisons.append(row)
    findings = causes.of_features(recomputed, ids, tolerances, other_poolings)
    return Outcome(tuple(comparisons), tuple(findings))


def train_cached(subject: Subject, *, progress: bool = False) -> Record:
    """Train on cached tensors."""
    x, evaluation = _stored(subject)
    return train(subject.plan, x, subject.cached_targets, evaluation, progress=progress, title="cached")


def _stored(subject: Subject) -> tuple[InMemory, InMemory]:
    """Return the cached features of the training rows and of the evaluation rows."""
    rows, feature = subject.rows, subject.plan.feature
    return stored(subject.cache, rows.train, feature), stored(subject.cache, rows.evaluate, feature)


def compare_canonical(
    subject: Subject, recomputed: Recomputed, cached: Record, tolerances: Mapping[str, float] | None, *,
    features_agree: bool, progress: bool = False,
) -> Outcome:  # fmt: skip
    """Train with the backbone inside every step, at canonical shapes; without tolerances, bit for bit."""
    plan, rows = subject.plan, subject.rows
    x, evaluation = (recomputed.features(part, plan.feature) for part in (rows.train, rows.evaluate))
    batches = LiveBatches(
        subject.raw.contents(rows.train), subject.backbone, plan.feature, plan.spec.batch_size, plan.spec.order_seed
    )
    live = train_live(plan, x, subject.input_targets, evaluation, batches, progress=progress, title="canonical")
    outcome = _compare_training(subject, "canonical", cached, live, tolerances, features_agree)
    if plan.head.kind == "linear" and tolerances is None:
        outcome += _compare_optimum(subject, x)
    return outcome


train_live = train
"""Training with the backbone in the loop, under a name of its own for whoever plants faults in it."""


def _compare_optimum(subject: Subject, x: InMemory) -> Outcome:
    """Compare the optima of the linear head on the cache and on live features ``x``."""
    plan, optima = subject.plan, []
    for features, y in ((_stored(subject)[0], subject.cached_targets), (x, subject.input_targets)):
        try:
            with quiet():
                trained = train_head(
                    features, y, task=plan.task.name, class_names=plan.class_names, feature=plan.feature,
                    progress=False, intervals=False,
                )  # fmt: skip
        except (TrainingError, FeatureError) as error:
            return Outcome(notes=(f"the optimum is not compared: {error}",))
        optima.append(trained.head.state)
    found, where = differences_of(*optima)
    return Outcome((judged("canonical", "optimum", found, where),))


def compare_standard(
    subject: Subject, model: StandardModel, cached: Record, feature_tolerances: Mapping[str, Array],
    training_tolerances: Mapping[str, float],
) -> Outcome:  # fmt: skip
    """Train as anyone would, and compare features, training and predictions within the tolerances."""
    plan, rows = subject.plan, subject.rows
    texts, sets = subject.raw.texts(rows.train), subject.cache.feature_sets
    train_features = model.features(texts, sets)
    evaluation_features = model.features(subject.raw.texts(rows.evaluate), sets)
    outcome = Outcome()
    for name, feature in sets.items():
        pairs = ((rows.train, train_features[name]), (rows.evaluate, evaluation_features[name]))
        outcome += _compare_standard_features(subject, feature, pairs, feature_tolerances[name])
    if plan.head.kind not in STANDARD_HEADS:
        return outcome + Outcome(notes=(f"no standard training: there is no plain twin of the head {plan.head.kind}",))
    x, evaluation = train_features[plan.feature.name], evaluation_features[plan.feature.name]
    standard = train_standard(plan, model, texts, x, subject.input_targets, cached, evaluation)
    agree = outcome.agrees and not outcome.findings
    return outcome + _compare_training(subject, "standard", cached, standard, training_tolerances, agree)


def _compare_standard_features(
    subject: Subject, feature: FeatureSet, pairs: Sequence[tuple[Rows, InMemory]], tolerance: Array
) -> Outcome:
    ids = subject.cache.ids()
    owner = np.concatenate([rows for rows, _ in pairs])
    cached = [stored(subject.cache, rows, feature) for rows, _ in pairs]
    standard = [x for _, x in pairs]
    if feature.kind == "tokens":
        lengths, standard_lengths = (
            np.concatenate([x.lengths for x in side if isinstance(x, Ragged)]) for side in (cached, standard)
        )
        if len(other := np.flatnonzero(lengths != standard_lengths)):
            place = int(other[0])
            return Outcome(findings=(
                f"standard reference, features {feature.name}: row {ids[int(owner[place])]} has "
                f"{counted(standard_lengths[place], 'token')}, and {lengths[place]} in the cache",
            ))  # fmt: skip
        owner = np.repeat(owner, lengths)
    a, b = (np.concatenate([x.values for x in side]) for side in (cached, standard))
    found = difference(a, b, feature.dtype)
    where = "" if found.where is None else (
        f"row {ids[int(owner[found.where[0]])]} [{', '.join(map(str, found.where[1:]))}]"
    )  # fmt: skip
    apart = np.abs(a.astype(np.float64) - b).max(axis=0)
    within = bool((apart <= tolerance).all())
    row = judged_by_component("standard", f"features {feature.name}", found, where, tolerance, within)
    if row.verdict != "different":
        return Outcome((row,))
    beyond = int((apart > tolerance).sum())
    return Outcome((row,), (
        f"standard reference, features {feature.name}: off by up to {found.largest:.2g} at {where}, and by "
        f"more than rounding explains in {beyond} of {apart.size} components: weights, tokens, pooling or layer",
    ))  # fmt: skip


def _compare_training(
    subject: Subject, reference: str, cached: Record, live: Record, tolerances: Mapping[str, float] | None,
    features_agree: bool,
) -> Outcome:  # fmt: skip
    """Compare two trainings and their predictions. The standard one starts from the other's head and batches."""
    taken = ("initial head", "batch order") if reference == "standard" else ()
    comparisons = compare_records(reference, cached, live, tolerances, taken)
    comparisons += _compare_predictions(subject, reference, cached.logits, live.logits, tolerances)
    return Outcome(tuple(comparisons), tuple(causes.of_training(comparisons, reference, features_agree)))


def _compare_predictions(
    subject: Subject, reference: str, cached: Array, live: Array, tolerances: Mapping[str, float] | None
) -> list[Comparison]:
    """Compare logits [N, C] and the labels that follow from them, which may differ where rounding decides."""
    task, tolerance = subject.plan.task, None if tolerances is None else tolerances["logits"]
    found = difference(cached, live)
    comparisons = [judged(reference, "logits", found, _row(subject, found.where), tolerance)]
    if task is REGRESSION:
        return comparisons
    cached_labels, live_labels = (_labels(logits, task) for logits in (cached, live))
    found = difference(cached_labels, live_labels)
    place = _row(subject, found.where)
    if tolerance is None:
        return [*comparisons, judged(reference, "labels", found, place)]
    clear = ~labels_may_differ(cached, tolerance, task)
    allowed = None if ((cached_labels != live_labels) & clear).any() else math.inf
    labels = judged(reference, "labels", found, place, allowed)
    return [*comparisons, replace(labels, tolerance=None, rule="but for close calls")]


def _row(subject: Subject, where: tuple[int, ...] | None) -> str:
    return "" if where is None else f"row {subject.cache.ids()[int(subject.rows.evaluate[where[0]])]}"


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
    found = difference(cached.logits, unrounded.logits)
    comparisons.append(cost("logits", found, _row(subject, found.where)))
    costs = {}
    if plan.task is not REGRESSION:
        same = (_labels(cached.logits, plan.task) == _labels(unrounded.logits, plan.task)).mean()
        costs["label agreement"] = f"{same:.2%}"
    costs["largest difference of a logit"] = f"{found.largest:.2e}"
    y = subject.cache.targets()[rows.evaluate]
    for metric in dict.fromkeys((plan.task.default_metric, *(["accuracy"] if plan.task is CLASSIFICATION else []))):
        stored_score, exact_score = (
            score(metric, plan.task.name, y, _probabilities(record)) for record in (cached, unrounded)
        )
        costs[metric] = (
            f"{stored_score:.4f} stored as {plan.feature.dtype}, {exact_score:.4f} as float32 "
            f"({stored_score - exact_score:+.4f})"
        )
    return Outcome(tuple(comparisons), costs=costs)


def _probabilities(record: Record) -> Array:
    assert record.head is not None
    return record.head.calibrated(record.logits)
