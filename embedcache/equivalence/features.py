"""Features recomputed from raw rows in canonical batches: all at once, or inside every step of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from embedcache.backbone import Backbone, compute_features, compute_views, rows_at_once, run_plan, views_of
from embedcache.batching import plan
from embedcache.equivalence.bits import Array, Difference, Rows, difference
from embedcache.equivalence.rows import Subject
from embedcache.features import Dense, InMemory, Ragged
from embedcache.notebook import shows_bars
from embedcache.shard import FeatureSet, rounded
from embedcache.spec import ExtractionSpec
from embedcache.train.batches import FeatureBatch, drawn_views, order

WINDOW = 2048
KEPT = 64


@dataclass
class SetReport:
    """One feature set, row by row, as it grows: n rows were compared, ``rows`` int64 [n] of the cache.

    ``differing`` [n] counts values that differ, ``lengths`` [n] are the rows' lengths as the backbone counts them now,
    ``here`` and ``there`` the first differing rows' features as recomputed and as stored, by place in ``rows``.
    ``apart`` is the largest difference of each component, ``largest`` its largest size before rounding to the storage
    type. ``rounding`` is what storing them in fewer bits changes. ``other_lengths`` has, by row, the numbers of vectors
    in the cache and here, where they differ.
    """

    feature: FeatureSet
    total: Difference = field(default_factory=Difference)
    rounding: Difference = field(default_factory=Difference)
    rows: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    differing: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    other_lengths: dict[int, tuple[int, int]] = field(default_factory=dict)
    here: dict[int, Array] = field(default_factory=dict)
    there: dict[int, Array] = field(default_factory=dict)
    apart: Array = field(default_factory=lambda: np.zeros(1))
    largest: Array = field(default_factory=lambda: np.zeros(1))
    square: float = 0.0
    square_apart: float = 0.0

    @property
    def relative(self) -> float:
        """How large the differences are, of all values: root mean squares."""
        return math.sqrt(self.square_apart / self.square) if self.square else math.inf

    def within(self, tolerance: Array) -> bool:
        """Whether no component differs by more than its tolerance, and every row has as many vectors as it should."""
        return not self.other_lengths and bool((self.apart <= tolerance).all())

    def place_of(self, gap: Difference, ids: Sequence[str]) -> str:
        """Say where the largest difference of ``total`` or ``rounding`` is."""
        if gap.where is None:
            return ""
        place, *inside = gap.where
        row = f"row {ids[int(self.rows[place])]}"
        return f"{row} [{', '.join(map(str, inside))}]" if inside else row

    def add(self, live: InMemory, cached: InMemory, rows: Rows, lengths: Rows) -> None:
        """Compare the features of some more rows, float32 before they are rounded to the storage type."""
        dtype, first = self.feature.dtype, len(self.rows)
        counts, owner = np.zeros(len(rows), np.int64), np.arange(len(rows))
        if isinstance(live, Ragged) and isinstance(cached, Ragged):
            same_length = live.lengths == cached.lengths
            for place in np.flatnonzero(~same_length).tolist():
                vectors = int(cached.lengths[place]), int(live.lengths[place])
                self.other_lengths[int(rows[place])] = vectors
                counts[place] = max(vectors) * self.feature.dim
                self.total = self.total.joined(Difference(int(counts[place]), 0, math.inf, 0, (place,)), first)
            comparable = np.flatnonzero(same_length)
            live, cached = live.take(comparable), cached.take(comparable)
            owner = np.repeat(comparable, live.lengths)
        exact, kept = (np.ascontiguousarray(side.values, np.float32) for side in (live, cached))
        here = rounded(exact, dtype)
        gap = difference(kept, here, dtype)
        self.total = self.total.joined(self._by_row(gap, owner), first)
        if dtype != "float32":
            self.rounding = self.rounding.joined(self._by_row(difference(kept, exact), owner), first)
        if len(exact):
            self.largest = np.maximum(self.largest, np.abs(exact).max(axis=0).astype(np.float64))
        with np.errstate(invalid="ignore", over="ignore"):
            apart = kept.astype(np.float64) - here
            self.square += float(np.square(kept, dtype=np.float64).sum())
            self.square_apart += float(np.square(apart).sum())
        if not gap.same:
            self.apart = np.maximum(self.apart, np.abs(apart).max(axis=0))
            differs = kept.view(np.int32) != here.view(np.int32)
            np.add.at(counts, owner, differs.reshape(len(kept), -1).sum(axis=1))
        for place in np.flatnonzero(counts)[: max(0, KEPT - len(self.here))].tolist():
            self.here[first + place], self.there[first + place] = here[owner == place], kept[owner == place]
        self.rows = np.concatenate([self.rows, rows])
        self.differing = np.concatenate([self.differing, counts])
        self.lengths = np.concatenate([self.lengths, lengths])

    def _by_row(self, gap: Difference, owner: Rows) -> Difference:
        """Return where a difference is as (row, token, component), where the vectors of all rows stand in one array."""
        if gap.where is None or self.feature.kind != "tokens":
            return gap
        vector, component = gap.where
        row = int(owner[vector])
        return replace(gap, where=(row, vector - int(np.searchsorted(owner, row)), component))


@dataclass(frozen=True)
class Recomputed:
    """Reports by feature set, the contents of some rows, and the recomputed features of the rows of training.

    ``kind`` is what a content is, such as ``text``; ``vectors`` are of the plan's feature set and its views, by set and
    row, before they are rounded to the storage type.
    """

    reports: Mapping[str, SetReport]
    vectors: Mapping[str, Mapping[int, Array]]
    contents: Mapping[int, bytes]
    kind: str = "text"

    def features(self, rows: Rows, feature: FeatureSet) -> InMemory:
        """Return the features of some rows as a set of ``feature.dtype`` stores them, in float32."""
        values = [rounded(self.vectors[feature.name][row], feature.dtype) for row in rows.tolist()]
        if feature.kind != "tokens":
            return Dense(np.stack(values), feature)
        ends = np.cumsum([0, *map(len, values)]).astype(np.int64)
        return Ragged(np.concatenate(values), ends, feature)


def computed(backbone: Backbone, contents: Sequence[bytes], feature: FeatureSet, views: Rows | None = None) -> InMemory:
    """Run a backbone over rows, or over a view of each, at canonical shapes, and round as ``feature`` is stored."""
    if views is None:
        exact = compute_features(backbone, contents, feature.name)
    else:
        exact = compute_views(backbone, contents, views, feature.name)
    return replace(exact, values=np.ascontiguousarray(rounded(exact.values, feature.dtype)), feature=feature)


def recompute(subject: Subject, *, progress: bool = False) -> Recomputed:
    """Run the backbone over the sampled rows and compare every feature set; keep what training reads."""
    from tqdm.auto import tqdm

    cache, backbone, rows = subject.cache, subject.backbone, subject.rows.features
    reports = {name: SetReport(feature) for name, feature in cache.feature_sets.items()}
    trained = [subject.plan.feature, *cache.views(subject.plan.feature)]
    vectors: dict[str, dict[int, Array]] = {feature.name: {} for feature in trained}
    contents: dict[int, bytes] = {}
    keep = {*subject.rows.train.tolist(), *subject.rows.evaluate.tolist()}
    reading = subject.raw.stream(rows)
    shown = progress and shows_bars()

    def done(count: int, _: int) -> None:
        bar.update(count)

    kind, pictures = ExtractionSpec(cache.spec).content or "text", len(rows) * (views_of(backbone) + 1)
    unit = " pictures" if kind == "image" else "row"
    with tqdm(total=pictures, desc="features", unit=unit, disable=not shown) as bar:
        size = min(WINDOW, rows_at_once(backbone) or WINDOW)
        for start in range(0, len(rows), size):
            window = rows[start : start + size]
            raw = list(islice(reading, len(window)))
            prepared = backbone.prepare(raw)
            features = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy), done)
            lengths = np.asarray(prepared.lengths)[:: views_of(prepared) + 1]
            for name, report in reports.items():
                live = replace(features[name].decoded(), feature=report.feature)
                report.add(live, cache.of_rows(window, report.feature), window, lengths)
                if name in vectors:
                    vectors[name].update((row, live[place]) for place, row in enumerate(window.tolist()) if row in keep)
            for row, content in zip(window.tolist(), raw, strict=True):
                if row in keep or len(contents) < WINDOW:
                    contents[row] = content
    return Recomputed(reports, vectors, contents, kind)


# The backbone in the loop: raw rows -> features, in canonical batches, inside every step.


class LiveBatches:
    """Training batches whose features the frozen backbone makes when they are asked for; see ``train.batches``.

    ``contents`` are the raw rows [N] and ``feature`` is the set that the head reads. The backbone prepares, plans and
    runs the rows of one batch and of no other, at the canonical shapes, and rounds as the cache stores. With ``views``,
    it decodes, augments and runs the one view of each row that is drawn for the epoch.
    """

    def __init__(
        self, contents: Sequence[bytes], backbone: Backbone, feature: FeatureSet, batch_size: int, seed: int,
        views: int = 0,
    ) -> None:  # fmt: skip
        self._views = views
        self._contents, self._backbone, self._feature = contents, backbone, feature
        self._size, self._seed = batch_size, seed
        self.steps = -(-len(contents) // batch_size)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """Yield the batches of one epoch."""
        shuffled = order(len(self._contents), self._seed, number)
        drawn = drawn_views(len(self._contents), self._views, self._seed, number)
        for start in range(0, len(shuffled), self._size):
            rows = shuffled[start : start + self._size]
            contents = [self._contents[row] for row in rows]
            x = computed(self._backbone, contents, self._feature, drawn[rows] if self._views else None)
            if isinstance(x, Ragged):
                values, mask = x.padded(np.arange(len(rows)))
                yield FeatureBatch(torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(rows))
            else:
                yield FeatureBatch(torch.from_numpy(x.values), None, torch.from_numpy(rows))
