"""Byte strings of many rows, in memory or in a temporary file; and the column that names rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from typing import IO

import numpy as np
from numpy.typing import NDArray

from embedcache.dataset import IdColumn, Packed
from embedcache.errors import InputError
from embedcache.examples.source import Faults, Parsed, is_missing, parsed, unicode_fault
from embedcache.journal import explained
from embedcache.wording import counted

MOST_HELD = 16 << 20
"""Bytes of contents held in memory: a hundred thousand long sentences."""


class Packing:
    """Byte strings that are put one after the other. ``most`` bytes are held in memory, without a limit for None.

    Raises ``InputError`` where the temporary file cannot be written.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._data = bytearray()
        self._lengths = bytearray()
        self._file: IO[bytes] | None = None

    def append(self, strings: Sequence[bytes]) -> None:
        """Add some strings."""
        self._lengths += np.fromiter(map(len, strings), np.int64, len(strings)).tobytes()
        self._data += b"".join(strings)
        if self._most is not None and len(self._data) > (self._most if self._file is None else 0):
            with explained(_cannot_hold(), InputError):
                # It has no name, so that nothing is left of it when this process ends, however it ends.
                self._file = self._file or tempfile.TemporaryFile(prefix="embedcache-")  # noqa: SIM115
                self._file.write(self._data)
            self._data = bytearray()

    def finish(self) -> Packed:
        """Return all strings; nothing is to be added afterwards."""
        lengths = np.frombuffer(self._lengths, np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        data: NDArray[np.uint8] = np.frombuffer(self._data, np.uint8)
        if self._file is not None:
            with explained(_cannot_hold(), InputError), self._file as file:
                file.flush()
                data = np.memmap(file, np.uint8, "r")  # which stays when the file is closed
        return Packed(data, offsets)


def _cannot_hold() -> str:
    return f"cannot hold the contents of the input in {tempfile.gettempdir()} (TMPDIR names another folder)"


# The column that names rows.


def encoded_ids(column: str, values: Sequence[object]) -> tuple[list[bytes], Faults]:
    """Return every id in UTF-8, whole numbers as their digits (``b""`` for a faulty one), and the faults."""
    ids: list[bytes] = []
    faults: Faults = {}
    for position, value in enumerate(values):
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            value = str(int(value))
        encoded = b""
        if is_missing(value) or value == "":
            faults[position] = f"the id {column!r} is missing"
        elif not isinstance(value, str):
            kind = type(value).__name__
            faults[position] = f"the id {column!r} is of type {kind}, expected a string or an integer"
        elif fault := unicode_fault(column, value):
            faults[position] = fault
        else:
            encoded = value.encode()
        ids.append(encoded)
    return ids, faults


class IdCollector:
    """Collects a column of ids."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._packing = Packing()
        self._digests = bytearray()

    def parse(self, values: Sequence[object]) -> Parsed:
        """Judge the cells of one block."""
        ids, faults = encoded_ids(self._column, values)
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
