"""Nearest neighbours: an exact search among training rows, and the votes of those that are found.

A head that votes is its training rows, four arrays: ``neighbours.features`` [N, D], ``neighbours.targets`` as the task
has them, and ``neighbours.mean`` and ``neighbours.scale`` [D] where features are standardised.

Which rows are found, and how far away, hangs on the two rows alone, whatever the batch, the number of threads and the
kernels of BLAS. By cosine, vectors of length 1 are rounded to multiples of 2^-26: products are then multiples of 2^-52
and their sums, in any order, below 2, so that float64 holds every one of them exactly. The Euclidean distance of what
a product of matrices brings near is computed again from the difference. Of rows with equal features the first comes
first.

The votes are those of DINO's evaluation (Caron et al. 2021; after Wu et al. 2018) where weights are ``softmax``: the k
nearest rows by cosine, each with exp(similarity / temperature); of raw features, so without standardisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embedcache.heads.sklearn_kinds import Options
from embedcache.task import CLASSIFICATION, Array, Floats, Task
from embedcache.threads import Workers, workers

Rows = npt.NDArray[np.int64]

FEATURES, TARGETS, MEAN, SCALE = (f"neighbours.{name}" for name in ("features", "targets", "mean", "scale"))

_PART = 256
"""Rows that look for neighbours together, on one thread."""
_TILE = 4096
"""Training rows that they look among at once."""
_CHUNK = 8192
"""Rows whose neighbours are in memory at once."""
_PAIRS = 1 << 22
_STEP = 2.0**-26


@dataclass(frozen=True)
class Vote:
    """How the ``k`` nearest rows vote; ``weights`` is uniform, distance or softmax."""

    k: int
    weights: str
    temperature: float

    @classmethod
    def of(cls, options: Options) -> Vote:
        """Return the vote that a head's options ask for."""
        return cls(options.whole("n_neighbors"), str(options["weights"]), options.number("temperature"))


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest of N training rows, nearest first: ``distance`` float64 [n, k], ``row`` int64 [n, k].

    The distance by cosine is 1 less the cosine.
    """

    distance: Floats
    row: Rows

    def first(self, k: int) -> Neighbours:
        """Return the nearest ``k``, or all where there are fewer."""
        return Neighbours(np.ascontiguousarray(self.distance[:, :k]), np.ascontiguousarray(self.row[:, :k]))


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Rows to search among, and how distance is measured: ``metric`` is cosine, euclidean or manhattan."""

    state: Mapping[str, Array]
    metric: str

    def __len__(self) -> int:
        return len(self.state[FEATURES])

    def alike(self, other: TrainingRows) -> bool:
        """Whether a search among others finds the same: they are the same arrays, not equal ones."""
        same = self.state.keys() == other.state.keys() and self.metric == other.metric
        return same and all(value is other.state[name] for name, value in self.state.items())

    def voted(self, x: Array, votes: Sequence[Vote], task: Task, outputs: int) -> list[Floats]:
        """Return what each vote says of features ``x`` [n, D], float64 [n, C], all from one search."""
        parts: list[list[Floats]] = [[np.zeros((0, outputs))] for _ in votes]
        for found in self.search(x, max(vote.k for vote in votes)):
            for vote, out in zip(votes, parts, strict=True):
                out.append(self._shares(found.first(vote.k), vote, task, outputs))
        return [np.concatenate(out) for out in parts]

    def search(self, x: Array, k: int) -> Iterator[Neighbours]:
        """Yield the ``k`` nearest rows of features ``x`` [n, D], or all where there are fewer, some rows at a time."""
        k = min(k, len(self))
        several: AbstractContextManager[Workers] = workers() if len(x) > _PART else nullcontext(Workers())
        with several as threads:
            for start in range(0, len(x), _CHUNK):
                wanted = self._vectors(x[start : start + _CHUNK])
                parts = [_Best(wanted.take(part), k) for part in range(0, len(wanted), _PART)]
                for first in range(0, len(self), _TILE):
                    among = self._vectors(self.state[FEATURES][first : first + _TILE])

                    def look(part: _Best, first: int = first, among: _Vectors = among) -> None:
                        part.look(among, first)

                    for _ in threads.run(parts, look):
                        pass
                score, row = (
                    np.concatenate(several) for several in zip(*((p.score, p.row) for p in parts), strict=False)
                )
                yield Neighbours(np.sqrt(-2 * score) if self.metric == "euclidean" else -score, row)

    def _vectors(self, x: Array) -> _Vectors:
        values = np.asarray(x, np.float64)
        if MEAN in self.state:
            values = (values - self.state[MEAN]) * self.state[SCALE]
        if self.metric == "cosine":
            length = np.sqrt(np.square(values).sum(axis=1, keepdims=True))
            values = np.divide(values, length, out=np.zeros_like(values), where=length > 0)
            values = np.rint(values / _STEP) * _STEP
        half = np.square(values).sum(axis=1) / 2
        if self.metric == "cosine":
            half[half == 0] = 0.5  # the cosine to a vector of zeros is taken for 0
        return _Vectors(values, half, self.metric)

    def _shares(self, found: Neighbours, vote: Vote, task: Task, outputs: int) -> Floats:
        weight, y = _weights(found, vote), self.state[TARGETS]
        out: Floats
        if task is CLASSIFICATION:
            places = np.arange(len(weight))[:, None] * outputs + y[found.row]
            shares = np.bincount(places.ravel(), weight.ravel(), len(weight) * outputs)
            out = np.asarray(shares, np.float64).reshape(-1, outputs)
        else:
            out = np.zeros((len(weight), outputs))
            for place in range(weight.shape[1]):  # in the order of nearness, whatever a product would have
                out += weight[:, place, None] * y[found.row[:, place]]
        return np.minimum(out, 1.0) if task.has_probabilities else out


