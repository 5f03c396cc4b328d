"""What every source of records looks like, whatever it reads from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from embedcache.errors import InputError
from embedcache.examples.content import is_missing

Kind = Literal["text", "number", "other"]

BLOCK_ROWS = 4096
SAMPLE_ROWS = 100
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


class BadRow(NamedTuple):
    """A row that cannot be used: its line (or row number), why, and what it held."""

    line: int
    reason: str
    raw: Any


@dataclass
class Block:
    """Some consecutive records: one list of cells per column asked for, and what could not be read as a record."""

    values: list[list[Any]]
    lines: Sequence[int]
    raw: Callable[[int], Any]
    bad: list[BadRow] = field(default_factory=list)


class Source(Protocol):
    """Something that gives the same records every time it is read."""

    name: str
    columns: tuple[str, ...]
    sample: dict[str, list[Any]]
    """The first cells of every column, to guess from."""

    def blocks(self, columns: Sequence[str]) -> Iterator[Block]:
        """Read everything from the start."""
        ...

    def where(self, line: int) -> str:
        """Return the place of a record for a message: ``file:line``."""
        ...

    def kind(self, column: str) -> Kind:
        """Return what the column seems to hold."""
        ...

    def not_text(self, column: str) -> str | None:
        """Return the declared type of a column that cannot hold text, None when it can or nothing is declared."""
        ...

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """Return the class names that the source declares for the column, in their order."""
        ...


def unique_columns(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns as a tuple. Raises ``InputError`` when one occurs twice."""
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputError(f"{name}: the column {', '.join(map(repr, twice))} occurs more than once: rename one of them")
    return tuple(columns)


def named(source: str, column: str, values: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """Return the cells of a ``ClassLabel`` column as names, also inside lists; -1 there means no label.

    Raises ``InputError`` for a number that has no name.
    """
    if names is None:
        return list(values)

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(item) for item in value]
        if value is None or value == -1:
            return None
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise InputError(
                f"{source}: the column {column!r} has the class {value!r}, expected 0 to {len(names) - 1}, or -1"
            )
        return names[value]

    return [name(value) for value in values]


def kind_of(values: Sequence[Any], numbers_in_text: bool) -> Kind:
    """Return what a column holds, going by some of its values."""
    present = [value for value in values if not is_missing(value)]
    if any(not isinstance(value, (str, int, float)) for value in present):
        return "other"
    if any(not isinstance(value, str) for value in present):
        return "number"
    written = [value for value in present if value.strip()]
    if numbers_in_text and written and all(_NUMBER.fullmatch(value) for value in written):
        return "number"
    return "text"


def row_of(columns: Sequence[str], values: list[list[Any]]) -> Callable[[int], dict[str, Any]]:
    """Return a function that shows one record of a columnar block as a dict."""
    return lambda position: {column: cells[position] for column, cells in zip(columns, values, strict=True)}
