"""New classes for a head that needs no training: each comes from its own rows, and the others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.errors import InputError, SpecError, warn
from embedcache.fingerprint import is_number
from embedcache.heads import TrainedHead
from embedcache.heads.neighbours import FEATURES, TARGETS
from embedcache.heads.registry import checked_kind
from embedcache.numerics import difference
from embedcache.task import CLASSIFICATION, Array
from embedcache.train.cached import opened, refuse_other_cache, rows_of
from embedcache.train.data import labelled_rows_of
from embedcache.train.sklearn_engine import centroids
from embedcache.wording import listed

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

ADDED = "added_classes"
"""Where a head's training record has the number of rows of each class that was added."""


@checks_arguments()
def add_classes(head: TrainedHead, cache: FeatureCache | Path | str) -> TrainedHead:
    """Return a head that also knows the classes which a cache has and it lacks, from their training rows alone.

    Of the head ``nearest-centroid`` a class is one more row of the matrix, of ``knn`` its rows are appended; nothing is
    trained. What the head holds of its own classes keeps every bit, whatever rows of them the cache has. The
    standardisation and the temperature stay those of the first training. The head's ``training`` record has the number
    of rows by class as ``added_classes``.

    Raises:
        SpecError: a head of another kind, task or version.
        InputError: a cache of another task, without training rows, or without a new class that has any.
        BackboneMismatchError: a cache of other features than those that the head was trained on.
    """
    refuse_fixed(head)
    cache = opened(cache)
    refuse_other_cache(head, cache)
    if cache.task != head.task:
        raise InputError(f"the head is for {head.task}, and {cache.path} has labels for {cache.task or 'nothing'}")
    if "train" not in cache.split_names:
        raise InputError(f"{cache.path} has no train split: it has {', '.join(cache.split_names)}")
    train = cache.rows("train")
    targets = cache.targets()[train]
    unknown = [name for name in cache.class_names if name not in head.class_names]
    counts = np.bincount(targets[targets >= 0], minlength=len(cache.class_names))
    added = {name: rows for name in unknown if (rows := int(counts[cache.class_names.index(name)]))}
    if not added:
        without = f"none of {listed(map(repr, unknown), 5)} has a training row"
        which = without if unknown else "the head knows all its classes"
        raise InputError(f"{cache.path} has no class to add: {which}")
    numbers = [cache.class_names.index(name) for name in added]
    own = np.isin(targets, numbers)
    feature = cache.feature(head.feature.name)
    views = cache.views(feature)[: _views(head)]
    x, *of_views = (rows_of(cache, train[own], part, 1 + len(views)) for part in (feature, *views))
    y = np.searchsorted(numbers, targets[own])  # the new classes are in the order in which the cache has them
    labelled = labelled_rows_of(x, y, CLASSIFICATION, [*added], feature=head.feature, views=of_views).every_view()
    numerics = difference(head.probe, cache.common_probe and cache.common_probe.only(feature.name))
    notes = numerics.notes("what the head was trained on")
    if both := [name for name in cache.class_names if name in head.class_names]:
        notes.append(f"left as they are, as the head has them already: {listed(map(repr, both), 5)}")
    if empty := [name for name in unknown if name not in added]:
        notes.append(f"not added, as no training row has them: {listed(map(repr, empty), 5)}")
    warn(notes)
    state = _state(head, labelled.matrix(head.spec.kind), labelled.y, len(added))
    training = {**head.training, ADDED: {**_before(head), **added}}
    return replace(head, class_names=(*head.class_names, *added), state=state, training=training)


def refuse_fixed(head: TrainedHead) -> None:
    """Raise ``SpecError`` for a head to which no class can be added, saying to which one can."""
    kind = head.spec.kind
    if head.spec.engine != "sklearn" or kind not in ("nearest-centroid", "knn"):
        raise SpecError(f"the head {kind} learns all classes together: add them to nearest-centroid or knn")
    if head.task != CLASSIFICATION.name:
        raise SpecError(f"the head {kind} is for {head.task}: classes are added to a classification")
    if not head.state:
        raise SpecError(f"the head {kind} was saved by a former version: train it again, then add classes")


def _views(head: TrainedHead) -> int:
    views = head.training.get("views")
    return int(views) if is_number(views) else 0


def _before(head: TrainedHead) -> Mapping[str, object]:
    before = head.training.get(ADDED)
    return before if isinstance(before, Mapping) else {}


def _state(head: TrainedHead, x: Array, y: Array, classes: int) -> dict[str, Array]:
    """Return the arrays of a head with those of new classes, numbered from 0, behind its own."""
    state = dict(head.state)
    if head.votes:
        more = {FEATURES: x, TARGETS: y + len(head.class_names)}
    else:
        _, options = checked_kind(head.spec, CLASSIFICATION)
        scaled = {name: array for name, array in state.items() if name in ("output.mean", "output.scale")}
        weight, bias = centroids(x, y, classes, str(options["metric"]), scaled)
        more = {"output.weight": weight, "output.bias": bias}
    return state | {name: np.concatenate([state[name], part.astype(state[name].dtype)]) for name, part in more.items()}
