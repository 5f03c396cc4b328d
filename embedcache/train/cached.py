"""Training and measuring a head on the splits of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embedcache.arguments import checks_arguments
from embedcache.dataset import renumbered
from embedcache.errors import BackboneMismatchError, FeatureError, InputError, TrainingError, warn
from embedcache.features import Array, Features, OnDisk, Rows
from embedcache.heads import TrainedHead
from embedcache.heads.registry import head_named, kinds_read
from embedcache.numerics import difference
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec, TrainSpec, differences_text, plain_name
from embedcache.task import CLASSIFICATION, Flags, task_named
from embedcache.train.data import fits_in_memory, labelled_rows_of
from embedcache.train.metrics.measuring import MetricValues
from embedcache.train.result import Observe, Origin, TrainingResult
from embedcache.train.run import measured, train_head
from embedcache.wording import counted

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

HELD_OUT = 10
"""Without a validation split, one content in this many is held out for early stopping and calibration."""


@checks_arguments()
def train_on_cache(
    cache: FeatureCache | Path | str,
    head: HeadSpec | str = "linear",
    spec: TrainSpec | Mapping[str, object] | None = None,
    *,
    feature: str | None = None,
    allow_unseen: bool = False,
    device: str = "cpu",
    progress: bool = True,
    observe: Observe | None = None,
) -> TrainingResult[TrainedHead]:
    """Train one head on the train split of a cache, open or where it is, judged by its validation split.

    Without a validation split, a tenth of the training contents is held out, chosen by content, so that duplicates
    stay together. The test split is not looked at, but for its classes. ``feature`` names the feature set; None takes
    the first that the head can read. Features that do not fit in memory are read as they are needed. ``observe`` is
    told of each epoch, as ``train_head`` says.

    Raises as ``train_head`` does, and ``TrainingError`` for a class in test that no training row has, unless
    ``allow_unseen``; ``FeatureError`` for a feature set that the cache does not have.
    """
    cache, head = opened(cache), head_named(head)
    chosen = feature_for(cache, head, feature)
    train, judged, notes = training_rows(cache)
    targets = cache.targets()
    if not allow_unseen:
        refuse_unseen(cache, train)
    origin = Origin.of(cache)
    spec = TrainSpec.of(spec)
    views = cache.views(chosen)
    views = views[: spec.of_views(len(views))]
    result = train_head(
        rows_of(cache, train, chosen, 1 + len(views)), targets[train],
        rows_of(cache, judged, chosen) if len(judged) else None, targets[judged] if len(judged) else None,
        head, spec, task=cache.task or CLASSIFICATION.name, class_names=cache.class_names, feature=chosen,
        extraction=origin.extraction, model=origin.model, revision=origin.revision, probe=origin.probe,
        device=device, progress=progress, notes=notes, observe=observe,
        views=[rows_of(cache, train, view, 1 + len(views)) for view in views],
    )  # fmt: skip
    facts = {"features": f"{chosen.name} of a cache with spec {cache.spec_hash[:16]}", **result.facts}
    return replace(result, facts=facts)


def opened(cache: FeatureCache | Path | str) -> FeatureCache:
    from embedcache.cache import FeatureCache

    return cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)


def training_rows(cache: FeatureCache) -> tuple[Rows, Rows, list[str]]:
    """Return the rows to train on and those to judge by, and what is to be said of them.

    Raises ``InputError`` for a cache without a train split.
    """
    if "train" not in cache.split_names:
        raise InputError(f"{cache.path} has no train split: it has {', '.join(cache.split_names)}")
    train = cache.rows("train")
    notes: list[str] = []
    if "validation" in cache.split_names:
        judged = cache.rows("validation")
    else:
        held_back = held_out(cache)
        train, judged = train[~held_back], train[held_back]
        if not len(train) or not len(judged):
            train, judged = cache.rows("train"), judged[:0]
        notes.append(
            f"there is no validation split: {len(judged):,} training rows are held out"
            if len(judged)
            else "there is no validation split and too few rows to hold some out: no early stopping, no calibration"
        )
    return train, judged, notes


def feature_for(cache: FeatureCache, head: HeadSpec, name: str | None) -> FeatureSet:
    """Return the feature set a head is to read: the one named, else the first it can read, ``states@`` last.

    Raises ``FeatureError`` when the cache has none such.
    """
    if name is not None:
        chosen = cache.feature(name)
        if chosen.name not in cache.plain_sets:
            plain = plain_name(chosen.name)[0]
            raise FeatureError(f"{chosen.name} is a set of views: train on {plain}, which its views go with")
        return chosen
    takes = kinds_read(head)
    for feature in sorted(cache.plain_sets.values(), key=lambda feature: feature.for_blocks):
        if feature.kind in takes:
            return feature
    has = ", ".join(f"{feature.name} ({feature.kind})" for feature in cache.plain_sets.values())
    what = "one vector a row" if "pooled" in takes else "tokens or several layers"
    raise FeatureError(f"the head {head.kind} reads {what}, and {cache.path} has only {has}: extract such a set too")


def held_out(cache: FeatureCache) -> Flags:
    """Return which training rows are held out where there is no validation split, bool [N], by content."""
    numbers = np.ascontiguousarray(cache.keys("train")[:, :8]).view("<u8").ravel()
    return np.asarray(numbers % HELD_OUT == 0)


class CachedRows:
    """Some rows of a cache, read when they are asked for; see ``features.Reader``."""

    def __init__(self, cache: FeatureCache, places: Rows, feature: FeatureSet) -> None:
        self._cache, self._places, self._feature = cache, places, feature
        self.row_shape = feature.row_shape

    def __len__(self) -> int:
        return len(self._places)

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Return some rows."""
        return self._cache.take(self._places[rows], self._feature.name)


