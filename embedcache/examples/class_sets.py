"""Label cells that hold any number of classes: lists of names, vectors of 0 and 1, cells with a separator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from embedcache.errors import InputError
from embedcache.examples.labels import (
    MAX_CLASSES,
    Codebook,
    KnownClasses,
    Targets,
    arrange,
    class_name,
    codes_of,
    name_fault,
    one_name_each,
)
from embedcache.examples.source import Faults, Parsed, is_missing, parsed
from embedcache.shard import Array
from embedcache.spec import TaskName
from embedcache.task import MULTILABEL
from embedcache.wording import counted

_BIT = {"0": 0, "1": 1, "false": 0, "true": 1}


class ClassSets:
    """Collects any number of classes for each row, from lists or from cells with a separator.

    Spaces around a separator are dropped. An empty cell or list is a row with no class. Lists of 0 and 1 that all have
    one length are read as vectors with an entry for each class, as scikit-learn's MultiLabelBinarizer writes them.
    """

    def __init__(self, column: str, task: TaskName | None, separator: str | None, required: bool) -> None:
        self._column = column
        self._task = task
        self._separator = separator
        self._required = required
        self._codes = Codebook()
        self._members: list[Array] = []
        self._counts = bytearray()
        self._ordered = True

    def parse(self, columns: Sequence[Sequence[object]]) -> Parsed:
        sets: list[list[str] | None] = []
        faults: Faults = {}
        for position, value in enumerate(columns[0]):
            members: list[str] | None = None
            try:
                members = self._parse(value)
            except ValueError as error:
                faults[position] = str(error)
            sets.append(members)
        return parsed(sets, faults, self._append)

    def _parse(self, value: object) -> list[str] | None:
        if isinstance(value, str):
            if self._separator is None:
                raise InputError(
                    f"the label column {self._column!r} holds text such as {value[:40]!r}, expected lists: "
                    "for several labels in one cell name what stands between them with --label-separator"
                )
            parts = [part for piece in value.split(self._separator) if (part := piece.strip())]
            for part in parts:
                if part not in self._codes and (fault := name_fault(self._column, part)):
                    raise ValueError(fault)
            return parts
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, (list, tuple, set, frozenset)):
            self._ordered = self._ordered and isinstance(value, (list, tuple))
            names = [class_name(self._column, item) for item in value]
            if None in names:
                raise ValueError(f"the label list {self._column!r} has a missing entry")
            broken = [item for item in value if isinstance(item, (float, np.floating)) and not float(item).is_integer()]
            if broken:
                raise ValueError(
                    f"the label list {self._column!r} holds the fraction {broken[0]}, expected names of classes, "
                    "or 0 and 1; for several targets give each a column of its own"
                )
            return [name for name in names if name is not None]
        if is_missing(value):
            if self._required:
                raise ValueError(f"the label {self._column!r} is missing (an empty list says that there is none)")
            return None
        raise ValueError(f"the label {self._column!r} is {value!r}, expected a list of labels")

    def _append(self, sets: Sequence[list[str] | None]) -> None:
        codes = b"".join(codes_of(self._codes, members) for members in sets if members)
        # Vectors have an entry for every class, most of them 0: one byte for each entry instead of four saves memory.
        narrow = np.uint8 if len(self._codes) <= 256 else np.int32
        self._members.append(np.frombuffer(codes, np.int32).astype(narrow))
        self._counts += np.array([-1 if members is None else len(members) for members in sets], np.int32).tobytes()
        if len(self._codes) > MAX_CLASSES:
            raise InputError(
                f"the label column {self._column!r} has more than {MAX_CLASSES:,} different labels: "
                "name the right one with --label-column"
            )

    def finish(self, known: KnownClasses) -> Targets:
        counts = np.frombuffer(self._counts, np.int32)
        members = np.concatenate(self._members) if self._members else np.zeros(0, np.int32)
        written = one_name_each(self._codes, known)
        columns = self._columns_of_vectors(counts, members, written, known)
        if columns is not None:
            names, order, notes = columns, np.arange(len(columns)), []
            bits = np.array([self._bit(name, known) for name in written], np.uint8)
            values = np.full((len(counts), len(names)), MULTILABEL.unlabelled, np.uint8)
            values[counts >= 0] = bits[members].reshape(-1, len(names))
            notes.append(f"the lists in {self._column!r} are vectors of 0 and 1: taken as one label for each position")
        else:
            names, order, notes = arrange(self._column, written, known)
            values = np.zeros((len(counts), len(names)), np.uint8)
            rows = np.repeat(np.arange(len(counts)), np.maximum(counts, 0))
            values[rows, order[members]] = 1
            values[counts < 0] = MULTILABEL.unlabelled
        if self._task is None:
            notes.append(f"task: multilabel with {counted(len(names), 'class')} (guessed from the labels)")
        empty = int((values == 0).all(axis=1).sum())
        if empty:
            notes.append(f"{counted(empty, 'row')} with no label at all: taken as the empty set")
        return Targets("multilabel", names, values, tuple(notes))

    def _bit(self, name: str, known: KnownClasses) -> int | None:
        """Return 0 or 1 for a name that may be the entry of a vector, else None.

        Where the source declares a ClassLabel, 0 and 1 were read as its first two names.
        """
        return known.declared[:2].index(name) if name in known.declared[:2] else _BIT.get(name)

    def _columns_of_vectors(
        self, counts: NDArray[np.int32], members: Array, written: Sequence[str], known: KnownClasses
    ) -> tuple[str, ...] | None:
        """Return the class names where the lists are vectors of 0 and 1; None where they are lists of names.

        A list of names has each name once, so lists with repeated entries must be vectors. Raises ``InputError`` where
        they repeat entries and cannot be vectors, such as when their lengths differ.
        """
        if not self._ordered or not written or any(self._bit(name, known) is None for name in written):
            return None
        labelled = counts[counts >= 0]
        widths = sorted(set(labelled.tolist()))
        sums = np.concatenate([[0], np.cumsum(labelled)])
        kinds = np.array([self._bit(name, known) for name in written], np.int64)[members]
        ones = np.diff(np.concatenate([[0], np.cumsum(kinds)])[sums])
        repeats = bool(((ones > 1) | (labelled - ones > 1)).any())
        declared, given = known.declared, known.names
        if not repeats and (len(widths) > 1 or widths[0] < 2 or declared or (given is not None and len(given) != 2)):
            return None
        width = widths[0]
        if len(widths) == 1 and given is not None and len(given) == width:
            return tuple(given)
        if len(widths) == 1 and given is None and len(declared) in (0, 2, width):
            return declared if len(declared) == width else tuple(map(str, range(width)))
        lengths = f"{width} long" if len(widths) == 1 else f"from {width} to {widths[-1]} long"
        expected = len(given if given is not None else declared)
        known_classes = f", and {expected} classes are known" if expected else ""
        raise InputError(
            f"the lists in {self._column!r} hold nothing but 0 and 1 and are {lengths}{known_classes}: expected "
            "vectors with one entry for each class, or lists that name each class of a row once"
        )
