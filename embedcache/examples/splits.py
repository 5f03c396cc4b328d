"""Split names, the split by content hash, and the column that names splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from embedcache.dataset import mixed
from embedcache.errors import InputError, SpecError
from embedcache.examples.source import Faults, Parsed, is_missing, parsed, unicode_fault
from embedcache.spec import SPLITS, split_name

_PART = re.compile(r"\d+(\.\d*)?|\.\d+")
_SLICE = 1 << 16


def is_standard(name: str) -> bool:
    """Whether ``name`` is one of the usual names of a split."""
    return split_name(name) in SPLITS


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return split names in the usual order: train, validation, test, then the others by code point."""
    present = set(names)
    return tuple(name for name in SPLITS if name in present) + tuple(sorted(present - set(SPLITS)))


def parse_split(text: str) -> tuple[tuple[str, ...], tuple[Fraction, ...]]:
    """Read ``80/10/10`` (train, validation, test) or ``80/20`` (train, test) into names and shares that sum to 1.

    The parts are proportions: they need not sum to 100. Raises ``SpecError`` when it is not two or three
    positive numbers.
    """
    parts = [part.strip() for part in text.split("/")]
    if len(parts) not in (2, 3) or not all(_PART.fullmatch(part) for part in parts):
        raise SpecError(f"cannot read the split {text!r}: expected two or three numbers such as 80/20 or 80/10/10")
    weights = [Fraction(part) for part in parts]
    if not all(weights):
        raise SpecError(
            f"the split {text!r} has a part of zero: expected positive parts; 80/20 is train and test alone"
        )
    names = SPLITS if len(parts) == 3 else ("train", "test")
    return names, tuple(weight / sum(weights) for weight in weights)


def shares_note(text: str) -> list[str]:
    """Say what the parts of a split are taken for, unless they add up to 100 or to 1."""
    if sum(Fraction(part.strip()) for part in text.split("/")) in (1, 100):
        return []
    names, shares = parse_split(text)
    parts = ", ".join(f"{name} {float(100 * share):.3g} %" for name, share in zip(names, shares, strict=True))
    return [f"the split {text} does not add up to 100: taken as proportions, {parts}"]


def assign_splits(keys: NDArray[np.uint8], shares: Sequence[Fraction], seed: int = 0) -> NDArray[np.uint8]:
    """Return the split of every row, decided by its content and ``seed`` alone.

    ``keys`` is u1 [N, 16]; the result is u1 [N], an index into ``shares``. The first eight bytes of the key, as a
    little-endian number, are ``mixed`` with ``seed`` as the stream. That gives a number uniform in [0, 2**64), which is
    compared with the cumulative shares: added rows move no other row, and duplicates are always in one split.

    Raises ``SpecError`` for a seed outside [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise SpecError(f"split_seed is {seed}: expected a whole number in [0, 2**64)")
    stream = np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    cumulative = [sum(shares[: part + 1], Fraction(0)) for part in range(len(shares) - 1)]
    bounds = np.array([int(share * 2**64) for share in cumulative], np.uint64)
    result = np.empty(len(keys), np.uint8)
    for start in range(0, len(keys), _SLICE):
        x = np.ascontiguousarray(keys[start : start + _SLICE, :8]).view("<u8").ravel().astype(np.uint64) + stream
        result[start : start + _SLICE] = np.searchsorted(bounds, mixed(x), side="right")
    return result


class SplitColumn:
    """Collects a column whose cells name splits."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._codes: dict[str, int] = {}
        self._buffer = bytearray()

    def parse(self, values: Sequence[object]) -> Parsed:
        """Judge the cells of one block."""
        known: dict[str, str] = {}
        faults: Faults = {}
        names: list[str] = []
        for position, value in enumerate(values):
            name = known.get(value, "") if isinstance(value, str) else ""
            if not name and isinstance(value, str) and value.strip():
                fault = unicode_fault(self.column, value)
                if fault is None:
                    name = known[value] = split_name(value)
                else:
                    faults[position] = fault
            elif not name:
                missing = is_missing(value) or isinstance(value, str)
                shown = "missing" if missing else f"{value!r} of type {type(value).__name__}, expected a name"
                faults[position] = f"the split {self.column!r} is {shown}"
            names.append(name)
        return parsed(names, faults, self._append)

    def _append(self, names: Sequence[str]) -> None:
        for name in dict.fromkeys(names):
            self._codes.setdefault(name, len(self._codes))
        if len(self._codes) > 255:
            raise InputError(
                f"the split column {self.column!r} has more than 255 different values: "
                "name the right one with --split-column"
            )
        self._buffer += bytes(map(self._codes.__getitem__, names))

    def finish(self) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
        """Return the split of every row, u1 [N], and the names it indexes."""
        names = ordered(self._codes)
        order = np.array([names.index(name) for name in self._codes], np.uint8)
        return order[np.frombuffer(self._buffer, np.uint8)], names
