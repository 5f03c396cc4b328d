"""The nearest neighbours of every row, and all pairs of rows that are nearly the same, exactly.

The matrix of similarities is symmetric, so half of it is computed: a tile serves its rows and its columns. 100,000 rows
of 384 numbers are 3.8 TFLOP. Each tile is one product on one BLAS thread, tiles go side by side, and what they found is
merged in a fixed order: the same bits however many threads there are. In memory are a tile for each thread and k
neighbours for each row; the rows themselves lie in a temporary file and are read panel by panel.

Tried, 2026-11-27: looking through a tile costs 0.9 ns a number, its product 8 ns, so that an approximate search (lists
of near centres) would have to leave out most of the matrix to pay, and would lose neighbours.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from embedcache.dataset import evenly_spread
from embedcache.errors import FeatureError
from embedcache.features import Features, Rows
from embedcache.task import Floats
from embedcache.threads import workers

Unit = npt.NDArray[np.float32]
Places = npt.NDArray[np.int32]

PANEL = 2048
"""Rows of a tile. Smaller ones stay in the cache a little better, and then merging costs more than that saves."""
_MOST_PAIRS = 20
"""Pairs for each row from which on the features do not tell rows apart: nobody reads so many."""
_MOST_STRANGERS = 0.05
"""Unrelated rows that may be as alike as duplicates, for each row: with more of them duplicates cannot be told."""
_SAMPLE = 400
"""Vectors whose cosines tell how alike strangers are: 80,000 pairs."""


class Vectors:
    """U different rows of N, centred and of length 1, in a temporary file; a context manager.

    A cosine tells nothing where all features point the same way, as those of many backbones do (Mu and Viswanath
    2018): the mean is taken off first. Rows with the same features are one vector.

    Attributes:
        of_row: int64 [N], the vector of each row.
        first: int64 [U], the first row of each vector.
        mean: float64 [D], what was taken off.
    """

    def __init__(self, x: Features) -> None:
        """Read features [N, D] block by block. Raises ``FeatureError`` naming the row that is not finite."""
        self.dim = x.feature.dim
        self.mean = _mean(x)
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="embedcache-")  # noqa: SIM115  # it lives as long as this
        seen: dict[bytes, int] = {}
        of_row = np.empty(len(x), np.int64)
        first: list[int] = []
        row = 0
        try:
            for part in x.vectors():
                new = []
                for place, values in enumerate(np.ascontiguousarray(part)):
                    digest = hashlib.blake2b(values.data, digest_size=16).digest()
                    vector = seen.setdefault(digest, len(seen))
                    if vector == len(first):
                        first.append(row + place)
                        new.append(place)
                    of_row[row + place] = vector
                row += len(part)
                self._file.write(_unit(part[new], self.mean).data)
            self._file.flush()
        except OSError as error:
            raise FeatureError(
                f"{x.feature.name}: no temporary file in {tempfile.gettempdir()} ({error.strerror or error}): "
                "set TMPDIR"
            ) from None
        self.of_row, self.first = of_row, np.array(first, np.int64)

    def __len__(self) -> int:
        return len(self.first)

    def __enter__(self) -> Vectors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def panel(self, start: int, stop: int) -> Unit:
        """Return vectors ``start`` to ``stop``, float32 [n, D]."""
        size = 4 * self.dim
        return np.frombuffer(os.pread(self._file.fileno(), (stop - start) * size, start * size), np.float32).reshape(
            -1, self.dim
        )

    def take(self, vectors: Rows) -> Unit:
        """Return some vectors, int64 [n], float32 [n, D]."""
        out = np.empty((len(vectors), self.dim), np.float32)
        for place, vector in enumerate(vectors.tolist()):
            out[place] = self.panel(vector, vector + 1)[0]
        return out

    def panels(self) -> list[tuple[int, int]]:
        """Return the first and last rows of all panels."""
        return [(start, min(start + PANEL, len(self))) for start in range(0, len(self), PANEL)]


def _mean(x: Features) -> Floats:
    total, rows = np.zeros(x.feature.dim), 0
    for part in x.vectors():
        total += part.sum(axis=0, dtype=np.float64)
        rows += len(part)
    return np.asarray(total / max(rows, 1))


def _unit(part: npt.NDArray[np.floating], mean: Floats) -> Unit:
    """Return rows less the mean, of length 1; rows at the mean stay 0, and are like no other."""
    centred = part.astype(np.float64) - mean
    length = np.sqrt(np.square(centred).sum(axis=1, keepdims=True))
    unit: Unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0).astype(np.float32)
    return unit


@dataclass(frozen=True, eq=False)
class Pairs:
    """P pairs of vectors, int32 [P] each with ``left < right``, and how alike they are, float64 [P]."""

    left: Places
    right: Places
    similarity: Floats


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest vectors of each of U, nearest first, and the pairs at or above a similarity.

    Attributes:
        similarity: float32 [U, k], the cosine of each; -inf where there are fewer vectors than that.
        vector: int32 [U, k], which vectors they are; -1 where there are fewer.
        pairs: those at or above the similarity asked for; None where there were too many for these features to tell
            rows apart.
    """

    similarity: Unit
    vector: Places
    pairs: Pairs | None


