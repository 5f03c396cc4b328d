"""What a careful person would want to be told about the rows: leaks, contradictions, classes a split lacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedcache.examples.labels import UNLABELLED, some
from embedcache.spec import TaskName
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


def labelled(task: TaskName | None, targets: NDArray[Any] | None, rows: int) -> NDArray[np.bool_]:
    """Return which rows have a label, bool [N]."""
    if targets is None:
        return np.zeros(rows, bool)
    if task == "classification":
        return np.asarray(targets >= 0)
    if task == "multilabel":
        return np.asarray((targets != UNLABELLED).all(axis=1))
    return np.asarray(~np.isnan(targets).any(axis=1))


def duplicates(groups: Groups) -> list[str]:
    """Say how many rows repeat another one."""
    repeated = len(groups.order) - groups.number
    if not repeated:
        return []
    return [f"{counted(repeated, 'row')} of {len(groups.order):,} repeat another: {groups.number:,} different contents"]


def leaks(groups: Groups, split: NDArray[np.uint8], names: Sequence[str], show: Show) -> list[str]:
    """Say which contents occur in two splits."""
    present = np.zeros((groups.number, len(names)), bool)
    present[groups.ids(), split[groups.order]] = True
    first = groups.first_rows()
    notes = []
    for one, other in itertools.combinations(range(len(names)), 2):
        both = np.sort(first[present[:, one] & present[:, other]])
        if len(both):
            verb = "occurs" if len(both) == 1 else "occur"
            examples = ", ".join(show(both[:SHOWN].tolist()))
            contents = counted(len(both), "different content")
            notes.append(f"{contents} {verb} in both {names[one]} and {names[other]}, for example {examples}")
    return notes


def contradictions(
    groups: Groups, task: TaskName | None, targets: NDArray[Any] | None, class_names: Sequence[str], show: Show
) -> list[str]:
    """Say which contents occur with different labels: another class, another set of classes, any other number."""
    if targets is None:
        return []
    known = labelled(task, targets, len(groups.order))[groups.order]
    rows, ids = groups.order[known], groups.ids()[known]
    values = targets.reshape(len(targets), -1)
    differs = (ids[1:] == ids[:-1]) & (values[rows[1:]] != values[rows[:-1]]).any(axis=1)
    if not differs.any():
        return []
    clashing = np.unique(ids[1:][differs])
    first = groups.first_rows()[clashing]
    earliest = np.argsort(first)[:SHOWN]
    shown = first[earliest].tolist()
    examples = []
    for number, text in zip(clashing[earliest].tolist(), show(shown), strict=True):
        members = rows[ids == number]
        several = dict.fromkeys(_label(task, targets[member], class_names) for member in members.tolist())
        examples.append(f"{text} ({' and '.join(list(several)[:SHOWN])})")
    verb = "occurs" if len(first) == 1 else "occur"
    return [f"{counted(len(first), 'content')} {verb} with different labels, for example {', '.join(examples)}"]


def _label(task: TaskName | None, target: Any, class_names: Sequence[str]) -> str:
    if task == "classification":
        return class_names[int(target)]
    if task == "multilabel":
        return "+".join(name for name, member in zip(class_names, target, strict=True) if member) or "none"
    return ", ".join(str(float(value)) for value in target)


def absent(
    task: TaskName | None,
    targets: NDArray[Any] | None,
    class_names: Sequence[str],
    split: NDArray[np.uint8],
    names: Sequence[str],
) -> list[str]:
    """Say which splits are empty or unlabelled, and which classes a split lacks."""
    known = labelled(task, targets, len(split))
    notes = []
    if task in ("classification", "multilabel") and len(class_names) == 1:
        notes.append(f"there is only one class: {class_names[0]!r}")
    for number, name in enumerate(names):
        inside = split == number
        if not inside.any():
            notes.append(f"no row falls into {name}")
        elif targets is not None and not (inside & known).any():
            notes.append(f"no row of {name} has a label")
        elif targets is not None and task != "regression":
            there = inside & known
            if task == "classification":
                rows = np.bincount(targets[there], minlength=len(class_names))
            else:
                rows = targets[there].any(axis=0)
            lacking = [class_names[place] for place in np.flatnonzero(rows == 0).tolist()]
            if lacking:
                notes.append(f"{name} has no row of {counted(len(lacking), 'class')}: {some(lacking)}")
    if targets is not None and known.any() and not known.all():
        notes.append(f"{counted(int((~known).sum()), 'row')} without label")
    return notes
