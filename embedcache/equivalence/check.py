"""The whole check: features, training and predictions, from the cache and with the backbone in the loop.

``canonical`` runs the backbone at the cache's own shapes, ``standard`` is plain transformers and torch, ``unrounded``
is what the cache would hold if it stored float32.

What was opened -> rows sampled -> features recomputed -> training on the cache, at canonical shapes, the standard way
-> predictions -> the result. Each step is a function of values; what they find is an ``Outcome``, and outcomes add up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.backbone import Backbone, Encoder, model_name, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence import alone, identity
from embedcache.equivalence.bits import Array, Rows, difference
from embedcache.equivalence.features import LiveBatches, Recomputed, recompute
from embedcache.equivalence.identity import load_live, load_standard, other_poolings
from embedcache.equivalence.logits import compare_predictions, storage_costs
from embedcache.equivalence.pictures import other_preparations
from embedcache.equivalence.result import (
    EquivalenceResult,
    Outcome,
    Recompute,
    judged,
    judged_by_component,
    of_features,
    of_training,
)
from embedcache.equivalence.rows import Subject, TrainingPlan, matched, sample
from embedcache.equivalence.standard import STANDARD_HEADS, StandardModel, train_standard
from embedcache.equivalence.tolerance import feature_tolerances, training_tolerances
from embedcache.equivalence.training import Record, compare_records, differences_of, refuse_interrupted, train
from embedcache.errors import FeatureError, SpecError, TrainingError, quiet
from embedcache.examples import Examples, load_examples
from embedcache.features import Dense, InMemory, Ragged
from embedcache.heads.registry import head_named
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, ModelSource
from embedcache.train import train_head
from embedcache.train.cached import feature_for
from embedcache.wording import counted

# The references a cache is held against: features, training and predictions of each, compared with the cache's own.


def compare_features(
    subject: Subject, recomputed: Recomputed, tolerances: Mapping[str, Array] | None, other_poolings: Recompute
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
    findings = of_features(
        recomputed, ids, tolerances, other_poolings,
        lambda contents, name: other_preparations(subject.backbone, contents, name),
    )  # fmt: skip
    return Outcome(tuple(comparisons), tuple(findings))


def train_cached(subject: Subject, views: Sequence[FeatureSet] = (), *, progress: bool = False) -> Record:
    """Train on cached tensors, with ``views`` on one of these or the plain picture for each row and epoch."""
    x, evaluation = _stored(subject)
    of_views = [subject.cache.of_rows(subject.rows.train, view) for view in views]
    return train(
        subject.plan, x, subject.cached_targets, evaluation, views=of_views, progress=progress, title="cached"
    )  # fmt: skip


def _stored(subject: Subject) -> tuple[InMemory, InMemory]:
    """Return the cached features of the training rows and of the evaluation rows."""
    rows, feature = subject.rows, subject.plan.feature
    return subject.cache.of_rows(rows.train, feature), subject.cache.of_rows(rows.evaluate, feature)


def compare_canonical(
    subject: Subject, recomputed: Recomputed, cached: Record, tolerances: Mapping[str, float] | None, *,
    features_agree: bool, progress: bool = False,
) -> Outcome:  # fmt: skip
    """Train with the backbone inside every step, at canonical shapes; without tolerances, bit for bit.

    Where the cache has views, both sides train on them: the one on what is stored, the other on pictures that are
    decoded, augmented and run in the step.
    """
    plan, rows, sets = subject.plan, subject.rows, subject.views
    cached = train_cached(subject, sets, progress=progress) if sets else cached
    views = [recomputed.features(rows.train, view) for view in sets]
    x, evaluation = (recomputed.features(part, plan.feature) for part in (rows.train, rows.evaluate))
    batches = LiveBatches(
        subject.raw.contents(rows.train), subject.backbone, plan.feature, plan.spec.batch_size, plan.spec.order_seed,
        len(views),
    )  # fmt: skip
    live = train_live(
        plan, x, subject.input_targets, evaluation, batches, views=views, progress=progress, title="canonical"
    )  # fmt: skip
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
            refuse_interrupted(trained.fitted)
        except (TrainingError, FeatureError) as error:
            return Outcome(notes=(f"the optimum is not compared: {error}",))
        optima.append(trained.head.state)
    gap, where = differences_of(*optima)
    return Outcome((judged("canonical", "optimum", gap, where),))


def compare_standard(
    subject: Subject, model: StandardModel, cached: Record, feature_tolerances: Mapping[str, Array],
    training_tolerances: Mapping[str, float],
) -> Outcome:  # fmt: skip
    """Train as anyone would, and compare features, training and predictions within the tolerances.

    It is of the plain pictures: nobody else makes these views.
    """
    plan, rows = subject.plan, subject.rows
    contents, sets = subject.raw.contents(rows.train), subject.cache.plain_sets
    train_features = model.features(contents, sets)
    evaluation_features = model.features(subject.raw.contents(rows.evaluate), sets)
    outcome = Outcome()
    for name, feature in sets.items():
        pairs = ((rows.train, train_features[name]), (rows.evaluate, evaluation_features[name]))
        outcome += _compare_standard_features(subject, feature, pairs, feature_tolerances[name])
    if plan.head.kind not in STANDARD_HEADS:
        return outcome + Outcome(notes=(f"no standard training: there is no plain twin of the head {plan.head.kind}",))
    x, evaluation = train_features[plan.feature.name], evaluation_features[plan.feature.name]
    standard = train_standard(plan, model, contents, x, subject.input_targets, cached, evaluation)
    agree = outcome.agrees and not outcome.findings
    return outcome + _compare_training(subject, "standard", cached, standard, training_tolerances, agree)


def _compare_standard_features(
    subject: Subject, feature: FeatureSet, pairs: Sequence[tuple[Rows, InMemory]], tolerance: Array
) -> Outcome:
    ids = subject.cache.ids()
    owner = np.concatenate([rows for rows, _ in pairs])
    cached = [subject.cache.of_rows(rows, feature) for rows, _ in pairs]
    standard = [x for _, x in pairs]
    if feature.kind == "tokens":
        lengths, standard_lengths = (
            np.concatenate([x.lengths for x in side if isinstance(x, Ragged)]) for side in (cached, standard)
        )
        if len(differing := np.flatnonzero(lengths != standard_lengths)):
            place = int(differing[0])
            return Outcome(findings=(
                f"standard reference, features {feature.name}: row {ids[int(owner[place])]} has "
                f"{counted(standard_lengths[place], 'token')}, and {lengths[place]} in the cache",
            ))  # fmt: skip
        owner = np.repeat(owner, lengths)
    a, b = (np.concatenate([x.values for x in side]) for side in (cached, standard))
    gap = difference(a, b, feature.dtype)
    where = "" if gap.where is None else (
        f"row {ids[int(owner[gap.where[0]])]} [{', '.join(map(str, gap.where[1:]))}]"
    )  # fmt: skip
    apart = np.abs(a.astype(np.float64) - b).max(axis=0)
    within = bool((apart <= tolerance).all())
    row = judged_by_component("standard", f"features {feature.name}", gap, where, tolerance, within)
    if row.verdict != "different":
        return Outcome((row,))
    beyond = int((apart > tolerance).sum())
    return Outcome((row,), (
        f"standard reference, features {feature.name}: off by up to {gap.largest:.2g} at {where}, and by "
        f"more than rounding explains in {beyond} of {apart.size} components: weights, inputs, pooling or layer",
    ))  # fmt: skip


def _compare_training(
    subject: Subject, reference: str, cached: Record, live: Record, tolerances: Mapping[str, float] | None,
    features_agree: bool,
) -> Outcome:  # fmt: skip
    """Compare two trainings and their predictions. The standard one starts from the other's head and batches."""
    taken = ("initial head", "batch order") if reference == "standard" else ()
    comparisons = compare_records(reference, cached, live, tolerances, taken)
    comparisons += compare_predictions(
        subject.cache, subject.rows.evaluate, subject.plan.task, reference, cached.logits, live.logits,
        None if tolerances is None else tolerances["logits"],
    )  # fmt: skip
    return Outcome(tuple(comparisons), tuple(of_training(comparisons, reference, features_agree)))