Found = tuple[Places, Places, Unit]
"""Places in two panels, and how alike they are."""


class _Best:
    """The k best neighbours so far of each row, and from which cosine on pairs are wanted: infinity for no more."""

    def __init__(self, rows: int, k: int, alike: float) -> None:
        self.k, self.alike = k, np.float32(alike - _ROUNDING)
        self.most = _MOST_PAIRS * rows + 1000
        self.similarity = np.full((rows, k), -np.inf, np.float32)
        self.vector = np.full((rows, k), -1, np.int32)

    def least(self, start: int, stop: int) -> Unit:
        """Return what a neighbour of each row must at least have, float32 [n]."""
        least: Unit = self.similarity[start:stop, -1]
        return least

    def merge(self, rows: Places, vectors: Places, similarity: Unit) -> None:
        """Take neighbours in; of those that are equally near the first vectors stay."""
        if not len(rows):
            return
        order = np.lexsort((vectors, -similarity, rows))
        rows, vectors, similarity = rows[order], vectors[order], similarity[order]
        touched, start, counts = np.unique(rows, return_index=True, return_counts=True)
        rank = np.arange(len(rows)) - np.repeat(start, counts)
        kept = rank < self.k
        into = np.repeat(np.arange(len(touched)), counts)[kept], self.k + rank[kept]
        near = np.full((len(touched), 2 * self.k), -np.inf, np.float32)
        who = np.full(near.shape, -1, np.int32)
        near[:, : self.k], who[:, : self.k] = self.similarity[touched], self.vector[touched]
        near[into], who[into] = similarity[kept], vectors[kept]
        best = np.lexsort((who, -near), axis=1)[:, : self.k]
        self.similarity[touched] = np.take_along_axis(near, best, axis=1)
        self.vector[touched] = np.take_along_axis(who, best, axis=1)


def search(vectors: Vectors, k: int, alike: float, tick: Callable[[float], None] | None = None) -> Neighbours:
    """Return the ``k`` nearest neighbours of every vector by cosine, and all pairs of at least ``alike``.

    ``tick`` is called after each tile, with the share of the work that is done.
    """
    panels = vectors.panels()
    best = _Best(len(vectors), min(k, max(1, len(vectors) - 1)), alike)
    pairs: list[Found] | None = []
    if strangers(vectors, alike) > _MOST_STRANGERS:
        best.alike, pairs = np.float32(np.inf), None
    number = 0
    # Diagonal tiles first: each row then has a k-th neighbour, and few of what comes later are nearer than that.
    tiles = [(panel, panel) for panel in range(len(panels))]
    tiles += [(row, column) for row in range(len(panels)) for column in range(row + 1, len(panels))]
    local = threading.local()

    def work(tile: tuple[int, int]) -> tuple[Found, Found]:
        return _tile(vectors, panels[tile[0]], panels[tile[1]], best, local)

    with workers() as threads:
        for done, (of_rows, of_columns) in enumerate(threads.run(tiles, work), 1):
            rows, columns, similarity = of_rows
            best.merge(*of_rows)
            best.merge(*of_columns)
            if pairs is not None:
                near = (similarity >= best.alike) & (rows < columns)
                number += int(near.sum())
                pairs.append((rows[near], columns[near], similarity[near]))
            if number > best.most or np.isinf(best.alike):
                best.alike, pairs = np.float32(np.inf), None
            if tick is not None:
                tick(done / len(tiles))
    return Neighbours(best.similarity, best.vector, None if pairs is None else _exact(vectors, pairs, alike))


