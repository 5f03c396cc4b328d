"""Byte strings of many rows: in memory up to a size, in a temporary file beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from embedcache.dataset import Packed
from embedcache.errors import InputError
from embedcache.journal import explained

MOST_HELD = 128 << 20
"""Bytes of contents held in memory: a million short texts."""


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
