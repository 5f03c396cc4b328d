"""Label cells -> targets: classes, sets of classes, or numbers.

A collector takes label cells block by block. ``parse`` checks the cells of a block and returns ``Parsed``: the faulty
cells, and a function that keeps the values of the usable rows. ``finish`` returns the targets of all rows kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from embedcache.errors import InputError
from embedcache.examples.source import NUMBER, Faults, Parsed, is_missing, parsed, unicode_fault
from embedcache.shard import Array
from embedcache.spec import TaskName
from embedcache.task import MULTILABEL
from embedcache.wording import counted, listed

MAX_CLASSES = 100_000
_INTEGER = re.compile(r"-?[1-9]\d{0,17}|0")

_TRUTH = frozenset(["true", "false", "True", "False", "TRUE", "FALSE"])
_ITEM = r"""(?:[+-]?\d+(?:\.\d*)?|'[^']*'|"[^"]*"|[Tt]rue|[Ff]alse)"""
_WRITTEN_LIST = re.compile(rf"\[\s*(?:{_ITEM}(?:\s*,\s*|\s+))*{_ITEM}?\s*\]")


@dataclass(frozen=True)
class Targets:
    """Parsed labels. ``values`` are as in ``Dataset.targets``; ``notes`` say what was guessed."""

    task: TaskName
    class_names: tuple[str, ...]
    values: Array
    notes: tuple[str, ...]


@dataclass(frozen=True)
class KnownClasses:
    """The classes that are known before any row is read.

    ``names`` were given by the caller: they come first, in their order, and other classes are refused unless
    ``extend``. ``declared`` are from the source itself, such as a ClassLabel: they only come first.
    """

    names: tuple[str, ...] | None = None
    extend: bool = False
    declared: tuple[str, ...] = ()


class Labels(Protocol):
    """A collector of labels."""

    def parse(self, columns: Sequence[Sequence[object]]) -> Parsed:
        """Check the cells of one block: a list of cells for each label column."""
        ...

    def finish(self, known: KnownClasses) -> Targets:
        """Return the targets of all rows added. Raises ``InputError`` for a class that is not among the known ones."""
        ...


class Codebook(dict[str, int]):
    """Class name -> number, in the order of first sight."""

    def __missing__(self, name: str) -> int:
        self[name] = code = len(self)
        return code


class Classes:
    """Collects one class for each row.

    Where no task was given and the labels turn out to be fractions, they are handed over to ``Numbers``.
    """

    def __init__(self, column: str, task: TaskName | None, required: bool) -> None:
        self._column = column
        self._task = task
        self._required = required
        self._codes = Codebook()
        self._buffer = bytearray()
        self._whole_floats = False
        self._numbers: Numbers | None = None

    def parse(self, columns: Sequence[Sequence[object]]) -> Parsed:
        if self._numbers is not None:
            return self._numbers.parse(columns)
        values = columns[0]
        types = set(map(type, values))
        if types == {int}:
            return parsed(list(map(str, values)), {}, self._append)
        if types == {str}:
            texts = cast("Sequence[str]", values)
            if all(name in self._codes or not name_fault(self._column, name) for name in set(texts)):
                return parsed(texts, {}, self._append)
        names: list[str | None] = []
        faults: Faults = {}
        for position, value in enumerate(values):
            try:
                name = class_name(self._column, value)
            except ValueError as error:
                faults[position] = str(error)
                name = None
            else:
                if name is None and self._required:
                    faults[position] = f"the label {self._column!r} is missing"
                elif isinstance(value, float) and name is not None:
                    self._whole_floats = self._whole_floats or value.is_integer()
            names.append(name)
        return parsed(names, faults, self._append)

    def _append(self, names: Sequence[str | None]) -> None:
        self._buffer += codes_of(self._codes, names)
        if len(self._codes) > MAX_CLASSES:
            if not self._are_fractions():
                raise InputError(
                    f"the label column {self._column!r} has more than {counted(MAX_CLASSES, 'different value')}: "
                    "name the right one with --label-column, or pass --task regression if it holds quantities"
                )
            self._numbers = self._become_numbers()

    def _are_fractions(self) -> bool:
        if self._task is not None or not self._codes:
            return False
        if not all(NUMBER.fullmatch(name) for name in self._codes):
            return False
        return any(not float(name).is_integer() for name in self._codes)

    def _become_numbers(self) -> Numbers:
        numbers = Numbers((self._column,), None, self._required)
        table = np.array([*map(float, self._codes), math.nan])  # code -1 is the last entry
        numbers.append(table[np.frombuffer(self._buffer, np.int32)][:, None])
        self._codes.clear()
        self._buffer = bytearray()
        return numbers

    def finish(self, known: KnownClasses) -> Targets:
        if self._numbers is None and known.names is None and not known.declared and self._are_fractions():
            self._numbers = self._become_numbers()
        if self._numbers is not None:
            return self._numbers.finish(known)
        names, order, notes = arrange(self._column, one_name_each(self._codes, known), known)
        self._refuse_lists()
        codes = np.append(order, -1)[np.frombuffer(self._buffer, np.int32)]
        if self._task is None:
            notes += self._doubts(names)
        return Targets("classification", names, codes, tuple(notes))

    def _refuse_lists(self) -> None:
        if self._task is None and self._codes and all(map(_WRITTEN_LIST.fullmatch, self._codes)):
            first = next(iter(self._codes))[:40]
            raise InputError(
                f"the label column {self._column!r} holds lists written as text, such as {first!r}: "
                "store them in JSONL or Parquet, or with a mark between the labels that --label-separator names; "
                "pass --task classification if each such text is one class"
            )

    def _doubts(self, names: Sequence[str]) -> list[str]:
        notes = [f"task: classification with {counted(len(names), 'class')} (guessed from the labels)"]
        numeric = sum(1 for name in self._codes if NUMBER.fullmatch(name))
        if self._whole_floats:
            notes.append(f"the labels in {self._column!r} are whole numbers in floating point: taken as classes")
        elif numeric == len(self._codes) > 50:
            notes.append(
                f"{self._column!r} holds {numeric} different whole numbers: taken as classes; "
                "pass --task regression if they are quantities"
            )
        elif len(self._codes) > numeric > len(self._codes) / 2:
            notes.append(
                f"{numeric} of the {len(self._codes)} different labels in {self._column!r} are numbers "
                "and the others are not: taken as classes"
            )
        return notes