def strangers(vectors: Vectors, alike: float) -> float:
    """Return how many unrelated vectors each vector is as ``alike`` to by chance.

    Cosines of random directions in d dimensions follow a beta distribution with the variance 1 / d. The d of these
    vectors is taken from the lower half of a sample's cosines, in which duplicates and rows of one class are not.
    """
    from scipy.special import betainc

    sample = vectors.take(evenly_spread(len(vectors), _SAMPLE)).astype(np.float64)
    if len(sample) < 2:
        return 0.0
    cosines = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    middle = np.median(cosines)
    spread = round(1.4826 * float(np.median(middle - cosines[cosines <= middle])), 6)
    half = (min(vectors.dim, 1 / max(spread, 1e-6) ** 2) - 1) / 2
    return (len(vectors) - 1) * float(betainc(max(half, 1e-6), max(half, 1e-6), (1 - alike) / 2))


_ROUNDING = 1e-4
"""How far a cosine in float32 may be off: pairs that near to the limit are computed again in float64."""


def _tile(
    vectors: Vectors, rows: tuple[int, int], columns: tuple[int, int], best: _Best, local: threading.local
) -> tuple[Found, Found]:
    """Return what of one tile may be among the best of its rows, or a pair; and what among the best of its columns."""
    if not hasattr(local, "tile"):
        local.tile, local.flags = np.empty(PANEL * PANEL, np.float32), np.empty(PANEL * PANEL, bool)
    shape = rows[1] - rows[0], columns[1] - columns[0]
    size = shape[0] * shape[1]
    tile, flags = local.tile[:size].reshape(shape), local.flags[:size].reshape(shape)
    np.matmul(vectors.panel(*rows), vectors.panel(*columns).T, out=tile)
    least = best.least(*rows)
    if rows == columns:
        np.fill_diagonal(tile, -np.inf)
        k = min(best.k, shape[1])
        least = np.partition(tile, shape[1] - k, axis=1)[:, shape[1] - k]
    if np.count_nonzero(np.greater_equal(tile, best.alike, out=flags)) > 2 * best.most:  # both halves of a diagonal one
        best.alike = np.float32(np.inf)
    np.greater_equal(tile, np.minimum(least, best.alike)[:, None], out=flags)
    of_rows = _where(tile, flags, rows[0], columns[0])
    if rows == columns:
        empty = np.zeros(0, np.int32)
        return of_rows, (empty, empty, np.zeros(0, np.float32))
    np.greater_equal(tile, best.least(*columns), out=flags)
    across, down, similarity = _where(tile, flags, rows[0], columns[0])
    return of_rows, (down, across, similarity)


def _where(tile: Unit, flags: npt.NDArray[np.bool_], row: int, column: int) -> Found:
    places = np.flatnonzero(flags)
    similarity = tile.reshape(-1)[places]
    there = np.isfinite(similarity)  # not a row with itself
    down, across = np.divmod(places[there], tile.shape[1])
    return (down + row).astype(np.int32), (across + column).astype(np.int32), similarity[there]


def _exact(vectors: Vectors, found: Iterable[Found], alike: float) -> Pairs:
    """Return pairs in their order, with their cosines in float64, which every machine computes alike."""
    joined = [np.concatenate(column) for column in zip(*found, strict=True)]
    left, right = joined[0].astype(np.int32), joined[1].astype(np.int32)
    similarity = np.concatenate([np.zeros(0), *_cosines(vectors, left, right)])
    kept = np.flatnonzero(similarity >= alike)
    order = kept[np.lexsort((right[kept], left[kept]))]
    return Pairs(left[order], right[order], similarity[order])


def _cosines(vectors: Vectors, left: Places, right: Places) -> Iterator[Floats]:
    for start in range(0, len(left), PANEL):
        a = vectors.take(left[start : start + PANEL].astype(np.int64)).astype(np.float64)
        b = vectors.take(right[start : start + PANEL].astype(np.int64))
        yield (a * b).sum(axis=1).clip(-1.0, 1.0)
