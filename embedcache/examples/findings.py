"""What a careful person would want to be told about the rows: leaks, contradictions, classes a split lacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedcache.dataset import Dataset
from embedcache.examples.labels import some
from embedcache.task import REGRESSION, task_named
from embedcache.wording import counted

Show = Callable[[Sequence[int]], list[str]]
"""Rows (increasing) -> a short printable form of each."""

SHOWN = 3


@dataclass(frozen=True)
class Groups:
    """Rows grouped by content. ``order`` int64 [N] sorts rows by content and, within, by row; ``start`` bool [N] marks
    where a group begins in that order."""

    order: NDArray[np.int64]
    start: NDArray[np.bool_]

    @property
    def number(self) -> int:
        """How many different contents there are."""
        return int(self.start.sum())

    def ids(self) -> NDArray[np.int64]:
        """Return the group of each place of ``order``, int64 [N]."""
        return np.cumsum(self.start) - 1

    def first_rows(self) -> NDArray[np.int64]:
        """Return the first row of every group, int64 [number]."""
        return self.order[self.start]


def group(keys: NDArray[np.uint8]) -> Groups:
    """Group rows by their keys, u1 [N, 16]."""
    words = np.ascontiguousarray(keys).view("<u8")
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: rows stay in order within a group
    start = np.ones(len(order), bool)
    start[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    return Groups(order, start)


def duplicates(groups: Groups) -> list[str]:
    """Say how many rows repeat another one."""
    repeated = len(groups.order) - groups.number
    if not repeated:
        return []
    return [f"{counted(repeated, 'row')} of {len(groups.order):,} repeat another: {groups.number:,} different contents"]


def leaks(groups: Groups, dataset: Dataset, show: Show) -> list[str]:
    """Say which contents occur in two splits."""
    names = dataset.split_names
    present = np.zeros((groups.number, len(names)), bool)
    present[groups.ids(), dataset.split[groups.order]] = True
    first = groups.first_rows()
    notes = []
    for a, b in itertools.combinations(range(len(names)), 2):
        both = np.sort(first[present[:, a] & present[:, b]])
        if len(both):
            verb = "occurs" if len(both) == 1 else "occur"
            shown = ", ".join(show(both[:SHOWN].tolist()))
            contents = counted(len(both), "different content")
            notes.append(f"{contents} {verb} in both {names[a]} and {names[b]}, for example {shown}")
    return notes


def contradictions(groups: Groups, dataset: Dataset, show: Show) -> list[str]:
    """Say which contents occur with different labels: another class, another set of classes, any other number."""
    targets = dataset.targets
    if targets is None:
        return []
    known = dataset.labelled()[groups.order]
    rows, ids = groups.order[known], groups.ids()[known]
    values = targets.reshape(len(targets), -1)
    differs = (ids[1:] == ids[:-1]) & (values[rows[1:]] != values[rows[:-1]]).any(axis=1)
    if not differs.any():
        return []
    clashing = np.unique(ids[1:][differs])
    first = groups.first_rows()[clashing]
    earliest = np.argsort(first)[:SHOWN]
    examples = []
    for number, content in zip(clashing[earliest].tolist(), show(first[earliest].tolist()), strict=True):
        labels = dict.fromkeys(_label(dataset, row) for row in rows[ids == number].tolist())
        examples.append(f"{content} ({' and '.join(list(labels)[:SHOWN])})")
    verb = "occurs" if len(first) == 1 else "occur"
    return [f"{counted(len(first), 'content')} {verb} with different labels, for example {', '.join(examples)}"]


def _label(dataset: Dataset, row: int) -> str:
    assert dataset.task is not None
    assert dataset.targets is not None
    task = task_named(dataset.task)
    named = task.named(dataset.targets[row], dataset.class_names)
    if isinstance(named, str):
        return named
    return (", " if task is REGRESSION else "+").join(map(str, named)) or "none"


def gaps(dataset: Dataset) -> list[str]:
    """Say which splits are empty or unlabelled, and which classes a split lacks."""
    known, targets, names = dataset.labelled(), dataset.targets, dataset.class_names
    notes = []
    task = None if dataset.task is None else task_named(dataset.task)
    if task is not None and task.has_probabilities and len(names) == 1:
        notes.append(f"there is only one class: {names[0]!r}")
    for number, split in enumerate(dataset.split_names):
        inside = dataset.split == number
        if not inside.any():
            notes.append(f"no row falls into {split}")
        elif targets is not None and not (inside & known).any():
            notes.append(f"no row of {split} has a label")
        elif task is not None and targets is not None:
            rows = task.counts(targets[inside & known], len(names))
            lacking = [] if rows is None else [names[place] for place in np.flatnonzero(rows == 0).tolist()]
            if lacking:
                notes.append(f"{split} has no row of {counted(len(lacking), 'class')}: {some(lacking)}")
    if targets is not None and known.any() and not known.all():
        notes.append(f"{counted(int((~known).sum()), 'row')} without label")
    return notes
