"""The value between the input and the cache: rows with their keys, splits, targets and ids.

``Dataset`` is what a cache commits. ``Examples`` is what an input becomes: a dataset and its contents.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from embedcache.errors import InputError
from embedcache.fingerprint import KEY_BYTES, row_key
from embedcache.shard import Array
from embedcache.spec import PixelRange, TaskName
from embedcache.task import task_named
from embedcache.wording import counted

Rows = NDArray[np.int64]

_BLOCK_ROWS = 4096


class Contents(Protocol):
    """The contents of N rows, wherever they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> bytes: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def select(self, rows: Rows) -> Contents:
        """Return the contents at ``rows``, int64, without copying them."""
        ...

    def lengths(self) -> Rows:
        """Return how many bytes each content has, int64 [N], without reading one."""
        ...


class Packed(Sequence[bytes]):
    """Byte strings in one buffer, N of them: string i is ``data[offsets[i]:offsets[i + 1]]``.

    ``data`` is u1 and may be a memory map, ``offsets`` int64 [M + 1]. ``rows``, int64 [N], chooses among the M
    strings; None takes all of them.
    """

    def __init__(self, data: NDArray[np.uint8], offsets: Rows, rows: Rows | None = None) -> None:
        self._data, self._offsets, self._rows = data, offsets, rows

    @classmethod
    def of(cls, strings: Iterable[bytes]) -> Packed:
        """Pack byte strings."""
        data = bytearray()
        ends = [0]
        for string in strings:
            data += string
            ends.append(len(data))
        return cls(np.frombuffer(data, np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = range(len(self))[place]
        if self._rows is not None:
            row = int(self._rows[row])
        return self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        buffer = memoryview(self._data.data)  # cut several times faster than an array
        for start in range(0, len(self), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(self))
            rows = slice(start, stop) if self._rows is None else self._rows[start:stop]
            begins, ends = self._offsets[:-1][rows].tolist(), self._offsets[1:][rows].tolist()
            for begin, end in zip(begins, ends, strict=True):
                yield bytes(buffer[begin:end])
            if isinstance(self._data, np.memmap) and self._data.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
                # What was read stays in the system's cache, and counts for this process no more.
                self._data._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def select(self, rows: Rows) -> Packed:
        """Return the strings at ``rows``, int64, without copying them."""
        return Packed(self._data, self._offsets, rows if self._rows is None else self._rows[rows])

    def lengths(self) -> Rows:
        """Return how many bytes each string has, int64 [N]."""
        lengths = np.diff(self._offsets)
        return lengths if self._rows is None else lengths[self._rows]

    def columns(self) -> tuple[NDArray[np.uint8], Rows]:
        """Return a buffer of just these strings, u1, and the offsets into it, int64 [N + 1]."""
        if self._rows is None:
            return self._data, self._offsets
        lengths = self.lengths()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        # The places of all bytes at once: each string's start in the old buffer, and on from there.
        places = np.repeat(self._offsets[self._rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return self._data[places], offsets


class InFiles:
    """Contents that may lie in files of their own, which are opened when the content is wanted.

    ``held`` has for each of N rows the path of its file where ``in_file``, bool [N], else the content itself. ``keys``,
    u1 [N, 16], are the row keys: a file whose bytes are no longer those is refused with ``InputError``.
    """

    def __init__(self, held: Packed, in_file: NDArray[np.bool_], keys: NDArray[np.uint8]) -> None:
        self._held, self._in_file, self._keys = held, in_file, keys

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, place: int) -> bytes:
        row = range(len(self))[place]
        return self._content(row, self._held[row])

    def __iter__(self) -> Iterator[bytes]:
        for row, held in enumerate(self._held):
            yield self._content(row, held)

    def select(self, rows: Rows) -> InFiles:
        """Return the contents at ``rows``, int64, without reading them."""
        return InFiles(self._held.select(rows), self._in_file[rows], self._keys[rows])

    def lengths(self) -> Rows:
        """Return how many bytes each content has, int64 [N]: of a file what the system says."""
        lengths = self._held.lengths()
        for row in np.flatnonzero(self._in_file).tolist():
            path = os.fsdecode(self._held[row])
            with _readable(path):
                lengths[row] = os.stat(path).st_size
        return lengths

    def path(self, row: int) -> str | None:
        """Return the file that the content of a row is, None where it lies in none of its own."""
        return os.fsdecode(self._held[row]) if self._in_file[row] else None

    def _content(self, row: int, held: bytes) -> bytes:
        if not self._in_file[row]:
            return held
        path = os.fsdecode(held)
        with _readable(path), open(path, "rb") as file:
            content = file.read()
        if row_key(content) != self._keys[row].tobytes():
            raise InputError(f"{path}: its bytes changed since the input was read: read the input again")
        return content


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more: {error.strerror or error}") from None


class Behind:
    """The contents of several, one behind the other; ``rows``, int64 [N], chooses among them all, None takes each."""

    def __init__(self, parts: Sequence[Contents], rows: Rows | None = None) -> None:
        self._parts, self._ends = parts, np.cumsum([0, *map(len, parts)])
        self._rows = np.arange(self._ends[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> bytes:
        row = int(self._rows[place])
        part = int(np.searchsorted(self._ends, row, side="right")) - 1
        return self._parts[part][row - int(self._ends[part])]

    def __iter__(self) -> Iterator[bytes]:
        return (self[place] for place in range(len(self)))

    def select(self, rows: Rows) -> Behind:
        """Return the contents at ``rows``, int64, without reading them."""
        return Behind(self._parts, self._rows[rows])

    def lengths(self) -> Rows:
        """Return how many bytes each content has, int64 [N], without reading one."""
        every: Rows = np.concatenate([part.lengths() for part in self._parts])
        return every[self._rows]


class IdColumn(Sequence[str]):
    """The ids of N rows: those the input gives, or else the running row number, which takes no room.

    ``given`` is None for running numbers. ``numbers``, int64 [N], are then the rows' numbers in the whole that they
    were selected from; None for a whole.
    """

    def __init__(self, rows: int, given: Packed | None = None, numbers: Rows | None = None) -> None:
        self._rows, self.given, self._numbers = rows, given, numbers

    def select(self, rows: Rows) -> IdColumn:
        """Return the ids of ``rows``, int64."""
        if self.given is not None:
            return IdColumn(len(rows), self.given.select(rows))
        return IdColumn(len(rows), numbers=rows if self._numbers is None else self._numbers[rows])

    def __len__(self) -> int:
        return self._rows if self.given is None else len(self.given)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        if self.given is not None:
            return self.given[row].decode()
        return str(row if self._numbers is None else self._numbers[row])


@dataclass(frozen=True, eq=False)
class Whole:
    """The larger dataset that a dataset is a part of.

    ``numbers``, int64 [N] and increasing, are the rows' numbers in it; ``rows`` is how many it has; ``hash`` tells it
    from every other, so that parts of different datasets are never joined.
    """

    numbers: Rows
    rows: int
    hash: str | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dataset:
    """N rows: which content each has, by its key, and what is known of it.

    ``keys`` is u1 [N, 16], the row key of each content. ``split`` is u1 [N], an index into ``split_names``.
    ``targets`` is None without labels, else int64 [N] for classification (-1: no label), uint8 [N, C] for multilabel
    (255 throughout: no label) or float64 [N, R] for regression (NaN: no label). ``class_names`` are the classes, or
    the names of the regression targets. ``whole`` is None unless the rows are a part of a larger dataset.

    Raises ``InputError`` where columns do not fit one another or the type they are stored in.
    """

    keys: NDArray[np.uint8]
    split: NDArray[np.uint8]
    split_names: tuple[str, ...]
    task: TaskName | None = None
    targets: Array | None = None
    class_names: tuple[str, ...] = ()
    ids: IdColumn | None = None
    whole: Whole | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", exactly("split", self.split, np.dtype("u1")))
        lengths = {"split": len(self.split)}
        if self.task is None or self.targets is None:
            object.__setattr__(self, "task", None)
            object.__setattr__(self, "targets", None)
        else:
            task = task_named(self.task)
            targets = exactly("target", self.targets, task.dtype)
            object.__setattr__(self, "targets", targets)
            lengths["target"] = len(targets)
            if targets.ndim != len(task.target_shape(0, 0)):
                raise InputError(f"targets of shape {targets.shape} do not fit the task {self.task}")
            if targets.ndim == 2 and targets.shape[1] != len(self.class_names):
                raise InputError(f"there are {counted(targets.shape[1], 'target')} and {len(self.class_names)} names")
        if self.ids is not None:
            lengths["id"] = len(self.ids)
        if self.whole is not None:
            numbers = exactly("number", self.whole.numbers, np.dtype("i8"))
            object.__setattr__(self, "whole", replace(self.whole, numbers=numbers))
            lengths["number"] = len(numbers)
        for name, length in lengths.items():
            if length != len(self.keys):
                raise InputError(f"the column {name} has length {length}, expected {len(self.keys)}")
        for what, names in (("classes", self.class_names), ("splits", self.split_names)):
            if len(set(names)) != len(names):
                raise InputError(f"two {what} have the same name: {', '.join(names)}")

    def __len__(self) -> int:
        return len(self.keys)

    def split_sizes(self) -> dict[str, int]:
        """Return how many rows each split has."""
        sizes = np.bincount(self.split, minlength=len(self.split_names))
        return dict(zip(self.split_names, sizes.tolist(), strict=True))

    def labelled(self) -> NDArray[np.bool_]:
        """Return which rows have a label, bool [N]."""
        if self.task is None or self.targets is None:
            return np.zeros(len(self), bool)
        return task_named(self.task).labelled(self.targets)

    def hash(self) -> str:
        """Return the sha256 of all rows in their order: contents, splits and targets."""
        digest = sha256()
        for column in (self.keys, self.split, self.targets):
            if column is not None:
                digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Examples(Dataset):
    """The usable rows of an input, N of them: a dataset and its contents.

    ``kind`` is what a content is, such as ``text``. ``notes`` are one-line facts to print: what was guessed, leaks,
    contradicting labels, classes a split lacks. ``n_unique`` counts different contents.
    ``pixel_range`` is that of pictures whose pixels have none of their own. See ``Dataset`` for the rest.
    """

    ids: IdColumn
    kind: str
    packed_contents: Contents
    n_unique: int
    notes: tuple[str, ...] = ()
    pixel_range: PixelRange | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.split_sizes().items())
        rows, classes = counted(len(self), "row"), counted(len(self.class_names), "class")
        return f"Examples({rows}: {sizes}; task {self.task}, {classes})"

    def select(self, rows: Rows) -> Examples:
        """Return the examples at ``rows``, int64, strictly increasing.

        Classes, splits and default ids stay the whole's.
        """
        rows = np.asarray(rows, np.int64)
        keys = self.keys[rows]
        whole = self.whole or Whole(np.arange(len(self)), len(self), self.hash())
        return replace(
            self,
            keys=keys,
            targets=None if self.targets is None else self.targets[rows],
            split=self.split[rows],
            ids=self.ids.select(rows),
            packed_contents=self.packed_contents.select(rows),
            n_unique=len(np.unique(key_values(keys))),
            whole=replace(whole, numbers=whole.numbers[rows]),
        )

    def without(self, rows: Rows) -> Examples:
        """Return the examples but for ``rows``, int64, and those of the same content, as if the input lacked them.

        Raises ``InputError`` where none is left.
        """
        kept = np.flatnonzero(~np.isin(key_values(self.keys), key_values(self.keys[rows])))
        if not len(kept):
            raise InputError(f"no usable row is left: all {len(self):,} are set aside")
        fewer = self.select(kept)
        if self.whole is not None:
            return fewer
        return replace(fewer, whole=None, ids=fewer.ids if self.ids.given is not None else IdColumn(len(kept)))

    def contents(self, rows: Rows | Sequence[int] | None = None) -> Iterator[bytes]:
        """Return the contents of ``rows``, int64 and strictly increasing, one after the other; None for all rows.

        Raises ``ValueError`` for rows out of order or range.
        """
        if rows is None:
            return iter(self.packed_contents)
        wanted = np.asarray(rows, np.int64)
        if wanted.ndim != 1 or (wanted[1:] <= wanted[:-1]).any():
            raise ValueError("rows must be a strictly increasing vector of row numbers")
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= len(self)):
            raise ValueError(f"rows must lie in [0, {len(self)}), got {wanted[0]} to {wanted[-1]}")
        return iter(self.packed_contents.select(wanted))


def renumbered(targets: Array, own: Sequence[str], names: Sequence[str]) -> Array:
    """Return indices into ``own`` names as indices into ``names``; -1, for no label, stays."""
    codes = np.array([*(names.index(name) for name in own), -1], np.int64)
    return codes[targets]


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers in which every bit depends on all: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def evenly_spread(count: int, most: int) -> Rows:
    """Return at most so many of ``count`` places, evenly spread and increasing."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def key_values(keys: NDArray[np.uint8]) -> NDArray[np.void]:
    """Return row keys, u1 [N, 16], as one value each, [N]: what finds and counts equal contents."""
    return np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").reshape(-1)


def exactly(name: str, values: Array, dtype: np.dtype[Any]) -> Array:
    """Return a column in the type that is stored. Raises ``InputError`` when that would change its values."""
    given = np.asarray(values)
    if given.dtype == dtype:
        return given
    stored = given.astype(dtype)
    if not np.array_equal(stored, given, equal_nan=given.dtype.kind == "f"):
        raise InputError(f"the column {name} does not fit into {dtype.name}")
    return stored
