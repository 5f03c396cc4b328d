"""The whole check: features, training and predictions, from the cache and with the backbone in the loop.

What was opened -> rows sampled -> features recomputed -> training on the cache, at canonical shapes, the standard way
-> predictions -> the result. Each step is a function of values; what they find is an ``Outcome``, and outcomes add up.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from embedcache.arguments import checks_arguments
from embedcache.backbone import Backbone, model_name, probe_of
from embedcache.cache import FeatureCache
from embedcache.equivalence import identity, references
from embedcache.equivalence.features import recompute
from embedcache.equivalence.loading import load_live, load_standard, other_poolings
from embedcache.equivalence.result import EquivalenceResult, Outcome
from embedcache.equivalence.rows import matched, sample
from embedcache.equivalence.subject import Subject, TrainingPlan
from embedcache.equivalence.tolerance import feature_tolerances, training_tolerances
from embedcache.errors import SpecError
from embedcache.examples import Examples, load_examples
from embedcache.heads.registry import head_named
from embedcache.spec import HeadSpec, ModelSource
from embedcache.train.cached import feature_for
from embedcache.wording import counted

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
    head: HeadSpec | str | None = None,
    feature: str | None = None,
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
        head: which head; None for an mlp, or for attention-pooling where the cache has no pooled set.
        feature: the feature set to train on; None for the first that the head can read. All sets are compared.
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
    _refuse_impossible(reference, steps, rows, seed)
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    source = ModelSource(model_name(model), revision, device, trust_remote_code)
    spec = _head_for(opened, head)
    chosen = feature_for(opened, spec, feature)
    examples = inputs if isinstance(inputs, Examples) or inputs is None else load_examples(inputs, **reading)
    raw = matched(opened, examples)
    sampled = sample(
        raw, rows=rows, train_rows=TRAIN_ROWS, evaluation_rows=EVALUATION_ROWS, split=split, everything=everything,
        seed=seed,
    )  # fmt: skip
    live = backbone if backbone is not None else load_live(opened, source)
    plan = TrainingPlan.of(
        opened, spec, chosen, len(sampled.train), steps=steps, whole_epoch=everything, seed=seed
    )  # fmt: skip
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


def _compare(
    subject: Subject, source: ModelSource, reference: Reference, environment: identity.Differences, progress: bool
) -> Outcome:
    """Compare the cache with what its backbone gives, from features to predictions."""
    cache, backbone, feature = subject.cache, subject.backbone, subject.plan.feature
    outcome, standard = Outcome(), None
    if reference != "canonical" or environment:  # in another environment tolerances are derived from it
        standard = load_standard(cache, source, backbone)
        if standard is None:
            outcome += Outcome(notes=("no standard reference: the backbone is no model that transformers loads",))
    few = subject.raw.contents(subject.rows.features[:STEADINESS_ROWS])
    before = identity.snapshot(backbone, few, feature.name)
    recomputed = recompute(subject, progress=progress)
    after = identity.snapshot(backbone, few, feature.name)
    outcome += Outcome(findings=identity.steadiness_findings(backbone, before, after))
    tolerances = None if standard is None else feature_tolerances(subject, standard, recomputed)
    if environment:
        outcome += Outcome(notes=(_environment_note(environment, tolerances is not None),))
    features = references.compare_features(
        subject, recomputed, tolerances if environment else None,
        lambda contents: other_poolings(cache, source, backbone, contents),
    )  # fmt: skip
    outcome += features
    cached = references.train_cached(subject, progress=progress)
    allowed = None if tolerances is None else training_tolerances(subject, cached, tolerances[feature.name])
    if reference != "standard":
        outcome += references.compare_canonical(
            subject, recomputed, cached, allowed if environment else None, features_agree=features.agrees,
            progress=progress,
        )  # fmt: skip
    if reference != "canonical" and standard is not None and tolerances is not None and allowed is not None:
        outcome += references.compare_standard(subject, standard, cached, tolerances, allowed)
    return outcome + references.storage_costs(subject, recomputed, cached)


def _refuse_impossible(reference: str, steps: int | None, rows: int, seed: int) -> None:
    if reference not in ("canonical", "standard", "both"):
        raise SpecError(f"reference is {reference!r}: expected canonical, standard or both")
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
        f"on {counted(len(rows.train), 'row')}",
        "predictions": f"{counted(len(rows.evaluate), 'row')} of {rows.split}",
        "head": f"{plan.head.kind} on {plan.feature.name}",
    }


def _chance_of_missing(subject: Subject) -> tuple[str, ...]:
    missed = 1 - len(subject.rows.features) / len(subject.cache)
    if not missed:
        return ()
    return (f"a fault in one row alone is missed with probability {missed:.0%}: --all looks at every row",)