class Numbers:
    """Collects one or several numbers for each row: regression targets, or the 0/1 columns of a multi-label task.

    Where no task was given, several columns that hold only 0 and 1 are taken as multi-label.
    """

    def __init__(self, columns: Sequence[str], task: TaskName | None, required: bool) -> None:
        self._columns = tuple(columns)
        self._task = task
        self._required = required
        self._buffer = bytearray()

    def parse(self, columns: Sequence[Sequence[object]]) -> Parsed:
        targets = np.empty((len(columns[0]), len(columns)))
        faults: Faults = {}
        for place, (column, values) in enumerate(zip(self._columns, columns, strict=True)):
            numbers = _plain_numbers(values)
            if numbers is not None and self._task != "multilabel" and np.isfinite(numbers).all():
                targets[:, place] = numbers
                continue
            for position, value in enumerate(values):
                try:
                    targets[position, place] = self._number(column, value)
                except ValueError as error:
                    faults.setdefault(position, str(error))
        return Parsed(faults, lambda keep: self.append(targets if keep is None else targets[keep]))

    def _number(self, column: str, value: object) -> float:
        if is_missing(value) and not isinstance(value, float):
            return self._absent(column)
        if isinstance(value, str) and not value.strip():
            return self._absent(column)
        binary = self._task == "multilabel" or (self._task is None and len(self._columns) > 1)
        if isinstance(value, str) and binary and value.strip().lower() in ("true", "false"):
            return float(value.strip().lower() == "true")
        if isinstance(value, (bool, np.bool_)) and binary:
            return float(value)
        if isinstance(value, str) and value.strip().lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise ValueError(f"the target {column!r} is {value.strip()!r}, expected a finite number")
        if isinstance(value, bool) or not (
            isinstance(value, (int, float, np.number)) or (isinstance(value, str) and NUMBER.fullmatch(value))
        ):
            shown = repr(value)[:40]
            raise ValueError(f"the target {column!r} is {shown} of type {type(value).__name__}, expected a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            if number != number and not self._required:
                return number
            raise ValueError(f"the target {column!r} is {number}, expected a finite number")
        if self._task == "multilabel" and number not in (0.0, 1.0):
            raise ValueError(f"the label {column!r} is {value!r}, expected 0 or 1")
        return number

    def _absent(self, column: str) -> float:
        if self._required:
            raise ValueError(f"the target {column!r} is missing")
        return math.nan

    def append(self, targets: NDArray[np.float64]) -> None:
        """Add the targets of usable rows, [n, columns]."""
        self._buffer += targets.tobytes()

    def finish(self, known: KnownClasses) -> Targets:
        values = np.frombuffer(self._buffer, np.float64).reshape(-1, len(self._columns))
        absent = np.isnan(values)
        binary = len(self._columns) > 1 and bool((absent | (values == 0) | (values == 1)).all())
        notes: list[str] = []
        if self._task is None:
            guess = (
                "multilabel (guessed: all labels are 0 or 1)" if binary else "regression (guessed: labels are numbers)"
            )
            notes.append(f"task: {guess}")
        if self._task == "multilabel" or (self._task is None and binary):
            names, order, more = arrange("label columns", self._columns, known, keep=True)
            sets = np.zeros((len(values), len(names)), np.uint8)
            sets[:, order] = values == 1
            sets[absent.any(axis=1)] = MULTILABEL.unlabelled
            return Targets("multilabel", names, sets, tuple(notes + more))
        if known.names is not None and known.names != self._columns:
            raise InputError(f"the targets are {', '.join(self._columns)}, expected {', '.join(known.names)}")
        return Targets("regression", self._columns, values, tuple(notes))


def _plain_numbers(values: Sequence[object]) -> list[float] | None:
    """Return cells as numbers, the fast way; None where some cell is not a plain number and must be checked alone."""
    types = set(map(type, values))
    plain = cast("Sequence[float | str]", values)
    if types <= {int, float} or (types == {str} and all(NUMBER.fullmatch(str(value)) for value in plain)):
        with suppress(OverflowError):
            return list(map(float, plain))
    return None


def codes_of(codebook: Codebook, names: Sequence[str | None]) -> bytes:
    """Return the code of each name as int32 bytes, -1 for None; a new name gets the next code."""
    known = [name for name in names if name is not None]
    if len(known) == len(names):
        return np.fromiter(map(codebook.__getitem__, known), np.int32, len(known)).tobytes()
    return np.array([-1 if name is None else codebook[name] for name in names], np.int32).tobytes()


def class_name(column: str, value: object) -> str | None:
    """Return a label cell as a class name; None when it is missing.

    Strings are kept as they are; 1 and 1.0 are ``"1"``, True is ``"true"``. Raises ``ValueError`` with the reason when
    it cannot be a class name.
    """
    if isinstance(value, str):
        fault = name_fault(column, value)
        if fault is not None and value.strip():
            raise ValueError(fault)
        return None if fault is not None else str(value)
    if is_missing(value):
        return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    shown = repr(value)[:40]
    raise ValueError(f"the label {column!r} is {shown} of type {type(value).__name__}, expected a string or an integer")


def name_fault(column: str, name: str) -> str | None:
    return unicode_fault(column, name) if name.strip() else "missing"


def arrange(
    column: str, codes: Iterable[str], known: KnownClasses, keep: bool = False
) -> tuple[tuple[str, ...], NDArray[np.int64], list[str]]:
    """Put classes in their final order.

    Known names come first, in their order; then new ones: whole numbers by value when all of them are, otherwise by
    code point (``keep`` leaves them as they come). Returns the names, the new number of every old code (int64 [C]) and
    notes. Raises ``InputError`` that names the classes which are not among the known ones and may not be added.
    """
    seen = list(codes)
    fixed = known.names if known.names is not None else tuple(known.declared)
    new = sorted(set(seen) - set(fixed))
    notes = []
    if new and known.names is not None and not known.extend:
        raise InputError(
            f"{counted(len(new), 'label')} in {column!r} not among the known classes: {some(new)}; "
            f"known are {some(fixed)}"
        )
    if new and known.names is not None:
        notes.append(f"{counted(len(new), 'new class')} added: {some(new)}")
    if keep:
        new = [name for name in seen if name not in set(fixed)]
    elif all(_INTEGER.fullmatch(name) for name in (new if fixed else seen)):
        new.sort(key=int)
    names = (*fixed, *new)
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([place[name] for name in seen], np.int64), notes


def one_name_each(names: Iterable[str], known: KnownClasses) -> list[str]:
    """Return class names that do not depend on the file format.

    CSV writes ``1.0`` and ``True`` where JSON and Parquet hold a number and a truth value, which are called ``1`` and
    ``true``. Other texts stay as they are, and so do names that are among the known classes.
    """
    seen = list(names)
    taken = {*(known.names or ()), *known.declared}
    if all(name in _TRUTH for name in seen):
        return [name if name in taken else name.lower() for name in seen]
    if all(_INTEGER.fullmatch(name) or (NUMBER.fullmatch(name) and repr(float(name)) == name) for name in seen):
        return [name if name in taken else name.removesuffix(".0") for name in seen]
    return seen


def some(names: Sequence[str], most: int = 10) -> str:
    """Return up to ``most`` quoted names and how many more there are."""
    return listed(map(repr, names), most)
