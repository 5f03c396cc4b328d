"""The training rows of a cache that lie nearest to a row: what the head may have learned its answer from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.cache import FeatureCache
from embedcache.errors import InputError, SpecError
from embedcache.features import Floats, InMemory, Ragged
from embedcache.heads import TrainedHead
from embedcache.task import Named, task_named
from embedcache.train.cached import refuse_other_cache

Keys = npt.NDArray[np.int64]

_STEPS = 1_000_000
"""Similarities are told and ranked in steps of 1e-6: how a product of matrices adds up then changes no rank."""
_ROW_BITS = 40
_BLOCK_ROWS, _BLOCK_RAGGED = 1024, 64
"""Training rows that are read and compared at once."""


@dataclass(frozen=True)
class Neighbour:
    """A training row near another row.

    ``similarity`` is the cosine of the angle between their features, from -1 to 1. ``label`` is None where the cache
    has no labels of the head's task, ``text`` where it kept no texts (``extract --keep-inputs``).
    """

    id: str
    similarity: float
    label: Named | None
    text: str | None


class NearestRows:
    """The ``number`` labelled training rows of ``cache`` that are nearest to a row, by the head's own feature set.

    Features of several layers are compared as one vector, those of tokens by the mean over the tokens. Rows of equal
    content count once, as the first of them; of equally near rows the first comes first. The cache is read block by
    block, so it may be larger than memory.

    Raises:
        BackboneMismatchError: the cache holds other features than the head was trained on.
        InputError: it has no training rows.
        SpecError: ``number`` is not positive.
    """

    def __init__(self, cache: FeatureCache | Path | str, head: TrainedHead, number: int) -> None:
        if number < 1:
            raise SpecError(f"explain is {number}: expected how many training rows to show, 1 or more")
        self._cache = cache if isinstance(cache, FeatureCache) else FeatureCache.open(cache)
        refuse_other_cache(head, self._cache)
        self._feature = self._cache.feature(head.feature.name)
        self._task = task_named(head.task) if self._cache.task == head.task else None
        self._targets = self._cache.targets() if self._task is not None else None
        rows = self._cache.rows("train")
        if self._task is not None and self._targets is not None:
            rows = rows[self._task.labelled(self._targets[rows])]
        if not len(rows):
            raise InputError(f"{self._cache.path} has no training rows to explain a prediction with")
        _, first = np.unique(self._cache.places()[rows], return_index=True)
        self._rows = rows[np.sort(first)]
        self.number = min(number, len(self._rows))
        self._ids = self._cache.dataset.ids
        self._texts = self._cache.inputs() if self._cache.spec.content in (None, "text") else None

    def of(self, x: InMemory) -> list[tuple[Neighbour, ...]]:
        """Return the nearest training rows of each of N rows, the nearest first, given their features."""
        wanted = _unit(x)
        best: Keys = np.empty((len(wanted), 0), np.int64)
        for first, block in self._blocks():
            # One whole number a pair, by which it is ranked: how far apart, and behind that the place of the row.
            apart = np.rint((1 - wanted @ block.T) * _STEPS).astype(np.int64)
            keys = (np.maximum(apart, 0) << _ROW_BITS) | np.arange(first, first + len(block))
            best = np.concatenate([best, keys], axis=1)
            if best.shape[1] > self.number:
                best = np.partition(best, self.number - 1, axis=1)[:, : self.number]
        return [tuple(map(self._neighbour, keys)) for keys in np.sort(best, axis=1).tolist()]

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        step = _BLOCK_RAGGED if self._feature.kind == "tokens" else _BLOCK_ROWS
        for first in range(0, len(self._rows), step):
            yield first, _unit(self._cache.of_rows(self._rows[first : first + step], self._feature))

    def _neighbour(self, key: int) -> Neighbour:
        row = int(self._rows[key & ((1 << _ROW_BITS) - 1)])
        label = None
        if self._task is not None and self._targets is not None:
            label = self._task.named(self._targets[row], self._cache.class_names)
        text = None if self._texts is None else self._texts[row].decode("utf-8", "replace")
        assert self._ids is not None
        return Neighbour(self._ids[row], (_STEPS - (key >> _ROW_BITS)) / _STEPS, label, text)


def _unit(x: InMemory) -> Floats:
    """Return one vector of length 1 for each row, float64 [N, ...]; a vector of zeros stays one."""
    if isinstance(x, Ragged):
        vectors = np.zeros((len(x), x.values.shape[1]))
        np.add.at(vectors, np.repeat(np.arange(len(x)), x.lengths), x.values)  # the angle of a sum is that of the mean
    else:
        vectors = np.asarray(x.values, np.float64).reshape(len(x), -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1))
