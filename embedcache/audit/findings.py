"""Numbers -> findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedcache.audit.duplicates import Twins
from embedcache.audit.labels import Doubts
from embedcache.audit.outliers import Outliers
from embedcache.audit.result import Finding, Kind
from embedcache.dataset import Dataset
from embedcache.features import Rows
from embedcache.sweep.store import Outputs
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Floats, Task, task_named

_PAIRS = 10
"""Pairs of classes that are named."""


@dataclass(frozen=True, eq=False)
class Names:
    """What rows are called: ids, keys, splits and labels of a dataset; ``rank`` int64 [N] is their place by row key."""

    dataset: Dataset
    rank: Rows

    @property
    def task(self) -> Task | None:
        """What the labels are."""
        return None if self.dataset.task is None else task_named(self.dataset.task)

    def id(self, row: int) -> str:
        """Return a row's id."""
        return str(row if self.dataset.ids is None else self.dataset.ids[row])

    def key(self, row: int) -> str:
        """Return a row's key in hexadecimal."""
        return str(self.dataset.keys[row].tobytes().hex())

    def split(self, row: int) -> str:
        """Return a row's split."""
        return self.dataset.split_names[int(self.dataset.split[row])]

    def label(self, row: int) -> str | None:
        """Return a row's label in words, None where it has none."""
        if self.task is None or self.dataset.targets is None:
            return None
        target = self.dataset.targets[row]
        return self.named(target) if self.task.labelled(self.dataset.targets[row : row + 1])[0] else None

    def named(self, target: Array) -> str:
        """Return a target in words."""
        assert self.task is not None
        named = self.task.named(target, self.dataset.class_names)
        if isinstance(named, str):
            return named
        return ";".join(f"{part:.4g}" if isinstance(part, float) else part for part in named)

    def finding(
        self, kind: Kind, row: int, score: float, reason: str, suggested: str | None = None, other: int | None = None
    ) -> Finding:
        """Return a finding about a row, and the ``other`` that it repeats."""
        return Finding(
            kind, round(float(score), 6), reason, row, self.id(row), self.key(row), self.split(row), self.label(row),
            suggested, None if other is None else self.id(other), other,
        )  # fmt: skip

    def worst_first(self, rows: Rows, score: Floats) -> Rows:
        """Return the order of rows, int64 [n]: the highest score first, ties by row key."""
        return np.lexsort((self.rank[rows], -np.round(score, 6)))


def labels_doubted(names: Names, rows: Rows, outputs: Outputs, doubts: Doubts) -> list[Finding]:
    """Return the labels that are probably wrong, of labelled ``rows`` int64 [n] with their outputs."""
    assert names.task is not None
    assert names.dataset.targets is not None
    flagged = np.flatnonzero(doubts.flagged)
    found = []
    for place in flagged[names.worst_first(rows[flagged], doubts.score[flagged])].tolist():
        row = int(rows[place])
        suggested = names.named(doubts.suggested[place])
        target, output = names.dataset.targets[row], outputs[place]
        if names.task is CLASSIFICATION:
            likeliest, own = float(output[doubts.suggested[place]]), float(output[target])
            reason = (
                f"labelled {names.label(row)!r}; judged without it, {suggested!r} has {likeliest:.3f} "
                f"and {names.label(row)!r} {own:.3f}"
            )
        elif names.task is MULTILABEL:
            flips = np.flatnonzero(doubts.suggested[place] != target)
            said = [
                f"{names.dataset.class_names[column]!r} is {'on' if target[column] == 1 else 'off'} with probability "
                f"{float(output[column]):.3f}"
                for column in flips.tolist()
            ]
            reason = f"judged without it, {', '.join(said)}"
        else:
            reason = (
                f"labelled {names.label(row)}; judged without it, it is {suggested}, "
                f"{doubts.score[place]:.1f} robust deviations from the usual error"
            )
        found.append(names.finding("label", row, doubts.score[place], reason, suggested=suggested))
    return found


def rows_repeated(names: Names, found: Twins) -> tuple[list[Finding], int]:
    """Return the rows that repeat another, and how many of them are labelled otherwise than that."""
    out, contrary = [], 0
    for place in names.worst_first(found.row, found.similarity).tolist():
        row, other, cosine = int(found.row[place]), int(found.other[place]), float(found.similarity[place])
        what = "the same content" if names.key(row) == names.key(other) else (
            "the same features" if cosine >= 1 else "nearly the same"
        )  # fmt: skip
        of = f" of {names.split(other)}" if found.leak[place] else ""
        reason = f"{what} as row {names.id(other)!r}{of}, cosine {cosine:.3f}"
        own, others = names.label(row), names.label(other)
        if own is not None and others is not None and own != others:
            contrary += 1
            reason += f"; the other is labelled {others!r}"
        kind: Kind = "leak" if found.leak[place] else "duplicate"
        out.append(names.finding(kind, row, cosine, reason, other=other))
    return out, contrary


def rows_far(names: Names, found: Outliers, by_class: bool) -> list[Finding]:
    """Return the rows that are far from all classes, or from the centre of all rows where there are none."""
    flagged = np.flatnonzero(found.flagged)
    centre, of = ("class", "its class") if by_class else ("centre", "all rows")
    return [
        names.finding(
            "outlier", row, found.deviation[row],
            f"its distance to the nearest {centre} is {found.distance[row]:.1f}, "
            f"by Mahalanobis, its square {found.deviation[row]:.1f} robust deviations above the median of {of}",
        )
        for row in flagged[names.worst_first(flagged, found.deviation[flagged])].tolist()
    ]  # fmt: skip


def classes_confused(names: Names, doubts: Doubts) -> list[Finding]:
    """Return the pairs of classes whose rows are most often taken for one another."""
    if doubts.joint is None or doubts.estimate is None:
        return []
    classes, rows = names.dataset.class_names, doubts.estimate.sum(axis=1)
    found = []
    there = np.argwhere(doubts.joint > 0).tolist()
    pairs = [(-float(doubts.estimate[label, other]), label, other) for label, other in there if label != other]
    for negative, label, other in sorted(pair for pair in pairs if pair[0] <= -1)[:_PAIRS]:
        name, rival, of = classes[label], classes[other], float(rows[label])
        reason = f"about {round(-negative):,} of {round(of):,} rows labelled {name!r} speak for {rival!r}"
        found.append(Finding("confused", round(-negative / of, 6), reason, label=name, suggested=rival))
    return found


def rows_next(names: Names, rows: Rows, worth: Floats, chosen: Sequence[int], outputs: Outputs | None) -> list[Finding]:
    """Return rows to label next, in the order in which they were chosen."""
    found = []
    for place in chosen:
        row = int(rows[place])
        suggested: str | None = None
        if outputs is None or names.task is None:
            reason = "typical of the rows without label, and unlike those chosen before it"
        elif names.task is CLASSIFICATION:
            first, second = np.argsort(-outputs[place], kind="stable")[:2].tolist()
            suggested = names.dataset.class_names[first]
            reason = (
                f"the head gives {suggested!r} {float(outputs[place][first]):.3f} and "
                f"{names.dataset.class_names[second]!r} {float(outputs[place][second]):.3f}"
            )
        else:
            column = int(np.abs(outputs[place] - 0.5).argmin())
            suggested = names.named((outputs[place] >= 0.5).astype(np.uint8))
            reason = f"the head gives {names.dataset.class_names[column]!r} {float(outputs[place][column]):.3f}"
        found.append(names.finding("next", row, worth[place], reason, suggested=suggested))
    return found
