"""The column that names rows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from embedcache.dataset import IdColumn
from embedcache.examples.cells import Faults, Parsed, is_missing, parsed, unicode_fault
from embedcache.examples.packing import Packing
from embedcache.wording import counted


class IdCollector:
    """Collects a column of ids."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._packing = Packing()
        self._digests = bytearray()

    def parse(self, values: Sequence[object]) -> Parsed:
        """Judge the cells of one block."""
        ids: list[bytes] = []
        faults: Faults = {}
        for position, value in enumerate(values):
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                value = str(int(value))
            encoded = b""
            if is_missing(value) or value == "":
                faults[position] = f"the id {self._column!r} is missing"
            elif not isinstance(value, str):
                kind = type(value).__name__
                faults[position] = f"the id {self._column!r} is of type {kind}, expected a string or an integer"
            elif fault := unicode_fault(self._column, value):
                faults[position] = fault
            else:
                encoded = value.encode()
            ids.append(encoded)
        return parsed(ids, faults, self._append)

    def _append(self, ids: Sequence[bytes]) -> None:
        self._packing.append(ids)
        self._digests += b"".join([blake2b(id, digest_size=8).digest() for id in ids])

    def finish(self) -> tuple[IdColumn, list[str]]:
        """Return the column, and a note when ids repeat."""
        packed = self._packing.finish()
        repeated = len(packed) - len(np.unique(np.frombuffer(self._digests, np.uint64)))
        notes = [f"{counted(repeated, 'id')} in {self._column!r} given to a row before"] if repeated else []
        return IdColumn(len(packed), packed), notes