Reference = Literal["canonical", "standard", "both"]

ROWS = 1536
TRAIN_ROWS = 320
EVALUATION_ROWS = 256
STEADINESS_ROWS = 16
"""Rows that are run twice, to see whether the backbone gives the same features again."""


@checks_arguments(load_examples)
def check_equivalence(
    cache: FeatureCache | Path | str,
    inputs: Any = None,
    *,
    model: Path | str | None = None,
    revision: str | None = None,
    backbone: Backbone | None = None,
    encoder: Callable[[list[Any]], Any] | None = None,
    head: HeadSpec | str | None = None,
    feature: str | None = None,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    reference: Reference = "both",
    steps: int | None = None,
    rows: int = ROWS,
    split: str | None = None,
    everything: bool = False,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = True,
    **reading: Any,
) -> EquivalenceResult:
    """Compare a cache with its frozen backbone run end to end. Nothing in the cache is changed.

    Three comparisons, from the same initial head, batches and dropout draws: features recomputed from the raw rows;
    steps of minibatch training on cached tensors against steps with the backbone run inside each of them (losses,
    gradient norms, parameters, the optimizer's state), and for the head ``linear`` its optimum too, which is what
    training gives by default; logits and labels of both heads on an evaluation split. The ``canonical`` reference runs
    the backbone at the cache's shapes and must agree bit for bit; ``standard`` is plain transformers and torch and must
    agree within the tolerance that ``tolerance`` derives.

    Args:
        cache: a cache, or where it is.
        inputs: what the cache was made from; see ``load_examples``. None for the inputs that the cache keeps.
        model, revision: the backbone, if it is no longer where it was.
        backbone: a loaded backbone instead.
        encoder: the encoder that ``extract`` was given. Without it, and for imported features, training on the cache is
            compared with training on the features in its files, and the result says what that does not prove.
        head: which head; None for an mlp, or for attention-pooling where the cache has no pooled set.
        feature: the feature set to train on; None for the first that the head can read. All sets are compared.
        optimizer: what takes the steps: ``adamw``, or ``sgd`` with momentum.
        reference: ``canonical``, ``standard`` or ``both``.
        steps: training steps to compare; None for 10, with ``everything`` at least a whole epoch.
        rows: how many rows' features are recomputed.
        split: the split on which predictions are compared; None for validation, else test.
        everything: look at every row of the cache, not at a sample.
        seed: seed of the sample, the head, the batches and the dropout.
        device: where the backbone runs.
        reading: the columns and splits of ``load_examples``.

    Raises:
        InputError: the input is not the cache's, or there are too few rows.
        BackboneError: the model is not there any more.

    Example::

        check_equivalence("reviews.cache", "reviews.csv").raise_if_different()
    """
    begun = time.perf_counter()
    _refuse_impossible(steps, rows, seed)
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    source = ModelSource(model_name(model), revision, device, trust_remote_code)
    spec = _head_for(opened, head)
    chosen = feature_for(opened, spec, feature)
    examples = (
        inputs
        if isinstance(inputs, Examples) or inputs is None
        else load_examples(inputs, **{"pixel_range": opened.spec.pixel_range, **reading})
    )
    if encoder is not None and opened.spec.origin is not None:
        (feature_set,) = opened.feature_sets.values()
        backbone = Encoder(encoder, opened.spec.origin, feature_set.dtype, feature_set.dim)
    by_itself = opened.spec.origin if backbone is None else None
    raw = alone.raw_rows(opened) if by_itself is not None and examples is None else matched(opened, examples)
    sampled = sample(
        raw, rows=rows, train_rows=TRAIN_ROWS, evaluation_rows=EVALUATION_ROWS, split=split, everything=everything,
        seed=seed,
    )  # fmt: skip
    plan = TrainingPlan.of(
        opened, spec, chosen, len(sampled.train), steps=steps, whole_epoch=everything, seed=seed, optimizer=optimizer
    )  # fmt: skip
    if by_itself is not None:
        subject = alone.subject_of(opened, raw, sampled, plan)
        outcome = Outcome(findings=raw.findings, notes=(alone.not_proved(opened, by_itself), *raw.notes))
        outcome += _compare_alone(subject, progress) + Outcome(notes=_chance_of_missing(subject))
        return EquivalenceResult(
            outcome.comparisons, outcome.findings, outcome.notes, _how_much(subject),
            seconds=time.perf_counter() - begun,
        )  # fmt: skip
    live = backbone if backbone is not None else load_live(opened, source)
    subject = Subject(opened, raw, sampled, live, plan)
    environment = identity.environment_differences(opened, live)
    numerics = opened.numerics_of(probe_of(live))
    outcome = Outcome(
        findings=raw.findings + identity.identity_findings(opened, live, given=backbone is not None), notes=raw.notes
    )
    if other_shapes := identity.shape_findings(opened, live):
        outcome += Outcome(findings=other_shapes)
    else:
        outcome += _compare(subject, source, reference, environment, progress)
    outcome += Outcome(notes=_chance_of_missing(subject))
    return EquivalenceResult(
        outcome.comparisons, tuple(dict.fromkeys(outcome.findings)), outcome.notes, _how_much(subject), outcome.costs,
        environment, time.perf_counter() - begun, numerics,
    )  # fmt: skip


