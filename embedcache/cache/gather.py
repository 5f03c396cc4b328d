"""Rows by key, and features of rows from many shards: memory-mapped where that is possible, else copied."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embedcache.errors import CorruptCacheError, InputError
from embedcache.features import Ragged
from embedcache.shard import Array, FeatureSet, Pages, Placed, decoded

# Row key -> place in the cache, vectorised.


Keys = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Halves = npt.NDArray[np.uint64]


class RowIndex:
    """Finds rows by their keys, in 24 bytes of memory for each row."""

    def __init__(self, keys: Keys) -> None:
        """Index ``keys`` u1 [N, 16]; the place of a key is its first position."""
        high, low = halves(keys)
        # lexsort is stable: of equal keys the first position comes first.
        self._order = np.lexsort((low, high))
        self._high, self._low = high[self._order], low[self._order]

    def lookup(self, keys: Keys) -> Rows:
        """Return the place of each key of ``keys`` u1 [n, 16], int64 [n], -1 for a key that is not there."""
        places = np.full(len(keys), -1, np.int64)
        if len(self._high):  # of a million keys at once the steps between would be 60 MB
            for start in range(0, len(keys), _LOOKED_UP):
                part = slice(start, start + _LOOKED_UP)
                places[part] = self._lookup(keys[part])
        return places

    def _lookup(self, keys: Keys) -> Rows:
        places = np.full(len(keys), -1, np.int64)
        high, low = halves(keys)
        first = np.searchsorted(self._high, high)
        near = np.minimum(first, len(self._high) - 1)
        same = self._high[near] == high
        hit = same & (self._low[near] == low)
        places[hit] = self._order[near[hit]]
        # Keys with the same first eight bytes do not occur by chance, but a hostile cache may hold any number of them.
        # One binary search for all of them at once keeps such a cache as fast as any other.
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
    """Return the two halves of each key as numbers, which numpy can sort: it has no integers of 128 bits.

    Big-endian, so that the numbers sort as the bytes do.
    """
    words = np.ascontiguousarray(keys, np.uint8).reshape(-1, 16).view(">u8")
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


_LOOKED_UP = 1 << 16
_READERS = 4
_POPULATE_READ = 22  # madvise, Linux 5.14: map the pages of a range now
_AHEAD = 8 << 20
"""Bytes whose pages are mapped by one call."""
_WORTH_IT = 32 << 20
"""Bytes from which on a thread that maps pages ahead pays."""


@dataclass(frozen=True)
class Piece:
    """Stored rows that follow one another in one file: ``shape`` is [rows, ...] of ``dtype``."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How many bytes they are."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, stop: int) -> Piece:
        """Return rows ``start`` to ``stop`` of the piece."""
        row_bytes = int(np.prod(self.shape[1:])) * np.dtype(self.dtype).itemsize
        return Piece(self.path, self.offset + start * row_bytes, (stop - start, *self.shape[1:]), self.dtype)

    def map(self) -> Array:
        """Map the rows, read-only."""
        return Placed(self.offset, self.shape, self.dtype).map(self.path)


def take(feature: FeatureSet, starts: Rows, piece: Callable[[int], Piece], places: Rows) -> Array:
    """Return the rows at ``places`` int64 [n] as float32 [n, D] or [n, L, D].

    ``starts`` int64 [shards + 1] says where each shard's rows begin, ``piece`` returns a shard's rows. Consecutive rows
    stored as float32 are returned as a read-only map without a copy: within one shard on any system, across shards on
    64-bit Linux where every shard but the last is whole pages long.
    """
    if len(places) and (int(places.min()) < 0 or int(places.max()) >= int(starts[-1])):
        raise InputError(f"places must lie in [0, {int(starts[-1])}), and -1 is a row that is not in the cache")
    if not len(places):
        return np.zeros((0, *feature.row_shape), np.float32)
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places) and bool((np.diff(places) == 1).all()):
        return _together(feature, starts, piece, first, last + 1)
    return _scattered(feature, starts, piece, places)


def take_tokens(feature: FeatureSet, starts: Rows, tokens: Callable[[int], tuple[Array, Rows]], places: Rows) -> Ragged:
    """Return a token-level set of the rows at ``places`` int64 [n].

    ``tokens`` returns a shard's vectors as stored and the offsets of its rows; see ``take`` for the rest. Consecutive
    rows of one shard stored as float32 are returned as a memory map.
    """
    shards = np.searchsorted(starts, places, side="right") - 1
    # Rows that follow one another in a shard are one run, copied as a whole.
    cuts = np.flatnonzero((np.diff(places) != 1) | (np.diff(shards) != 0)) + 1
    bounds = [0, *cuts.tolist(), len(places)] if len(places) else [0]
    lengths = np.zeros(len(places), np.int64)
    runs: list[Array] = []
    opened: dict[int, tuple[Array, Rows]] = {}
    for begin, end in pairwise(bounds):
        shard = int(shards[begin])
        if shard not in opened:
            opened[shard] = tokens(shard)
        values, offsets = opened[shard]
        first = int(places[begin] - starts[shard])
        of_run = offsets[first : first + end - begin + 1]
        lengths[begin:end] = np.diff(of_run)
        runs.append(values[int(of_run[0]) : int(of_run[-1])])
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    if len(runs) == 1:
        return Ragged(decoded(runs[0]), ends, feature)
    out = np.empty((int(ends[-1]), feature.dim), np.float32)
    for begin, run in zip(bounds, runs, strict=False):
        decoded(run, out[ends[begin] : ends[begin] + len(run)])
    return Ragged(out, ends, feature)