def _weights(found: Neighbours, vote: Vote) -> Floats:
    """Return how much each neighbour counts, float64 [n, k]: a row's sum to 1."""
    distance = found.distance
    if vote.weights == "uniform":
        weight = np.ones_like(distance)
    elif vote.weights == "distance":
        same = distance == 0
        weight = np.where(same.any(axis=1, keepdims=True), same, 1 / np.where(same, 1.0, distance))
    else:
        weight = np.exp((distance[:, :1] - distance) / vote.temperature)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class _Vectors:
    """Features as they are compared, float64 [n, D], and half the square of their lengths [n]."""

    values: Floats
    half: Floats
    metric: str

    def __len__(self) -> int:
        return len(self.values)

    def take(self, start: int) -> _Vectors:
        """Return the part that begins with a row."""
        return replace(self, values=self.values[start : start + _PART], half=self.half[start : start + _PART])


class _Best:
    """The best of the training rows seen so far for each of n rows: scores [n, k], highest first, and their places.

    A score is minus half the squared distance, by cosine and Euclid; by Manhattan minus the distance.
    """

    def __init__(self, wanted: _Vectors, k: int) -> None:
        self._wanted = wanted
        self.score = np.full((len(wanted), k), -np.inf)
        self.row = np.full((len(wanted), k), -1)

    def look(self, among: _Vectors, first: int) -> None:
        """Look at more training rows, of which the first has the place ``first``."""
        tile, doubt = self._scores(among)
        least, k = self.score[:, -1], self.score.shape[1]
        if tile.shape[1] > k and not np.isfinite(least).all():
            least = np.maximum(least, np.partition(tile, tile.shape[1] - k, axis=1)[:, tile.shape[1] - k])
        # Both what is the least and what is compared with it may be off.
        near = np.flatnonzero(tile >= (least - 2 * doubt)[:, None])
        own, other = np.divmod(near, tile.shape[1])
        score = tile.reshape(-1)[near]
        if self._wanted.metric == "euclidean":
            score = -_half_squares(self._wanted.values, among.values, own, other)
        number = np.bincount(own, minlength=len(tile))
        place = k + np.arange(len(own)) - (np.cumsum(number) - number)[own]
        scores = np.full((len(tile), k + int(number.max())), -np.inf)
        rows = np.full(scores.shape, -1)
        scores[:, :k], rows[:, :k] = self.score, self.row
        scores[own, place], rows[own, place] = score, first + other
        # Stable: of equal ones that stay in their order, the first are kept.
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        self.score, self.row = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)

    def _scores(self, among: _Vectors) -> tuple[Floats, Floats]:
        """Return the scores of all pairs [n, m], and by how much those of a row may be off [n]."""
        wanted = self._wanted
        if wanted.metric == "manhattan":
            from scipy.spatial.distance import cdist

            return -cdist(wanted.values, among.values, "cityblock"), np.zeros(len(wanted))
        tile: Floats = wanted.values @ among.values.T
        tile -= among.half
        tile -= wanted.half[:, None]
        if wanted.metric == "cosine":
            return tile, np.zeros(len(wanted))
        # A sum of D products is off by less than D roundings of the product of the lengths.
        lengths = np.sqrt(2 * wanted.half) + np.sqrt(2 * among.half.max())
        return tile, (wanted.values.shape[1] + 4) * 2.0**-52 * lengths**2


def _half_squares(a: Floats, b: Floats, rows: Rows, columns: Rows) -> Floats:
    """Return half the squared distances of pairs, each from the difference of the two rows."""
    out, step = np.empty(len(rows)), max(1, _PAIRS // a.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        out[part] = np.square(a[rows[part]] - b[columns[part]]).sum(axis=1) / 2
    return out


__all__ = ["FEATURES", "MEAN", "SCALE", "TARGETS", "Neighbours", "TrainingRows", "Vote"]