def rows_of(cache: FeatureCache, rows: Rows, feature: FeatureSet, copies: int = 1) -> Features:
    """Return the features of some rows of a cache, on disk where they and others as large do not fit in memory.

    Raises ``FeatureError`` naming the row that holds NaN or infinity.
    """
    places = cache.places()[rows]
    together = len(places) > 0 and bool((np.diff(places) == 1).all())
    size = 4 * len(rows) * int(np.prod(feature.row_shape)) * copies
    # Training makes a standardised copy, so a mapped array has to fit as much as one that is read.
    if feature.kind != "tokens" and not fits_in_memory(size * (1 if together else 2)):
        return OnDisk(CachedRows(cache, places, feature), feature)
    return cache.of_rows(rows, feature)


def refuse_unseen(cache: FeatureCache, train: Rows) -> None:
    """Raise ``TrainingError`` for a class that occurs in another split and never in training."""
    if cache.task != CLASSIFICATION.name:
        return
    targets = cache.targets()
    counts = np.bincount(targets[train][targets[train] >= 0], minlength=len(cache.class_names))
    for split in cache.split_names:
        of_split = cache.targets(split)
        in_split = np.bincount(of_split[of_split >= 0], minlength=len(cache.class_names))
        unseen = np.flatnonzero((counts == 0) & (in_split > 0))
        if len(unseen) and split != "train":
            rows = [(cache.class_names[label], int(in_split[label])) for label in unseen[:5].tolist()]
            names = ", ".join(f"{name!r} ({counted(count, 'row')})" for name, count in rows)
            raise TrainingError(
                f"{split} has classes that no training row has: {names}; no head can learn them: "
                "give them training rows, leave them out, or pass --allow-unseen"
            )


@checks_arguments()
def evaluate_on_cache(
    head: TrainedHead, cache: FeatureCache | Path | str, split: str = "test", *, intervals: bool = True,
    average_views: bool = False,
) -> MetricValues:  # fmt: skip
    """Return the metrics of a head on a split of a cache, with bootstrap intervals of the most looked-at ones.

    With ``average_views``, a row's probabilities are the mean of those of its plain picture and of all views that the
    cache has of it; temperature and thresholds are as fitted on plain pictures.

    Raises:
        BackboneMismatchError: the cache was made by another backbone or other settings than the head was trained on.
        InputError: no such split, no labels, or a class that the head does not know.
    """
    cache = opened(cache)
    refuse_other_cache(head, cache)
    common = cache.common_probe and cache.common_probe.only(head.feature.name)
    warn(difference(head.probe, common).notes("what the head was trained on"))
    rows = cache.rows(split)
    if not len(rows):
        raise InputError(f"the split {split} of {cache.path} is empty")
    feature = cache.feature(head.feature.name)
    views = cache.views(feature) if average_views else []
    if average_views and not views:
        raise FeatureError(
            f"{cache.path} has no views of {feature.name} to average over: make it with extract --views N"
        )
    x, *of_views = (rows_of(cache, rows, part, 1 + len(views)) for part in (feature, *views))
    targets = targets_for(head, cache)[rows]
    labelled = labelled_rows_of(
        x, targets, task_named(head.task), head.class_names, feature=head.feature, where=split, views=of_views
    )  # fmt: skip
    if not len(labelled):
        raise InputError(f"no row of the split {split} of {cache.path} has a label")
    return measured(head, labelled, intervals=intervals)


def targets_for(head: TrainedHead, cache: FeatureCache) -> Array:
    """Return the targets of a cache in the head's own order of classes.

    Raises ``InputError`` for another task or a class that the head does not know.
    """
    if cache.task != head.task:
        raise InputError(f"the head is for {head.task}, and {cache.path} has labels for {cache.task}")
    targets = cache.targets()
    if cache.class_names == head.class_names:
        return targets
    unknown = sorted(set(cache.class_names) - set(head.class_names))
    if cache.task != CLASSIFICATION.name or unknown:
        named = ", ".join(map(repr, unknown[:5])) or "another order"
        raise InputError(
            f"{cache.path} has labels that the head was not trained on ({named}): "
            f"it knows {', '.join(map(repr, head.class_names[:20]))}"
        )
    return renumbered(targets, cache.class_names, head.class_names)


def refuse_other_cache(head: TrainedHead, cache: FeatureCache) -> None:
    """Raise ``BackboneMismatchError`` unless a cache holds the features that a head was trained on."""
    name = head.feature.name
    if name not in cache.feature_sets:
        raise FeatureError(f"{cache.path} has no feature set {name!r}: it has {', '.join(cache.plain_sets)}")
    if head.extraction and (differences := head.extraction.differences_for(name, cache.spec)):
        shown = differences_text(differences, "trained on", "the cache has")
        raise BackboneMismatchError(f"the head was trained on other features than {cache.path} holds ({shown})")
