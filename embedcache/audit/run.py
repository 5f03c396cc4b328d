"""``audit_cache``: what is wrong with the data, as far as its features tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from embedcache.arguments import checks_arguments
from embedcache.audit.duplicates import Twins, fold_groups, twins
from embedcache.audit.findings import Names, classes_confused, labels_doubted, rows_far, rows_next, rows_repeated
from embedcache.audit.labels import Doubts, doubts
from embedcache.audit.layout import Layout, layout, refuse_without_umap
from embedcache.audit.neighbours import Neighbours, Vectors, search
from embedcache.audit.outliers import Outliers, outliers
from embedcache.audit.probabilities import OutOfFold, of_sweep, quick, with_neighbours
from embedcache.audit.result import (
    KINDS,
    Audit,
    ClassFacts,
    Content,
    Finding,
    Map,
    Point,
    Settings,
    Shown,
    Summary,
    by_kind,
    refuse_other,
)
from embedcache.audit.selection import choose, typicality, uncertainty
from embedcache.cache.gather import halves
from embedcache.dataset import Dataset, evenly_spread
from embedcache.errors import InputError, SpecError, SweepError, TrainingError, warn
from embedcache.features import OnDisk, Rows
from embedcache.shard import FeatureSet
from embedcache.spec import HeadSpec
from embedcache.sweep.findings import preview
from embedcache.task import CLASSIFICATION, Flags
from embedcache.train.cached import CachedRows, feature_for

if TYPE_CHECKING:
    from embedcache.cache import FeatureCache

ALIKE = 0.85
"""The cosine, of centred features, from which on two rows are nearly the same.

Of movie reviews, text messages and questions through MiniLM with one word left out, 0.86 to 0.91 are at least that near
to the original, with one word replaced by a random one 0.66 to 0.81; of drawings through EfficientNet-Lite0, saved as
JPEG of quality 95 and 85, 0.99 and 0.93. Of 10,603 reviews nine are as near to another (``pipelines/benchmark.py``).
"""
NEAREST = 10
_SHOWN = 24
"""Findings of a kind whose contents a report shows."""
_POINTS = 2000
_MARKED = 200
"""Findings of a kind that the map marks."""
_ORDER = ("train", "validation", "test")


@checks_arguments()
def audit_cache(
    cache: FeatureCache | Path | str,
    *,
    sweep: Path | str | None = None,
    output_dir: Path | str | None = None,
    feature: str | None = None,
    duplicates: float = ALIKE,
    neighbours: int = NEAREST,
    label_next: int = 20,
    map: Literal["pca", "umap", "none"] = "pca",
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Look for what is wrong with the rows of a cache: labels, duplicates, leaks, outliers; and for rows to label next.

    Nothing is changed. Neighbours are exact: time grows with the square of the number of rows. The same rows give the
    same findings, whatever the number of threads.

    Args:
        cache: an open cache or its folder.
        sweep: a folder of a sweep with folds over this cache, whose chosen head judges the labels; None for a linear
            head that is trained here, out of fold.
        output_dir: a folder for ``findings.csv`` and ``audit.json``; ``embedcache.report.report`` makes its page.
        feature: the feature set, one vector a row; None for the first such.
        duplicates: the cosine of centred features from which on two rows are nearly the same, above 0, at most 1.
        neighbours: how many nearest neighbours of a row have a part in judging its label.
        label_next: how many rows without label to suggest for labelling.
        map: how rows are laid out in two dimensions.
        seed: of folds and of UMAP.
        progress: show how far it is, on a terminal.

    Raises:
        FeatureError: no feature set with one vector a row, or features that are not finite.
        SweepError: a sweep of something else, or without folds.
        MissingExtraError: UMAP without umap-learn.
        AuditError: an output folder that holds something else.
    """
    if not 0 < duplicates <= 1:
        raise SpecError(f"duplicates is {duplicates}: expected a cosine above 0, at most 1")
    if neighbours < 1 or label_next < 0:
        raise SpecError(f"neighbours is {neighbours} and label_next {label_next}: expected at least 1 and 0")
    from embedcache.cache import FeatureCache

    opened = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
    if not len(opened):
        raise InputError(f"{opened.path} has no rows: there is nothing to look at")
    if output_dir is not None:
        refuse_other(Path(output_dir))
    if map == "umap":
        refuse_without_umap()
    chosen = feature_for(opened, HeadSpec("linear"), feature)
    contents, content = np.unique(opened.places(), return_inverse=True)
    settings = Settings(duplicates, neighbours, label_next, map, seed, sweep is not None)
    with Vectors(OnDisk(CachedRows(opened, contents, chosen), chosen)) as vectors:
        with _bar(progress) as tick:
            near = search(vectors, neighbours, duplicates, tick)
        work = _Work(opened, chosen, vectors, vectors.of_row[content.reshape(-1)], near, settings)
        result = work.audit(None if sweep is None else Path(sweep))
    if output_dir is not None:
        result.save(output_dir)
    warn(result.notes)
    return result


