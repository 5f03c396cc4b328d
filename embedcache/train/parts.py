"""Features of rows and of their views, which training reads as one array and nobody has to hold as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from embedcache.features import Array, Dense, Features, Floats, Rows, joined, slice_rows
from embedcache.shard import FeatureSet


@dataclass(frozen=True, eq=False)
class Parts(Features):
    """Several ``Dense`` of one type, one behind the other, that are not copied into one array before they must be.

    ``whole`` is that array; ``vectors`` come in the same pieces as its own, so sums over them have the same bits.
    """

    parts: tuple[Dense, ...]
    feature: FeatureSet

    @classmethod
    def of(cls, parts: Sequence[Features]) -> Features:
        """Return parts one behind the other; of other kinds or of several types what ``joined`` makes of them."""
        dense = tuple(part for part in parts if isinstance(part, Dense))
        alike = len(dense) == len(parts) and len({part.values.dtype for part in dense}) == 1
        return cls(dense, dense[0].feature) if alike else joined(parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def whole(self) -> Dense:
        """Return all of it as one array, copied."""
        return replace(self.parts[0], values=np.concatenate([part.values for part in self.parts]))

    def take(self, rows: Rows) -> Dense:
        """Return some rows, copied."""
        first = self.parts[0]
        out = np.empty((len(rows), *first.values.shape[1:]), first.values.dtype)
        start = 0
        for part in self.parts:
            inside = np.flatnonzero((rows >= start) & (rows < start + len(part)))
            out[inside] = part.values[rows[inside] - start]
            start += len(part)
        return replace(first, values=out)

    def blocks(self, multiple: int = 1) -> Iterator[Dense]:
        """Yield all of it."""
        yield self.whole()

    def vectors(self) -> Iterator[Array]:
        """Yield the vectors, [n, D]."""
        size = slice_rows(self.parts[0].values)
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self)))).values.reshape(-1, self.feature.dim)

    def of_vectors(self, weight: Array) -> Floats:
        """Return the weight of each vector."""
        return self.parts[0].of_vectors(weight)
