"""The whole check: features, training and predictions, from the cache and with the backbone in the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from embedcache.arguments import checks_arguments
from embedcache.backbone import Backbone, features_of, load_again, model_name
from embedcache.cache import FeatureCache
from embedcache.equivalence.examination import Examination
from embedcache.equivalence.result import EquivalenceResult
from embedcache.equivalence.rows import matched, sample
from embedcache.errors import BackboneError, SpecError
from embedcache.examples import Examples, load_examples
from embedcache.heads.registry import head_named
from embedcache.spec import ExtractionSpec, HeadSpec, ModelSource
from embedcache.train.cached import feature_for

Reference = Literal["canonical", "standard", "both"]

ROWS = 1536
TRAIN_ROWS = 320
EVALUATION_ROWS = 256


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
    gradient norms, parameters, the optimizer's state), and of the head ``linear`` its optimum too, which is what
    training gives when nobody asks for minibatches; logits and labels of both heads on an evaluation split. The
    ``canonical`` reference runs the backbone at the cache's shapes and must agree bit for bit; ``standard`` is plain
    transformers and torch and must agree within the tolerance that ``tolerance`` derives.

    Args:
        cache: a cache, or where it is.
        inputs: what the cache was made from; see ``load_examples``. None for the inputs that the cache keeps.
        model, revision: where the backbone is now, if not where it was.
        backbone: a loaded backbone instead.
        head: which head; None for an mlp, or for attention-pooling where the cache has no pooled set.
        feature: the feature set it reads; None for the first it can. Features are compared of every set.
        reference: ``canonical``, ``standard`` or ``both``.
        steps: of training; None for 10, with ``everything`` at least a whole epoch.
        rows: how many rows' features are recomputed.
        split: the split that predictions are compared on; None for validation, else test.
        everything: every row of the cache, not a sample.
        seed: of the sample, the head, the batches and the dropout.
        device: where the backbone runs.
        reading: the columns and splits of ``load_examples``.

    Raises:
        InputError: the input is not the cache's, or there are too few rows.
        BackboneError: the model is not there any more.

    Example::

        check_equivalence("reviews.cache", "reviews.csv").raise_if_different()
    """
    begun = time.perf_counter()
    if reference not in ("canonical", "standard", "both"):
        raise SpecError(f"reference is {reference!r}: expected canonical, standard or both")
    for name, number in (("steps", steps), ("rows", rows)):
        if number is not None and number < 1:
            raise SpecError(f"{name} is {number}: expected at least 1")
    if not 0 <= seed < 2**32:
        raise SpecError(f"seed is {seed}: expected a whole number in [0, 2**32)")
    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    model = model_name(model)
    source = ModelSource(model, revision, device, trust_remote_code)
    spec = _head_for(opened, head)
    chosen = feature_for(opened, spec, feature)
    examples = inputs if isinstance(inputs, Examples) or inputs is None else load_examples(inputs, **reading)
    raw = matched(opened, examples)
    rows_of = sample(
        raw, rows=rows, train_rows=TRAIN_ROWS, evaluation_rows=EVALUATION_ROWS, split=split, everything=everything,
        seed=seed,
    )  # fmt: skip
    given = backbone is not None
    if backbone is None:
        backbone = load_live(opened, source)
    check = Examination(opened, raw, rows_of, backbone, spec, chosen, seed, steps, everything, progress)
    check.identity(given)
    check.environment()
    if not check.same_shape():
        return check.result(begun)
    standard = check.standard_model(reference != "canonical", model, revision, trust_remote_code)
    check.features(lambda contents: _other_poolings(opened, source, backbone, contents))
    check.measure_tolerances(standard)
    check.cached_side()
    if reference != "standard":
        check.canonical()
    if standard is not None and reference != "canonical":
        check.standard(standard)
    check.storage_costs()
    return check.result(begun)


def load_live(cache: FeatureCache, source: ModelSource, features: Sequence[str] = ()) -> Backbone:
    """Load the backbone that a cache was made with, set up as its spec says, storing nothing in fewer bits.

    Raises ``BackboneError`` when it is not there any more.
    """
    settings = ExtractionSpec.from_json(cache.spec).settings
    if settings is None:
        raise BackboneError(
            f"{cache.path} was made by a backbone of one's own, which no name leads to: pass it as backbone=..."
        )
    settings = replace(settings, features=tuple(features) or tuple(cache.feature_sets), storage_dtype=None)
    made = cache.provenance()[-1] if cache.provenance() else {}
    made_with = ModelSource(made.get("model"), made.get("revision"))
    return load_again(settings, source, made_with, f"{cache.path} was made with")


def _other_poolings(
    cache: FeatureCache, source: ModelSource, backbone: Any, contents: Sequence[bytes]
) -> dict[str, Any]:
    """Return what every pooling of a cache's model makes of some rows, to find the one that was used."""
    there = [each for each in getattr(backbone, "poolings", ()) if each != "tokens"]
    if not ExtractionSpec.from_json(cache.spec).has_backbone or not there:
        return {}
    names = [*there, *(f"l2:{each}" for each in there)]
    try:
        other = load_live(cache, source, names)
    except BackboneError:  # the model was passed in, and is nowhere else
        return {}
    return {name: features_of(other, contents, name) for name in names}


def _head_for(cache: FeatureCache, head: HeadSpec | str | None) -> HeadSpec:
    if head is None:
        pooled = any(each.kind == "pooled" for each in cache.feature_sets.values())
        return HeadSpec("mlp" if pooled else "attention-pooling")
    spec = head_named(head)
    if spec.engine != "torch":
        raise SpecError(f"the head {spec.kind} is not trained in steps: check a torch head, such as linear or mlp")
    return spec