@contextmanager
def _bar(progress: bool) -> Iterator[Callable[[float], None] | None]:
    """Show the search for neighbours, on a terminal."""
    if not (progress and sys.stderr.isatty()):
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc="neighbours", total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def tick(share: float) -> None:
            bar.update(100 * share - bar.n)

        yield tick


@dataclass(frozen=True, eq=False)
class _Work:
    """One audit: what was read, and the steps on it."""

    cache: FeatureCache
    feature: FeatureSet
    vectors: Vectors
    of_row: Rows
    near: Neighbours
    settings: Settings

    def audit(self, sweep: Path | None) -> Audit:
        """Return the findings and their summary."""
        cache, notes = self.cache, list[str]()
        dataset = cache.dataset
        names = Names(dataset, _rank(dataset))
        pairs = self.near.pairs
        if pairs is None:
            notes.append(
                f"rows that are no duplicates have a cosine of {self.settings.duplicates:g} or more in these features: "
                "only rows with the same features count as duplicates; ask for a higher --duplicates"
            )
        repeated = twins(self.vectors, self.of_row, pairs, _split_numbers(dataset), names.rank)
        findings, contrary = rows_repeated(names, repeated)
        if contrary:
            rows = "row repeats" if contrary == 1 else "rows repeat"
            notes.append(
                f"{contrary:,} {rows} another that is labelled otherwise: one of the two is wrong, or neither sure"
            )
        labelled = dataset.labelled()
        judged, doubt = self._judged(sweep, labelled, names, repeated, notes)
        if judged is not None and doubt is not None:
            findings += labels_doubted(names, judged.rows, judged.outputs, doubt)
            findings += classes_confused(names, doubt)
        by_class = names.task is CLASSIFICATION
        groups = np.zeros(len(dataset), np.int64) if not by_class or dataset.targets is None else dataset.targets
        far = outliers(self.vectors, self.of_row, groups)
        findings += rows_far(names, far, by_class)
        findings += self._next(np.flatnonzero(~labelled), judged, names)
        order = {kind: number for number, kind in enumerate(KINDS)}
        findings.sort(key=lambda finding: order[finding.kind])
        kind = self.settings.map
        laid = None if kind == "none" else layout(self.vectors, kind, self.settings.seed)
        summary = Summary(
            name=cache.path.resolve().name,
            rows=cache.split_sizes(),
            vectors=len(self.vectors),
            feature=self.feature.name,
            task=cache.task,
            labelled=int(labelled.sum()),
            labels=None if judged is None else judged.how,
            settings=self.settings,
            counts=by_kind(findings),
            wrong=_share_wrong(doubt),
            agreed=None if judged is None or doubt is None or not by_class else _share_agreed(judged, doubt, groups),
            classes=_class_facts(names, judged, doubt, far, groups) if by_class else (),
            map=None if laid is None else self._map(laid, findings, groups, names),
            shown=self._shown(findings),
            notes=tuple(notes),
            cache_spec=cache.spec_hash,
            dataset=dataset.hash(),
        )
        return Audit(findings, summary, judged)

    def _judged(
        self, sweep: Path | None, labelled: Flags, names: Names, repeated: Twins, notes: list[str]
    ) -> tuple[OutOfFold | None, Doubts | None]:
        """Return outputs of heads that did not learn from the rows they are of, and the doubts that follow."""
        task, targets, rows = names.task, names.dataset.targets, np.flatnonzero(labelled)
        if task is None or targets is None or not len(rows):
            notes.append("no row has a label: labels, and classes that are confused, were not looked at")
            return None, None
        if sweep is not None:
            judged = of_sweep(self.cache, sweep)
        else:
            group = fold_groups(repeated.group, self.of_row)
            try:
                judged = quick(
                    self.cache, self.feature, task, rows, names.dataset.keys[group[rows]], seed=self.settings.seed
                )
            except (SweepError, TrainingError) as error:
                notes.append(f"labels were not judged: {error}")
                return None, None
            judged = with_neighbours(judged, self.near, self.of_row, group, task, targets)
        notes += judged.notes
        return judged, doubts(task, targets[judged.rows], judged.outputs)

    def _next(self, rows: Rows, judged: OutOfFold | None, names: Names) -> list[Finding]:
        """Return the rows to label next."""
        most = self.settings.label_next
        if not len(rows) or not most:
            return []
        outputs, worth = None, None
        if judged is not None and names.task is not None and names.task.has_probabilities:
            outputs = judged.of_others(rows)
            worth = uncertainty(names.task, outputs)
        known = np.zeros(0, np.int64)
        if worth is None:
            worth = typicality(self.near)[self.of_row[rows]]
            known = self.of_row[judged.rows] if judged is not None else known
        chosen = choose(self.vectors, rows, self.of_row, worth, names.rank, most, known)
        return rows_next(names, rows, worth, chosen, outputs)

    def _shown(self, findings: Sequence[Finding]) -> tuple[Shown, ...]:
        """Return the worst of each kind with their contents, where the cache kept them."""
        inputs, spec = self.cache.inputs(), self.cache.spec
        first: dict[tuple[str, str], Finding] = {}  # of rows with the same content one is enough to look at
        for place, finding in enumerate(findings):
            first.setdefault((finding.kind, finding.key or str(place)), finding)
        taken = [each for kind in KINDS for each in [each for each in first.values() if each.kind == kind][:_SHOWN]]

        def content(row: int | None) -> Content:
            return Content() if inputs is None or row is None else Content(*preview(spec, inputs[row]))

        return tuple(Shown(each, content(each.row), content(each.other_row)) for each in taken)

    def _map(self, laid: Layout, findings: Sequence[Finding], groups: Rows, names: Names) -> Map:
        """Return the points of the map: vectors evenly spread, and those of the worst findings."""
        kinds: dict[int, list[str]] = {}
        for kind in KINDS:
            for finding in [each for each in findings if each.kind == kind and each.row is not None][:_MARKED]:
                of = kinds.setdefault(int(self.of_row[finding.row]), [])
                of.extend(() if kind in of else (kind,))
        place_of = {vector: place for place, vector in enumerate(laid.vector.tolist())}
        drawn = {*laid.vector[evenly_spread(len(laid.vector), _POINTS)].tolist(), *(kinds.keys() & place_of.keys())}
        first = np.full(len(self.vectors), -1, np.int64)
        first[self.of_row[::-1]] = np.arange(len(self.of_row))[::-1]
        points = []
        for vector in sorted(drawn):
            row, (x, y) = int(first[vector]), laid.place[place_of[vector]].tolist()
            title = f"row {names.id(row)}" + ("" if (label := names.label(row)) is None else f": {label}")
            points.append(Point(round(x, 4), round(y, 4), int(groups[row]), tuple(kinds.get(vector, ())), title))
        return Map(self.settings.map, tuple(points), laid.explained)


