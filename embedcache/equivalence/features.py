"""Features recomputed from raw rows at canonical shapes, compared with what the cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from embedcache.backbone import Backbone, run_plan
from embedcache.batching import plan
from embedcache.cache import FeatureCache
from embedcache.equivalence.bits import Difference, difference
from embedcache.features import Ragged
from embedcache.shard import FeatureSet, decoded, rounded

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
WINDOW = 2048
KEPT = 64


@dataclass
class SetReport:
    """One feature set, row by row: n rows were compared, ``rows`` int64 [n] of the cache.

    ``differing`` [n] counts values that differ, ``lengths`` [n] are the rows' lengths as the backbone counts them now,
    ``here`` and ``there`` the first differing rows' features as recomputed and as stored, by place in ``rows``.
    ``apart`` is the largest difference of each component, ``largest``
    its largest size before rounding to the storage type. ``rounding`` is what storing them in fewer bits changes.
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
    apart: Array = field(default_factory=lambda: np.zeros(0))
    largest: Array = field(default_factory=lambda: np.zeros(0))
    where: str = ""
    rounding_where: str = ""
    square: float = 0.0
    square_apart: float = 0.0

    @property
    def relative(self) -> float:
        """How large the differences are, of all values: root mean squares."""
        return math.sqrt(self.square_apart / self.square) if self.square else math.inf


@dataclass
class Recomputed:
    """Reports by feature set; and the recomputed features of some rows of one set, ``wanted`` in order."""

    reports: dict[str, SetReport]
    wanted: dict[int, Array]
    contents: dict[int, bytes]


def stored(cache: FeatureCache, rows: Rows, feature: FeatureSet) -> Any:
    """Return the stored features of some rows, int64 [n]: float32 [n, ...], or (values, offsets), shard by shard."""
    places = cache.places()[rows]
    if feature.kind != "tokens":
        return cache.take(places, feature.name)
    starts = np.concatenate([[0], np.cumsum([shard["rows"] for shard in cache.manifest["shards"]])])
    unique, back = np.unique(places, return_inverse=True)
    shards = np.searchsorted(starts, unique, side="right") - 1
    values, lengths = [], []
    for shard in np.unique(shards).tolist():
        _, arrays = cache.shard(shard, unique[shards == shard] - starts[shard])
        values.append(decoded(arrays[feature.name][0]))
        lengths.append(np.diff(arrays[feature.name][1]))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    ragged = Ragged(np.concatenate(values), offsets, feature).take(back.astype(np.int64))
    return ragged.values, ragged.offsets


def recompute(
    cache: FeatureCache,
    backbone: Backbone,
    contents: Callable[[Rows], Iterator[bytes]],
    rows: Rows,
    wanted: Rows,
    feature: FeatureSet,
    done: Callable[[int, int], None] | None = None,
) -> Recomputed:
    """Run the backbone over some rows and compare every feature set; keep ``feature`` of the rows ``wanted``.

    What is kept is as the backbone gives it, before it is rounded to the storage type.
    """
    found = Recomputed({each.name: SetReport(each) for each in cache.feature_sets.values()}, {}, {})
    ids = cache.ids()
    keep = set(wanted.tolist())
    reading = contents(rows)
    for start in range(0, len(rows), WINDOW):
        mine = rows[start : start + WINDOW]
        raw = list(islice(reading, len(mine)))
        prepared = backbone.prepare(raw)
        arrays = run_plan(backbone, prepared, plan(prepared.lengths, backbone.policy), done)
        for name, report in found.reports.items():
            live = arrays[name]
            live = (decoded(live[0]), live[1]) if isinstance(live, tuple) else decoded(live)
            if name == feature.name:
                for at, row in enumerate(mine.tolist()):
                    if row in keep:
                        found.wanted[row] = (
                            live[0][live[1][at] : live[1][at + 1]] if isinstance(live, tuple) else live[at]
                        )
            _add(report, live, stored(cache, mine, report.feature), mine, np.asarray(prepared.lengths), ids)
            for row, content in zip(mine.tolist(), raw, strict=True):
                if row in keep or len(found.contents) < WINDOW:
                    found.contents[row] = content
    return found


