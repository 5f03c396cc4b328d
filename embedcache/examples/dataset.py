"""``Examples``: the rows of an input without their contents, which are read again on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedcache.errors import InputError
from embedcache.examples import findings
from embedcache.examples.content import CONTENTS
from embedcache.examples.ids import IdColumn
from embedcache.examples.source import Source
from embedcache.fingerprint import KEY_BYTES
from embedcache.spec import TaskName
from embedcache.wording import counted


@dataclass(frozen=True)
class Part:
    """The rows of one source: usable rows ``first`` to ``first + rows``; ``skipped`` are records that are no rows."""

    source: Source
    column: str
    first: int
    rows: int
    skipped: NDArray[np.int64]


@dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """The usable rows of an input, N of them, without their contents.

    ``keys`` is u1 [N, 16], the row key of each content. ``targets`` is None without labels, else int64 [N] for
    classification (-1: no label), uint8 [N, C] for multilabel (255 throughout: no label) or float64 [N, R] for
    regression (NaN: no label). ``class_names`` are the classes, or the names of the regression targets. ``split`` is
    u1 [N], an index into ``split_names``. ``notes`` are one-line facts to print: what was guessed, leaks,
    contradicting labels, classes a split lacks. ``n_unique`` counts different contents. ``numbers`` is None for a
    whole input, else int64 [N], the row numbers in the whole that ``select`` chose, and ``whole_hash`` then tells that
    whole from every other.
    """

    keys: NDArray[np.uint8]
    targets: NDArray[Any] | None
    task: TaskName | None
    class_names: tuple[str, ...]
    split: NDArray[np.uint8]
    split_names: tuple[str, ...]
    ids: IdColumn
    notes: tuple[str, ...]
    n_unique: int
    kind: str
    parts: tuple[Part, ...]
    numbers: NDArray[np.int64] | None = None
    whole_hash: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.split_sizes().items())
        rows, classes = counted(len(self), "row"), counted(len(self.class_names), "class")
        return f"Examples({rows}: {sizes}; task {self.task}, {classes})"

    def split_sizes(self) -> dict[str, int]:
        """Return how many rows each split has."""
        sizes = np.bincount(self.split, minlength=len(self.split_names))
        return dict(zip(self.split_names, sizes.tolist(), strict=True))

    def labelled(self) -> NDArray[np.bool_]:
        """Return which rows have a label, bool [N]."""
        return findings.labelled(self.task, self.targets, len(self))

    def select(self, rows: NDArray[np.int64]) -> Examples:
        """Return the examples at ``rows``, int64, strictly increasing.

        Classes, splits and default ids stay the whole's.
        """
        rows = np.asarray(rows, np.int64)
        keys = self.keys[rows]
        return replace(
            self,
            keys=keys,
            targets=None if self.targets is None else self.targets[rows],
            split=self.split[rows],
            ids=self.ids.select(rows),
            n_unique=len(np.unique(keys.view(f"V{KEY_BYTES}"))),
            numbers=rows if self.numbers is None else self.numbers[rows],
            whole_hash=self.whole_hash or self._hash(),
        )

    def _hash(self) -> str:
        """Return the sha256 of all rows in their order: contents, splits and targets."""
        digest = sha256()
        for column in (self.keys, self.split, self.targets):
            if column is not None:
                digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def contents(self, rows: NDArray[np.int64] | Sequence[int] | None = None) -> Iterator[bytes]:
        """Read the input again and yield the contents of ``rows`` (int64, strictly increasing; None for all).

        Memory stays flat. Raises ``ValueError`` for rows out of order or range, and ``InputError`` when a content is
        no longer the one that was seen first.
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        if wanted.ndim != 1 or (wanted[1:] <= wanted[:-1]).any():
            raise ValueError("rows must be a strictly increasing vector of row numbers")
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= len(self)):
            raise ValueError(f"rows must lie in [0, {len(self)}), got {wanted[0]} to {wanted[-1]}")
        keys = self.keys if rows is None else self.keys[wanted]
        return self._contents(wanted if self.numbers is None else self.numbers[wanted], keys)

    def _contents(self, wanted: NDArray[np.int64], keys: NDArray[np.uint8]) -> Iterator[bytes]:
        content = CONTENTS[self.kind]
        given = 0
        for part in self.parts:
            mine = wanted[np.searchsorted(wanted, part.first) : np.searchsorted(wanted, part.first + part.rows)]
            done = 0
            records = 0
            row = part.first
            if not len(mine):
                continue
            for block in part.source.blocks((part.column,)):
                values = block.values[0]
                from_, to = np.searchsorted(part.skipped, (records, records + len(values)))
                skipped = part.skipped[from_:to] - records
                records += len(values)
                if len(skipped):
                    gone = set(skipped.tolist())
                    values = [value for place, value in enumerate(values) if place not in gone]
                here = mine[done : np.searchsorted(mine, row + len(values))]
                if len(here) != len(values):
                    values = [values[place] for place in (here - row).tolist()]
                row += len(block.values[0]) - len(skipped)
                done += len(here)
                if not values:
                    continue
                contents, faults = content.encode(part.column, values)
                seen = np.frombuffer(row_keys(contents), np.uint8).reshape(-1, KEY_BYTES)
                changed = (seen != keys[given : given + len(here)]).any(axis=1)
                given += len(here)
                if faults or changed.any():
                    place = min([*faults, *np.flatnonzero(changed).tolist()])
                    raise InputError(
                        f"{part.source.name} changed while it was being used: row {here[place]} differs; start again"
                    )
                yield from contents
                if done == len(mine):
                    break
            if done < len(mine):
                raise InputError(
                    f"{part.source.name} changed while it was being used: "
                    f"it had {counted(part.rows, 'row')} and now has {row - part.first}; start again"
                )


def row_keys(contents: Sequence[bytes]) -> bytes:
    """Return the row keys of ``contents``, one after the other."""
    # ``fingerprint.row_key`` of each, without a Python call a row: half of the cost of a pass. A test holds them equal.
    return b"".join([blake2b(content, digest_size=KEY_BYTES).digest() for content in contents])
