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
        """Return the place of each key, int64 [n], -1 for a key that is not there."""
        high, low = halves(keys)
        found = np.full(len(high), -1, np.int64)
        at = np.searchsorted(self._high, high)
        open_ = np.arange(len(high))
        while len(open_):  # once round, unless two keys share their first eight bytes
            open_ = open_[at[open_] < len(self._high)]
            open_ = open_[self._high[at[open_]] == high[open_]]
            hit = self._low[at[open_]] == low[open_]
            found[open_[hit]] = self._order[at[open_[hit]]]
            open_ = open_[~hit]
            at[open_] += 1
        return found


def halves(keys: Keys) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the two halves of each key as big-endian numbers, which sort as the bytes do."""
    words = np.ascontiguousarray(keys, np.uint8).reshape(-1, 16).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