def _add(report: SetReport, live: Any, cached: Any, rows: Rows, lengths: Rows, ids: list[str]) -> None:
    dtype, first = report.feature.dtype, len(report.rows)
    counts = np.zeros(len(rows), np.int64)
    if isinstance(live, tuple):
        ours, theirs = np.diff(live[1]), np.diff(cached[1])
        equal = np.flatnonzero(ours == theirs)
        for at in np.flatnonzero(ours != theirs).tolist():
            report.other_lengths[int(rows[at])] = int(theirs[at]), int(ours[at])
            counts[at] = max(ours[at], theirs[at]) * report.feature.dim
            place = (at, 0, 0)
            lost = Difference(int(counts[at]), 0, math.inf, 0, place)
            report.total = report.total.joined(lost, first)
        again, stored = (Ragged(pair[0], pair[1], report.feature).take(equal) for pair in (live, cached))
        exact, kept, owner = again.values, stored.values, np.repeat(equal, again.lengths)
    else:
        exact, kept, owner = live, cached, np.arange(len(rows))
    exact = np.ascontiguousarray(exact, np.float32)
    kept, here = np.ascontiguousarray(kept, np.float32), rounded(exact, dtype)
    total = difference(kept, here, dtype)
    report.total = _placed(report, "where", report.total, total, owner, rows, ids, first, isinstance(live, tuple))
    if dtype != "float32":
        report.rounding = _placed(
            report, "rounding_where", report.rounding, difference(kept, exact), owner, rows, ids, first,
            isinstance(live, tuple),
        )  # fmt: skip
    if len(exact):
        sizes = np.abs(exact).max(axis=0).astype(np.float64)
        report.largest = sizes if not report.largest.size else np.maximum(report.largest, sizes)
    if not total.same:
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(kept.astype(np.float64) - here).max(axis=0)
        report.apart = apart if not report.apart.size else np.maximum(report.apart, apart)
        differs = (kept.view(np.int32) != here.view(np.int32)).reshape(len(kept), -1).sum(axis=1)
        np.add.at(counts, owner, differs)
    with np.errstate(invalid="ignore", over="ignore"):
        report.square += float(np.square(kept, dtype=np.float64).sum())
        report.square_apart += float(np.square(kept.astype(np.float64) - here).sum())
    for at in np.flatnonzero(counts)[: max(0, KEPT - len(report.here))].tolist():
        report.here[first + at] = here[owner == at]
        report.there[first + at] = kept[owner == at]
    report.rows = np.concatenate([report.rows, rows])
    report.differing = np.concatenate([report.differing, counts])
    report.lengths = np.concatenate([report.lengths, lengths])


def _placed(
    report: SetReport, attribute: str, before: Difference, found: Difference, owner: Rows, rows: Rows, ids: list[str],
    first: int, tokens: bool,
) -> Difference:  # fmt: skip
    if found.where is not None and (before.where is None or found.largest > before.largest):
        at = int(owner[found.where[0]])
        inside = list(found.where[1:])
        if tokens:
            inside = [found.where[0] - int(np.searchsorted(owner, at)), *inside]
        setattr(report, attribute, f"row {ids[int(rows[at])]} [{', '.join(map(str, inside))}]")
    return before.joined(found, first)


def gathered(wanted: Mapping[int, Array], rows: Rows, feature: FeatureSet) -> Any:
    """Put kept features of some rows together: float32 [n, ...], or (values, offsets) for tokens."""
    each = [rounded(wanted[row], feature.dtype) for row in rows.tolist()]
    if feature.kind != "tokens":
        return np.stack(each)
    return np.concatenate(each), np.concatenate([[0], np.cumsum([len(one) for one in each])]).astype(np.int64)


def differing_rows(report: SetReport) -> Iterator[int]:
    """Yield the places of the rows that differ."""
    return iter(np.flatnonzero(report.differing).tolist())
