"""Cells of the input: what is missing, what cannot be written, and the judged cells of one column of a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

Value = TypeVar("Value")

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
"""A number as text."""

Kind = Literal["text", "number", "other"]
"""What a column of the input holds, as far as its source declares or shows it."""

Faults = dict[int, str]
"""Why records of a block cannot be used: position in the block -> reason."""


class Parsed(NamedTuple):
    """The cells of one column of a block, judged.

    ``add`` adds the values of the rows that turned out usable, by their positions in the block; None adds all. So a
    row that is set aside for another column's sake leaves no trace: it never creates a class.
    """

    faults: Faults
    add: Callable[[list[int] | None], None]


def parsed(values: Sequence[Value], faults: Faults, append: Callable[[Sequence[Value]], None]) -> Parsed:
    """Return judged cells, one of ``values`` for each row, of which ``append`` adds some."""
    return Parsed(faults, lambda keep: append(values if keep is None else [values[place] for place in keep]))


def is_missing(value: object) -> bool:
    """Whether ``value`` is None, NaN, pandas' NA or NaT."""
    if isinstance(value, float):
        return value != value
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def unicode_fault(column: str, value: str) -> str | None:
    """Return why ``value`` cannot be written as UTF-8, or None when it can."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        where = f"at character {error.start + 1} of {column!r}"
        if 0xDC80 <= code <= 0xDCFF:  # how errors="surrogateescape" carries a byte that is not UTF-8
            return f"undecodable byte 0x{code - 0xDC00:02x} {where}, expected UTF-8"
        return f"lone surrogate U+{code:04X} {where}"
    return None