def _compare_alone(subject: Subject, progress: bool) -> Outcome:
    """Compare the cache with its own files: what can be said without what made the features."""
    plan, rows = subject.plan, subject.rows
    files = alone.FromFiles(subject.cache)
    outcome = alone.compare_files(subject, files)
    if plan.head.kind not in STANDARD_HEADS:
        return outcome + Outcome(notes=(f"no training: there is no plain twin of the head {plan.head.kind}",))
    cached = train_cached(subject, progress=progress)
    x, evaluation = (Dense(files.values(part, plan.feature), plan.feature) for part in (rows.train, rows.evaluate))
    plain = train_standard(
        plan, alone.Batches(x.values), range(len(x)), x, subject.input_targets, cached, evaluation
    )  # fmt: skip
    allowed = training_tolerances(subject, cached, alone.rounding(x.values))
    return outcome + _compare_training(subject, "standard", cached, plain, allowed, outcome.agrees)


def _compare(
    subject: Subject, source: ModelSource, reference: Reference, environment: identity.Differences, progress: bool
) -> Outcome:
    """Compare the cache with what its backbone gives, from features to predictions."""
    cache, backbone, feature = subject.cache, subject.backbone, subject.plan.feature
    outcome, standard = Outcome(), None
    if reference != "canonical" or environment:  # in another environment tolerances are derived from it
        standard = load_standard(cache, source, backbone)
        if standard is None:
            outcome += Outcome(notes=("no standard reference: transformers cannot load the backbone",))
    few = subject.raw.contents(subject.rows.features[:STEADINESS_ROWS])
    before = identity.snapshot(backbone, few, feature.name)
    recomputed = recompute(subject, progress=progress)
    after = identity.snapshot(backbone, few, feature.name)
    outcome += Outcome(findings=identity.steadiness_findings(backbone, before, after))
    tolerances = None if standard is None else feature_tolerances(subject, standard, recomputed)
    if environment:
        outcome += Outcome(notes=(_environment_note(environment, tolerances is not None),))
    features = compare_features(
        subject, recomputed, tolerances if environment else None,
        lambda contents: other_poolings(cache, source, backbone, contents),
    )  # fmt: skip
    outcome += features
    cached = train_cached(subject, progress=progress)
    allowed = None if tolerances is None else training_tolerances(subject, cached, tolerances[feature.name])
    if reference != "standard":
        outcome += compare_canonical(
            subject, recomputed, cached, allowed if environment else None, features_agree=features.agrees,
            progress=progress,
        )  # fmt: skip
    if reference != "canonical" and standard is not None and tolerances is not None and allowed is not None:
        outcome += compare_standard(subject, standard, cached, tolerances, allowed)
    return outcome + storage_costs(subject, recomputed, cached)