def _rank(dataset: Dataset) -> Rows:
    """Return each row's place in the order of the row keys, int64 [N]; rows of equal content in their own order."""
    high, low = halves(dataset.keys)
    rank = np.empty(len(dataset), np.int64)
    rank[np.lexsort((low, high))] = np.arange(len(dataset))
    return rank


def _split_numbers(dataset: Dataset) -> Rows:
    """Return each row's split by a number that rises from the rows one learns from to those one tests on."""
    order = sorted(range(len(dataset.split_names)), key=lambda code: (_place(dataset.split_names[code]), code))
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return numbers[dataset.split]


def _place(split: str) -> int:
    return _ORDER.index(split) if split in _ORDER else 0


def _share_wrong(doubt: Doubts | None) -> float | None:
    if doubt is None or doubt.estimate is None or not (whole := float(doubt.estimate.sum())):
        return None
    return round(1 - float(np.trace(doubt.estimate)) / whole, 6)


def _share_agreed(judged: OutOfFold, doubt: Doubts, targets: Rows) -> float:
    return round(float((doubt.suggested == targets[judged.rows]).mean()), 6)


def _class_facts(
    names: Names, judged: OutOfFold | None, doubt: Doubts | None, far: Outliers, groups: Rows
) -> tuple[ClassFacts, ...]:
    classes = len(names.dataset.class_names)
    counts = np.bincount(groups[groups >= 0], minlength=classes)
    doubted = np.zeros(classes, np.int64)
    if judged is not None and doubt is not None:
        doubted = np.bincount(groups[judged.rows[doubt.flagged]], minlength=classes)
    outlying = np.bincount(groups[far.flagged & (groups >= 0)], minlength=classes)
    return tuple(
        ClassFacts(name, int(counts[label]), int(doubted[label]), int(outlying[label]))
        for label, name in enumerate(names.dataset.class_names)
    )
