"""Rows to label next: those a head is least sure of, and not all of one kind."""

from __future__ import annotations

import numpy as np

from embedcache.audit.neighbours import Neighbours, Unit, Vectors
from embedcache.features import Rows
from embedcache.task import CLASSIFICATION, MULTILABEL, Array, Floats, Task

_CANDIDATES = 20
"""So many rows for each that is wanted are looked at: the least sure ones."""


def uncertainty(task: Task, outputs: Array) -> Floats | None:
    """Return how unsure a head is of n rows, float64 [n] in [0, 1]; None for a regression, which does not say.

    Of classes it is 1 less the margin between the two likeliest (Scheffer, Decomain and Wrobel 2001), of labels that
    of the label that is nearest to one half.
    """
    p = outputs.astype(np.float64)
    if task is CLASSIFICATION:
        top = np.sort(p, axis=1)[:, -2:]
        return np.asarray(1 - (top[:, 1] - top[:, 0]))
    return np.asarray((1 - np.abs(2 * p - 1)).max(axis=1, initial=0.0)) if task is MULTILABEL else None


def typicality(near: Neighbours) -> Floats:
    """Return how near each vector is to its neighbours, float64 [U] in [0, 1]: first labels belong in the thick of it.

    (Hacohen, Dekel and Weinshall 2022.)
    """
    there = np.isfinite(near.similarity)
    mean = np.where(there, near.similarity, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(there.sum(axis=1), 1)
    return np.asarray(np.round(np.clip((1 + mean) / 2, 0.0, 1.0), 6))


def choose(vectors: Vectors, rows: Rows, of_row: Rows, worth: Floats, rank: Rows, most: int, known: Rows) -> list[int]:
    """Return the places in ``rows`` int64 [n] of those to label next, the first first.

    Greedy: the row of the largest product of its ``worth`` float64 [n] and its distance to what has been chosen, and
    to the vectors ``known`` int64 [k] already. ``of_row`` and ``rank`` [N] are each row's vector and place by key.
    """
    order = np.lexsort((rank[rows], -worth))[: most * _CANDIDATES]
    _, first = np.unique(of_row[rows[order]], return_index=True)
    order = order[np.sort(first)]  # of rows with the same features one is enough
    x = vectors.take(of_row[rows[order]]).astype(np.float64)
    distance = _farthest_from(vectors, x, np.unique(known))
    chosen: list[int] = []
    while len(chosen) < min(most, len(order)):
        best = int((worth[order] * distance).argmax())
        if worth[order[best]] * distance[best] <= 0:
            break
        chosen.append(int(order[best]))
        distance = np.minimum(distance, np.round(1 - (x * x[best]).sum(axis=1), 9).clip(0))
        distance[best] = 0.0
    return chosen


def _farthest_from(vectors: Vectors, x: Floats, known: Rows) -> Floats:
    distance = np.ones(len(x))
    for start in range(0, len(known), 1024):
        part: Unit = vectors.take(known[start : start + 1024])
        products = np.stack([(x * vector).sum(axis=1) for vector in part.astype(np.float64)])
        distance = np.minimum(distance, np.round(1 - products.max(axis=0), 9).clip(0))
    return distance