def _refuse_impossible(steps: int | None, rows: int, seed: int) -> None:
    for name, number in (("steps", steps), ("rows", rows)):
        if number is not None and number < 1:
            raise SpecError(f"{name} is {number}: expected at least 1")
    if not 0 <= seed < 2**32:
        raise SpecError(f"seed is {seed}: expected a whole number in [0, 2**32)")


def _head_for(cache: FeatureCache, head: HeadSpec | str | None) -> HeadSpec:
    if head is None:
        pooled = any(feature.kind == "pooled" for feature in cache.feature_sets.values())
        return HeadSpec("mlp" if pooled else "attention-pooling")
    spec = head_named(head)
    if spec.engine != "torch":
        raise SpecError(f"the head {spec.kind} is not trained in steps: check a torch head, such as linear or mlp")
    return spec


def _environment_note(environment: identity.Differences, tolerated: bool) -> str:
    differing = ", ".join(f"{name} {there} there, {here} here" for name, there, here in environment)
    held_to = "the tolerance instead of to every bit" if tolerated else "every bit all the same"
    return (
        f"the cache was made in another environment ({differing}), where kernels may add up in another order: "
        f"the canonical reference is held to {held_to}"
    )


def _how_much(subject: Subject) -> dict[str, str]:
    """Say how much of the cache was looked at."""
    plan, rows, total = subject.plan, subject.rows, len(subject.cache)
    share = "all" if len(rows.features) == total else f"{len(rows.features):,} of {total:,}"
    return {
        "features": f"{share} rows",
        "training": f"{counted(plan.steps, 'minibatch step')} of {plan.spec.batch_size} "
        f"on {counted(len(rows.train), 'row')}, by {plan.spec.optimizer}",
        "predictions": f"{counted(len(rows.evaluate), 'row')} of {rows.split}",
        "head": f"{plan.head.kind} on {plan.feature.name}",
    }


def _chance_of_missing(subject: Subject) -> tuple[str, ...]:
    missed = 1 - len(subject.rows.features) / len(subject.cache)
    if not missed:
        return ()
    return (f"a fault in one row alone is missed with probability {missed:.0%}: --all looks at every row",)
