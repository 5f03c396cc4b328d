"""Rows that are nearly the same, within a split and across splits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedcache.audit.neighbours import Pairs, Vectors
from embedcache.features import Rows
from embedcache.task import Floats

_CHAIN = 0.1
"""A group of more than this share of all rows is a chain of rows that are a little alike, not one thing seen often."""


@dataclass(frozen=True, eq=False)
class Twins:
    """Rows that nearly repeat another, P of them.

    Attributes:
        row, other: int64 [P], the row and the one it repeats; a row is here once.
        similarity: float64 [P], the cosine of the two.
        leak: bool [P], whether the other lies in an earlier split: train before validation before test.
        group: int64 [N], for every row of the dataset the first row of those it is joined with; its own number for a
            row that repeats none.
    """

    row: Rows
    other: Rows
    similarity: Floats
    leak: npt.NDArray[np.bool_]
    group: Rows


def twins(vectors: Vectors, of_row: Rows, pairs: Pairs | None, split: Rows, rank: Rows) -> Twins:
    """Return the rows that repeat another, given the pairs of vectors that are alike.

    ``of_row`` int64 [N] is each row's vector, ``split`` int64 [N] its split by a number that rises from the rows one
    learns from to those one tests on, ``rank`` int64 [N] its place in the order of the row keys, which decides ties.
    Without pairs, rows with the same features alone are alike.
    """
    count, splits = len(vectors), int(split.max(initial=0)) + 1
    none = np.zeros(0, np.int32)
    pairs = pairs or Pairs(none, none, np.zeros(0))
    itself = np.arange(count)
    start = np.concatenate([pairs.left, pairs.right, itself]).astype(np.int64)
    end = np.concatenate([pairs.right, pairs.left, itself]).astype(np.int64)
    similarity = np.concatenate([pairs.similarity, pairs.similarity, np.ones(count)])
    # Of the rows of a vector in a split, the first by key stands for all; the second is what the first itself repeats.
    standing, second = np.full((splits, count), -1, np.int64), np.full((splits, count), -1, np.int64)
    order = np.argsort(rank, kind="stable")
    for number in range(splits):
        own = order[split[order] == number]
        _, first = np.unique(of_row[own], return_index=True)
        standing[number, of_row[own[first]]] = own[first]
        rest = np.delete(own, first)
        _, first = np.unique(of_row[rest], return_index=True)
        second[number, of_row[rest[first]]] = rest[first]
    near = [_nearest(start, end, similarity, standing[number], rank, count) for number in range(splits)]
    within = [_nearest(start[:-count], end[:-count], similarity[:-count], standing[number], rank, count)
              for number in range(splits)]  # fmt: skip
    group = _groups(pairs, of_row, count)
    other, alike, leak = np.full(len(split), -1, np.int64), np.full(len(split), -np.inf), np.zeros(len(split), bool)
    for number in range(splits):
        rows = np.flatnonzero(split == number)
        for earlier in range(number):
            who, value = (column[of_row[rows]] for column in near[earlier])
            better = (who >= 0) & (value > alike[rows])
            other[rows[better]], alike[rows[better]], leak[rows[better]] = who[better], value[better], True
        # Within a split: a row with the same features, else the nearest of the pairs.
        who, value = (column[of_row[rows]] for column in within[number])
        same = np.where(
            standing[number, of_row[rows]] != rows, standing[number, of_row[rows]], second[number, of_row[rows]]
        )
        who, value = np.where(same >= 0, same, who), np.where(same >= 0, 1.0, value)
        _, first = np.unique(group[rows], return_index=True)
        kept = np.zeros(len(rows), bool)
        kept[first] = True
        repeats = ~leak[rows] & (who >= 0) & ~kept
        other[rows[repeats]], alike[rows[repeats]] = who[repeats], value[repeats]
    row = np.flatnonzero(other >= 0)
    return Twins(row, other[row], alike[row], leak[row], group)


def _nearest(start: Rows, end: Rows, similarity: Floats, standing: Rows, rank: Rows, count: int) -> tuple[Rows, Floats]:
    """Return for each vector the nearest row of a split that it is alike with, int64 [U], -1 for none; and how much."""
    who = standing[end]
    there = np.flatnonzero(who >= 0)
    order = there[np.lexsort((rank[who[there]], -similarity[there], start[there]))]
    vector, first = np.unique(start[order], return_index=True)
    found, value = np.full(count, -1, np.int64), np.full(count, -np.inf)
    found[vector], value[vector] = who[order[first]], similarity[order[first]]
    return found, value


def _groups(pairs: Pairs, of_row: Rows, count: int) -> Rows:
    """Return the first row of each row's group, int64 [N]: rows that pairs join, over any number of steps."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs.left), np.int8), (pairs.left, pairs.right)), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    of = component[of_row].astype(np.int64)
    _, first, inverse = np.unique(of, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)].astype(np.int64)


def fold_groups(group: Rows, of_row: Rows) -> Rows:
    """Return for each row the row whose fold it shares: its group's first, unless groups are long chains."""
    largest = int(np.bincount(group).max(initial=0))
    if largest <= max(10, _CHAIN * len(group)):
        return group
    _, first, inverse = np.unique(of_row, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)].astype(np.int64)