def _together(feature: FeatureSet, starts: Rows, piece: Callable[[int], Piece], start: int, stop: int) -> Array:
    """Return the stored rows ``start`` to ``stop``."""
    first, last = (int(np.searchsorted(starts, row, side="right")) - 1 for row in (start, stop - 1))
    bounds = [int(bound) for bound in starts[first : last + 2]]
    pieces = [piece(shard) for shard in range(first, last + 1)]
    if feature.dtype == "float32":
        if len(pieces) == 1:
            return pieces[0].rows(start - bounds[0], stop - bounds[0]).map()
        mapped = map_together(pieces)
        if mapped is not None:
            rows: Array = mapped[start - bounds[0] : stop - bounds[0]]
            if rows.nbytes >= _WORTH_IT and all(_tells_residence(piece.path) for piece in pieces):
                with suppress(RuntimeError):  # no thread to be had: the pages come one by one
                    threading.Thread(target=_map_ahead, args=(rows,), name="embedcache-pages", daemon=True).start()
            return rows
    out = np.empty((stop - start, *feature.row_shape), np.float32)

    def read(number: int) -> None:
        begin, end = max(start, bounds[number]), min(stop, bounds[number + 1])
        into = out[begin - start : end - start]
        part = pieces[number].rows(begin - bounds[number], end - bounds[number])
        if feature.dtype == "float32" and np.dtype(part.dtype).isnative:
            read_into(into, part)
        else:
            decoded(part.map(), into)

    _parallel(read, range(len(pieces)))
    return out


def _scattered(feature: FeatureSet, starts: Rows, piece: Callable[[int], Piece], places: Rows) -> Array:
    """Return the rows at any ``places``.

    Each shard is mapped once, and its rows are copied by one call, which reads its pages in order.
    """
    out = np.empty((len(places), *feature.row_shape), np.float32)
    shards = np.searchsorted(starts, places, side="right") - 1
    ordered = bool((np.diff(shards) >= 0).all())
    order = np.arange(len(places)) if ordered else np.argsort(shards, kind="stable")
    cuts = np.flatnonzero(np.diff(shards[order])) + 1
    bounds = [0, *cuts.tolist(), len(places)]

    def copy(number: int) -> None:
        begin, end = bounds[number], bounds[number + 1]
        into = order[begin:end]
        shard = int(shards[into[0]])
        rows = places[into] - starts[shard]
        stored = piece(shard).map()
        if not ordered:
            out[into] = decoded(stored[rows])
        elif feature.dtype == "float32":
            np.take(stored, rows, axis=0, out=out[begin:end], mode="clip")  # "raise" would copy through a buffer
        else:
            decoded(stored[rows], out[begin:end])

    _parallel(copy, range(len(bounds) - 1))
    return out


def _parallel(work: Callable[[int], None], items: Iterable[int]) -> None:
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        list(pool.map(work, items))


def read_into(out: Array, piece: Piece) -> None:
    """Read float32 rows into ``out``: cheaper than copying from a map, which faults on every page."""
    view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    with open(piece.path, "rb", buffering=0) as file:
        file.seek(piece.offset)
        while len(view):
            count = file.readinto(view)
            if not count:
                raise CorruptCacheError(f"{piece.path} ends early: restore it from a copy")
            view = view[count:]


def map_together(pieces: Sequence[Piece]) -> Array | None:
    """Map pieces of float32 next to one another, read-only, as one array without a copy; None where that cannot be.

    Every piece starts on a page of its file, and every one but the last is whole pages long.
    """
    page = mmap.PAGESIZE
    if any(piece.offset % page for piece in pieces) or any(piece.nbytes % page for piece in pieces[:-1]):
        return None
    pages = Pages.reserve(sum(piece.nbytes for piece in pieces))
    if pages is None:
        return None
    start = 0
    for piece in pieces:
        try:
            descriptor = os.open(piece.path, os.O_RDONLY)
        except OSError:
            return None
        try:
            # Reading a map past the end of its file kills the process with SIGBUS: refuse it before it is mapped.
            if os.fstat(descriptor).st_size < piece.offset + piece.nbytes:
                raise CorruptCacheError(f"{piece.path} ends early: restore it from a copy")
            if not pages.lay(start, piece.nbytes, descriptor, piece.offset):
                return None
        finally:
            os.close(descriptor)
        start += piece.nbytes
    shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
    return np.frombuffer(pages.buffer, pieces[0].dtype, count=int(np.prod(shape))).reshape(shape)


def _tells_residence(path: Path) -> bool:
    """Whether the system says which pages of a file it has in memory: of others' files it claims to have all."""
    return os.access(path, os.W_OK) or os.stat(path).st_uid == os.geteuid()


def _map_ahead(array: Array) -> None:
    """Map the pages of an array that are in memory already before they are read; read nothing from disk.

    Pieces laid side by side are not aligned to 2 MB, so the system maps 16 pages at a time instead of 512, and the
    first pass over the array waits each time.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    first, size = array.__array_interface__["data"][0], array.nbytes
    address = first - first % mmap.PAGESIZE
    size += first - address
    resident = ctypes.create_string_buffer(_AHEAD // mmap.PAGESIZE)
    for start in range(0, size, _AHEAD):
        length = min(_AHEAD, size - start)
        if library.mincore(address + start, length, resident):
            return
        # A page that is not in memory would be read from disk, for rows that perhaps nobody asks for.
        if b"\0" in resident.raw[: -(-length // mmap.PAGESIZE)]:
            return
        if library.madvise(address + start, length, _POPULATE_READ):
            return
