"""The ids of rows, packed."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedcache.examples.content import Faults, is_missing, unicode_fault
from embedcache.wording import counted


class IdColumn(Sequence[str]):
    """The ids of N rows: strings packed into one buffer, or the running row number, which takes no room.

    ``data`` is u1 (UTF-8) and ``offsets`` i8 [N + 1]; both are None when the ids are the running row number, which
    for a selection is the number in the whole, ``numbers`` int64 [N].
    """

    def __init__(
        self,
        rows: int,
        data: NDArray[np.uint8] | None = None,
        offsets: NDArray[np.int64] | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self._rows = rows
        self.data = data
        self.offsets = offsets
        self.numbers = numbers

    def select(self, rows: NDArray[np.int64]) -> IdColumn:
        """Return the ids of ``rows``, int64."""
        if self.data is None or self.offsets is None:
            return IdColumn(len(rows), numbers=rows if self.numbers is None else self.numbers[rows])
        kept = [self.data[self.offsets[row] : self.offsets[row + 1]] for row in rows.tolist()]
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])])
        return IdColumn(len(rows), np.concatenate(kept) if kept else self.data[:0], offsets)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(self._rows))]
        if not -self._rows <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        row = int(row) % self._rows
        if self.data is None or self.offsets is None:
            return str(row if self.numbers is None else self.numbers[row])
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()


class IdCollector:
    """Collects a column of ids."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._data = bytearray()
        self._lengths = bytearray()
        self._digests = bytearray()

    def parse(self, values: Sequence[Any]) -> tuple[list[bytes], Faults]:
        """Return the ids as UTF-8 and the faults of one block."""
        ids: list[bytes] = []
        faults: Faults = {}
        for position, value in enumerate(values):
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                value = str(int(value))
            if is_missing(value) or value == "":
                faults[position] = f"the id {self._column!r} is missing"
            elif not isinstance(value, str):
                what = type(value).__name__
                faults[position] = f"the id {self._column!r} is of type {what}, expected a string or an integer"
            elif fault := unicode_fault(self._column, value):
                faults[position] = fault
            ids.append(b"" if position in faults else value.encode())
        return ids, faults

    def append(self, ids: Sequence[bytes]) -> None:
        """Add the ids of usable rows."""
        self._data += b"".join(ids)
        self._lengths += np.array(list(map(len, ids)), np.int64).tobytes()
        self._digests += b"".join([blake2b(id, digest_size=8).digest() for id in ids])

    def finish(self) -> tuple[IdColumn, list[str]]:
        """Return the column, and a note when ids repeat."""
        lengths = np.frombuffer(self._lengths, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        repeated = len(lengths) - len(np.unique(np.frombuffer(self._digests, np.uint64)))
        notes = [f"{counted(repeated, 'id')} in {self._column!r} given to a row before"] if repeated else []
        return IdColumn(len(lengths), np.frombuffer(self._data, np.uint8), offsets), notes
