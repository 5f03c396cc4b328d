"""Row key -> place in the cache, vectorised."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint64]


class RowIndex:
    """The places of row keys: 24 bytes a row."""

    def __init__(self, keys: Keys) -> None:
        """Index ``keys`` u1 [N, 16]; the place of a key is its first position."""
        high, low = halves(keys)
        self._order = np.lexsort((low, high))
        self._high, self._low = high[self._order], low[self._order]

    def lookup(self, keys: Keys) -> Rows:
        """Return the place of each key of ``keys`` u1 [n, 16], int64 [n], -1 for a key that is not there."""
        places = np.full(len(keys), -1, np.int64)
        if not len(self._high):
            return places
        high, low = halves(keys)
        first = np.searchsorted(self._high, high)
        near = np.minimum(first, len(self._high) - 1)
        same = self._high[near] == high
        hit = same & (self._low[near] == low)
        places[hit] = self._order[near[hit]]
        # Keys that share their first eight bytes: chance brings none, somebody else's cache may bring any number. A
        # binary search for all of them at once, so that such a cache costs no more than another.
        rest = np.flatnonzero(same & ~hit)
        if len(rest):
            start, stop = first[rest], np.searchsorted(self._high, high[rest], side="right")
            end = stop.copy()
            while (start < stop).any():
                middle = (start + stop) // 2
                less = self._low[np.minimum(middle, end - 1)] < low[rest]
                start, stop = np.where(less & (start < stop), middle + 1, start), np.where(less, stop, middle)
            inside = start < end
            inside[inside] = self._low[start[inside]] == low[rest[inside]]
            places[rest[inside]] = self._order[start[inside]]
        return places


def halves(keys: Keys) -> tuple[Halves, Halves]:
    """Return the two halves of each key as numbers that sort as the bytes do, which is big-endian."""
    words = np.ascontiguousarray(keys, np.uint8).reshape(-1, 16).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
