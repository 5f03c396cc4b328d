"""Row key -> place in the cache, vectorised."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


class RowIndex:
    """The places of row keys: 24 bytes a row."""

    def __init__(self, keys: Keys) -> None:
        """Index ``keys`` u1 [N, 16]; the place of a key is its first position."""
        high, low = halves(keys)
        self._order = np.lexsort((low, high))
        self._high, self._low = high[self._order], low[self._order]

    def lookup(self, keys: Keys) -> Rows:
        """Return the place of each key of ``keys`` u1 [n, 16], int64 [n], -1 for a key that is not there."""
        found = np.full(len(keys), -1, np.int64)
        if not len(self._high):
            return found
        high, low = halves(keys)
        at = np.searchsorted(self._high, high)
        near = np.minimum(at, len(self._high) - 1)
        same = self._high[near] == high
        hit = same & (self._low[near] == low)
        found[hit] = self._order[near[hit]]
        # Keys that share their first eight bytes: chance brings none, somebody else's cache may bring any number.
        rest = np.flatnonzero(same & ~hit)
        if len(rest):
            start, stop = at[rest], np.searchsorted(self._high, high[rest], side="right")
            end = stop.copy()
            while (start < stop).any():
                middle = (start + stop) // 2
                less = self._low[np.minimum(middle, end - 1)] < low[rest]
                start, stop = np.where(less & (start < stop), middle + 1, start), np.where(less, stop, middle)
            inside = start < end
            inside[inside] = self._low[start[inside]] == low[rest[inside]]
            found[rest[inside]] = self._order[start[inside]]
        return found


def halves(keys: Keys) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the two halves of each key as big-endian numbers, which sort as the bytes do."""
    words = np.ascontiguousarray(keys, np.uint8).reshape(-1, 16).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
